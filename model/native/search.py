"""Binds search.cpp: a draft's search of beams of its own, as one call for many rows.

Knows pointers and shapes; nothing of requests or plans. The tensors of `model.decoding.beam_draft` are the twin.

Shapes: F layers of the target, d hidden size, W beams a level at most, X continuations.
"""

import ctypes
from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from model.item_trie import ItemTrie
from model.native.beams import BeamState, Drafted, Guess, NativeRows
from model.native.kernel import NativeDraft, NativeLinear, NativeTarget, StepTerm, load, step_arrays
from model.native.tables import NativeCache, NativeTrie

Tensor = torch.Tensor
_pointer, _number = ctypes.c_void_p, ctypes.c_int64


class SearchAsked(NamedTuple):
    """A row to search for: its `prompt`, how many `beams` it has (at level 0: the root is one), how many to keep a
    level (`width`), the target's layers over the prompt (`features`, each [its tokens, d]); of a relaxed row the luck
    it draws by, `seed` and `replacement`."""

    row: int
    prompt: Sequence[int]
    beams: int
    width: int
    features: Sequence[Tensor] = ()
    seed: int | None = None
    replacement: bool = False


class Searching(NamedTuple):
    """What searches: a PAD-Rec draft's network, or a small language model; its cache, the `head` by which it says
    codes, and of a PAD-Rec draft `terms`, what its steps add, and `fuse`, the packed map from the target's layers to
    its features."""

    network: NativeDraft | NativeTarget
    cache: NativeCache
    head: NativeLinear
    terms: Sequence[StepTerm | None] = ()
    fuse: Tensor | None = None


class _Search(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("asks", "levels", "level", "most", "room", "num_features")),
        *((name, _pointer) for name in ("ask", "prompts", "features", "step", "context", "gate", "fuse")),
        *((name, _pointer) for name in ("draws", "drawn", "count", "nodes", "joint")),
    ]


class NativeSearch:
    """Searches by one draft over one set of rows: the PAD-Rec draft, or a small language model."""

    def __init__(self, trie: ItemTrie, rows: NativeRows, widest: Sequence[int], own: Searching) -> None:
        """`widest`: children of a node at most, by depth."""
        self._trie, self._rows, self._widest, self._own = NativeTrie(trie, own.head), rows, tuple(widest), own
        self._steps: dict[int, tuple[Any, Any, Any]] = {}

    def __call__(self, asked: Sequence[SearchAsked], state: BeamState, level: int, levels: int) -> list[Guess]:
        """Search `levels` levels from `level` on."""
        library = load()
        assert library is not None
        most = max(one.width for one in asked)
        relaxed = any(one.seed is not None for one in asked)
        widest = max(most, max(one.beams for one in asked)) * max(self._widest[level : level + levels])
        room = widest if relaxed else 0
        ask, prompts, features = array("q"), array("q"), array("q")
        for one in asked:
            ask.extend((one.row, one.width, one.beams, len(one.prompt)))
            ask.extend((0, 0, 0) if one.seed is None else (1, int(one.replacement), one.seed))
            prompts.extend(one.prompt)
            features.extend(layer.data_ptr() for layer in one.features)
        if levels not in self._steps:
            self._steps[levels] = step_arrays(self._own.terms, levels)
        draws, count = torch.empty(2, len(asked), levels, dtype=torch.int64)
        drawn = torch.empty(len(asked), levels * most, dtype=torch.int64)
        nodes = torch.empty(len(asked), levels, room, dtype=torch.int64)
        joint = torch.empty(len(asked), levels, room)
        one_search = _Search(
            len(asked),
            levels,
            level,
            most,
            room,
            len(asked[0].features),
            *(part.buffer_info()[0] for part in (ask, prompts, features)),
            *map(ctypes.addressof, self._steps[levels]),
            None if self._own.fuse is None else self._own.fuse.data_ptr(),
            *(part.data_ptr() for part in (draws, drawn, count, nodes, joint)),
        )
        tree, rows = self._rows.pointers(state)
        network: tuple[Any, Any] = (self._own.network.pointer, None)
        if isinstance(self._own.network, NativeTarget):
            network = (None, self._own.network.pointer)
        given = (self._trie.pointer, tree, *network, rows, ctypes.byref(one_search), self._own.cache.pointer)
        if library.padrec_search(*given, torch.get_num_threads()):
            raise IndexError("a token, node or position lies outside the model, the trie or the cache")
        guesses = []
        for i, (one, number, found) in enumerate(zip(asked, draws.tolist(), count.tolist(), strict=True)):
            ends = list(accumulate(number, initial=0))
            drafted = []
            for j in range(levels if one.seed is not None else 0):
                drafted.append(
                    Drafted(nodes[i, j, : found[j]], joint[i, j, : found[j]], drawn[i, ends[j] : ends[j + 1]])
                )
            guesses.append(Guess(drawn[i, : ends[-1]], number[-1], tuple(drafted)))
        return guesses
