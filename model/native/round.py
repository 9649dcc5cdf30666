"""Binds round.cpp: a whole round of list decoding as one call, rows changed in place.

Knows pointers and shapes, and what a round is told and tells; nothing of requests. The tensors of `model.decoding` are
the twin.

Shapes: B rows in use, L levels, Q = L + 1 tokens a run at most, J draft steps, W nodes a step, K most decisions of a
round, E exclusions a row, d hidden size.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from model.item_trie import ItemTrie
from model.kv_cache import KVCache
from model.native.kernel import NativeDraft, NativeLinear, NativeTarget, StepTerm, load
from model.native.tables import NativeCache, NativeTrie

Tensor = torch.Tensor
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
        terms = [] if draft is None else draft[3]
        layers = () if draft is None else draft[5]
        self._layers = (_number * len(layers))(*layers)
        self._pointers = [None if term is None else term.embedding.data_ptr() for term in terms]
        self._contexts = [None if term is None or term.context is None else term.context.data_ptr() for term in terms]
        self._gates = [0.0 if term is None else term.constant for term in terms]
        self._plans: dict[tuple[int, bool], tuple[_Plan, object]] = {}

    def __call__(self, count: int, rows: RowState, table: TreeTable, forced: bool) -> tuple[RowGain, RoundCounts]:
        """Advance rows 0..count-1 by one round; rows without a pending run stay as they are."""
        library = load()
        assert library is not None
        steps = table.rank.shape[1]
        state = _State(
            count, rows.fresh_length.shape[1], rows.excluded.shape[1], *(tensor.data_ptr() for tensor in rows)
        )
        accepted, drafted = torch.zeros(2, count, dtype=torch.int64).unbind()
        length, leaf = torch.zeros(2, count, steps + 1, dtype=torch.int64).unbind()
        score = torch.zeros(count, steps + 1)
        counted = torch.zeros(2 * steps + 2 * self.levels + 2 * self.levels * steps, dtype=torch.int64)
        by_step, by_slot = (steps, steps), (self.levels, self.levels)
        parts = counted.split((*by_step, *by_slot, self.levels * steps, self.levels * steps))
        outputs = (accepted, length, leaf, drafted, score, *parts)
        report = _Report(*(tensor.data_ptr() for tensor in outputs), 0, 0.0, 0.0)
        plan = self._plan(table, forced)
        given = (self._trie.pointer, self._target.pointer, self._draft and self._draft[0].pointer)
        held = (ctypes.byref(state), ctypes.byref(plan), self._cache.pointer)
        cache = None if self._draft_cache is None else self._draft_cache.pointer
        if library.padrec_round(*given, *held, cache, ctypes.byref(report), torch.get_num_threads()):
            raise IndexError("a token, node or position lies outside the model, the trie or the cache")
        gain = RowGain(accepted.tolist(), score.tolist(), leaf.tolist(), length.tolist(), drafted.tolist())
        counts = RoundCounts(
            drafted_by_step=parts[0].tolist(),
            accepted_by_step=parts[1].tolist(),
            drafted_by_slot=parts[2].tolist(),
            accepted_by_slot=parts[3].tolist(),
            tried=parts[4].view(self.levels, steps).tolist(),
            passed=parts[5].view(self.levels, steps).tolist(),
            seconds=(report.draft_seconds, report.verify_seconds),
            target_tokens=report.target_tokens,
        )
        return gain, counts

    def _plan(self, table: TreeTable, forced: bool) -> _Plan:
        key = (id(table), forced)  # kept with the plan: an id is not given out again
        if key not in self._plans:
            _, steps, width = table.rank.shape
            last = len(self._gates) - 1
            at = [min(step, last) for step in range(steps)] if self._gates else []
            arrays = (
                (_pointer * steps)(*(self._pointers[i] for i in at)),
                (_pointer * steps)(*(self._contexts[i] for i in at)),
                (ctypes.c_float * steps)(*(self._gates[i] for i in at)),
            )
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
