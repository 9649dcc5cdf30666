"""Binds round.cpp: a whole round of list decoding as one call, rows changed in place.

Knows pointers and shapes, and what a round is told and tells; nothing of requests. The tensors of `model.decoding` are
the twin.

Shapes: B rows in use, L levels, Q = L + 1 tokens a run at most, J draft steps, W nodes a step, K most decisions of a
round, E exclusions a row, d hidden size.
"""

import ctypes
from array import array
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeVar

import torch

from model.item_trie import ItemTrie
from model.kv_cache import KVCache
from model.native.kernel import NativeDraft, NativeLinear, NativeTarget, StepTerm, load, step_arrays
from model.native.tables import NativeCache, NativeTrie

Tensor = torch.Tensor
T = TypeVar("T", int, float)
_pointer, _number = ctypes.c_void_p, ctypes.c_int64


class RowState(NamedTuple):
    """The rows' tensors, [R, ...] and contiguous (see `model.decoding.rows.Rows`). All but those from `filter_slot` on
    are changed by a round."""

    base: Tensor
    node: Tensor
    remaining: Tensor
    draftable: Tensor
    written: Tensor
    pending_tokens: Tensor
    pending_length: Tensor
    fresh_tokens: Tensor
    fresh_length: Tensor
    excluded: Tensor
    fresh_feature: Tensor
    filter_slot: Tensor
    seed: Tensor
    temperature: Tensor
    top_p: Tensor
    passing: Tensor


class TreeTable(NamedTuple):
    """Draft trees by the slot a row begins at: node i of step j hangs on node `parent` [L, J, W] of the step before,
    and is its child of `rank` [L, J, W] (-1: there is no such node). int32."""

    parent: Tensor
    rank: Tensor


class RowGain(NamedTuple):
    """What a round did, as lists. Per row: `accepted` nodes; of each decision (accepted + 1 count) the `score` in nats,
    the `leaf` completed (number of items: none) and the `length` of its run; nodes `drafted`."""

    accepted: list[int]
    score: list[list[float]]
    leaf: list[list[int]]
    length: list[list[int]]
    drafted: list[int]


class RoundCounts(NamedTuple):
    """Counts over all rows: nodes by step and by slot; how often rows that began at a slot came to a step of their tree
    (`tried`) and beyond (`passed`), [L][J]; seconds of drafting and of the rest; tokens of the target's pass."""

    drafted_by_step: list[int]
    accepted_by_step: list[int]
    drafted_by_slot: list[int]
    accepted_by_slot: list[int]
    tried: list[list[int]]
    passed: list[list[int]]
    seconds: tuple[float, float]
    target_tokens: int


class Prompt(NamedTuple):
    """A prompt to read, or a piece of one: the `tokens` of `row` behind `start` others, and whether it `ends` here.
    With a `feature` [d] the draft reads along: it is that of the token before, and then that of the last one. So many
    items are `draftable` once the prompt has ended."""

    row: int
    start: int
    tokens: Sequence[int]
    ends: bool
    draftable: int
    feature: Tensor | None


class First(NamedTuple):
    """The first choice of a row: its `score` in nats, the `leaf` it completed (number of items: none) and the `length`
    of its run."""

    score: float
    leaf: int
    length: int


class _State(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("rows", "gains", "width")),
        *((name, _pointer) for name in RowState._fields),
    ]


class _Plan(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("steps", "width", "forced", "num_features")),
        *((name, _pointer) for name in ("parent", "rank", "feature_layers", "step", "context", "gate", "fuse")),
        ("by_node", _pointer),
    ]


class _Prompts(ctypes.Structure):
    _fields_ = [("count", _number), *((name, _pointer) for name in ("prompt", "token"))]


class _Report(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("accepted", "length", "leaf", "drafted", "score")),
        *((name, _pointer) for name in ("drafted_by_step", "accepted_by_step", "drafted_by_slot", "accepted_by_slot")),
        *((name, _pointer) for name in ("tried", "passed")),
        ("target_tokens", _number),
        ("draft_seconds", ctypes.c_double),
        ("verify_seconds", ctypes.c_double),
    ]


