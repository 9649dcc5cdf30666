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
    """Keys and values [layers, 2, R, T, kv_heads, head_size]."""

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
        shape = (num_layers, 2, num_rows, num_positions, num_kv_heads, head_size)
        self.data = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def num_rows(self) -> int:
        return self.data.shape[2]

    @property
    def num_positions(self) -> int:
        return self.data.shape[3]

    def write(self, layer: int, keys: Tensor, values: Tensor, at: Write) -> None:
        """Store `keys`, `values` [B, n, kv_heads, head_size]."""
        store = self.data[layer]
        if at.start is not None:
            stop = at.start + keys.shape[1]
            store[0, at.row, at.start : stop].copy_(keys[0])
            store[1, at.row, at.start : stop].copy_(values[0])
        else:
            store[0].index_put_((at.rows, at.positions), keys)
            store[1].index_put_((at.rows, at.positions), values)

    def read(self, layer: int, num_rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, kv_heads, length, head_size] of rows 0..B-1, as views."""
        both = self.data[layer, :, :num_rows, :length].transpose(2, 3)
        return both[0], both[1]

    def keep(self, base: Tensor, picked: Tensor) -> None:
        """Move the accepted tokens into place: position base + picked[:, i] to base + i for every i.

        `base` [B], `picked` [B, a] ascending offsets (repeat an earlier one to pad: what lands past the accepted
        length is dead). Reads happen before writes.
        """
        rows = torch.arange(base.shape[0], device=base.device)[:, None]
        steps = torch.arange(picked.shape[1], device=base.device)
        moved = self.data[:, :, rows, base[:, None] + picked]
        self.data[:, :, rows, base[:, None] + steps] = moved
