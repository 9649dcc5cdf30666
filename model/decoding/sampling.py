"""Exact sampling: which token a row draws, as a function of its seed and its own list alone.

By the Gumbel-max identity, argmax over tokens of (log p + noise) with independent standard Gumbel noise is a draw from
p. The noise of a decision is a hash of (seed, decision, code), with decision = items written * num_levels + level:
the same whatever the batch, the row, the round or the draft. Given its seed, a sampled list is therefore a greedy list
over perturbed log-probabilities, and the greedy walk of `verify` verifies it: a drafted token is kept iff it is the one
the target draws. Nothing is rejected and redrawn, so no residual distribution is needed, any tree will do, and output
is token for token that of plain sampling; its distribution is p because every draw is one from p, with noise that no
other decision of the list shares.

The draft proposes with the same noise. Where the classic rule (keep with probability min(1, p/q)) accepts
sum_x min(p, q) of single proposals, the best any coupling can, shared noise accepts sum_x 1 / sum_y max(p_y/p_x,
q_y/q_x): never less than (1 - tv) / (1 + tv) of total variation distance tv. That difference buys reproducibility.
(Daliri, Musco and Suresh 2024, "Coupling without communication and drafter-invariant speculative decoding".)

Knows nothing of requests, models, trees or verification. The slow twin is `plain.draw`.

Shapes: B rows, M nodes a row, C the largest codebook, P items on a path.
"""

import secrets
from typing import NamedTuple

import torch

from model.item_trie import Children, ItemTrie

Tensor = torch.Tensor
MAX_TEMPERATURE = 2.0
MAX_SEED = 2**63 - 1


class Sampling(NamedTuple):
    """How rows draw: `temperature` [B] float64 (0: greedy), `top_p` [B] float64 (None: no row cuts its tokens),
    `seed` [B], `written` [B] items of the list so far."""

    temperature: Tensor
    top_p: Tensor | None
    seed: Tensor
    written: Tensor


def fresh_seed() -> int:
    """A seed nobody can guess, for requests that bring none."""
    return secrets.randbelow(MAX_SEED + 1)


def uniform(seed: Tensor | int, decision: Tensor | int, code: Tensor) -> Tensor:
    """Uniform over (0, 1), float64, of int64 `seed`, `decision` and `code`, broadcast against each other.

    SplitMix64 (Steele, Lea and Flood 2014) thrice: each number is mixed into a key that starts the next sequence.
    Integer arithmetic wraps, so the bits are the same on every device."""
    seeds, decisions = (torch.as_tensor(number, device=code.device) for number in (seed, decision))
    bits = _mixed(_mixed(_mixed(seeds + _GAMMA) + (decisions + 1) * _GAMMA) + (code + 1) * _GAMMA)
    # 52 bits and a half: never an end of the interval, and exact in float64.
    return (_shifted(bits, 12).double() + 0.5) * 2.0**-52


def gumbel(seed: Tensor, decision: Tensor, code: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, of what `uniform` takes."""
    return -(-uniform(seed, decision, code).log()).log()


def noise(sampling: Sampling, trie: ItemTrie, nodes: Tensor, children: Children, path: Tensor) -> Tensor:
    """Noise [B, M, C] of the `children` of `nodes` [B, M]; `path` [B, M, P] as in `ItemTrie.children`."""
    items = sampling.written[:, None] + (path < trie.num_items).sum(-1)
    decision = items * trie.num_levels + trie.depth.take(nodes)
    return gumbel(sampling.seed[:, None, None], decision.unsqueeze(-1), trie.code.take(children.nodes).long())


def perturbed(logits: Tensor, noise: Tensor, sampling: Sampling) -> Tensor:
    """What to take the argmax of, float64 [B, M, C]: tempered log-probabilities (up to a constant) plus `noise` where
    a row draws, -inf outside its top-p set; `logits` themselves where it does not. -inf stays -inf."""
    exact = logits.double()
    temperature = sampling.temperature[:, None, None]
    draws = temperature > 0
    # Relative to the best one, so that a tiny temperature overflows into -inf and never into NaN.
    below = exact - exact.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).min)
    tempered = below / torch.where(draws, temperature, 1.0)
    if sampling.top_p is not None:
        tempered = tempered.masked_fill(~_likely(tempered, sampling.top_p[:, None, None]), float("-inf"))
    return torch.where(draws, tempered + noise, exact)


def _likely(tempered: Tensor, top_p: Tensor) -> Tensor:
    """The smallest set of most likely tokens whose mass reaches `top_p`: those before which less than `top_p` lies.
    Ties go to the lowest token: the sort is stable."""
    probabilities, order = tempered.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = torch.nn.functional.pad(probabilities.cumsum(-1)[..., :-1], (1, 0))
    kept = (before < top_p) | (top_p >= 1)  # rounding must not cut what nobody asked to cut
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _signed(value: int) -> int:
    """An unsigned 64-bit constant as the int64 of the same bits."""
    return value - 2**64 if value >= 2**63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Logical shift right: int64's own drags the sign along."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mixed(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)
