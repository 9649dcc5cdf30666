"""What was measured is the same when it is read again, and nothing else is taken for it."""

import json
from pathlib import Path
from typing import Any

import pytest

from model.decoding.beam_decoder import BeamDecoder
from model.decoding.beam_plan import TREE_ATTENTION, Cost, MeasuredPlan
from model.decoding.budget import LoadBudget
from model.decoding.list_decoder import ListDecoder
from model.decoding.measurements import keep, kept
from model.decoding.profile import Profile
from model.decoding.topology import Budget, FixedBudget
from tests.model.conftest import Tiny

ABOUT = {"version": "1", "rows": 4}
TREES = ((((0, 0), (0, 1)), ((1, 0),)), (), ((),), (((0, 2),),))
SECONDS = {1: {Budget(0): 0.1, Budget(2, 3): 0.2, Budget.static(TREES): 0.15}, 4: {Budget(0): 0.3}}
COSTS = {1: Cost(0.1, 0.01, 0.2), 4: Cost(0.2, 0.0)}


def decoders(tiny: Tiny) -> tuple[ListDecoder, BeamDecoder]:
    options: Any = {"num_rows": 4, "max_history_items": 6, "max_k": 10}
    lists = ListDecoder(tiny.target, tiny.draft(), tiny.trie, tiny.catalog, budget=FixedBudget(Budget(0)), **options)
    return lists, BeamDecoder(tiny.target, tiny.trie, tiny.catalog, plan=TREE_ATTENTION, draft=tiny.draft(), **options)


def write(tiny: Tiny, path: Path) -> tuple[LoadBudget, MeasuredPlan]:
    lists, beams = decoders(tiny)
    budget = LoadBudget(SECONDS, Profile.guess(4), 0.05, lists.trie.decisions_per_item)
    tree, seen = beams.tree, {4: [5.0, 2.0, 70.0]}
    plan = MeasuredPlan(COSTS, tree.deciding, tree.whole, beams.draft_width, beams.max_nodes, seen=seen)
    keep(path, ABOUT, budget, plan)
    return budget, plan


def test_what_was_measured_is_taken_over_whole(tiny: Tiny, tmp_path: Path) -> None:
    budget, plan = write(tiny, tmp_path / "m.json")
    found = kept(tmp_path / "m.json", ABOUT, *decoders(tiny), Profile.guess(4))
    assert found is not None
    assert found[0].seconds == SECONDS and found[0].by_load == budget.by_load
    assert (found[0].prompt_seconds, found[0].decisions_per_item) == (0.05, budget.decisions_per_item)
    assert found[1] == plan
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]


@pytest.mark.parametrize(
    "spoil",
    [
        {"about": {"version": "2", "rows": 4}},
        {"about": None},
        {"rounds": []},
        {"rounds": [[1, []]]},
        {"rounds": [[1, [[0, 1, None, -1.0]]]]},
        {"rounds": [[1, [[1, 1, [[]], 1.0]]]]},
        {"rounds": [[1, [[0, 1, None, "x"]]]]},
        {"rounds": [[1, [[1, 1, [[[[7, 0]]]], 1.0]]]]},
        {"prompt_seconds": float("nan")},
        {"passes": []},
        {"passes": [[float("inf"), 0.1, 0.1, 0.1]]},
        {"passes": [[1, 0.1]]},
        {"drafts": [[4, 1.0]]},
        {"drafts": [[4, 0.0, 0.0, 0.0]]},
        {"drafts": 3},
    ],
    ids=str,
)
def test_what_is_of_something_else_or_makes_no_sense_is_not_taken(
    tiny: Tiny, tmp_path: Path, spoil: dict[str, Any]
) -> None:
    path = tmp_path / "m.json"
    write(tiny, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | spoil))
    assert kept(path, ABOUT, *decoders(tiny), Profile.guess(4)) is None


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null"])
def test_what_cannot_be_read_is_not_taken(tiny: Tiny, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "m.json").write_text(text)
    assert kept(tmp_path / "m.json", ABOUT, *decoders(tiny), Profile.guess(4)) is None
