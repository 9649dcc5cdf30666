import pytest

from model.decoding.budget import PROBE_EVERY, LoadBudget, expected_decisions, measured_budget
from model.decoding.list_decoder import Budget, ListDecoder
from model.decoding.offline import decode_all
from model.decoding.request import ListRequest, RoundStats
from tests.model.conftest import Tiny


def test_a_round_is_expected_to_gain_its_own_choice_and_what_survives() -> None:
    assert expected_decisions(Budget(0), [0.9, 0.5]) == 1.0
    assert expected_decisions(Budget(2), [0.9, 0.5, 0.2]) == pytest.approx(2.4)


COSTS = {1: {Budget(0): 1.0, Budget(2): 1.5, Budget(4): 2.0}, 8: {Budget(0): 1.0, Budget(2): 3.0}}


def rounds(drafted: tuple[int, ...], accepted: tuple[int, ...]) -> RoundStats:
    none = (0,)
    return RoundStats(1, 0.0, 0.0, 1, sum(drafted), sum(accepted), 0, drafted, accepted, none, none)


def test_a_load_takes_what_is_cheapest_a_decision_at_the_next_measured_one() -> None:
    budget = LoadBudget(COSTS, [0.9, 0.8, 0.7, 0.6])
    assert [budget(n) for n in (1, 2, 8, 50)] == [Budget(4), Budget(0), Budget(0), Budget(0)]


def test_survival_begins_with_what_it_was_told_and_moves_to_what_is_seen() -> None:
    budget = LoadBudget(COSTS, [0.9, 0.72, 0.6, 0.3])
    assert budget.survival == pytest.approx([0.9, 0.72, 0.6, 0.3])
    for _ in range(1500):
        budget.observe(rounds((10, 10, 10, 10), (5, 4, 1, 1)))
    assert budget.survival == pytest.approx([0.5, 0.4, 0.1, 0.1], abs=0.03)


def test_steps_nobody_drafts_keep_their_share_of_the_steps_before() -> None:
    budget = LoadBudget(COSTS, [0.8, 0.4])
    for _ in range(1500):
        budget.observe(rounds((10,), (4,)))
    assert budget.survival == pytest.approx([0.4, 0.2], abs=0.02)


def test_speculation_ends_when_nothing_is_accepted_is_tried_now_and_then_and_comes_back() -> None:
    budget = LoadBudget(COSTS, [0.9, 0.8, 0.7, 0.6])
    for _ in range(400):
        budget.observe(rounds((1, 1, 1, 1), (0, 0, 0, 0)))
    asked = [budget(1) for _ in range(10 * PROBE_EVERY)]
    assert 0 < sum(b.steps > 0 for b in asked) <= 10
    assert asked.count(Budget(0)) >= 0.98 * len(asked)
    for _ in range(800):
        budget.observe(rounds((1, 1, 1, 1), (1, 1, 1, 1)))
    assert budget(1).steps > 0


def test_a_budget_without_loads_or_candidates_is_refused() -> None:
    for costs in ({}, {1: {}}):
        with pytest.raises(ValueError, match="load"):
            LoadBudget(costs, [0.5])


def measured(tiny: Tiny, survival: list[float]) -> tuple[ListDecoder, LoadBudget]:
    decoder = ListDecoder(
        tiny.target,
        tiny.draft(),
        tiny.trie,
        tiny.catalog,
        num_rows=2,
        max_history_items=6,
        max_k=10,
        budget=lambda rows: Budget(3),
    )
    requests = [ListRequest(str(i), (tiny.codes[i],), 10) for i in range(2)]
    return decoder, measured_budget(decoder, requests, survival, repeats=2)


def test_a_draft_that_never_survives_is_not_asked(tiny: Tiny) -> None:
    decoder, budget = measured(tiny, [0.0] * 6)
    assert set(budget.by_load.values()) == {Budget(0)}
    assert decoder.budget is budget
    assert decoder.rows.num_free == 2


def test_a_draft_that_always_survives_is_asked_for_a_lot(tiny: Tiny) -> None:
    assert measured(tiny, [100.0] * 6)[1](1).steps >= 1


def test_a_decoder_learns_from_its_own_rounds(tiny: Tiny) -> None:
    decoder, budget = measured(tiny, [0.99] * 4)
    before = budget.survival
    decode_all(decoder, [ListRequest(str(i), (tiny.codes[i],), 10) for i in range(20)])
    assert budget.survival != before