class NativeRound:
    """Rounds over one set of rows and caches."""

    def __init__(
        self,
        trie: ItemTrie,
        head: NativeLinear,
        target: NativeTarget,
        cache: tuple[KVCache, Tensor],
        draft: tuple[NativeDraft, KVCache, Tensor, Sequence[StepTerm | None], Tensor, Sequence[int]] | None,
        by_node: Tensor | None = None,
    ) -> None:
        """`cache`: the target's rows and rotations; `draft`: the network, its rows and rotations, what its steps add,
        and the packed map from the outputs of the target's layers named last to its features; or, of a draft that is
        no network, its logits `by_node` [V]."""
        self._trie = NativeTrie(trie, head)
        self._kept: list[object] = [target, cache, draft]
        self._by_node = by_node
        self.levels, self._target, self._draft = trie.num_levels, target, draft
        self._cache = NativeCache(*cache)
        self._draft_cache = None if draft is None else NativeCache(draft[1], draft[2])
        self._terms = [] if draft is None else draft[3]
        layers = () if draft is None else draft[5]
        self._layers = (_number * len(layers))(*layers)
        self._rows: RowState | None = None
        self._state = _State()
        self._rooms: dict[tuple[int, int], tuple[Any, Any, list[tuple[int, int]], _Report]] = {}
        self._plans: dict[tuple[int, bool], tuple[_Plan, object]] = {}

    def __call__(self, count: int, rows: RowState, table: TreeTable, forced: bool) -> tuple[RowGain, RoundCounts]:
        """Advance rows 0..count-1 by one round; rows without a pending run stay as they are."""
        library = load()
        assert library is not None
        steps = table.rank.shape[1]
        held = self._held(count, rows, self._plan(table, forced))
        told, score, bounds, report = self._room(count, steps)
        ctypes.memset(told, 0, ctypes.sizeof(told))
        if library.padrec_round(*held, ctypes.byref(report), torch.get_num_threads()):
            raise IndexError("a token, node or position lies outside the model, the trie or the cache")
        parts = [told[begin:end] for begin, end in bounds]
        accepted, lengths, leaves, drafted = parts[:4]
        gain = RowGain(accepted, _lines(score[:], count), _lines(leaves, count), _lines(lengths, count), drafted)
        counts = RoundCounts(
            drafted_by_step=parts[4],
            accepted_by_step=parts[5],
            drafted_by_slot=parts[6],
            accepted_by_slot=parts[7],
            tried=_lines(parts[8], self.levels),
            passed=_lines(parts[9], self.levels),
            seconds=(report.draft_seconds, report.verify_seconds),
            target_tokens=report.target_tokens,
        )
        return gain, counts

    @property
    def drafts(self) -> bool:
        """Whether there is a network that drafts."""
        return self._draft is not None

    def read(self, prompts: Sequence[Prompt], rows: RowState, table: TreeTable, forced: bool) -> list[First]:
        """Read prompts, of rows that have none pending. Returns the first choice of each; of one that goes on, nothing
        that means anything. `table`: of one step."""
        library = load()
        assert library is not None
        held = self._held(len(rows.base), rows, self._plan(table, forced))
        asked, tokens = array("q"), array("q")
        for one in prompts:
            feature = 0 if one.feature is None else one.feature.data_ptr()
            asked.extend((one.row, one.start, len(one.tokens), int(one.ends), one.draftable, feature))
            tokens.extend(one.tokens)
        count = len(prompts)
        told, score = (_number * (2 * count))(), (ctypes.c_float * count)()
        leaf = ctypes.addressof(told) + ctypes.sizeof(_number) * count
        report = _Report(length=ctypes.addressof(told), leaf=leaf, score=ctypes.addressof(score))
        given = _Prompts(count, asked.buffer_info()[0], tokens.buffer_info()[0])
        ends = (ctypes.byref(given), ctypes.byref(report), torch.get_num_threads())
        if library.padrec_prompts(*held, *ends):
            raise IndexError("a token, row or position lies outside the model, the rows or the cache")
        return [First(score[i], told[count + i], told[i]) for i in range(count)]

    def _room(self, count: int, steps: int) -> tuple[Any, Any, list[tuple[int, int]], _Report]:
        """For what comes back of `count` rows: one piece of memory and where each part of it lies, used again and
        again. Scores are no integers, and have their own."""
        if (count, steps) not in self._rooms:
            by_step, by_slot, decisions = (steps, steps), (self.levels, self.levels), count * (steps + 1)
            sizes = (count, decisions, decisions, count, *by_step, *by_slot, self.levels * steps, self.levels * steps)
            bounds = list(pairwise(accumulate(sizes, initial=0)))
            told, score = (_number * bounds[-1][1])(), (ctypes.c_float * decisions)()
            first, last = ctypes.addressof(told), ctypes.addressof(score)
            begins = [first + ctypes.sizeof(_number) * begin for begin, _ in bounds]
            self._rooms[count, steps] = (told, score, bounds, _Report(*begins[:4], last, *begins[4:], 0, 0.0, 0.0))
        return self._rooms[count, steps]

    def _held(self, count: int, rows: RowState, plan: _Plan) -> tuple[Any, ...]:
        """What every call is given: both networks, `count` rows, what to do and both caches."""
        if rows is not self._rows:
            self._rows = rows
            self._state = _State(
                count, rows.fresh_length.shape[1], rows.excluded.shape[1], *(tensor.data_ptr() for tensor in rows)
            )
        self._state.rows = count
        networks = (self._trie.pointer, self._target.pointer, self._draft and self._draft[0].pointer)
        caches = (self._cache.pointer, None if self._draft_cache is None else self._draft_cache.pointer)
        return (*networks, ctypes.byref(self._state), ctypes.byref(plan), *caches)

    def _plan(self, table: TreeTable, forced: bool) -> _Plan:
        key = (id(table), forced)  # kept with the plan: an id is not given out again
        if key not in self._plans:
            _, steps, width = table.rank.shape
            arrays = step_arrays(self._terms, steps)
            plan = _Plan(
                steps,
                width,
                int(forced),
                len(self._layers),
                table.parent.data_ptr(),
                table.rank.data_ptr(),
                ctypes.addressof(self._layers),
                *(ctypes.addressof(array) for array in arrays),
                None if self._draft is None else self._draft[4].data_ptr(),
                None if self._by_node is None else self._by_node.data_ptr(),
            )
            self._plans[key] = (plan, (table, arrays))
        return self._plans[key][0]


def _lines(numbers: list[T], count: int) -> list[list[T]]:
    """`count` lines of equal length."""
    width = len(numbers) // count
    return [numbers[line * width : (line + 1) * width] for line in range(count)]
