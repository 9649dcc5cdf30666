"""Measures what a beam decoder's passes cost on this device, and how good its draft is, for `MeasuredPlan`.

At warm-up, as the list decoder's budget is: passes of different numbers of nodes are timed at each load, and a line is
laid through them (seconds a pass, seconds a node). Knows decoders and numbers; nothing of queues.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from model.decoding.beam_decoder import BeamDecoder
from model.decoding.beam_plan import DRAFT_FREE, TREE_ATTENTION, Ahead, Cost, FixedPlan, MeasuredPlan, Plan, Seen
from model.decoding.beam_request import BeamRequest, BeamStats

LOADS = (1, 4, 16)  # a pass over more rows is arithmetic: the line through these goes on
BEAMS = (1, 10, 40)
MANY = 8  # rows from which passes take long


@dataclass
class Rehearsal(FixedPlan):
    """Drafts whenever it can, and keeps what it hears."""

    heard: list[Seen] = field(default_factory=list)

    def observe(self, seen: Seen) -> None:
        self.heard.append(seen)


def measured_plan(decoder: BeamDecoder, requests: Sequence[BeamRequest], repeats: int = 3) -> MeasuredPlan:
    """Time passes over `requests` (repeated as needed) at each load the decoder has rows for. The decoder must be idle;
    it is idle again afterwards, and its plan is the one returned."""
    num_rows, tree = len(decoder.rows.held), decoder.tree
    rehearsal = Rehearsal("rehearsal", Ahead.DRAFT, MeasuredPlan.draft_to, MeasuredPlan.below)
    costs = {}
    for load in sorted({min(load, num_rows) for load in LOADS}):
        points: list[tuple[int, float]] = []
        drafting: list[float] = []
        # Two sizes give a line; more are for small loads, whose passes are quick and noisy.
        for k in sorted({min(k, decoder.max_k) for k in (BEAMS if load < MANY else BEAMS[1:2])}):
            batch = [replace(requests[i % len(requests)], request_id=f"warm-{i}", k=k) for i in range(load)]
            for _ in range(repeats if load < 4 else 1):
                for tried in (TREE_ATTENTION, DRAFT_FREE):
                    points += [(s.target_tokens, s.verify_seconds) for s in _rounds(decoder, batch, tried)]
                if decoder.draft:
                    points += [
                        (s.target_tokens, s.verify_seconds) for s in _rounds(decoder, batch, rehearsal, drafting)
                    ]
        each, node = line(points)
        costs[load] = Cost(each, node, median(drafting) / load if drafting else 0.0)
    plan = MeasuredPlan(costs, tree.deciding, tree.whole, decoder.draft_width, decoder.max_nodes)
    for seen in rehearsal.heard:
        plan.observe(seen)
    decoder.plan = plan
    return plan


def line(points: Iterable[tuple[int, float]]) -> tuple[float, float]:
    """`each`, `node` of seconds = each + node * nodes, least squares, neither negative. Passes of equally many nodes
    count once, by their median: one slow moment must not tilt the line."""
    by_nodes: dict[int, list[float]] = {}
    for nodes, seconds in points:
        by_nodes.setdefault(nodes, []).append(seconds)
    medians = [(nodes, median(found)) for nodes, found in by_nodes.items()]
    if not medians:
        return 0.0, 0.0
    count = len(medians)
    mean_nodes, mean_seconds = sum(n for n, _ in medians) / count, sum(s for _, s in medians) / count
    spread = sum((n - mean_nodes) ** 2 for n, _ in medians)
    slope = sum((n - mean_nodes) * (s - mean_seconds) for n, s in medians) / spread if spread else 0.0
    slope = max(0.0, slope)
    each = mean_seconds - slope * mean_nodes
    if each < 0:
        return 0.0, sum(n * s for n, s in medians) / max(1, sum(n * n for n, _ in medians))
    return each, slope


def _rounds(
    decoder: BeamDecoder, batch: Sequence[BeamRequest], plan: Plan, drafting: list[float] | None = None
) -> list[BeamStats]:
    """Decode `batch` to the end; the rounds that all of it took part in."""
    decoder.plan = plan
    decoder.admit(batch)
    found = []
    while decoder.rows.in_use:
        stats = decoder.round()[1]
        if stats.rows == len(batch):
            found.append(stats)
            if drafting is not None and stats.draft_seconds:
                drafting.append(stats.draft_seconds)
    return found
