"""Rows: the state of the requests being decoded, as tensors with one row a request, and what the host knows of each.

Takes requests in, hands finished lists out, and applies what a round gained. Knows nothing of target or draft passes.

Shapes: R rows, B rows 0..highest in use, K decisions gained in a round, Q = L + 1 tokens a run at most, E exclusions
a row, N items, d hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad

from model.decoding.filters import FilterTable
from model.decoding.held_rows import HeldRows, scalars
from model.decoding.request import ListRequest, ListResult, ScoredItem, SpeculationStats
from model.decoding.sampling import Sampling, fresh_seed
from model.item_trie import Availability, ItemTrie
from model.native.round import RowState

Tensor = torch.Tensor


@dataclass
class Row:
    """What the host knows of one request. `items` holds (leaf, score), `score` the open item's score so far,
    `position` where the token after its pending run goes, `banned` how many leaves its exclusions may come to; `drafts`
    while the draft may guess at it, `on_device` once the device's state is this request's. Of its prompt, `unread` is
    still to be read; `feature` [1, 1, d] is the target's at the last token read."""

    request: ListRequest
    wanted: int
    filter_slot: int
    history_used: int
    degraded: tuple[tuple[str, str], ...]
    banned: int
    drafts: bool
    position: int = 0
    on_device: bool = False
    unread: list[int] = field(default_factory=list)
    feature: Tensor | None = None
    score: float = 0.0
    items: list[tuple[int, float]] = field(default_factory=list)
    rounds: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    forced_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def done(self) -> bool:
        return len(self.items) >= self.wanted


class Gain(NamedTuple):
    """Runs a round added to each row, in order: `tokens` [B, K, Q], `length` [B, K] (0: none), `leaf` [B, K],
    `feature` [B, K, d] the target's (fused) feature each was chosen from, `last` [B] index of the last run, which is
    not in the target's cache yet, and `node` [B] where it ends."""

    tokens: Tensor
    length: Tensor
    leaf: Tensor
    feature: Tensor | None
    last: Tensor
    node: Tensor


class Placement(NamedTuple):
    """What the tensors of the row at `place` are to hold; `leaves` are those it may not emit."""

    place: int
    leaves: npt.NDArray[np.int64]
    wanted: int
    draftable: int
    filter_slot: int
    temperature: float
    top_p: float
    seed: int


class Moment(NamedTuple):
    """What rows held at one time: their tensors, and what the host knew of each."""

    tensors: tuple[Tensor, ...]
    held: list[Row | None]


