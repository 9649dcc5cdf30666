"""What is known of a draft before it is served: how often its guesses are right, by slot, step and rank.

Measured by decoding with caterpillar trees: a chain of first guesses with the next ranks beside each of them. How often
rounds come past a step with one rank more than before is how often the target's choice had that rank. Knows a decoder;
nothing of files.

Shapes: L slots, J draft steps, R ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from model.decoding.list_decoder import ListDecoder
from model.decoding.offline import decode_all
from model.decoding.request import ListRequest
from model.decoding.topology import Budget, FixedBudget, Tree

PROFILE_RANKS = 4  # guesses beside each other that are worth knowing about
GUESS = (0.6, 0.65, 0.6, 0.6)  # of a draft nobody has measured: that its first guess is right, step by step


@dataclass(frozen=True)
class Profile:
    """`acceptance` [L][J][R]: how often, for rows whose round begins at a slot and whose first guesses were right up to
    a step, the guess of a rank was the target's choice. `begins` [L]: the share of rounds that begin at each slot."""

    acceptance: tuple[tuple[tuple[float, ...], ...], ...]
    begins: tuple[float, ...]

    @classmethod
    def guess(cls, num_slots: int, acceptance: Sequence[float] = GUESS) -> "Profile":
        """A draft of which nothing is known but how often its first guess is right at each step."""
        steps = tuple((rate,) for rate in acceptance)
        return cls((steps,) * num_slots, (1 / num_slots,) * num_slots)

    @property
    def steps(self) -> int:
        return min(len(steps) for steps in self.acceptance)

    def as_dict(self) -> dict[str, Any]:
        return {
            "acceptance": [[[round(rate, 4) for rate in ranks] for ranks in steps] for steps in self.acceptance],
            "begins": [round(share, 4) for share in self.begins],
        }

    @classmethod
    def from_dict(cls, values: Any, num_slots: int) -> "Profile":
        """Raises ValueError when it is not one for `num_slots` slots."""
        try:
            acceptance = tuple(tuple(tuple(map(float, ranks)) for ranks in steps) for steps in values["acceptance"])
            begins = tuple(map(float, values["begins"]))
        except (TypeError, KeyError, ValueError) as exc:
            raise ValueError(f"not a draft's profile: {exc!r}") from exc
        rates = [rate for steps in acceptance for ranks in steps for rate in ranks]
        if not (len(acceptance) == len(begins) == num_slots) or not all(0 <= rate <= 1 for rate in (*rates, *begins)):
            raise ValueError(f"not a draft's profile for {num_slots} slots")
        return cls(acceptance, begins)


def caterpillar(steps: int, ranks: int, num_slots: int) -> Budget:
    """The trees that `measured_profile` decodes with: first guesses in a chain, `ranks` - 1 others beside each."""
    tree: Tree = tuple(tuple((0, rank) for rank in range(ranks)) for _ in range(steps))
    return Budget.static([tree] * num_slots)


def measured_profile(decoder: ListDecoder, requests: Sequence[ListRequest], steps: int, ranks: int) -> Profile:
    """Decode `requests` once per rank. The decoder must be idle and speculate; its budget is put back."""
    slots, budget = decoder.trie.num_levels, decoder.budget
    passed: list[list[list[float]]] = []  # [R][L][J] how often rounds come past a step
    begun = [0.0] * slots
    for rank in range(1, ranks + 1):
        trees = caterpillar(steps, rank, slots)
        decoder.budget = FixedBudget(trees)
        rounds = decode_all(decoder, requests).rounds
        rounds = [r for r in rounds if r.draft_tokens]
        begun = [float(sum(r.tried[slot][0] for r in rounds)) for slot in range(slots)]
        came_past = [[sum(r.passed[slot][step] for r in rounds) for step in range(steps)] for slot in range(slots)]
        passed.append([[_ratio(n, begun[slot]) for n in came_past[slot]] for slot in range(slots)])
    decoder.budget = budget
    acceptance = []
    for slot in range(slots):
        reached = [1.0, *passed[0][slot]]  # along first guesses alone
        within = [[_ratio(passed[rank][slot][step], reached[step]) for rank in range(ranks)] for step in range(steps)]
        acceptance.append(tuple(tuple(_shares(rates)) for rates in within))
    total = max(sum(begun), 1)
    return Profile(tuple(acceptance), tuple(count / total for count in begun))


def _ratio(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole else 0.0


def _shares(within: Sequence[float]) -> list[float]:
    """How often each rank was it, from how often it was within the first so many; never less likely than the next."""
    shares = [max(0.0, now - before) for before, now in zip((0.0, *within), within, strict=False)]
    return sorted(shares, reverse=True)
