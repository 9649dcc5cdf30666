"""Decodes many requests to the end without a queue: training, evaluation and benchmarks. Serving has its engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from model.decoding.list_decoder import ListDecoder
from model.decoding.request import ListRequest, ListResult, RoundStats


@dataclass(frozen=True)
class Decoded:
    """Results by request ID, and what every round did."""

    results: dict[str, ListResult]
    rounds: list[RoundStats] = field(default_factory=list)

    @property
    def acceptance_length(self) -> float:
        """1 + accepted / rounds, over the rounds of all rows."""
        row_rounds = sum(r.rows for r in self.rounds)
        return 1.0 + sum(r.accepted_tokens for r in self.rounds) / row_rounds if row_rounds else 0.0

    def survival(self) -> list[float]:
        """Probability that a draft step is drafted and accepted in a row's round, step by step."""
        row_rounds = sum(r.rows for r in self.rounds)
        return [accepted / row_rounds for accepted in self._sum("accepted_by_step")] if row_rounds else []

    def acceptance_by_step(self) -> list[float]:
        return _ratio(self._sum("accepted_by_step"), self._sum("drafted_by_step"))

    def acceptance_by_slot(self) -> list[float]:
        return _ratio(self._sum("accepted_by_slot"), self._sum("drafted_by_slot"))

    def _sum(self, name: str) -> list[int]:
        columns = [getattr(r, name) for r in self.rounds]
        width = max((len(c) for c in columns), default=0)
        return [sum(c[i] for c in columns if i < len(c)) for i in range(width)]


def decode_all(
    decoder: ListDecoder, requests: Sequence[ListRequest], tick: Callable[[], None] | None = None
) -> Decoded:
    """Decode `requests` in order, rows always full; `tick` is called per finished list."""
    decoded, waiting = Decoded({}), list(requests)
    while len(decoded.results) < len(requests):
        entering, waiting = waiting[: decoder.rows.num_free], waiting[decoder.rows.num_free :]
        finished = decoder.admit(entering) if entering else []
        if decoder.rows.in_use:
            results, stats = decoder.round()
            finished += results
            decoded.rounds.append(stats)
        for result in finished:
            decoded.results[result.request_id] = result
            if tick:
                tick()
    return decoded


def _ratio(accepted: list[int], drafted: list[int]) -> list[float]:
    return [round(a / d, 4) if d else 0.0 for a, d in zip(accepted, drafted, strict=True)]
