from typing import Any

import pytest

from model.decoding.budget import PROBE_EVERY, PROBE_ROUNDS, LoadBudget, candidates, expected_decisions, measured_budget
from model.decoding.list_decoder import ListDecoder
from model.decoding.offline import decode_all
from model.decoding.profile import Profile
from model.decoding.request import ListRequest, RoundStats
from model.decoding.topology import Budget, FixedBudget
from tests.model.conftest import Tiny

GOOD = Profile.guess(1, [0.9, 0.9, 0.9, 0.8])
COSTS = {1: {Budget(0): 1.0, Budget(2): 1.5, Budget(4): 2.0}, 8: {Budget(0): 1.0, Budget(2): 3.0}}
FORK = Budget.static([(((0, 0), (0, 1)),), (((0, 0), (0, 1)),)])
OPEN = Profile((((0.5, 0.4), (0.5, 0.2)), ((0.9, 0.05), (0.9, 0.05))), (0.5, 0.5))


def rounds(tried: tuple[tuple[int, ...], ...], passed: tuple[tuple[int, ...], ...]) -> RoundStats:
    drafted, accepted = (tuple(map(sum, zip(*counts, strict=True))) for counts in (tried, passed))
    total = (sum(drafted), sum(accepted))
    return RoundStats(1, 0.0, 0.0, 1, *total, 0, drafted, accepted, (0,), (0,), tried, passed)


def test_a_round_is_expected_to_gain_its_own_choice_and_what_survives() -> None:
    profile = Profile.guess(1, [0.9, 0.5])
    assert expected_decisions(Budget(0), profile) == 1.0
    assert expected_decisions(Budget(2), profile) == pytest.approx(1 + 0.9 + 0.45)


def test_a_tree_is_expected_to_gain_what_any_of_its_nodes_does_slot_by_slot() -> None:
    assert expected_decisions(FORK, OPEN) == pytest.approx(1 + (0.9 + 0.95) / 2)


def test_a_load_takes_what_is_cheapest_a_decision_at_the_next_measured_one() -> None:
    budget = LoadBudget(COSTS, GOOD)
    assert [budget(n) for n in (1, 2, 8, 50)] == [Budget(4), Budget(0), Budget(0), Budget(0)]


def see(budget: LoadBudget, right: float, rounds_seen: int) -> list[Budget]:
    """Rounds of one row in which every first guess is right or none is, whatever the budget asks for."""
    asked: list[Budget] = []
    for _ in range(rounds_seen):
        asked.append(budget(1))
        steps = asked[-1].steps
        tried = tuple(1 if right or not step else 0 for step in range(steps))
        budget.observe(rounds((tried,), ((int(right),) * steps,)))
    return asked


def test_what_is_expected_begins_with_the_profile_and_moves_to_what_is_seen() -> None:
    budget = LoadBudget({1: {Budget(0): 100.0, Budget(4): 1.0}}, GOOD)
    assert budget.decisions(Budget(4)) == pytest.approx(1 + 0.9 + 0.81 + 0.729 + 0.5832)
    for _ in range(1500):
        assert budget(1) == Budget(4)
        budget.observe(rounds(((10, 5, 4, 1),), ((5, 4, 1, 1),)))
    assert budget.decisions(Budget(4)) == pytest.approx(1 + 0.5 + 0.4 + 0.1 + 0.1, abs=0.1)


def test_what_is_seen_of_one_slot_says_nothing_of_another() -> None:
    budget = LoadBudget({1: {Budget(0): 100.0, FORK: 1.0}}, OPEN)
    for _ in range(1500):
        assert budget(1) == FORK
        budget.observe(rounds(((1,), (1,)), ((0,), (1,))))
    left, right = (budget.decisions(Budget(0)), budget.decisions(FORK))
    assert left == 1.0
    assert right == pytest.approx(1 + 0.95 / 2, abs=0.15)  # half the rounds begin where nothing is right any more


def test_speculation_ends_when_nothing_is_accepted_is_tried_now_and_then_and_comes_back() -> None:
    budget = LoadBudget(COSTS, GOOD)
    see(budget, 0, 400)
    asked = see(budget, 0, 10 * PROBE_EVERY)
    assert 0 < sum(b.steps > 0 for b in asked) <= 10
    assert asked.count(Budget(0)) >= 0.98 * len(asked)
    see(budget, 1, 300 * PROBE_EVERY)
    assert budget(1).steps > 0


