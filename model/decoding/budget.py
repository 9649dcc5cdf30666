"""How much a round may draft at each load, from what a round costs on this device and what drafting gains.

At warm-up, rounds are timed per number of rows and candidate budget; a candidate's gain is the expected number of
decisions of a round, from the survival probabilities the bundle's report holds. The best ratio wins, no speculation
included, so that speculating is never slower than not. Knows decoders and numbers; nothing of queues.
"""

from collections.abc import Mapping, Sequence
from statistics import median

from model.decoding.list_decoder import Budget, ListDecoder
from model.decoding.request import ListRequest

LOADS = (1, 2, 4, 8, 16, 32, 64)
CANDIDATES = tuple(Budget(steps) for steps in range(7))


def expected_decisions(budget: Budget, survival: Sequence[float]) -> float:
    """Decisions a round gains on average: the target's own, and each draft step that survives up to there."""
    return 1.0 + sum(survival[: budget.steps])


class LoadBudget:
    """Budget by rows in use: that of the smallest measured load not below it."""

    def __init__(self, by_load: Mapping[int, Budget]) -> None:
        if not by_load:
            raise ValueError("a budget needs at least one load")
        self.by_load = dict(sorted(by_load.items()))

    def __call__(self, rows: int) -> Budget:
        fitting = (budget for load, budget in self.by_load.items() if load >= rows)
        return next(fitting, list(self.by_load.values())[-1])


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
    chosen = {}
    for load in loads:
        batch = [requests[i % len(requests)] for i in range(load)]
        seconds: dict[Budget, list[float]] = {}
        prices: list[float] = []
        for candidate in candidates:
            seconds[candidate] = _round_seconds(decoder, batch, candidate, repeats)
            prices.append(_price(seconds[candidate], candidate, survival))
            if len(prices) > 2 and min(prices[-2:]) > prices[-3]:
                break  # twice dearer: what is longer still would only take time to say so
        # Small batches are quick and noisy: more tries, turn by turn, so that a slow moment falls on all candidates.
        for _ in range(4 // load - 1):
            for candidate, found in seconds.items():
                found += _round_seconds(decoder, batch, candidate, repeats)
        chosen[load] = min(seconds, key=lambda c: _price(seconds[c], c, survival))
    decoder.budget = LoadBudget(chosen)
    return decoder.budget


def _price(seconds: Sequence[float], budget: Budget, survival: Sequence[float]) -> float:
    """Seconds a decision."""
    return median(seconds) / expected_decisions(budget, survival)


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
