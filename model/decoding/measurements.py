"""What a warm-up measured, kept in a file for the next process that is to serve the same in the same place.

That one begins sooner, and does not measure the load it comes into: the first of them began before there was any. What
cannot be read, or is of something else, is measured anew. Knows numbers and JSON; no tensors.
"""

import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.decoding.beam_decoder import BeamDecoder
from model.decoding.beam_plan import Cost, MeasuredPlan
from model.decoding.budget import LoadBudget
from model.decoding.list_decoder import ListDecoder
from model.decoding.profile import Profile
from model.decoding.topology import Budget


def keep(path: Path, about: Mapping[str, Any], budget: LoadBudget, plan: MeasuredPlan) -> None:
    """Write what was measured of `about` (JSON). Raises OSError."""
    document = {
        "about": about,
        "rounds": [
            [load, [[*candidate, seconds] for candidate, seconds in costs.items()]]
            for load, costs in budget.seconds.items()
        ],
        "prompt_seconds": budget.prompt_seconds,
        "passes": [[load, *cost] for load, cost in plan.costs.items()],
        "drafts": [[size, *found] for size, found in plan.seen.items()],
    }
    half = path.with_name(f"{path.name}.{os.getpid()}")  # another process may do the same
    half.write_text(json.dumps(document))
    half.replace(path)


def kept(
    path: Path, about: Mapping[str, Any], lists: ListDecoder, beams: BeamDecoder, profile: Profile
) -> tuple[LoadBudget, MeasuredPlan] | None:
    """What was measured of `about`, for these decoders; None where nothing is known of it."""
    try:
        document = json.loads(path.read_text())
        if document["about"] != about:
            return None
        seconds = {int(load): dict(map(_candidate, costs)) for load, costs in document["rounds"]}
        prompt = _seconds(document["prompt_seconds"])
        passes = {int(load): Cost(*map(_seconds, cost)) for load, *cost in document["passes"]}
        drafts = {int(size): [_seconds(value) for value in found] for size, *found in document["drafts"]}
        if not passes or any(len(found) != 3 or not found[0] for found in drafts.values()):
            return None
        budget = LoadBudget(seconds, profile, prompt, lists.trie.decisions_per_item)
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        return None
    tree = beams.tree
    return budget, MeasuredPlan(passes, tree.deciding, tree.whole, beams.draft_width, beams.max_nodes, seen=drafts)


def processor() -> str:
    """What the processor that is measured calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())


def _candidate(fields: list[Any]) -> tuple[Budget, float]:
    steps, width, trees, seconds = fields
    if trees is None:
        return Budget(int(steps), int(width)), _seconds(seconds)
    shaped = [tuple(tuple((int(p), int(r)) for p, r in step) for step in tree) for tree in trees]
    return Budget.static(shaped), _seconds(seconds)


def _seconds(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError("should be a number, not below zero")
    return float(value)
