"""Binds tables.h: an item trie with the target's head, and a row cache, as compiled decoding takes them.

Knows pointers and shapes; nothing of rounds or beams.
"""

import ctypes
from typing import Any

import torch

from model.item_trie import ItemTrie
from model.kv_cache import KVCache
from model.native.kernel import NativeLinear

Tensor = torch.Tensor
_pointer, _number = ctypes.c_void_p, ctypes.c_int64


class _Trie(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("items", "levels", "nodes", "first_leaf", "size")),
        *((name, _pointer) for name in ("leaf_start", "first_child", "column")),
        *((name, _pointer) for name in ("run_end", "item_tokens", "code", "depth", "head")),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [
        *((name, _number) for name in ("rows", "positions", "turns")),
        *((name, _pointer) for name in ("rotations", "data")),
    ]


class NativeTrie:
    """An item trie, and the head that chooses among its children."""

    def __init__(self, trie: ItemTrie, head: NativeLinear) -> None:
        tables = (trie.leaf_start, trie.first_child, trie.column, trie.run_end, trie.item_tokens)
        read = (*tables, trie.code, trie.depth, head.packed)
        shape = (trie.num_items, trie.num_levels, trie.num_nodes, trie.first_leaf, head.columns)
        self._kept = (trie, head, read)
        self._trie = _Trie(*shape, *(table.data_ptr() for table in read))

    @property
    def pointer(self) -> Any:
        """The trie as the compiled functions take it; alive as long as this object is."""
        return ctypes.byref(self._trie)


class NativeCache:
    """A row cache, and the rotations of its positions."""

    def __init__(self, cache: KVCache, rotations: Tensor) -> None:
        self._kept = (cache, rotations)
        sizes = (cache.num_rows, cache.num_positions, len(rotations))
        self._cache = _Cache(*sizes, rotations.data_ptr(), cache.data.data_ptr())

    @property
    def pointer(self) -> Any:
        """The cache as the compiled functions take it; alive as long as this object is."""
        return ctypes.byref(self._cache)
