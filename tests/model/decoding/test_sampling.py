"""Draws: the noise is what it says it is, and what is drawn with it is the distribution and the twin's choice."""

import math
import random

import pytest
import torch
from scipy.stats import chi2_contingency, chisquare, kstest

from model.decoding.plain import draw
from model.decoding.sampling import MAX_SEED, Sampling, gumbel, perturbed

Tensor = torch.Tensor
CHANCE = 1e-4  # seeds are fixed: a test that passes once passes always


def splitmix64(key: int, steps: int) -> int:
    """Output number `steps` of SplitMix64 started at `key`, in whole Python numbers."""
    bits = (key + steps * 0x9E3779B97F4A7C15) % 2**64
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
    return bits ^ (bits >> 31)


def gumbel_twin(seed: int, decision: int, code: int) -> float:
    bits = splitmix64(splitmix64(splitmix64(seed, 1), decision + 1), code + 1)
    return -math.log(-math.log(((bits >> 12) + 0.5) / 2**52))


def uniform(seed: Tensor, decision: Tensor, code: Tensor) -> Tensor:
    """The noise as what it was before: uniform over (0, 1)."""
    return (-(-gumbel(seed, decision, code)).exp()).exp()


def sampling(temperature: float, top_p: float = 1.0) -> Sampling:
    whole = torch.zeros(1, dtype=torch.int64)
    exact = torch.tensor([[temperature], [top_p]], dtype=torch.float64)
    return Sampling(exact[0], exact[1], whole, whole)


def test_the_twin_is_splitmix64() -> None:
    assert [splitmix64(0, n) for n in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_the_noise_is_that_of_plain_arithmetic() -> None:
    rng = random.Random(0)
    asked = [(0, 0, 0), (MAX_SEED, 4000, 65535)]
    asked += [(rng.randrange(MAX_SEED + 1), rng.randrange(5000), rng.randrange(65536)) for _ in range(500)]
    noise = gumbel(*torch.tensor(asked).unbind(1)).tolist()
    assert noise == pytest.approx([gumbel_twin(*each) for each in asked], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("varied", ["seed", "decision", "code"])
def test_noise_is_gumbel_and_neighbours_know_nothing_of_each_other(varied: str) -> None:
    count, still = torch.arange(40_000), torch.tensor(5)
    asked = {name: count if name == varied else still for name in ("seed", "decision", "code")}
    values = uniform(**asked)
    assert kstest(values.numpy(), "uniform").pvalue > CHANCE
    for distance in (1, 2, 64):
        first, second = (values[:-distance] * 8).long(), (values[distance:] * 8).long()
        table = torch.bincount(first * 8 + second, minlength=64).view(8, 8)
        assert chi2_contingency(table.numpy()).pvalue > CHANCE


def test_noise_of_different_decisions_and_codes_of_a_list_is_different() -> None:
    seed, decision, code = torch.arange(20)[:, None, None], torch.arange(40)[:, None], torch.arange(50)
    assert len(gumbel(seed, decision, code).unique()) == 20 * 40 * 50


def test_argmax_of_perturbed_logits_has_the_tempered_distribution() -> None:
    logits, temperature = torch.tensor([1.0, -0.5, float("-inf"), 0.3, 0.3]), 0.6
    noise = gumbel(torch.arange(20_000)[:, None, None], torch.tensor(3), torch.arange(5))
    drawn = perturbed(logits.expand(20_000, 1, -1), noise, sampling(temperature)).argmax(-1).flatten()
    counts = torch.bincount(drawn, minlength=5)
    expected = 20_000 * (logits.double() / temperature).softmax(0)
    legal = [0, 1, 3, 4]
    assert counts[2] == 0
    assert chisquare(counts[legal].numpy(), expected[legal].numpy()).pvalue > CHANCE


@pytest.mark.parametrize("temperature", [1e-310, 0.01, 0.7, 2.0])
@pytest.mark.parametrize("top_p", [1e-300, 0.5, 0.9, 1.0])
def test_every_draw_is_the_slow_twins(temperature: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(200):
        # Few distinct values: ties must be broken alike.
        logits = torch.randint(-4, 5, (1, 1, 7), generator=generator) / 2
        logits[0, 0, torch.randperm(7, generator=generator)[: seed % 7]] = float("-inf")
        legal = logits[0, 0].isfinite().nonzero()[:, 0]
        noise = gumbel(torch.tensor(seed), torch.tensor(1), torch.arange(7))
        place, _ = draw(logits[0, 0, legal].tolist(), noise[legal].tolist(), temperature, top_p)
        fast = perturbed(logits, noise.view(1, 1, -1), sampling(temperature, top_p)).argmax()
        assert int(fast) == int(legal[place])


def test_the_cut_keeps_the_fewest_most_likely_tokens_and_the_lowest_of_equals() -> None:
    logits = torch.tensor([0.1, 0.4, 0.25, 0.25]).log()[None, None]

    def kept(top_p: float) -> list[int]:
        wanted = perturbed(logits, torch.zeros(1, 1, 4), sampling(1.0, top_p))
        return wanted[0, 0].isfinite().nonzero()[:, 0].tolist()

    assert [kept(p) for p in (0.01, 0.39, 0.5, 0.8, 0.95)] == [[1], [1], [1, 2], [1, 2, 3], [0, 1, 2, 3]]
    even = torch.zeros(1, 1, 4)
    wanted = perturbed(even, torch.zeros(1, 1, 4), sampling(1.0, 0.5))
    assert wanted.isfinite().tolist() == [[[True, True, False, False]]]


def test_greedy_rows_beside_sampled_ones_keep_their_logits_and_nothing_legal_stays_so() -> None:
    logits = torch.tensor([[[0.5, 2.0, float("-inf")]], [[0.5, 2.0, float("-inf")]], [[float("-inf")] * 3]])
    mixed = sampling(0.0, 0.2)._replace(temperature=torch.tensor([0.0, 1.0, 1.0]).double())
    wanted = perturbed(logits, torch.full((3, 1, 3), 9.0), mixed)
    assert torch.equal(wanted[0].float(), logits[0])
    assert wanted[1].tolist() == [[float("-inf"), 9.0, float("-inf")]]
    assert wanted[2].tolist() == [[float("-inf")] * 3]


def test_shared_noise_accepts_as_often_as_the_module_says() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.25, 0.25, 0.1, 0.4])
    noise = gumbel(torch.arange(40_000)[:, None], torch.tensor(0), torch.arange(4))
    agreed = float(((p.log() + noise).argmax(1) == (q.log() + noise).argmax(1)).double().mean())
    ratios = torch.maximum(p[None] / p[:, None], q[None] / q[:, None])  # [x, y]
    formula = float((1 / ratios.sum(1)).sum())
    classic = float(torch.minimum(p, q).sum())  # 1 - total variation
    assert agreed == pytest.approx(formula, abs=4 * 0.5 / 200)
    assert classic / (2 - classic) <= formula <= classic
