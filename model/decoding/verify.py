"""Exact verification of a draft tree: a drafted choice is kept iff it is the one the target makes.

That is the best legal one of a greedy row and the drawn one of a row that samples; `sampling` says why the second
leaves the target's distribution as it is. Knows choices and groups only; nothing of models, caches or requests.
Shapes as in `draft_tree`.
"""

from typing import NamedTuple

import torch

from model.decoding.draft_tree import DraftTree

Tensor = torch.Tensor


class Verdict(NamedTuple):
    """`path` [B, J+1] groups whose choice counts: the pending run's, then the accepted nodes' (the last one repeated);
    `accepted` [B] how many nodes were kept."""

    path: Tensor
    accepted: Tensor


def accept(tree: DraftTree, best: Tensor, steps: int, width: int) -> Verdict:
    """Walk down from the pending run as long as the target's choice `best` [B, G] was drafted."""
    if width == 1:  # a chain: node j hangs on group j, so what was kept is a prefix
        hit = (tree.choice == best[:, :steps]) & (tree.length > 0)
        accepted = hit.long().cumprod(1).sum(1)
        return Verdict(torch.minimum(torch.arange(steps + 1, device=best.device), accepted[:, None]), accepted)
    current = torch.zeros_like(best[:, 0])
    alive = torch.ones_like(current, dtype=torch.bool)
    accepted = torch.zeros_like(current)
    path = [current]
    for step in range(steps):
        nodes = slice(step * width, (step + 1) * width)
        wanted = best.gather(1, current.unsqueeze(1))
        hit = (tree.parent[:, nodes] == current.unsqueeze(1)) & (tree.choice[:, nodes] == wanted)
        hit &= (tree.length[:, nodes] > 0) & alive.unsqueeze(1)
        alive = hit.any(1)
        current = torch.where(alive, 1 + step * width + hit.long().argmax(1), current)
        accepted += alive
        path.append(current)
    return Verdict(torch.stack(path, dim=1), accepted)
