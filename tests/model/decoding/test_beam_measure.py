import pytest

from model.decoding.beam_decoder import BeamDecoder
from model.decoding.beam_measure import line, measured_plan
from model.decoding.beam_plan import TREE_ATTENTION, MeasuredPlan
from model.decoding.beam_request import BeamRequest
from tests.model.conftest import Tiny
from tests.model.decoding.test_beam_decoder import assert_same, decode_all, some_requests


@pytest.mark.parametrize("drafting", [False, True])
def test_a_measured_decoder_is_idle_again_and_answers_as_before(tiny: Tiny, drafting: bool) -> None:
    running = BeamDecoder(
        tiny.target,
        tiny.trie,
        tiny.catalog,
        num_rows=5,
        max_history_items=6,
        max_k=30,
        plan=TREE_ATTENTION,
        draft=tiny.draft() if drafting else None,
        draft_width=8,
    )
    golden = [BeamRequest(f"golden-{i}", (code,), 5) for i, code in enumerate(tiny.codes[:3])]
    plan = measured_plan(running, golden)
    assert isinstance(plan, MeasuredPlan) and running.plan is plan
    assert set(plan.costs) == {1, 4, 5}
    assert all(cost.each >= 0 and cost.node >= 0 and cost.each + cost.node > 0 for cost in plan.costs.values())
    assert all((cost.draft > 0) == drafting for cost in plan.costs.values())
    assert bool(plan.seen) == drafting
    assert running.rows.num_free == 5
    running.rows.check_integrity()
    requests = some_requests(tiny, 12)
    assert_same(tiny, requests, decode_all(running, requests)[0])


def test_the_line_goes_through_the_medians() -> None:
    points = [(nodes, 0.002 + 0.0001 * nodes) for nodes in (1, 10, 40, 200)]
    assert line(points) == pytest.approx((0.002, 0.0001))
    assert line([*points * 2, (10, 9.0)]) == pytest.approx((0.002, 0.0001)), "one slow moment"


def test_nothing_is_ever_free_or_less() -> None:
    assert line([]) == (0.0, 0.0)
    assert line([(5, 0.01)]) == pytest.approx((0.01, 0.0))
    assert line([(1, 0.02), (10, 0.01)]) == pytest.approx((0.015, 0.0))
    each, node = line([(10, 0.001), (100, 0.1)])
    assert each == 0.0 and node > 0
