import pytest

from model.data.histories import History
from model.train.baselines import baselines

ITEMS = ["a", "b", "c", "d", "e"]


def users(*histories: str) -> list[History]:
    return [History(str(n), tuple(items), tuple(range(len(items)))) for n, items in enumerate(histories)]


def recommend(name: str, histories: list[str], history: str, k: int = 5) -> str:
    return "".join(baselines(users(*histories), ITEMS, k)[name](list(history)))


def test_popularity_ranks_by_how_many_have_seen_an_item_and_ties_by_the_catalog() -> None:
    assert recommend("popularity", ["ab", "bc", "cb", "ed"], "a") == "bcde"


def test_item_knn_ranks_by_cosine_over_users() -> None:
    # With a: b is shared by 2 of (2 and 2) users: 1; c by 1 of (2 and 1): 0.71; d by 1 of (2 and 4): 0.35; e: 0.
    assert recommend("item-knn", ["abc", "abd", "d", "d", "d", "e"], "a") == "bcde"


def test_item_knn_sums_over_the_history() -> None:
    assert recommend("item-knn", ["ac", "bd", "bd", "ad", "e"], "ab", k=1) == "d"


def test_markov_ranks_by_what_followed_the_last_item_alone() -> None:
    # b is what follows a, d what follows c; popularity decides the rest.
    histories = ["ab"] * 30 + ["cd"] * 30 + ["e"] * 10
    assert recommend("markov", histories, "ca", k=1) == "b"
    assert recommend("markov", histories, "ac", k=1) == "d"


def test_markov_falls_back_to_popularity_where_nothing_followed() -> None:
    assert recommend("markov", ["ba", "ca", "cd", "cd"], "e") == "cadb"


@pytest.mark.parametrize("name", ["popularity", "item-knn", "markov"])
@pytest.mark.parametrize("history", ["a", "ba", "abcd", "abcde", "aab"])
def test_what_is_in_the_history_is_never_recommended(name: str, history: str) -> None:
    found = recommend(name, ["abc", "bcd", "cde", "ea"], history)
    assert not set(found) & set(history)
    assert len(set(found)) == len(found) == 5 - len(set(history))
    assert recommend(name, ["abc", "bcd", "cde", "ea"], history, k=1) == found[:1]
