from dataclasses import replace

import pytest

from model.decoding.beam_plan import (
    ATSPEED,
    DRAFT_FREE,
    MAX_FIRST_CODES,
    PROBE_EVERY,
    TREE_ATTENTION,
    Ahead,
    Cost,
    MeasuredPlan,
    Question,
    Seen,
    draft_beams,
)

QUESTION = Question(rows=1, level=1, k=10, alone=10, whole=40, draft=False)
# Seconds of a pass and of a node: passes are dear, nodes are dear.
DEAR_PASSES, DEAR_NODES = Cost(1.0, 0.001, 0.1), Cost(0.001, 1.0, 0.1)


def plan(cost: Cost, **changes: object) -> MeasuredPlan:
    values: dict[str, object] = {"costs": {1: cost}, "deciding": [1.0, 1.0, 0.5, 0.1], "whole": [60.0, 5.0, 1.5, 0.2]}
    return MeasuredPlan(**values | {"width": 12, "room": 256} | changes)  # type: ignore[arg-type]


def test_fixed_plans_take_what_they_are_named_after_where_it_can_be_had() -> None:
    assert TREE_ATTENTION.ahead(QUESTION._replace(draft=True)) is Ahead.NOTHING
    assert DRAFT_FREE.ahead(QUESTION) is Ahead.WHOLE
    assert DRAFT_FREE.ahead(QUESTION._replace(whole=None)) is Ahead.NOTHING
    assert DRAFT_FREE.ahead(QUESTION._replace(level=0, whole=MAX_FIRST_CODES)) is Ahead.WHOLE
    assert DRAFT_FREE.ahead(QUESTION._replace(level=0, whole=MAX_FIRST_CODES + 1)) is Ahead.NOTHING
    assert ATSPEED.ahead(QUESTION._replace(draft=True)) is Ahead.DRAFT
    assert ATSPEED.ahead(QUESTION) is Ahead.NOTHING


def test_where_passes_are_dear_everything_rides_and_where_nodes_are_dear_nothing_does() -> None:
    assert plan(DEAR_PASSES).ahead(QUESTION) is Ahead.WHOLE
    assert plan(DEAR_NODES).ahead(QUESTION) is Ahead.NOTHING
    assert plan(DEAR_PASSES).ahead(QUESTION._replace(whole=None)) is Ahead.NOTHING


def test_first_codes_ride_with_the_prompt_when_what_lies_below_them_is_too_much_for_one_pass() -> None:
    asked = QUESTION._replace(level=0, alone=0, whole=60)
    assert plan(DEAR_PASSES).ahead(asked) is Ahead.NOTHING, "after the prompt's one pass is enough"
    wide = [60.0, 72.0, 1.5, 0.2]
    assert plan(DEAR_PASSES, whole=wide).ahead(asked) is Ahead.WHOLE
    assert plan(DEAR_NODES, whole=wide).ahead(asked) is Ahead.NOTHING


def test_company_shares_the_price_of_a_pass_so_less_rides_along() -> None:
    shared = plan(Cost(1.0, 0.02), costs={1: Cost(1.0, 0.02), 64: Cost(1.0, 0.02)})
    assert shared.ahead(QUESTION) is Ahead.WHOLE
    assert shared.ahead(QUESTION._replace(rows=64)) is Ahead.NOTHING


def test_each_load_has_its_own_costs_and_more_than_was_measured_has_the_last() -> None:
    measured = plan(DEAR_PASSES, costs={1: DEAR_PASSES, 8: DEAR_NODES})
    ways = [measured.ahead(QUESTION._replace(rows=rows)) for rows in (1, 2, 8, 500)]
    assert ways == [Ahead.WHOLE, Ahead.NOTHING, Ahead.NOTHING, Ahead.NOTHING]


def test_what_is_left_after_the_last_decision_costs_nothing_and_never_less_than_nothing() -> None:
    measured = plan(DEAR_PASSES)
    assert measured.left(QUESTION.rows, QUESTION.k, 4) == 0
    assert (
        0
        < measured.left(QUESTION.rows, QUESTION.k, 3)
        < measured.left(QUESTION.rows, QUESTION.k, 2)
        <= measured.left(QUESTION.rows, QUESTION.k, 1)
    )
    certain = plan(DEAR_PASSES, deciding=[1.0, 1.0, 0.0, 0.0], whole=[9.0, 9.0, 0.0, 0.0])
    assert certain.left(QUESTION.rows, QUESTION.k, 2) == 0


def test_a_draft_is_asked_while_it_is_right_and_given_up_when_it_is_not_and_tried_now_and_then() -> None:
    asked = QUESTION._replace(draft=True, whole=None)
    measured = plan(Cost(1.0, 0.01, 0.05))
    for _ in range(100):
        measured.observe(Seen(10, 20, hit=True))
    assert measured.ahead(asked) is Ahead.DRAFT
    for _ in range(600):
        measured.observe(Seen(10, 60, hit=False))
    ways = [measured.ahead(asked) for _ in range(4 * PROBE_EVERY)]
    assert ways.count(Ahead.DRAFT) == 4
    for _ in range(600):
        measured.observe(Seen(11, 20, hit=True))
    assert measured.ahead(asked) is Ahead.DRAFT, "11 beams are about as many as 10"


def test_a_draft_that_is_right_for_few_beams_is_not_thought_right_for_many() -> None:
    measured = plan(Cost(1.0, 0.001, 0.1))
    for _ in range(300):
        measured.observe(Seen(1, 5, hit=True))
        measured.observe(Seen(50, 60, hit=False))
    asked = Question(1, 1, 1, 1, None, True)
    assert measured.ahead(asked) is Ahead.DRAFT
    assert measured.ahead(asked._replace(k=50, alone=50)) is Ahead.NOTHING


def test_plans_keep_apart_what_they_have_seen() -> None:
    first = plan(DEAR_PASSES)
    first.observe(Seen(1, 5, hit=True))
    assert replace(plan(DEAR_PASSES)).seen == {}
    assert first.left(QUESTION.rows, QUESTION.k, 2) == pytest.approx(
        plan(DEAR_PASSES).left(QUESTION.rows, QUESTION.k, 2)
    )


def test_for_another_catalog_a_plan_keeps_what_it_learned_and_takes_the_catalogs_shape() -> None:
    first = plan(DEAR_PASSES)
    first.observe(Seen(1, 5, hit=False))
    other = first.over([1.0, 1.0, 1.0, 1.0], [900.0, 500.0, 90.0, 9.0])
    assert other.seen == first.seen and other.costs == first.costs
    assert other.left(QUESTION.rows, QUESTION.k, 2) > first.left(QUESTION.rows, QUESTION.k, 2)
    assert ATSPEED.over([1.0], [1.0]) is ATSPEED


def test_a_draft_searches_with_some_beams_to_spare_and_never_with_fewer_than_the_target_keeps() -> None:
    assert [draft_beams(k, 128) for k in (1, 10, 20, 100, 200)] == [5, 19, 34, 128, 200]
