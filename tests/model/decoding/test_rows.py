import pytest

from model.decoding.request import ListRequest
from model.decoding.topology import Budget, FixedBudget
from tests.model.conftest import Tiny
from tests.model.decoding.test_list_decoder import decoder

WIDE = Budget(2, 2)


@pytest.mark.parametrize(
    "budgets", [(Budget(3), Budget(0)), (Budget(0), Budget(3)), (WIDE, Budget(3)), (Budget(3), WIDE)]
)
def test_rows_that_go_back_write_the_same_lists_again(tiny: Tiny, budgets: tuple[Budget, Budget]) -> None:
    """Also where rounds without drafts have ended drafting, and where other rounds left other keys in the caches."""
    before, after = budgets
    running = decoder(tiny, tiny.draft(), "chain", num_rows=3)
    running.budget = FixedBudget(Budget(1))
    requests = [
        ListRequest(str(i), tuple(tiny.codes[i : i + 1 + i]), 12, temperature=0.5 * i, seed=i) for i in range(3)
    ]
    running.admit(requests)
    running.round()
    moment = running.rows.moment()
    written = [len(running.rows.row(i).items) for i in range(3)]
    running.budget = FixedBudget(before)
    for _ in range(2):
        running.round()
    assert running.rows.in_use == [0, 1, 2]
    running.rows.back_to(moment)
    assert [len(running.rows.row(i).items) for i in range(3)] == written
    running.budget = FixedBudget(after)
    found, drafted = {}, 0
    while running.rows.in_use:
        results, stats = running.round()
        found |= {result.request_id: result for result in results}
        drafted += stats.draft_tokens
    assert (drafted > 0) == (after.steps > 0)
    again = decoder(tiny, None, "forced", num_rows=3)
    again.admit(requests)
    while again.rows.in_use:
        for result in again.round()[0]:
            assert [item.codes for item in found[result.request_id].items] == [item.codes for item in result.items]
    running.rows.check_integrity()
