import random
from dataclasses import replace

import pytest

from model.config import DataConfig
from model.data.histories import History, Interaction, Logs, cases, histories, last_cases, split_users

CONFIG = DataConfig(held_out_users=4, validation_users=3, min_history=5, cases_per_user=4)


def user(name: str, count: int) -> History:
    return History(name, tuple(f"{name}-{i}" for i in range(count)), tuple(range(count)))


def users(count: int = 30) -> list[History]:
    rng = random.Random(1)
    return [user(f"u{i}", rng.randrange(3, 40)) for i in range(count)]


def test_a_history_is_in_order_of_time_and_ties_keep_the_order_of_the_log() -> None:
    events = (
        Interaction("u", "late", 30),
        Interaction("u", "tie-1", 20),
        Interaction("v", "other", 25),
        Interaction("u", "tie-2", 20),
        Interaction("u", "early", 10),
    )
    found = {h.user_id: h for h in histories(Logs(events, {}))}
    assert found["u"].item_ids == ("early", "tie-1", "tie-2", "late")
    assert found["u"].timestamps == (10, 20, 20, 30)
    assert found["v"].item_ids == ("other",)


def test_an_item_watched_again_counts_once_at_its_first_time() -> None:
    events = (Interaction("u", "a", 5), Interaction("u", "b", 2), Interaction("u", "a", 1))
    assert histories(Logs(events, {})) == [History("u", ("a", "b"), (1, 2))]


def test_held_out_users_are_never_trained_on_and_nobody_is_lost() -> None:
    split = split_users(users(), CONFIG)
    parts = [{u.user_id for u in part} for part in (split.train, split.validation, split.test)]
    assert [len(parts[1]), len(parts[2])] == [3, 4]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert set.union(*parts) == {u.user_id for u in users()}
    assert len(split.train) + len(split.validation) + len(split.test) == len(users())


def test_held_out_users_have_enough_items_for_a_case_and_short_ones_are_trained_on() -> None:
    split = split_users(users(), CONFIG)
    assert all(len(u.item_ids) >= 15 for u in (*split.validation, *split.test))
    short = {u.user_id for u in users() if len(u.item_ids) < 15}
    assert short <= {u.user_id for u in split.train}


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_logs() -> None:
    assert split_users(users(), CONFIG) == split_users(reversed(users()), CONFIG)
    assert split_users(users(), CONFIG).test != split_users(users(), replace(CONFIG, seed=8)).test


def test_a_limit_on_users_leaves_the_others_out() -> None:
    split = split_users(users(), replace(CONFIG, max_users=20))
    assert len(split.train) + len(split.validation) + len(split.test) == 20


def test_too_few_users_to_hold_out_is_an_error_that_names_the_field() -> None:
    with pytest.raises(ValueError, match=r"data\.held_out_users"):
        split_users([user(f"u{i}", 20) for i in range(7)], CONFIG)


def test_a_case_is_a_cut_of_a_history_that_leaves_exactly_ten() -> None:
    for one in split_users(users(), CONFIG).test:
        found = cases([one], CONFIG)
        assert 1 <= len(found) <= 4
        assert found[-1].history == one.item_ids[:-10]
        for case in found:
            assert case.history + case.future == one.item_ids[: len(case.history) + 10]
            assert len(case.future) == 10
            assert len(case.history) >= 5
        assert len({case.history for case in found}) == len(found)


def test_cuts_are_evenly_spaced() -> None:
    assert [len(case.history) for case in cases([user("u", 35)], CONFIG)] == [10, 15, 20, 25]


def test_a_user_with_items_for_a_single_case_has_a_single_case() -> None:
    assert [len(case.history) for case in cases([user("u", 15)], CONFIG)] == [5]
    assert cases([user("u", 14)], CONFIG) == []


def test_the_last_cases_are_one_a_user_and_leave_ten() -> None:
    asked = [user("u", 35), user("v", 20)]
    assert [(c.user_id, len(c.history), len(c.future)) for c in last_cases(asked, CONFIG)] == [
        ("u", 25, 10),
        ("v", 10, 10),
    ]
