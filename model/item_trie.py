"""ItemTrie: which codes may come next, as arithmetic on flat sorted arrays.

Items are sorted by semantic ID, so a node is a range of leaves; nodes of one depth lie side by side, so a node's
children are neighbours. A filter is a prefix sum over leaves, read at every node; a child is legal while its range
holds leaves that pass the filter, less those excluded, less those emitted. A step does the same work, on memory as
close together, whatever the number of items. Knows nothing of models or requests. The slow twin is
`legal_codes_by_search`.

Shapes: B rows, M nodes a row, C the largest codebook, L levels, N items, V nodes, E exclusions a row, P items on a
path, F filters.
"""

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model.semantic_id import Codes, Vocabulary

Tensor = torch.Tensor
ROOT = 0
ANY_NODE = 2  # the root's first child: what padding steps into
KNOWN_LEAVES = 1 << 16  # of items asked for of late; some 200 bytes each
_TABLES = ("leaf_start", "first_child", "run_end", "code", "depth", "column", "item_tokens")


class Availability(NamedTuple):
    """What each row may still emit. `passing` [F, V] of filters (`ItemTrie.passing`), `filter_slot` [B] rows of it,
    `excluded` [B, E] ascending leaves that pass the row's filter, padded with N."""

    passing: Tensor
    filter_slot: Tensor
    excluded: Tensor


class Children(NamedTuple):
    """Children of nodes, ascending by code: `nodes` and the `available` leaves below each, [B, M, C]. A child is legal
    where `available` is positive; other entries are padding."""

    nodes: Tensor
    available: Tensor


class Run(NamedTuple):
    """A chosen token and the forced tokens after it. `tokens` [B, M, L+1] (padding repeats valid tokens), `length`
    [B, M], `node` [B, M] where the next choice is made, `leaf` [B, M] the item completed or N."""

    tokens: Tensor
    length: Tensor
    node: Tensor
    leaf: Tensor


