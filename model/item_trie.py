"""ItemTrie: which codes may come next, as arithmetic on flat sorted arrays.

Items are sorted by semantic ID, so a node is a range of leaves; nodes of one depth lie side by side, so a node's
children are neighbours. A filter is a prefix sum over leaves; a child is legal while its range holds leaves that pass
the filter, less those excluded, less those emitted. The cost of a step does not depend on the number of items.
Knows nothing of models or requests. The slow twin is `legal_codes_by_search`.

Shapes: B rows, M nodes a row, C the largest codebook, L levels, N items, E exclusions a row, P items on a path.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model.semantic_id import Codes, Vocabulary

Tensor = torch.Tensor
ROOT = 0
ANY_NODE = 2  # the root's first child: what padding steps into


class Availability(NamedTuple):
    """What each row may still emit. `passing` [F, N+1] prefix sums of filters, `filter_slot` [B] rows of it,
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

    def __init__(self, codes: npt.NDArray[np.int64], vocabulary: Vocabulary, device: torch.device | str = "cpu"):
        """`codes` [N, L] in any order, distinct. Raises ValueError otherwise."""
        order = np.lexsort(codes.T[::-1])
        ordered = codes[order]
        changed = np.ones((len(codes), codes.shape[1] + 1), dtype=bool)
        changed[1:, 0] = False
        changed[1:, 1:] = np.logical_or.accumulate(ordered[1:] != ordered[:-1], axis=1)
        if not changed[:, -1].all():
            raise ValueError("semantic IDs must be distinct")
        self.vocabulary, self.num_items, self.num_levels = vocabulary, len(codes), codes.shape[1]
        self.leaf_of_item = np.empty(len(codes), dtype=np.int64)
        self.leaf_of_item[order] = np.arange(len(codes))
        self.item_of_leaf = order
        self.sorted_codes = ordered
        tables = _node_tables(ordered, changed)
        self.num_nodes = len(tables[0])
        self.leaf_start, self.first_child, self.code, self.depth, self.run_end = (
            torch.from_numpy(t).to(device) for t in tables
        )
        tokens = ordered + np.array(vocabulary.level_offsets)
        separators = np.full((len(codes), 1), vocabulary.list_separator)
        rows = np.concatenate([tokens, separators], axis=1)
        # One item's worth of padding: a run is read a whole row wide from wherever it starts.
        self.item_tokens = torch.from_numpy(np.append(rows, rows[-1:])).to(device)
        self.first_leaf = int(self.num_nodes - 2 - len(codes))
        columns = np.cumsum([0, *vocabulary.codebook_sizes])
        self.column = self.code + torch.from_numpy(columns[:-1])[(self.depth.cpu() - 1).clamp(min=0)].to(device)
        self._window = torch.arange(vocabulary.max_codebook_size + 1, device=device)
        self._places = torch.arange(self.num_levels + 1, device=device)

    @property
    def device(self) -> torch.device:
        return self.leaf_start.device

    def leaf(self, codes: Codes) -> int | None:
        """Leaf of an item, or None when no item has these codes."""
        low, high = 0, self.num_items
        for level, code in enumerate(codes):
            column = self.sorted_codes[low:high, level]
            low, high = low + int(np.searchsorted(column, code)), low + int(np.searchsorted(column, code, "right"))
        return low if high - low == 1 and len(codes) == self.num_levels else None

    def passing(self, leaves: npt.NDArray[np.bool_] | None = None) -> Tensor:
        """Prefix sum [N+1] of a filter over leaves; without a filter every leaf passes."""
        mask = np.ones(self.num_items, dtype=bool) if leaves is None else leaves
        sums = np.zeros(self.num_items + 1, dtype=np.int32)
        np.cumsum(mask, out=sums[1:])
        return torch.from_numpy(sums).to(self.device)

    def children(self, nodes: Tensor, may: Availability, path: Tensor | None = None) -> Children:
        """Children of `nodes` [B, M] given what the rows may emit. `path` [B, M, P] holds leaves emitted on the way
        to each node and not yet in `may.excluded` (N where none). Leaves (depth L) have no children."""
        first, last = self.first_child.take(nodes), self.first_child.take(nodes + 1)
        index = torch.minimum(first.unsqueeze(-1) + self._window, last.unsqueeze(-1))
        bounds = self.leaf_start.take(index)
        banned = torch.searchsorted(may.excluded, bounds.flatten(1)).view_as(bounds)
        if path is not None and path.shape[-1]:
            banned += (path.unsqueeze(-2) < bounds.unsqueeze(-1)).sum(-1)
        # With slot 0 alone there is no filter in use, and its prefix sum is the identity.
        before = may.passing[may.filter_slot[:, None, None], bounds] if len(may.passing) > 1 else bounds
        before = before - banned
        return Children(index[..., :-1], before[..., 1:] - before[..., :-1])

    def run(self, chosen: Tensor, forced: bool = True) -> Run:
        """The run that starts with stepping into the nodes `chosen` [B, M]: on through single children to the end of
        the item and its separator. Without `forced`, the chosen token alone (the separator stays a token of its own:
        the end node of a completed item is then its leaf)."""
        end = self.run_end.take(chosen) if forced else chosen
        leaf = self.leaf_start.take(end)
        done = end >= self.first_leaf
        # Tokens of the item from the chosen one on: a row of `item_tokens` read from the chosen depth.
        place = leaf * (self.num_levels + 1) + self.depth.take(chosen) - 1
        tokens = self.item_tokens.take(place.unsqueeze(-1) + self._places)
        length = self.depth.take(end) - self.depth.take(chosen) + 1
        if forced:
            length += done
            end = end.masked_fill(done, ROOT)
        return Run(tokens, length, end, leaf.masked_fill(~done, self.num_items))


