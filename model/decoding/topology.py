"""How much a round drafts, and in which shape: none, a chain, a static tree per slot, or a dynamic tree.

A static tree is drawn up before anything is decoded: for every slot (trie depth) where a row may stand, it says which
nodes each draft step has, by the node of the step before and the rank among its children. `best_trees` finds the trees
that are accepted deepest from how often the draft's r-th guess at a step was the target's choice. Knows numbers;
nothing of models.

Shapes: L slots, J draft steps, W nodes a step, R ranks.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch

from model.decoding.request import RoundStats
from model.native.round import TreeTable

Tree = tuple[tuple[tuple[int, int], ...], ...]  # step -> nodes: (node of the step before, rank)


class Budget(NamedTuple):
    """Draft nodes of a round: `steps` choices deep, at most `width` nodes a step. Zero steps: no speculation. `trees`:
    one a slot; without them a chain (width 1), or the `width` likeliest nodes of each step."""

    steps: int
    width: int = 1
    trees: tuple[Tree, ...] | None = None

    @classmethod
    def static(cls, trees: Sequence[Tree]) -> "Budget":
        """Raises ValueError when a node hangs on none of the step before."""
        for slot, tree in enumerate(trees):
            for step, nodes in enumerate(tree):
                above = len(tree[step - 1]) if step else 1
                if any(not 0 <= parent < above or not 0 <= rank < MOST_RANKS for parent, rank in nodes):
                    raise ValueError(f"tree of slot {slot}, step {step}: no such parent or rank")
        steps = max((len(tree) for tree in trees), default=0)
        return cls(steps, max((len(nodes) for tree in trees for nodes in tree), default=1), tuple(trees))

    def nodes(self, slot: int) -> int:
        """Draft nodes of a row that begins at a slot."""
        return self.steps * self.width if self.trees is None else sum(map(len, self.trees[slot]))


class Budgets(Protocol):
    """Decides how much is drafted."""

    def __call__(self, rows: int) -> Budget:
        """What a round may draft while so many rows are in use."""

    def drafts(self, rows: int, items: int) -> bool:
        """Whether to draft at all for a request of so many items, one of `rows`."""

    def observe(self, stats: RoundStats) -> None:
        """What a round did."""


@dataclass(frozen=True)
class FixedBudget:
    """The same budget always."""

    budget: Budget

    def __call__(self, rows: int) -> Budget:
        del rows
        return self.budget

    def drafts(self, rows: int, items: int) -> bool:
        del rows, items
        return True

    def observe(self, stats: RoundStats) -> None:
        del stats


MOST_RANKS = 8  # as in round.cpp


@lru_cache(maxsize=256)
def table_of(budget: Budget, num_slots: int, device: torch.device) -> TreeTable | None:
    """The budget's trees, padded to `width` nodes a step; None for a dynamic tree."""
    if budget.trees is None and budget.width > 1:
        return None
    shape = (num_slots, budget.steps, budget.width)
    parent, rank = torch.zeros(shape, dtype=torch.int32), torch.full(shape, -1, dtype=torch.int32)
    if budget.trees is None:
        rank.zero_()
    else:
        for slot, tree in enumerate(budget.trees):
            for step, nodes in enumerate(tree):
                for index, (above, place) in enumerate(nodes):
                    parent[slot, step, index], rank[slot, step, index] = above, place
    return TreeTable(parent.to(device), rank.to(device))


def best_trees(acceptance: Sequence[Sequence[Sequence[float]]], nodes: int) -> tuple[Tree, ...]:
    """For each slot the tree of `nodes` nodes that is accepted deepest on average. `acceptance` [L][J][R]: how often,
    for rows that begin at a slot and were right so far, the draft's guess of rank r at step j was the target's.

    A node is right with the product of these along its path, which falls with every step and rank: taking the likeliest
    node that can be taken, again and again, is therefore optimal (as in Sequoia, Chen et al. 2024)."""
    return tuple(_best_tree(steps, nodes) for steps in acceptance)


def gains(tree: Tree, acceptance: Sequence[Sequence[float]]) -> list[float]:
    """How often a round comes to accept a node at each step of `tree`; `acceptance` [J][R] of its slot."""
    found, above = [], [1.0]
    for nodes, ranks in zip(tree, acceptance, strict=False):
        above = [above[parent] * (ranks[rank] if rank < len(ranks) else 0.0) for parent, rank in nodes]
        found.append(sum(above))
    return found


def _best_tree(acceptance: Sequence[Sequence[float]], nodes: int) -> Tree:
    # The heap holds nodes that may be taken: minus their probability, step, path of ranks.
    taken: list[list[tuple[int, ...]]] = [[] for _ in acceptance]
    waiting: list[tuple[float, int, tuple[int, ...]]] = []
    if acceptance and acceptance[0]:
        waiting = [(-acceptance[0][0], 0, (0,))]
    for _ in range(nodes):
        if not waiting or not waiting[0][0]:
            break
        negative, step, path = heapq.heappop(waiting)
        taken[step].append(path)
        ranks = acceptance[step]
        if path[-1] + 1 < min(len(ranks), MOST_RANKS) and ranks[path[-1]]:
            sibling = negative / ranks[path[-1]] * ranks[path[-1] + 1]
            heapq.heappush(waiting, (sibling, step, (*path[:-1], path[-1] + 1)))
        if step + 1 < len(acceptance):
            heapq.heappush(waiting, (negative * acceptance[step + 1][0], step + 1, (*path, 0)))
    found = [sorted(paths) for paths in taken if paths]
    return tuple(
        tuple((found[step - 1].index(path[:-1]) if step else 0, path[-1]) for path in paths)
        for step, paths in enumerate(found)
    )
