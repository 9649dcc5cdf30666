"""KVCache: preallocated key/value rows, one row a request.

A pass writes its new tokens behind each row's committed length; accepted ones are moved into place, the rest are
simply overwritten. Knows nothing of layers' maths, requests or trees.

Shapes: R rows, T positions a row, B rows in a pass (always rows 0..B-1, or named rows in a prefill), n new tokens.
"""

from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Write(NamedTuple):
    """Where a pass puts its new keys and values: `rows` [B, 1] and `positions` [B, n]. `start` is set when the pass
    has one row: a contiguous copy is several times cheaper than an indexed one."""

    rows: Tensor
    positions: Tensor
    row: int = 0
    start: int | None = None


class KVCache:
    """Per layer, keys and values [R, kv_heads, T, head_size]."""

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_positions: int,
        num_kv_heads: int,
        head_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (num_layers, 2, num_rows, num_kv_heads, num_positions, head_size)
        self.data = torch.zeros(shape, device=device, dtype=dtype)
        self._layers = [(layer[0], layer[1]) for layer in self.data]

    @property
    def num_rows(self) -> int:
        return self.data.shape[2]

    @property
    def num_positions(self) -> int:
        return self.data.shape[4]

    def write(self, layer: int, keys: Tensor, values: Tensor, at: Write) -> None:
        """Store `keys`, `values` [B, n, kv_heads, head_size]."""
        all_keys, all_values = self._layers[layer]
        if at.start is not None:
            stop = at.start + keys.shape[1]
            all_keys[at.row, :, at.start : stop].copy_(keys[0].transpose(0, 1))
            all_values[at.row, :, at.start : stop].copy_(values[0].transpose(0, 1))
        else:
            all_keys.transpose(1, 2).index_put_((at.rows, at.positions), keys)
            all_values.transpose(1, 2).index_put_((at.rows, at.positions), values)

    def read(self, layer: int, num_rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, kv_heads, length, head_size] of rows 0..B-1, as views."""
        keys, values = self._layers[layer]
        return keys[:num_rows, :, :length], values[:num_rows, :, :length]

    def keep(self, base: Tensor, picked: Tensor) -> None:
        """Move the accepted tokens into place: position base + picked[:, i] to base + i for every i.

        `base` [B], `picked` [B, a] ascending offsets (repeat an earlier one to pad: what lands past the accepted
        length is dead). Reads happen before writes.
        """
        by_position = self.data.movedim(4, 3)
        rows = torch.arange(base.shape[0], device=base.device)[:, None]
        steps = torch.arange(picked.shape[1], device=base.device)
        by_position[:, :, rows, base[:, None] + steps] = by_position[:, :, rows, base[:, None] + picked]
