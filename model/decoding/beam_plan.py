"""Which nodes ride along in a pass over beams: none, whole sub-trees, or what a draft proposes.

Beams alone are plain beam search (a level a pass). Whole sub-trees need no draft: all first codes ride in the prompt's
pass, or everything below the beams in theirs, and the request is done. A draft rides when its guess is cheaper than the
pass it may save. All of it is exact, so a plan decides about time only. `MeasuredPlan` decides per request and load, by
what passes cost on this device (measured at warm-up, as the list decoder's budget is) and how often drafts were right.

Knows counts and seconds; nothing of tensors, tries or requests.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple, Protocol

PRIOR = 8.0  # drafts that the assumption "every second one is right" is worth
FADE = 0.98  # of what was seen, a draft
MAX_FIRST_CODES = 128  # that ride in every prompt's pass by a fixed plan: more cost more than the pass they save
PROBE_EVERY = 256  # requests that could have been drafted and were not


class Ahead(Enum):
    """What rides along with the beams of a row."""

    NOTHING = "nothing"
    WHOLE = "whole"
    DRAFT = "draft"


class Question(NamedTuple):
    """A row about to be passed over: `rows` in the pass, the `level` its beams have reached (0: the prompt itself is
    to be read), `k` beams, the nodes to pass over `alone`, those of the `whole` sub-trees (at level 0: all first codes;
    None: no room), and whether a `draft` can be asked."""

    rows: int
    level: int
    k: int
    alone: int
    whole: int | None
    draft: bool


class Seen(NamedTuple):
    """How a draft fared: for `k` beams it cost `nodes`, and `hit` says whether that pass was the last one."""

    k: int
    nodes: int
    hit: bool


def draft_beams(k: int, most: int) -> int:
    """How many beams a draft searches with for `k` of the target's, where it may with `most`. Fewer than the target
    keeps could never hold all of them, and those it is wrong about want some to spare: half as many again and four are
    where, measured on a CPU, another one costs more than the pass it may save."""
    return max(k, min(most, k + k // 2 + 4))


class Plan(Protocol):
    """Decides what rides along."""

    name: str
    draft_to: int
    below: bool

    def ahead(self, question: Question) -> Ahead: ...

    def observe(self, seen: Seen) -> None: ...

    def over(self, deciding: Sequence[float], whole: Sequence[float]) -> "Plan":
        """The same plan for another catalog's shape, with all that it has learned."""


@dataclass
class FixedPlan:
    """The same answer always: `wanted` where it can be had. `draft_to`: how many codes deep a draft searches (never
    to the last: leaves are not read); `below`: the whole sub-trees of what it found at the last one ride too."""

    name: str
    wanted: Ahead
    draft_to: int = 0
    below: bool = False

    def ahead(self, question: Question) -> Ahead:
        if self.wanted is Ahead.DRAFT and question.draft:
            return Ahead.DRAFT
        most = MAX_FIRST_CODES if question.level == 0 else math.inf
        if self.wanted is Ahead.WHOLE and question.whole is not None and question.whole <= most:
            return Ahead.WHOLE
        return Ahead.NOTHING

    def observe(self, seen: Seen) -> None:
        del seen

    def over(self, deciding: Sequence[float], whole: Sequence[float]) -> "FixedPlan":
        del deciding, whole
        return self


TREE_ATTENTION = FixedPlan("tree-attention", Ahead.NOTHING)
DRAFT_FREE = FixedPlan("draft-free", Ahead.WHOLE)
ATSPEED = FixedPlan("atspeed-s", Ahead.DRAFT, draft_to=64)


class Cost(NamedTuple):
    """Seconds of a pass: `each` plus `node` times the nodes in it, and of a `draft` (a request's)."""

    each: float
    node: float
    draft: float = 0.0


@dataclass
class MeasuredPlan:
    """The cheapest by measured `costs` (by rows in a pass) and the catalog's shape: how likely a beam has a choice left
    at each depth (`deciding`), and how many decisions the `whole` sub-tree below it holds. There is `room` for so many
    nodes to ride along. A draft searches at most `width` beams, two codes deep, and brings the sub-trees below its
    guesses: the codes after the second are nearly forced. `seen`: of requests of about so many beams, drafts tried,
    drafts that were right, and nodes they took."""

    costs: Mapping[int, Cost]
    deciding: Sequence[float]
    whole: Sequence[float]
    width: int
    room: int
    name: str = "planner"
    draft_to: int = 2
    below: bool = True
    seen: dict[int, list[float]] = field(default_factory=dict)
    _left: dict[tuple[int, int, int], float] = field(default_factory=dict)
    _by_rows: dict[int, Cost] = field(default_factory=dict)
    _refused: int = 0

    def ahead(self, question: Question) -> Ahead:
        cost = self._cost(question.rows)
        share = cost.each / question.rows if question.level else 0.0  # the prompt's pass is paid for anyway
        prices = {
            Ahead.NOTHING: share + cost.node * question.alone + self.left(question.rows, question.k, question.level + 1)
        }
        if question.whole is not None:
            after = self.left(question.rows, question.k, 2) if question.level == 0 else 0.0
            prices[Ahead.WHOLE] = share + cost.node * question.whole + after
        if question.draft and question.level < len(self.whole):
            tried, hits, nodes = self._of(question.k)
            missed = (1 - hits / tried) * self.left(question.rows, question.k, question.level + 1)
            prices[Ahead.DRAFT] = share + cost.draft + cost.node * (question.alone + nodes / tried) + missed
        cheapest = min(prices, key=lambda way: prices[way])
        if Ahead.DRAFT in prices and cheapest is not Ahead.DRAFT:  # tried now and then: it may pay again
            self._refused += 1
            return cheapest if self._refused % PROBE_EVERY else Ahead.DRAFT
        return cheapest

    def left(self, rows: int, k: int, level: int) -> float:
        """Seconds from `k` beams at `level` to the end without a draft, by the catalog's averages."""
        if level >= len(self.deciding):
            return 0.0
        if (rows, k, level) not in self._left:
            cost, deciding = self._cost(rows), self.deciding[level]
            # A pass is needed unless no beam has a choice left.
            share = (1 - (1 - deciding) ** k) * cost.each / rows
            alone = share + cost.node * k * deciding + self.left(rows, k, level + 1)
            whole = k * self.whole[level]
            found = min(alone, share + cost.node * whole) if whole <= self.room else alone
            self._left[rows, k, level] = found
        return self._left[rows, k, level]

    def observe(self, seen: Seen) -> None:
        found = self._of(seen.k)
        for place, value in enumerate((1.0, float(seen.hit), float(seen.nodes))):
            found[place] = FADE * found[place] + value

    def over(self, deciding: Sequence[float], whole: Sequence[float]) -> "MeasuredPlan":
        return replace(self, deciding=deciding, whole=whole, _left={})

    def _of(self, k: int) -> list[float]:
        """Drafts tried, drafts that were right, nodes they took, of requests of about `k` beams."""
        nodes = draft_beams(k, self.width) * sum(self.whole[2:3])
        return self.seen.setdefault(k.bit_length(), [PRIOR, PRIOR / 2, PRIOR * nodes])

    def _cost(self, rows: int) -> Cost:
        """That of the smallest load measured which is no smaller."""
        if rows not in self._by_rows:
            above = [load for load in self.costs if load >= rows]
            self._by_rows[rows] = self.costs[min(above) if above else max(self.costs)]
        return self._by_rows[rows]
