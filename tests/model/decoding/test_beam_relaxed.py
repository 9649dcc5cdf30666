import pytest
import torch
from scipy.stats import chisquare

from model.decoding.beam_relaxed import Luck, draw, keep

P = torch.tensor([0.35, 0.25, 0.2, 0.1, 0.06, 0.04, 0.0], dtype=torch.float64)
Q = torch.tensor([0.05, 0.3, 0.1, 0.3, 0.05, 0.1, 0.1], dtype=torch.float64)
NODES = torch.arange(30, 37)
TRIES = 6000


def answers(width: int, count: int, replacement: bool) -> list[list[int]]:
    found = []
    for seed in range(TRIES):
        drawn = draw(Q.log(), NODES, count, replacement, Luck(seed, 1))
        found.append(keep(P, Q, NODES, drawn, width, replacement, Luck(seed, 1)).tolist())
    return found


@pytest.mark.parametrize("count", [1, 3, 12])
def test_with_replacement_the_first_one_kept_is_drawn_from_the_target(count: int) -> None:
    first = torch.bincount(torch.tensor([kept[0] for kept in answers(2, count, True)]), minlength=7)
    assert first[6] == 0
    assert chisquare(first[:6].numpy(), (P[:6] * TRIES).numpy()).pvalue > 1e-3


def test_with_replacement_pairs_are_drawn_from_the_target_without_repeating() -> None:
    pairs = torch.zeros(7, 7)
    for first, second in answers(2, 3, True):
        pairs[first, second] += 1
    expected = P[:, None] * P / (1 - P[:, None])
    expected.fill_diagonal_(0)
    wanted = expected > 0
    assert float(pairs[~wanted].sum()) == 0
    shares = expected[wanted] / expected[wanted].sum()
    assert chisquare(pairs[wanted].numpy(), (shares * TRIES).numpy()).pvalue > 1e-3


def test_without_replacement_what_is_included_is_biased_so_it_is_called_lossy() -> None:
    first = torch.zeros(7)
    for kept in answers(2, 5, False):
        first[kept] += 1
    second = P[:, None] * P / (1 - P[:, None])
    included = P + second.fill_diagonal_(0).sum(0)
    assert chisquare(first[:6].numpy(), (included[:6] * 2 * TRIES / included.sum()).numpy()).pvalue < 1e-6


@pytest.mark.parametrize("replacement", [False, True])
def test_as_many_distinct_ones_come_as_there_are(replacement: bool) -> None:
    for width in (1, 3, 6, 7):
        for count in (1, 4, 20):
            for kept in answers_for(width, count, replacement):
                assert len(kept) == len(set(kept)) == min(width, 6)
                assert 6 not in kept, "the target gives it no probability"


def answers_for(width: int, count: int, replacement: bool) -> list[list[int]]:
    lucks = (Luck(seed, 0) for seed in range(50))
    return [
        keep(P, Q, NODES, draw(Q.log(), NODES, count, replacement, luck), width, replacement, luck).tolist()
        for luck in lucks
    ]


def test_a_draft_that_is_the_target_is_never_refused() -> None:
    for seed in range(50):
        drawn = draw(P.log(), NODES, 3, False, Luck(seed, 0))
        assert set(keep(P, P, NODES, drawn, 3, False, Luck(seed, 0)).tolist()) == set(drawn.tolist())


def test_draws_without_replacement_are_distinct_and_never_impossible() -> None:
    log_probs = torch.tensor([0.0, float("-inf"), -1.0])
    assert set(draw(log_probs, NODES[:3], 9, False, Luck(0, 0)).tolist()) == {0, 2}
