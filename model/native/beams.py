"""Binds beams.cpp: a pass over beams and how far they walk then, as one call, rows changed in place.

Knows pointers and shapes, and what a row is asked and tells; nothing of requests. The tensors of
`model.decoding.beam_decoder` are the twin.

Shapes: R rows, T nodes a row, W the widest beam, E exclusions a row, V nodes of the trie, d hidden size.
"""

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from model.native.kernel import NativeTarget, load
from model.native.tables import NativeCache, NativeTrie

Tensor = torch.Tensor
_pointer, _number = ctypes.c_void_p, ctypes.c_int64


class TreeTables(NamedTuple):
    """What beams look up by node, [V] int64 (see `model.decoding.beam_tree.BeamTables`); all `decisions` in order, and
    the `first_codes` among them."""

    parent: Tensor
    token: Tensor
    only_child: Tensor
    decisions: Tensor
    first: Tensor
    below: Tensor
    first_codes: Tensor


class BeamState(NamedTuple):
    """The rows' tensors, contiguous (see `model.decoding.beam_rows.BeamRows`): `prompt`, `used` [R], `nodes` [R, T],
    `beam`, `score` [R, W], `hidden` [R, T, d], `last` [R, d]. From `excluded` on they are only read."""

    prompt: Tensor
    used: Tensor
    nodes: Tensor
    beam: Tensor
    hidden: Tensor
    last: Tensor
    score: Tensor
    excluded: Tensor
    filter_slot: Tensor
    passing: Tensor


class Drafted(NamedTuple):
    """What was drafted for a row at a level: of relaxed rows all continuations, `nodes` [X] ascending, with their
    `joint` score [X] (nats); and the nodes `drawn` [n] in order. All contiguous."""

    nodes: Tensor
    joint: Tensor
    drawn: Tensor


class Guess(NamedTuple):
    """What a draft's search found for a row: the `nodes` [n] drawn, level after level, how many of them at the `last`,
    and of a relaxed row all that was drafted at each of its `levels`."""

    nodes: Tensor
    last: int
    levels: tuple[Drafted, ...]


class Asked(NamedTuple):
    """What is asked of a row: its beams at `level` (`settled`: no pass was needed for them), how many are `wanted`, and
    what to read: at most `limit` nodes, the `whole` sub-trees, the `prompt` before, what was `guessed`, with the
    sub-trees below the last `deepest` of that. At the levels `drafted` verification is relaxed (`model.decoding.
    beam_relaxed`), by luck from the `seed`, with `replacement` or without."""

    row: int
    wanted: int
    level: int
    beams: int
    settled: bool
    limit: int
    whole: bool
    prompt: Sequence[int]
    guessed: Tensor | None
    deepest: int
    seed: int
    replacement: bool
    drafted: Mapping[int, Drafted]


class Told(NamedTuple):
    """What came of it: nodes `read`, levels `accepted` and `forced`; where the beams are now, how many nodes to pass
    over next, `alone` and with all `below` them, and whether a level was `lossy`."""

    read: int
    accepted: int
    forced: int
    level: int
    beams: int
    settled: int
    alone: int
    below: int
    lossy: int


class _Tree(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("nowhere", "chains", "num_first_codes")),
        *((name, _pointer) for name in TreeTables._fields),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("rows", "room", "width", "exclusions")),
        *((name, _pointer) for name in BeamState._fields),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("asks", "num_features")),
        *((name, _pointer) for name in ("ask", "prompts", "feature_layers", "features", "told")),
    ]


class NativeRows:
    """A tree and the rows of requests whose beams go through it, as the compiled functions take them."""

    def __init__(self, tables: TreeTables, nowhere: int, chains: bool) -> None:
        """`nowhere`: the node that pads; `chains`: whether any decision is an only child."""
        self._tables = tables
        self._tree = _Tree(nowhere, chains, len(tables.first_codes), *(table.data_ptr() for table in tables))
        self._state: BeamState | None = None
        self._rows = _Rows()

    def pointers(self, state: BeamState) -> tuple[Any, Any]:
        """Tree and rows; alive as long as this object and the tensors are."""
        if state is not self._state:
            rows, room, _ = state.hidden.shape
            sizes = (rows, room, state.beam.shape[1], state.excluded.shape[1])
            self._state, self._rows = state, _Rows(*sizes, *(tensor.data_ptr() for tensor in state))
        return ctypes.byref(self._tree), ctypes.byref(self._rows)


class NativeBeams:
    """Passes over one set of rows and one cache."""

    def __init__(self, trie: NativeTrie, rows: NativeRows, target: NativeTarget, cache: NativeCache) -> None:
        self._trie, self._rows, self._target, self._cache = trie, rows, target, cache

    def __call__(
        self, asked: Sequence[Asked], state: BeamState, layers: Sequence[int] = ()
    ) -> tuple[list[Told], list[Tensor]]:
        """Read and walk the rows `asked`. Returns what each tells, and the outputs of `layers` over all prompts, one
        behind the other: [sum of their lengths, d] each."""
        library = load()
        assert library is not None
        ask, prompts, drafted = array("q"), array("q"), array("q")
        levels = [_levels(one.drafted) for one in asked]
        for of_one in levels:
            drafted.extend(of_one)
        at = drafted.buffer_info()[0]
        for one, of_one in zip(asked, levels, strict=True):
            count, guesses = (0, 0) if one.guessed is None else (len(one.guessed), one.guessed.data_ptr())
            ask.extend((*one[:4], int(one.settled), one.limit, int(one.whole), len(one.prompt), count, one.deepest))
            ask.extend((len(one.drafted), one.seed, int(one.replacement), guesses, at))
            at += len(of_one) * drafted.itemsize
            prompts.extend(one.prompt)
        size = state.hidden.shape[2]
        features = [torch.empty(len(prompts), size) for _ in layers]
        into = (_pointer * len(layers))(*(feature.data_ptr() for feature in features))
        told = (_number * (len(asked) * len(Told._fields)))()
        of_layers = array("q", layers)
        numbers = (part.buffer_info()[0] for part in (ask, prompts, of_layers))
        one_pass = _Pass(len(asked), len(layers), *numbers, ctypes.addressof(into), ctypes.addressof(told))
        tree, rows = self._rows.pointers(state)
        given = (self._trie.pointer, tree, self._target.pointer, rows, ctypes.byref(one_pass))
        if library.padrec_beams(*given, self._cache.pointer, torch.get_num_threads()):
            raise IndexError("a token, node or position lies outside the model, the trie or the cache")
        width = len(Told._fields)
        return [Told(*told[i * width : (i + 1) * width]) for i in range(len(asked))], features


def _levels(drafted: Mapping[int, Drafted]) -> list[int]:
    """As `relaxed.h` has it."""
    numbers = []
    for level, (nodes, joint, drawn) in drafted.items():
        numbers += [level, len(nodes), nodes.data_ptr(), joint.data_ptr(), len(drawn), drawn.data_ptr()]
    return numbers
