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
    has one row: a contiguous copy is several times cheaper than an indexed one. When rows of different lengths are
    computed without their padding, `only` [N] are the places among the B n that hold tokens, and `places` their rows
    and positions [N] each."""

    rows: Tensor
    positions: Tensor
    row: int = 0
    start: int | None = None
    only: Tensor | None = None
    places: tuple[Tensor, Tensor] | None = None

    def without(self, padding: Tensor) -> "Write":
        """The same write for the places that are not `padding` [B, n] alone."""
        only = (~padding).flatten().nonzero().squeeze(1)
        rows = self.rows.expand_as(self.positions).flatten()[only]
        return self._replace(only=only, places=(rows, self.positions.flatten()[only]))

    def compact(self, values: Tensor) -> Tensor:
        """The N tokens of values [B, n, ...]: [N, ...]."""
        flat = values.flatten(0, 1)
        return flat if self.only is None else flat[self.only]

    def among(self, places: Tensor) -> Tensor:
        """Which of the N tokens those at `places` [B] of each row are."""
        count = self.positions.shape[1]
        flat = places + count * torch.arange(len(places), device=places.device)
        return flat if self.only is None else torch.searchsorted(self.only, flat)

    def padded(self, values: Tensor) -> Tensor:
        """[B, n, ...] from the N tokens' values [N, ...]; padding is zero."""
        shape = (*self.positions.shape, *values.shape[1:])
        if self.only is None:
            return values.view(shape)
        whole = values.new_zeros(self.positions.numel(), *values.shape[1:])
        whole[self.only] = values
        return whole.view(shape)


class Sight(NamedTuple):
    """What the new tokens of a pass see: the positions before `committed` [B] of their row (None: nothing, a prompt's
    first pass), and of the m positions behind it those that `own` [B, n, m] allows (None: m = n, each token sees
    those before it and itself). `reach` bounds the positions looked at: it is where the longest row ends, or, where
    shapes are `static`, anything behind that."""

    committed: Tensor | None
    own: Tensor | None
    reach: int
    static: bool = False

    def mask(self, at: Write, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Additive mask [B, 1, n, reach] for a pass that stores its tokens `at`; None where nothing is committed and
        a token sees what is before it: attention kernels know that case."""
        if self.committed is None:
            assert self.own is None, "a first pass is causal"
            return None
        own, new = self.own, at.positions.shape[1]
        if own is None:
            triangle = torch.ones(new, new, dtype=torch.bool, device=at.positions.device).tril()
            own = triangle.expand(len(at.positions), -1, -1)
        return attention_mask(self.committed, own, self.reach, dtype, static=self.static)


class TreeSight(NamedTuple):
    """What the new tokens of a pass see when each has its own way back: token t sees positions 0..committed[t]-1
    (`committed` [B, n]) and committed[t] + p for every p of `paths` [B, n, A] that is not negative (padding comes
    last). A prompt's tokens have committed = their own position + 1 and no path; a beam's nodes the prompt and their
    ancestors, wherever these lie behind it. `reach` bounds the positions looked at."""

    committed: Tensor
    paths: Tensor
    reach: int

    def mask(self, at: Write, dtype: torch.dtype = torch.float32) -> Tensor:
        """Additive mask [B, 1, n, reach], as `attention_mask` makes it."""
        del at
        places = torch.arange(self.reach, device=self.committed.device)
        visible = places < self.committed.clamp(min=1).unsqueeze(-1)
        # A negative place repeats position 0, which everything sees.
        index = (self.committed.unsqueeze(-1) + self.paths).masked_fill(self.paths < 0, 0)
        visible = visible.scatter(2, index, True)
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~visible, float("-inf")).unsqueeze(1)


def attention_mask(
    committed: Tensor, own: Tensor, length: int, dtype: torch.dtype = torch.float32, *, static: bool = False
) -> Tensor:
    """Additive mask [B, 1, n, length]: 0 on everything committed [B] and where `own` [B, n, m] allows among the m
    positions behind it, -inf elsewhere. At least one position is visible to every token, padding too: a softmax over
    nothing is NaN, and NaN in a cache survives masking. `static`: see `Sight.reach`."""
    rows, new, extra = own.shape
    if rows == 1 and not static and not own.is_cuda and length - extra > 0:  # one row knows where it ends: no scatter
        mask = torch.zeros(1, 1, new, length, dtype=dtype)
        if extra:
            mask[0, 0, :, length - extra :].masked_fill_(~own[0], float("-inf"))
        return mask
    places = torch.arange(length, device=own.device)
    visible = (places < committed[:, None].clamp(min=1)).unsqueeze(1).expand(rows, new, length).contiguous()
    index = committed[:, None] + torch.arange(extra, device=own.device)
    visible.scatter_(2, index.unsqueeze(1).expand(rows, new, extra), own)
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, float("-inf")).unsqueeze(1)


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
        """Store the tokens' `keys`, `values` [N, kv_heads, head_size]."""
        all_keys, all_values = self._layers[layer]
        if at.start is not None:
            stop = at.start + keys.shape[0]
            all_keys[at.row, :, at.start : stop].copy_(keys.transpose(0, 1))
            all_values[at.row, :, at.start : stop].copy_(values.transpose(0, 1))
        else:
            places = at.places or (at.rows.expand_as(at.positions).flatten(), at.positions.flatten())
            all_keys.transpose(1, 2).index_put_(places, keys)
            all_values.transpose(1, 2).index_put_(places, values)

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
