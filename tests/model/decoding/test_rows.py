import pytest

from model.decoding.list_decoder import ListDecoder
from model.decoding.request import ListRequest
from model.decoding.topology import Budget, FixedBudget
from model.draft.draft import Draft
from tests.model.conftest import Tiny

WIDE = Budget(2, 2)


def of_three(tiny: Tiny, draft: Draft | None, budget: Budget) -> ListDecoder:
    return ListDecoder(
        tiny.target,
        draft,
        tiny.trie,
        tiny.catalog,
        num_rows=3,
        max_history_items=6,
        max_k=20,
        budget=FixedBudget(budget),
    )


@pytest.mark.parametrize(
    "budgets", [(Budget(3), Budget(0)), (Budget(0), Budget(3)), (WIDE, Budget(3)), (Budget(3), WIDE)]
)
def test_rows_that_go_back_write_the_same_lists_again(tiny: Tiny, budgets: tuple[Budget, Budget]) -> None:
    """Also where rounds without drafts have ended drafting, and where other rounds left other keys in the caches."""
    before, after = budgets
    decoder = of_three(tiny, tiny.draft(), Budget(1))
    requests = [
        ListRequest(str(i), tuple(tiny.codes[i : i + 1 + i]), 12, temperature=0.5 * i, seed=i) for i in range(3)
    ]
    decoder.admit(requests)
    decoder.round()
    moment = decoder.rows.moment()
    written = [len(decoder.rows.row(i).items) for i in range(3)]
    decoder.budget = FixedBudget(before)
    for _ in range(2):
        decoder.round()
    assert decoder.rows.in_use == [0, 1, 2]
    decoder.rows.back_to(moment)
    assert [len(decoder.rows.row(i).items) for i in range(3)] == written
    decoder.budget = FixedBudget(after)
    found, drafted = {}, 0
    while decoder.rows.in_use:
        results, stats = decoder.round()
        found |= {result.request_id: result for result in results}
        drafted += stats.draft_tokens
    assert (drafted > 0) == (after.steps > 0)
    again = of_three(tiny, None, Budget(0))
    again.admit(requests)
    while again.rows.in_use:
        for result in again.round()[0]:
            assert [item.codes for item in found[result.request_id].items] == [item.codes for item in result.items]
    decoder.rows.check_integrity()