def test_a_plain_round_measured_in_a_slow_moment_does_not_make_a_useless_draft_pay() -> None:
    """What drafts does all that a plain round does, and more. Doubt lets it save a little for ever, less than what a
    prompt costs."""
    budget = LoadBudget({1: {Budget(0): 1.5, Budget(2): 1.1, Budget(4): 1.3}}, GOOD, 1.0)
    see(budget, 0, 400)
    assert not budget.drafts(1, 10)


def test_a_budget_without_loads_or_candidates_is_refused() -> None:
    for costs in ({}, {1: {}}):
        with pytest.raises(ValueError, match="load"):
            LoadBudget(costs, GOOD)


def test_candidates_are_none_chains_and_trees_within_the_bounds() -> None:
    found = candidates(OPEN, max_steps=2, max_nodes=6)
    assert found[0] == Budget(0)
    assert Budget(2) in found
    assert any(budget.trees for budget in found)
    assert all(budget.steps <= 2 and budget.steps * budget.width <= 6 for budget in found)


def drafting(tiny: Tiny, num_rows: int, max_k: int = 10) -> ListDecoder:
    return ListDecoder(
        tiny.target,
        tiny.draft(),
        tiny.trie,
        tiny.catalog,
        num_rows=num_rows,
        max_history_items=6,
        max_k=max_k,
        budget=FixedBudget(Budget(3)),
    )


def measured(tiny: Tiny, acceptance: list[float]) -> tuple[ListDecoder, LoadBudget]:
    decoder = drafting(tiny, 2)
    requests = [ListRequest(str(i), (tiny.codes[i],), 10) for i in range(2)]
    return decoder, measured_budget(decoder, requests, Profile.guess(tiny.trie.num_levels, acceptance), repeats=2)


def test_a_draft_that_is_never_right_is_not_asked(tiny: Tiny) -> None:
    decoder, budget = measured(tiny, [0.0] * 6)
    assert set(budget.by_load.values()) == {Budget(0)}
    assert decoder.budget is budget
    assert decoder.rows.num_free == 2


def test_a_decoder_learns_from_its_own_rounds(tiny: Tiny) -> None:
    decoder, _ = measured(tiny, [0.99] * 4)
    budget = LoadBudget({2: {Budget(0): 100.0, Budget(2): 1.0}}, Profile.guess(tiny.trie.num_levels, [0.99] * 4))
    decoder.budget = budget
    before = budget.decisions(Budget(2))
    decode_all(decoder, [ListRequest(str(i), (tiny.codes[i],), 10) for i in range(20)])
    assert budget.decisions(Budget(2)) < before


def test_a_list_too_short_to_earn_what_its_prompt_costs_is_not_drafted_for() -> None:
    """Rounds of 1 s that gain 2 decisions instead of one save half a second a decision; a prompt costs 3."""
    profile = Profile.guess(1, [1.0])
    costs = {1: {Budget(0): 1.0, Budget(1): 1.0}, 4: {Budget(0): 4.0, Budget(1): 4.0}}
    budget = LoadBudget(costs, profile, 3.0, decisions_per_item=2.0)
    assert [budget.drafts(1, items) for items in (1, 2, 3, 4, 10)] == [False, False, False, True, True]
    assert not budget.drafts(3, 3), "four rows save four times as much, and pay for four prompts"
    assert LoadBudget(costs, profile).drafts(1, 1), "a draft that adds nothing to a prompt pays at once"
    assert LoadBudget({1: {Budget(1): 1.0}}, profile, 9.0).drafts(1, 1), "never measured without"


def test_requests_that_are_not_drafted_for_are_tried_now_and_then_for_some_rounds() -> None:
    budget = LoadBudget({1: {Budget(0): 1.0, Budget(1): 5.0}}, GOOD, 1.0)
    asked = [budget.drafts(1, 10) for _ in range(3 * PROBE_EVERY)]
    assert asked.count(True) == 3
    drafted = [budget(1).steps > 0 for _ in range(PROBE_EVERY - 1)]
    assert drafted == [True] * PROBE_ROUNDS + [False] * (PROBE_EVERY - 1 - PROBE_ROUNDS)