class ItemTrie:
    """Prefix tree of all valid semantic IDs."""

    leaf_start: Tensor
    first_child: Tensor
    run_end: Tensor
    code: Tensor
    depth: Tensor
    column: Tensor
    item_tokens: Tensor

    def __init__(self, codes: npt.NDArray[np.int64], vocabulary: Vocabulary, device: torch.device | str = "cpu"):
        """`codes` [N, L] in any order, distinct, inside the codebooks. Raises ValueError otherwise."""
        sizes = np.array(vocabulary.codebook_sizes)
        if codes.min() < 0 or (codes.max(axis=0) >= sizes).any():
            raise ValueError("codes must lie inside their codebooks")
        # In the narrowest type the sort is a radix sort, and everything after it moves fewer bytes.
        columns = codes.T.astype(np.min_scalar_type(sizes.max() - 1))
        order = np.lexsort(columns[::-1])
        columns = columns[:, order]
        starts = _node_starts(columns)
        if len(starts[-1]) != len(codes):
            raise ValueError("semantic IDs must be distinct")
        # Rows of tokens, and one item's worth of padding: a run is read a whole row wide from wherever it starts.
        tokens = np.full((len(codes) + 1, len(sizes) + 1), vocabulary.list_separator, dtype=np.int32)
        tokens[:-1, :-1] = columns.T
        tokens[:-1, :-1] += np.array(vocabulary.level_offsets, dtype=np.int32)
        tokens[-1] = tokens[-2]
        tables = dict(zip(_TABLES, _node_tables(columns, starts), strict=False))
        first_column = np.array([0, *np.cumsum([0, *sizes[:-1]])])
        column = tables["code"] + first_column[tables["depth"]]
        more = {"item_of_leaf": order.astype(np.int32), "columns": np.ascontiguousarray(columns)}
        self._adopt({**tables, **more, "column": column, "item_tokens": tokens}, vocabulary, device)

    @classmethod
    def of_tables(
        cls, tables: Mapping[str, npt.NDArray[Any]], vocabulary: Vocabulary, device: torch.device | str = "cpu"
    ) -> "ItemTrie":
        """The trie whose `tables` these are, without building anything."""
        trie = cls.__new__(cls)
        trie._adopt(tables, vocabulary, device)
        return trie

    def _adopt(
        self, tables: Mapping[str, npt.NDArray[Any]], vocabulary: Vocabulary, device: torch.device | str
    ) -> None:
        self.vocabulary = vocabulary
        self.num_levels: int
        self.num_items: int
        self.num_levels, self.num_items = tables["columns"].shape
        self.item_of_leaf = tables["item_of_leaf"]
        # One look-up at a time: bytes are read faster where they lie than through arrays or tensors.
        self.sorted_codes = tables["columns"].T
        for name in _TABLES:
            setattr(self, name, torch.from_numpy(tables[name]).to(device))
        self.num_nodes = len(self.depth)
        self.first_leaf = self.num_nodes - 2 - self.num_items
        look_up = (tables["first_child"].data, tables["code"].data, self.num_levels, self.first_leaf)
        self._find = partial(_leaf, *look_up)
        # Leaf of an item, or None when no item has these codes. Histories name the same popular items again and again,
        # and are looked up when they are checked and when they get a row.
        self.leaf = lru_cache(KNOWN_LEAVES)(self._find)
        self._window = torch.arange(vocabulary.max_codebook_size + 1, device=device)
        self._places = torch.arange(self.num_levels + 1, device=device) - 1
        self._one = torch.ones(1, dtype=torch.int64, device=device)

    def tables(self) -> dict[str, npt.NDArray[Any]]:
        """Everything that was built, by name: what `of_tables` takes."""
        of_nodes = {name: getattr(self, name).cpu().numpy() for name in _TABLES}
        return {**of_nodes, "item_of_leaf": self.item_of_leaf, "columns": np.ascontiguousarray(self.sorted_codes.T)}

    def leaves(self, codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Leaves of the items among `codes` [M, L], which may hold codes of no item; ascending and distinct."""
        found = (self._find(each) for each in codes.tolist())
        return np.array(sorted({leaf for leaf in found if leaf is not None}), dtype=np.int64)

    @cached_property
    def decisions_per_item(self) -> float:
        """Of an item's codes those that are a choice among several, on average."""
        choices = self.first_child[1:] - self.first_child[:-1] > 1
        leaves = self.leaf_start[1:] - self.leaf_start[:-1]
        return float(leaves[choices].sum() / self.num_items)

    @property
    def device(self) -> torch.device:
        return self.leaf_start.device

    def passing(self, leaves: npt.NDArray[np.bool_] | None = None) -> Tensor:
        """How many of the leaves before each node pass a filter, [V]; without a filter every leaf passes. By node, not
        by leaf: a node's children are neighbours, the leaves where they start may be a million apart."""
        if leaves is None:
            return self.leaf_start.int()
        sums = np.zeros(self.num_items + 1, dtype=np.int32)
        np.cumsum(leaves, out=sums[1:])
        return torch.from_numpy(sums).to(self.device).take(self.leaf_start)

    def children(
        self, nodes: Tensor, may: Availability, path: Tensor | None = None, widest: int | None = None
    ) -> Children:
        """Children of `nodes` [B, M] given what the rows may emit. `path` [B, M, P] holds leaves emitted on the way
        to each node and not yet in `may.excluded` (N where none). Leaves (depth L) have no children. Whoever knows
        that none of the nodes has more than `widest` children need not look at more: C is then `widest`."""
        node = nodes.unsqueeze(-1)
        first, last = self.first_child.take(node), self.first_child.take(node + 1)
        window = self._window if widest is None else self._window[: widest + 1]
        index = torch.minimum(first + window, last)
        bounds = self.leaf_start.take(index)
        # With slot 0 alone there is no filter in use, and what passes before a node is every leaf before it.
        before = bounds
        if len(may.passing) > 1:
            before = may.passing.view(-1).take(index + (may.filter_slot * self.num_nodes).view(-1, 1, 1))
        excluded = may.excluded
        if path is None or not path.shape[-1] or excluded.shape[1] > bounds.shape[-1]:
            banned = torch.searchsorted(excluded, bounds.flatten(1)).view_as(bounds)
            if path is not None and path.shape[-1]:
                banned += (path.unsqueeze(-2) < bounds.unsqueeze(-1)).sum(-1)
            before = before - banned
            return Children(index[..., :-1], before[..., 1:] - before[..., :-1])
        # Fewer exclusions than children: those are looked up among these, and the path with them.
        leaves = torch.cat([excluded.unsqueeze(1).expand(-1, nodes.shape[1], -1), path], dim=-1)
        place = torch.searchsorted(bounds, leaves, right=True)
        # Place 0 lies before the first child, the last place (padding too) behind the last child.
        gone = bounds.new_zeros(*nodes.shape, bounds.shape[-1] + 1).scatter_add_(-1, place, self._one.expand_as(place))
        return Children(index[..., :-1], before[..., 1:] - before[..., :-1] - gone[..., 1:-1])

    def run(self, chosen: Tensor, forced: bool = True) -> Run:
        """The run that starts with stepping into the nodes `chosen` [B, M]: on through single children to the end of
        the item and its separator. Without `forced`, the chosen token alone (the separator stays a token of its own:
        the end node of a completed item is then its leaf)."""
        end = self.run_end.take(chosen).long() if forced else chosen
        leaf, depth = self.leaf_start.take(end), self.depth.take(chosen)
        done = end >= self.first_leaf
        # Tokens of the item from the chosen one on: a row of `item_tokens` read from the chosen depth.
        place = leaf * (self.num_levels + 1) + depth
        tokens = self.item_tokens.take(place.unsqueeze(-1) + self._places).long()
        length = self.depth.take(end) - depth + self._one
        if forced:
            length += done
            end = end.masked_fill(done, ROOT)
        return Run(tokens, length, end, leaf.masked_fill(~done, self.num_items))


def _leaf(
    first_child: memoryview, code: memoryview, num_levels: int, first_leaf: int, codes: Sequence[int]
) -> int | None:
    """Leaf of the item with these `codes`. Bytes are read faster where they lie than through arrays or tensors."""
    if len(codes) != num_levels:
        return None
    node = ROOT
    for wanted in codes:
        end = first_child[node + 1]
        node = bisect_left(code, wanted, first_child[node], end)
        if node == end or code[node] != wanted:
            return None
    return node - first_leaf


def _node_starts(columns: npt.NDArray[np.unsignedinteger]) -> list[npt.NDArray[np.int64]]:
    """For every depth 0..L the leaves where its nodes start, given the sorted codes as `columns` [L, N]."""
    changed = np.zeros(columns.shape[1], dtype=bool)
    changed[0] = True
    starts = [np.flatnonzero(changed)]
    for column in columns:
        changed[1:] |= column[1:] != column[:-1]
        starts.append(np.flatnonzero(changed))
    return starts


def _node_tables(
    columns: npt.NDArray[np.unsignedinteger], starts: list[npt.NDArray[np.int64]]
) -> tuple[npt.NDArray[np.signedinteger], ...]:
    """leaf_start, first_child, run_end, code, depth [V] of all nodes, depth by depth, a sentinel after each depth so
    that `first_child[node + 1]` ends a node's children and `leaf_start[end]` ends their leaves. What a mask step uses
    as an index is int64: converting it would cost a small batch more than the bytes are worth."""
    num_levels, num_items = columns.shape
    offsets = np.cumsum([0] + [len(start) + 1 for start in starts])
    # One entry past the last sentinel, so that `first_child[node + 1]` exists for it too.
    num_nodes = int(offsets[-1]) + 1
    leaf_start = np.full(num_nodes, num_items, dtype=np.int64)
    # To begin with everything is a leaf: an empty range of children, and a run that ends where it is.
    first_child = np.full(num_nodes, num_nodes - 2, dtype=np.int64)
    run_end = np.arange(num_nodes, dtype=np.int32)
    code = np.zeros(num_nodes, dtype=np.int32)
    depth = np.full(num_nodes, num_levels, dtype=np.int8)
    for d in range(num_levels, -1, -1):
        low, high = offsets[d], offsets[d + 1] - 1
        leaf_start[low:high] = starts[d]
        depth[low : high + 1] = d
        if d:
            code[low:high] = columns[d - 1, starts[d]]
        if d < num_levels:
            first_child[low:high] = offsets[d + 1] + np.searchsorted(starts[d + 1], starts[d])
            first_child[high] = offsets[d + 2] - 1
            children = first_child[low : high + 1]
            single = np.flatnonzero(np.diff(children) == 1)
            run_end[low + single] = run_end[children[single]]
    return leaf_start, first_child, run_end, code, depth


def legal_codes_by_search(items: Sequence[Codes], prefix: Codes, banned: Collection[Codes]) -> list[int]:
    """The slow twin: codes that may follow `prefix`, by looking at every item."""
    depth = len(prefix)
    return sorted({i[depth] for i in items if i[:depth] == prefix and i not in banned})
