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

Knows probabilities only. Shapes: X continuations, n draws.
"""

import torch

Tensor = torch.Tensor


def generator(seed: int, level: int, verifying: bool) -> torch.Generator:
    """Luck that depends on the request and the level alone; the draft's is not the verification's."""
    return torch.Generator().manual_seed((seed * 64 + 2 * level + verifying) % 2**63)


def draw(log_probs: Tensor, count: int, replacement: bool, luck: torch.Generator) -> Tensor:
    """`count` draws [n] from softmax of `log_probs` [X] (-inf: never), in order; without replacement fewer when there
    are not so many."""
    probabilities = torch.softmax(log_probs.double(), dim=0)
    if replacement:
        return torch.multinomial(probabilities, count, replacement=True, generator=luck)
    return _ordered(probabilities, min(count, int((probabilities > 0).sum())), luck)


def keep(p: Tensor, q: Tensor, drawn: Tensor, width: int, replacement: bool, luck: torch.Generator) -> Tensor:
    """The continuations kept, at most `width` distinct ones, given what the draft `drawn` [n] from q [X]. Fewer only
    where p [X] has fewer."""
    width = min(width, int((p > 0).sum()))
    accepted = torch.rand(len(drawn), generator=luck, dtype=torch.float64) * q[drawn] < p[drawn]
    residual = (p - q).clamp(min=0)
    if replacement:
        return _fill(p, residual, drawn, accepted, width, luck)
    kept = drawn[accepted]
    if len(kept) >= width:
        return kept[p[kept].argsort(descending=True, stable=True)[:width]]
    for source in (residual, p):  # the residual may hold too few
        rest = source.index_fill(0, kept, 0.0)
        missing = min(width - len(kept), int((rest > 0).sum()))
        kept = torch.cat([kept, _ordered(rest, missing, luck)])
    return kept


def _fill(p: Tensor, residual: Tensor, drawn: Tensor, accepted: Tensor, width: int, luck: torch.Generator) -> Tensor:
    kept: dict[int, None] = {}
    for drafted, passed in zip(drawn.tolist(), accepted.tolist(), strict=True):
        if len(kept) == width:
            break
        kept[drafted if passed else int(torch.multinomial(residual, 1, generator=luck))] = None
    found = torch.tensor(list(kept), dtype=torch.int64)
    # From p until `width` are distinct: the same as from what is left of p, without replacement.
    rest = p.index_fill(0, found, 0.0)
    return torch.cat([found, _ordered(rest, width - len(found), luck)])


def _ordered(weights: Tensor, count: int, luck: torch.Generator) -> Tensor:
    """`count` draws without replacement, in the order they are drawn: exponential clocks, the first to ring."""
    if not count:
        return torch.empty(0, dtype=torch.int64)
    clocks = torch.empty(len(weights), dtype=torch.float64).exponential_(generator=luck) / weights
    return clocks.topk(count, largest=False).indices