def _node_tables(codes: npt.NDArray[np.int64], changed: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.int64]]:
    """leaf_start, first_child, code, depth, run_end of all nodes, depth by depth, a sentinel after each depth so that
    `first_child[node + 1]` ends a node's children and `leaf_start[end]` ends their leaves."""
    num_items, num_levels = codes.shape
    starts = [np.flatnonzero(changed[:, d]) for d in range(num_levels + 1)]
    offsets = np.cumsum([0] + [len(s) + 1 for s in starts])
    leaf_start: list[npt.ArrayLike] = []
    first_child: list[npt.ArrayLike] = []
    code: list[npt.ArrayLike] = []
    depth: list[npt.ArrayLike] = []
    for d, start in enumerate(starts):
        leaf_start += [start, [num_items]]
        code += [codes[start, d - 1] if d else [0], [0]]
        depth.append(np.full(len(start) + 1, d))
        if d < num_levels:
            ordinal = np.cumsum(changed[:, d + 1]) - 1
            first_child += [offsets[d + 1] + ordinal[start], [offsets[d + 1] + len(starts[d + 1])]]
        else:  # an empty range: leaves have no children
            first_child.append(np.full(len(start) + 1, offsets[-1] - 1))
    child = np.concatenate(first_child)
    run_end = np.arange(offsets[-1])
    for d in range(num_levels - 1, -1, -1):
        nodes = np.arange(offsets[d], offsets[d + 1] - 1)
        single = child[nodes + 1] - child[nodes] == 1
        run_end[nodes[single]] = run_end[child[nodes[single]]]
    # One entry past the last sentinel, so that `first_child[node + 1]` exists for it too.
    tables = [np.concatenate(leaf_start), child, np.concatenate(code), np.concatenate(depth), run_end]
    return [np.append(t, t[-1]).astype(np.int64) for t in tables]


def legal_codes_by_search(items: Sequence[Codes], prefix: Codes, banned: Collection[Codes]) -> list[int]:
    """The slow twin: codes that may follow `prefix`, by looking at every item."""
    depth = len(prefix)
    return sorted({i[depth] for i in items if i[:depth] == prefix and i not in banned})
