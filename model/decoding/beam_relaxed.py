"""Relaxed sampling verification (AtSpeed-R): which continuations of a level a request keeps. Lossy, and labelled so.

The space is every continuation of the beams of a level. The draft draws from q, the target decides by p, both joint
probabilities renormalised over that space.

*With replacement* the draft's draws are independent, and so is every verdict: a draw x is kept with probability
min(1, p(x) / q(x)), otherwise its place is taken by one from the residual max(0, p - q), normalised. So every place
holds a draw from p, exactly. Beams must be distinct: places are filled, from p itself when the draft's draws are used
up, until `width` different ones are there, which is drawing from p without replacement.

*Without replacement* (as AtSpeed does) the draft's draws are distinct. All are tested in the same way; of those kept
the `width` most likely stay; if there are fewer, the rest is drawn from the residual without replacement. What is
included is not exactly what drawing from p would include.

Knows probabilities and nodes only; it is the twin of `model/native/relaxed.h`. Shapes: X continuations, n draws.
"""

from typing import NamedTuple

import torch

from model.decoding.sampling import uniform

Tensor = torch.Tensor
_DRAW, _VERDICT, _RESIDUAL, _REST = range(4)


class Luck(NamedTuple):
    """What a request draws at a level depends on its seed, the level and what is drawn from alone."""

    seed: int
    level: int

    def of(self, use: int, numbers: Tensor) -> Tensor:
        """Uniform over (0, 1), one for each of `numbers`; what one use gets no other gets."""
        return uniform(self.seed, self.level * 4 + use, numbers)


def draw(log_probs: Tensor, nodes: Tensor, count: int, replacement: bool, luck: Luck) -> Tensor:
    """`count` places [n] drawn from softmax of `log_probs` [X] (-inf: never) of `nodes` [X], in order; without
    replacement fewer when there are not so many."""
    probabilities = torch.softmax(log_probs.double(), dim=0)
    if replacement:
        return _independent(probabilities, torch.arange(count), _DRAW, luck)
    return _ordered(probabilities, nodes, count, _DRAW, luck)


def keep(p: Tensor, q: Tensor, nodes: Tensor, drawn: Tensor, width: int, replacement: bool, luck: Luck) -> Tensor:
    """The places kept, at most `width` distinct ones, given which the draft `drawn` [n] from q [X]. Fewer only where
    p [X] of `nodes` [X] has fewer."""
    width = min(width, int((p > 0).sum()))
    order = torch.arange(len(drawn))
    accepted = luck.of(_VERDICT, order) * q[drawn] < p[drawn]
    residual = (p - q).clamp(min=0)
    if replacement:
        instead = _independent(residual, order, _RESIDUAL, luck) if bool((residual > 0).any()) else drawn
        kept = torch.tensor(
            list(dict.fromkeys(torch.where(accepted, drawn, instead).tolist()))[:width], dtype=torch.int64
        )
        # From p until `width` are distinct: the same as from what is left of p, without replacement.
        rest = p.index_fill(0, kept, 0.0)
        return torch.cat([kept, _ordered(rest, nodes, width - len(kept), _REST, luck)])
    kept = drawn[accepted]
    if len(kept) >= width:
        return kept[p[kept].argsort(descending=True, stable=True)[:width]]
    for use, source in ((_RESIDUAL, residual), (_REST, p)):  # the residual may hold too few
        rest = source.index_fill(0, kept, 0.0)
        kept = torch.cat([kept, _ordered(rest, nodes, width - len(kept), use, luck)])
    return kept


def _independent(weights: Tensor, numbers: Tensor, use: int, luck: Luck) -> Tensor:
    """A place drawn from `weights` [X] for each of `numbers`."""
    below = weights.cumsum(0)
    return torch.searchsorted(below, luck.of(use, numbers) * below[-1], right=True)


def _ordered(weights: Tensor, nodes: Tensor, count: int, use: int, luck: Luck) -> Tensor:
    """At most `count` places drawn from `weights` [X] of `nodes` [X] without replacement, in the order they are drawn:
    exponential clocks, the first to ring."""
    there = (weights > 0).nonzero()[:, 0]
    clocks = -luck.of(use, nodes[there]).log() / weights[there]
    return there[clocks.topk(min(count, len(there)), largest=False).indices]