class Rows(HeldRows[Row]):
    """Per row: `base` tokens in the target's cache, the `pending` run behind them (chosen, not yet read),
    the `fresh` runs the draft has not read with the features they were chosen from, the trie `node` after the pending
    run, `remaining` items to go, `written` items so far, `draftable` items the draft may guess at, what is `excluded`,
    and how it samples: `temperature` (0: greedy), `top_p`, `seed`. Where shapes are static one more row, the last,
    takes what padding writes, and tensors stay where they are for good."""

    base: Tensor
    node: Tensor
    remaining: Tensor
    draftable: Tensor
    written: Tensor
    filter_slot: Tensor
    seed: Tensor
    temperature: Tensor
    top_p: Tensor

    def __init__(
        self,
        num_rows: int,
        trie: ItemTrie,
        filters: FilterTable,
        max_history_items: int,
        max_gain: int,
        size: int,
        max_excluded: int | None = None,
    ) -> None:
        """`max_gain`: most runs a round can add to a row; `size`: d of the draft's features; `max_excluded`: leaves a
        row may have to leave out, where shapes are static."""
        self.static = max_excluded is not None
        super().__init__(num_rows, trie, filters, max_history_items, spare=int(self.static), width=max_excluded or 64)
        self.placed: list[Placement] = []
        num_rows += self.static
        # Side by side: a request comes and goes in few calls.
        self._whole = whole = torch.zeros(7, num_rows, dtype=torch.int64, device=trie.device)
        self.base, self.node, self.remaining, self.draftable, self.written, self.filter_slot, self.seed = whole
        self._real = torch.zeros(2, num_rows, dtype=torch.float64, device=trie.device)
        self.temperature, self.top_p = self._real
        places = trie.num_levels + 1
        self.pending_tokens = whole.new_zeros(num_rows, 1, places)
        self.pending_length = whole.new_zeros(num_rows, 1)
        self.fresh_tokens = whole.new_zeros(num_rows, max_gain, places)
        self.fresh_length = whole.new_zeros(num_rows, max_gain)
        self.fresh_feature = torch.zeros(num_rows, max_gain, size, device=trie.device)
        self._state: RowState | None = None
        self._views = [scalars(of) for of in (whole, self._real, self.pending_length, self.fresh_length)]

    @property
    def running(self) -> list[int]:
        """Rows in use whose prompts are read."""
        return [i for i, row in enumerate(self.held) if row is not None and not row.unread]

    def state(self) -> RowState:
        """The rows' tensors as a compiled round takes them: the same object as long as they are the same."""
        known = self._state
        if known is None or known.excluded is not self.excluded or known.passing is not self.filters.passing:
            known = self._state = RowState(
                base=self.base,
                node=self.node,
                remaining=self.remaining,
                draftable=self.draftable,
                written=self.written,
                pending_tokens=self.pending_tokens,
                pending_length=self.pending_length,
                fresh_tokens=self.fresh_tokens,
                fresh_length=self.fresh_length,
                excluded=self.excluded,
                fresh_feature=self.fresh_feature,
                filter_slot=self.filter_slot,
                seed=self.seed,
                temperature=self.temperature,
                top_p=self.top_p,
                passing=self.filters.passing,
            )
        return known

    def may(self, rows: Tensor | slice, banned: int | None = None) -> Availability:
        """What `rows` may still emit; none of them has more than `banned` exclusions, where one says so."""
        excluded = self.excluded[rows]
        if banned is not None:
            excluded = excluded[:, :banned].contiguous()
        return Availability(self.filters.passing, self.filter_slot[rows], excluded)

    def sampling(self, rows: Tensor | slice) -> Sampling | None:
        """How `rows` draw; None when no request held does, so that greedy batches compute no noise."""
        drawing = self.drawing
        if not drawing:
            return None
        top_p = self.top_p[rows] if any(request.top_p < 1 for request in drawing) else None
        return Sampling(self.temperature[rows], top_p, self.seed[rows], self.written[rows])

    @property
    def drawing(self) -> list[ListRequest]:
        """The requests held that sample."""
        return [row.request for row in self.held if row is not None and row.request.temperature > 0]

    def place(self, request: ListRequest, headroom: int) -> int:
        """Give a validated request a free row; `headroom`: leaves a round may add beyond the list."""
        index = self.held.index(None)
        leaves, slot, wanted, used, degraded = self._share(request)
        most = len(leaves) + request.k + headroom
        row = Row(request, wanted, slot, used, degraded, most, request.speculation)
        self.held[index] = row
        # A greedy list draws nothing.
        seed = request.seed if request.seed is not None else fresh_seed() if request.temperature else 0
        draftable = row.wanted if request.speculation else 0
        drawing = (request.temperature, request.top_p, seed)
        placement = Placement(index, leaves, row.wanted, draftable, slot, *drawing)
        if self.static:
            self.placed.append(placement)  # the pass that reads the prompt writes them all at once
        else:
            self._reserve_exclusions(most)
            self._write(placement)
        return index

    def _write(self, placement: Placement) -> None:
        index = placement.place
        self._exclude(index, placement.leaves)
        whole, real, *_ = self._views
        counts = (0, 0, placement.wanted, placement.draftable, 0, placement.filter_slot, placement.seed)
        for place, value in enumerate(counts):
            whole[place, index] = value
        real[0, index], real[1, index] = placement.temperature, placement.top_p

    def finish(self, index: int) -> ListResult:
        """The list of a row, which is free afterwards."""
        row, codes = self.row(index), self.trie.sorted_codes
        found = codes[[leaf for leaf, _ in row.items]].tolist()
        items = tuple(ScoredItem(tuple(each), score) for each, (_, score) in zip(found, row.items, strict=True))
        stats = SpeculationStats(row.rounds, row.draft_tokens, row.accepted_tokens, row.forced_tokens)
        self.free(index)
        return ListResult(
            row.request.request_id,
            items,
            stats,
            row.history_used,
            row.degraded,
            prefill_seconds=row.prefill_seconds,
            decode_seconds=row.decode_seconds,
        )

    def free(self, index: int) -> None:
        row = self.row(index)
        self.filters.release(row.filter_slot)
        self.held[index] = None
        if self.static and (row.done or not row.on_device):
            return  # what is done has been put to rest on the device, by the round that completed it
        whole, real, pending_length, fresh_length = self._views
        whole[:, index] = real[:, index] = 0
        pending_length[index] = fresh_length[index] = 0
        self._excluded[index] = self.trie.num_items

    def moment(self) -> Moment:
        """What the rows hold now, to go back to."""
        return Moment(tuple(tensor.clone() for tensor in self._changing()), [_copied(row) for row in self.held])

    def back_to(self, moment: Moment) -> None:
        """As if no round had been since. No row may have been given away or freed in between."""
        for tensor, before in zip(self._changing(), moment.tensors, strict=True):
            tensor.copy_(before)
        self.held[:] = map(_copied, moment.held)

    def _changing(self) -> tuple[Tensor, ...]:
        pending, fresh = (self.pending_tokens, self.pending_length), (self.fresh_tokens, self.fresh_length)
        return (self._whole, *pending, *fresh, self.fresh_feature, self.excluded)

    def check_integrity(self) -> None:
        """Nothing leaks: free rows decode nothing, filters are held by rows only."""
        self._check_filters()
        remaining, banned = self.remaining.tolist(), (self.excluded < self.trie.num_items).any(1).tolist()
        for index, row in enumerate(self.held):
            assert row is not None or remaining[index] == 0, f"row {index} is free but still decodes"
            assert row is not None or self.static or not banned[index], f"row {index} is free but excludes leaves"

    def rest(self, rows: Tensor | slice) -> None:
        """Nothing more happens in those of `rows` that are complete, whatever rounds they are in."""
        running = self.remaining[rows] > 0
        self.base[rows] *= running
        self.pending_length[rows] *= running.unsqueeze(1)
        self.fresh_length[rows] *= running.unsqueeze(1)

    def advance(self, rows: Tensor | slice, base: Tensor, gain: Gain, banned: int | None = None) -> None:
        """Apply a gain to `rows` [B] whose caches now hold `base` [B] tokens; `banned` as in `may`."""
        self.base[rows] = base
        self.node[rows] = gain.node
        last = gain.last[:, None]
        places = self.pending_tokens.shape[-1]
        self.pending_tokens[rows] = gain.tokens.gather(1, last.unsqueeze(-1).expand(-1, -1, places))
        self.pending_length[rows] = gain.length.gather(1, last)
        emitted = (gain.leaf < self.trie.num_items).sum(1)
        left = (self.remaining[rows] - emitted).clamp_(min=0)
        self.remaining[rows] = left
        self.written[rows] += emitted
        self.draftable[rows] = torch.minimum(self.draftable[rows], left)
        if self.static or bool(emitted.any()):
            excluded = self.excluded[:, :banned]
            merged = torch.cat([excluded[rows], gain.leaf], dim=1).sort(dim=1).values
            excluded[rows] = merged[:, : excluded.shape[1]]
        if gain.feature is not None:
            added = gain.length.shape[1]
            self.fresh_tokens[rows, :added] = gain.tokens
            self.fresh_feature[rows, :added] = gain.feature
            self.fresh_length[rows] = pad(gain.length, (0, self.fresh_length.shape[1] - added))


def _copied(row: Row | None) -> Row | None:
    return None if row is None else replace(row, items=list(row.items))


def account(row: Row, scores: Sequence[float], leaves: Sequence[int], lengths: Sequence[int], num_items: int) -> None:
    """Book a row's decisions on the host: scores in nats, leaves completed (num_items: none), tokens of each run."""
    for score, leaf, length in zip(scores, leaves, lengths, strict=True):
        row.score += score
        row.forced_tokens += length - 1
        if leaf < num_items:
            row.items.append((leaf, row.score))
            row.score = 0.0
            if row.done:
                return
