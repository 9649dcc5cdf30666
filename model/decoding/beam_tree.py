"""BeamTree: what beams need to know of an item trie beyond its children: parents, tokens, and the decisions below.

A *decision* is a node (not the root) with at least two items below it: only there the target has anything left to say,
so only there a beam needs a hidden state. A beam with one item below it is settled. Decisions in depth-first order make
every node's decisions a slice, so a whole sub-tree is two numbers. Knows nothing of scores, requests or passes.

Shapes: V nodes, B rows, M nodes a row, n nodes found a row, L levels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from model.item_trie import Availability, ItemTrie
from model.native.beams import TreeTables

Tensor = torch.Tensor
Table = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BeamTables:
    """What `BeamTree` looks up, as it is built and saved: V entries a table, and all `decisions` in order. Per depth
    0..L-1: how wide the `widest` node is; and at the node above an item drawn at random, how likely there is a decision
    (`deciding`), and how many lie at or below it (`whole`). Beams go where many items are, so items are averaged."""

    parent: Table
    token: Table
    only_child: Table
    decisions: Table
    first: Table
    below: Table
    widest: tuple[int, ...]
    deciding: tuple[float, ...]
    whole: tuple[float, ...]

    @classmethod
    def of(cls, trie: ItemTrie) -> "BeamTables":
        """Seconds for a million items."""
        levels = trie.num_levels
        depth, leaf_start, first_child = (t.cpu().numpy() for t in (trie.depth, trie.leaf_start, trie.first_child))
        nodes = np.arange(trie.num_nodes)
        # A sentinel ends the nodes of each depth: it starts where no leaf is.
        real = leaf_start < trie.num_items
        inner = nodes[real & (depth < levels)]
        number = first_child[inner + 1] - first_child[inner]
        parent = np.zeros(trie.num_nodes, dtype=np.int64)
        parent[_ranges(first_child[inner], number)] = np.repeat(inner, number)
        leaves = np.zeros(trie.num_nodes, dtype=np.int64)
        leaves[inner] = leaf_start[inner + 1] - leaf_start[inner]
        decisions = inner[(leaves[inner] > 1) & (depth[inner] > 0)]
        order = np.lexsort((depth[decisions], leaf_start[decisions]))
        decisions = decisions[order]
        first = np.zeros(trie.num_nodes, dtype=np.int64)
        below = np.zeros(trie.num_nodes, dtype=np.int64)
        first[decisions] = np.arange(len(decisions))
        ends = np.searchsorted(leaf_start[decisions], leaf_start[decisions + 1], side="left")
        below[decisions] = ends - first[decisions]
        token = np.zeros(trie.num_nodes, dtype=np.int64)
        offsets = np.array([0, *trie.vocabulary.level_offsets])
        token[real] = trie.code.cpu().numpy()[real] + offsets[depth[real]]
        only = np.full(trie.num_nodes, _nowhere(trie), dtype=np.int64)
        chained = inner[(number == 1) & (leaves[inner] > 1) & (depth[inner] > 0)]
        only[chained] = first_child[chained]
        at = [inner[depth[inner] == d] for d in range(levels)]
        return cls(
            parent,
            token,
            only,
            decisions,
            first,
            below,
            tuple(int(number[depth[inner] == d].max()) for d in range(levels)),
            tuple(float(leaves[found][leaves[found] > 1].sum() / trie.num_items) for found in at),
            tuple(float((leaves[found] * below[found]).sum() / trie.num_items) for found in at),
        )


class BeamTree:
    """Tables of V entries beside a trie's own. `nowhere` is the node that pads: it has no children, comes after every
    real node and counts as settled."""

    def __init__(self, trie: ItemTrie, tables: BeamTables | None = None) -> None:
        """`tables` where they have been made already."""
        tables = tables or BeamTables.of(trie)
        self.trie, self.nowhere = trie, _nowhere(trie)
        self.widest, self.deciding, self.whole = tables.widest, tables.deciding, tables.whole
        decisions = tables.decisions if len(tables.decisions) else np.array([self.nowhere])
        self.parent, self.token, self.only_child, self._decisions, self._first, self.below = (
            torch.from_numpy(table).to(trie.device)
            for table in (tables.parent, tables.token, tables.only_child, decisions, tables.first, tables.below)
        )
        self.has_chains = bool((self.only_child != self.nowhere).any())
        self.first_codes = self._decisions[trie.depth[self._decisions] == 1]

    def tables(self) -> TreeTables:
        """Everything as compiled passes take it."""
        return TreeTables(
            self.parent, self.token, self.only_child, self._decisions, self._first, self.below, self.first_codes
        )

    def available(self, nodes: Tensor, may: Availability) -> Tensor:
        """How many leaves below `nodes` [B, M] the rows may emit."""
        bounds = torch.stack([self.trie.leaf_start.take(nodes), self.trie.leaf_start.take(nodes + 1)], dim=-1)
        before = bounds
        if len(may.passing) > 1:
            index = torch.stack([nodes, nodes + 1], dim=-1) + (may.filter_slot * self.trie.num_nodes).view(-1, 1, 1)
            before = may.passing.view(-1).take(index)
        banned = torch.searchsorted(may.excluded, bounds.flatten(1)).view_as(bounds)
        before = before - banned
        return before[..., 1] - before[..., 0]

    def decisions_below(self, nodes: Tensor) -> Tensor:
        """All decisions at or below `nodes` [B, M]: [B, n], a row's padded at its end."""
        stop = self.below.take(nodes).cumsum(1)
        count = int(stop[:, -1].max())
        place = torch.arange(count, device=nodes.device).expand(len(nodes), -1).contiguous()
        of = torch.searchsorted(stop, place, right=True).clamp_(max=nodes.shape[1] - 1)
        began = (stop - self.below.take(nodes)).gather(1, of)
        index = self._first.take(nodes.gather(1, of)) + place - began
        found = self._decisions.take(index.clamp_(0, len(self._decisions) - 1))
        return found.masked_fill_(place >= stop[:, -1:], self.nowhere)


def _nowhere(trie: ItemTrie) -> int:
    return trie.num_nodes - 2


def _ranges(starts: Table, counts: Table) -> Table:
    """start, start + 1, ... of each range, one range after the other."""
    ends = counts.cumsum()
    return np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
