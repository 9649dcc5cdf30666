"""The beams of the next level: the best continuations of the beams of this one, and which of them beams go on from.

Ties go to the lowest token, which here is the lowest node: nodes of a depth are in the order of their codes. Knows
scores and nodes; nothing of models or requests.

Shapes: B rows, X continuations, W beams at most.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from model.decoding.beam_tree import BeamTree
from model.item_trie import Children

Tensor = torch.Tensor


class Beams(NamedTuple):
    """`nodes` [B, W] ascending, padded with the tree's `nowhere`, and their `scores` [B, W] (nats; padding: -inf)."""

    nodes: Tensor
    scores: Tensor


def joint_scores(logits: Tensor, children: Children, scores: Tensor) -> Tensor:
    """[B, M, C] log-probability of every continuation: the beam's score [B, M] plus the child's, renormalised over the
    legal children; -inf where not legal. `logits` [B, M, C] are those of the children."""
    illegal = children.available <= 0
    logits = logits.masked_fill(illegal, float("-inf"))
    # A node without legal children gives NaN, and nothing of it is legal.
    joint = logits - logits.logsumexp(-1, keepdim=True) + scores.unsqueeze(-1)
    return joint.masked_fill_(illegal, float("-inf"))


def best(joint: Tensor, nodes: Tensor, widths: Sequence[int], tree: BeamTree) -> Beams:
    """The `widths` best of `joint` [B, X] in each row, whose `nodes` [B, X] ascend wherever they are legal."""
    count = joint.shape[1]
    widest = min(max(widths), count)
    top = joint.topk(min(widest + 1, count), dim=1)
    wanted = torch.tensor(widths, device=joint.device)[:, None]
    scores, places = top.values, top.indices
    # `topk` keeps any of equals; where that decides who stays, a stable sort keeps the lowest.
    last, after = (scores.gather(1, (wanted - less).clamp(max=scores.shape[1] - 1)) for less in (1, 0))
    if bool(((wanted < count) & (last == after) & last.isfinite()).any()):
        scores, places = joint.sort(dim=1, descending=True, stable=True)
    scores, places = scores[:, :widest], places[:, :widest]
    order = torch.arange(scores.shape[1], device=joint.device)
    scores = scores.masked_fill(order >= wanted, float("-inf"))
    return ascending(nodes.gather(1, places), scores, tree)


def ascending(nodes: Tensor, scores: Tensor, tree: BeamTree) -> Beams:
    """In the order of their nodes; what has no score is padding."""
    kept, order = nodes.masked_fill(scores == float("-inf"), tree.nowhere).sort(dim=1)
    return Beams(kept, scores.gather(1, order))
