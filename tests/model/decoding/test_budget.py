import pytest

from model.decoding.budget import LoadBudget, expected_decisions, measured_budget
from model.decoding.list_decoder import Budget, ListDecoder
from model.decoding.request import ListRequest
from tests.model.conftest import Tiny


def test_a_round_is_expected_to_gain_its_own_choice_and_what_survives() -> None:
    assert expected_decisions(Budget(0), [0.9, 0.5]) == 1.0
    assert expected_decisions(Budget(2), [0.9, 0.5, 0.2]) == pytest.approx(2.4)


def test_a_load_takes_the_budget_of_the_next_measured_one() -> None:
    budget = LoadBudget({8: Budget(2), 1: Budget(4), 32: Budget(0)})
    assert [budget(n) for n in (1, 2, 8, 9, 32, 50)] == [Budget(4), Budget(2), Budget(2), *[Budget(0)] * 3]


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
