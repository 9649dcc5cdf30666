"""How much a round may draft at each load, from what a round costs on this device and what drafting gains.

At warm-up, rounds are timed per number of rows and candidate budget. A candidate's gain is the expected number of
decisions of a round, from how often drafts survive: at first what the bundle's report says, then what is seen. The best
ratio wins, no speculation included, so that speculating is never slower than not, and ends by itself where drafts are
no longer accepted. Knows decoders and numbers; nothing of queues.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from statistics import median

import torch

from model.decoding.list_decoder import Budget, ListDecoder
from model.decoding.request import ListRequest, RoundStats

LOADS = (1, 2, 4, 8, 16, 32, 64)
CANDIDATES = tuple(Budget(steps) for steps in range(7))
PRIOR = 30  # decisions that what the bundle's report says is worth
FADE = 0.99  # of what was seen, a round
DECIDE_EVERY = 16  # rounds
PROBE_EVERY = 64  # rounds without speculation


def expected_decisions(budget: Budget, survival: Sequence[float]) -> float:
    """Decisions a round gains on average: the target's own, and each draft step that survives up to there."""
    return 1.0 + sum(survival[: budget.steps])


class LoadBudget:
    """Budget by rows in use: the cheapest per decision at the smallest measured load not below it. `observe` every
    round, and it follows what is accepted."""

    def __init__(self, seconds: Mapping[int, Mapping[Budget, float]], survival: Sequence[float]) -> None:
        """`seconds` a round takes, by load and candidate; `survival` of each draft step, to begin with."""
        if not seconds or not all(seconds.values()):
            raise ValueError("a budget needs at least one load, and a candidate for each")
        self.seconds = dict(sorted(seconds.items()))
        before = (1.0, *survival)
        self._prior = [after / max(was, 1e-9) for was, after in zip(before, survival, strict=False)]
        self._kept, self._tried = [0.0] * len(survival), [0.0] * len(survival)
        self._asked, self._observed = 0, 0
        self._decide()

    @property
    def survival(self) -> list[float]:
        """How often a drafted path is right up to each step, by what was seen of late and the prior."""
        seen = zip(self._kept, self._tried, self._prior, strict=True)
        return list(accumulate(((kept + PRIOR * prior) / (tried + PRIOR) for kept, tried, prior in seen), mul))

    def __call__(self, rows: int) -> Budget:
        load = next((load for load in self.seconds if load >= rows), max(self.seconds))
        self._asked += 1
        if self.by_load[load].steps or self._asked % PROBE_EVERY:
            return self.by_load[load]
        return self._probe[load]

    def observe(self, stats: RoundStats) -> None:
        """Learn from a round's counts; every so often decide anew."""
        before = stats.drafted_by_step[0] if stats.drafted_by_step else 0
        for step, drafted in enumerate(stats.drafted_by_step[: len(self._prior)]):
            kept = stats.accepted_by_step[step]
            self._tried[step] = FADE * self._tried[step] + (min(before, drafted) if drafted else 0)
            self._kept[step] = FADE * self._kept[step] + kept
            before = kept
        self._observed += 1
        if self._observed % DECIDE_EVERY == 0:
            self._decide()

    def _decide(self) -> None:
        survival = self.survival

        def cheapest(costs: Mapping[Budget, float]) -> Budget:
            return min(costs, key=lambda c: _price(costs[c], c, survival))

        self.by_load = {load: cheapest(costs) for load, costs in self.seconds.items()}
        # Where drafting does not pay it is tried now and then: it may pay again.
        drafting = {load: {c: s for c, s in costs.items() if c.steps} for load, costs in self.seconds.items()}
        self._probe = {load: cheapest(costs) if costs else Budget(0) for load, costs in drafting.items()}


def measured_budget(
    decoder: ListDecoder, requests: Sequence[ListRequest], survival: Sequence[float], repeats: int = 5
) -> LoadBudget:
    """Time rounds of `requests` (repeated as needed) at every load up to the decoder's rows. The decoder must be idle;
    it is idle again afterwards, and its budget is the one returned."""
    num_rows = len(decoder.rows.held)
    loads = [load for load in LOADS if load < num_rows] + [num_rows]
    possible = [c for c in CANDIDATES if c.steps <= (min(len(survival), decoder.max_steps) if decoder.draft else 0)]
    gains = [expected_decisions(c, survival) for c in possible]
    # A longer budget that gains nothing is not worth timing: noise could make it look cheaper.
    candidates = [c for i, c in enumerate(possible) if all(gains[i] > g for g in gains[:i])]
    costs: dict[int, dict[Budget, float]] = {}
    for load in loads:
        batch = [requests[i % len(requests)] for i in range(load)]
        seconds: dict[Budget, list[float]] = {}
        prices: list[float] = []
        for candidate in candidates:
            seconds[candidate] = _round_seconds(decoder, batch, candidate, repeats)
            prices.append(_price(median(seconds[candidate]), candidate, survival))
            if len(prices) > 2 and min(prices[-2:]) > prices[-3]:
                break  # twice dearer: what is longer still would only take time to say so
        # Small batches are quick and noisy: more tries, turn by turn, so that a slow moment falls on all candidates.
        for _ in range(4 // load - 1):
            for candidate, found in seconds.items():
                found += _round_seconds(decoder, batch, candidate, repeats)
        costs[load] = {candidate: median(found) for candidate, found in seconds.items()}
    budget = LoadBudget(costs, survival)
    decoder.budget, decoder.learn = budget, budget.observe
    return budget


def _price(seconds: float, budget: Budget, survival: Sequence[float]) -> float:
    """Seconds a decision."""
    return seconds / expected_decisions(budget, survival)


@torch.inference_mode()
def _round_seconds(decoder: ListDecoder, batch: list[ListRequest], budget: Budget, repeats: int) -> list[float]:
    decoder.budget = lambda rows: budget
    decoder.admit(batch)
    seconds = []
    for _ in range(repeats):
        if len(decoder.rows.in_use) < len(batch):
            break  # lists are ending: a round of fewer rows would count as cheap
        stats = decoder.round()[1]
        seconds.append(stats.draft_seconds + stats.verify_seconds)
    for index in decoder.rows.in_use:
        decoder.rows.free(index)
    return seconds