class OddItems(FixedBudget):
    """Drafts for lists of an odd number of items."""

    def drafts(self, rows: int, items: int) -> bool:
        return items % 2 == 1


def test_who_is_not_drafted_for_gets_the_same_list_and_reads_no_prompt_for_the_draft(tiny: Tiny) -> None:
    decoder, _ = measured(tiny, [0.99] * 4)
    requests = [ListRequest(str(i), (tiny.codes[i],), 5 + i % 2) for i in range(12)]
    decoder.budget = FixedBudget(Budget(3))
    right = decode_all(decoder, requests)
    decoder.budget = OddItems(Budget(3))
    assert decoder.draft_cache is not None
    got = decode_all(decoder, requests)
    for request in requests:
        found, wanted = got.results[request.request_id], right.results[request.request_id]
        assert found.items == wanted.items
        assert (found.speculation.draft_tokens > 0) == (request.k == 5)
    decoder.draft_cache.data.zero_()
    decoder.admit([requests[1], requests[2]])
    read = decoder.draft_cache.data[0, 0].flatten(1).any(1)
    assert [bool(read[i]) for i in decoder.rows.in_use] == [request.k == 5 for request in (requests[1], requests[2])]


def test_what_a_draft_adds_to_a_prompt_is_measured(tiny: Tiny) -> None:
    _, budget = measured(tiny, [0.99] * 4)
    assert 0 <= budget.prompt_seconds < 1
    assert budget.decisions_per_item == pytest.approx(tiny.trie.decisions_per_item)


@pytest.mark.parametrize("max_k", [1, 3, 40])
def test_rounds_of_every_budget_are_timed_from_the_same_place_of_the_lists(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, max_k: int
) -> None:
    """Further down a list a round looks at more. Lists may end before: those of one item before anything is timed."""
    decoder = drafting(tiny, 2, max_k)
    begun: dict[Budget, list[tuple[int, ...]]] = {}
    one_round = decoder.round

    def spied() -> Any:
        begun.setdefault(decoder.budget(2), []).append(tuple(decoder.rows.base.tolist()))
        return one_round()

    monkeypatch.setattr(decoder, "round", spied)
    requests = [ListRequest(str(i), (tiny.codes[i],), 10) for i in range(2)]
    budget = measured_budget(decoder, requests, Profile.guess(tiny.trie.num_levels, [0.99] * 4), repeats=2)
    assert decoder.rows.num_free == 2
    timed = budget.seconds[2]
    assert len(timed) > 3
    assert all(found > 0 for found in timed.values())
    if max_k == 40:
        places = {min(begun[candidate]) for candidate in timed if candidate != Budget(1)}
        assert len(places) == 1
        assert places <= set(begun[Budget(1)])
        assert min(begun[Budget(1)]) < min(places), "behind the first rounds"


def test_rounds_that_are_arithmetic_are_not_measured_but_multiplied(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 4 to 8 rows a round takes twice as long, so it does from 8 to 16; from 2 to 4 it would be told too soon."""
    timed: list[int] = []

    def seconds(rounds: Any, budget: Budget, gained: float) -> float:
        timed.append(len(rounds.batch))
        return len(rounds.batch) * (1.0 + budget.steps / 4)

    monkeypatch.setattr("model.decoding.budget._Rounds.seconds", seconds)
    budget = measured_budget(drafting(tiny, 16), [ListRequest("r", (tiny.codes[0],), 5)], GOOD, repeats=1)
    assert set(timed) == {1, 2, 4, 8}
    assert budget.seconds[16] == {candidate: 2 * found for candidate, found in budget.seconds[8].items()}


def test_a_draft_much_worse_than_its_profile_is_found_out_in_every_slot() -> None:
    """Slots are seen in turn: what the profile says of one must not outlast what is seen of it."""
    budget = LoadBudget({1: {Budget(0): 100.0, Budget(1): 1.0}}, Profile.guess(4, [0.9]))
    for number in range(800):
        budget(1)
        tried = tuple((int(slot == number % 4),) for slot in range(4))
        passed = tuple((int(slot == number % 4 and number // 4 % 4 == 0),) for slot in range(4))
        budget.observe(rounds(tried, passed))
    assert budget.decisions(Budget(1)) == pytest.approx(1.25, abs=0.1)
