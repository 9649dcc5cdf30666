import pytest

from model.data.histories import Case
from model.train.evaluate import quality


def case(*future: str) -> Case:
    return Case("u", ("h",), future)


def test_quality_equals_a_case_computed_by_hand() -> None:
    # Ranks 2 and 3 hit: gains 1/log2(3) = 0.6309 and 1/log2(4) = 0.5; the ideal list gains 1 + 0.6309.
    assert quality([case("a", "b")], [["x", "a", "b"]], 3) == {
        "next_recall@3": 1.0,
        "next_ndcg@3": 0.6309,
        "future_recall@3": 1.0,
        "future_ndcg@3": 0.6934,
    }


def test_quality_is_the_mean_over_cases() -> None:
    found = quality([case("a", "b"), case("a", "b")], [["a", "b"], ["x", "y"]], 2)
    assert set(found.values()) == {0.5}


def test_the_next_item_is_the_first_of_the_future() -> None:
    found = quality([case("a", "b", "c")], [["c", "b"]], 2)
    assert found["next_recall@2"] == found["next_ndcg@2"] == 0.0
    assert found["future_recall@2"] == found["future_ndcg@2"] == 1.0


def test_what_stands_below_the_kth_place_does_not_count() -> None:
    assert set(quality([case("a")], [["x", "y", "a"]], 2).values()) == {0.0}
    assert quality([case("a")], [["x", "y", "a"]], 3)["next_recall@3"] == 1.0


def test_a_future_longer_than_the_list_can_still_be_met_in_full() -> None:
    assert quality([case(*"abcdef")], [["f", "a", "d"]], 3)["future_recall@3"] == 1.0


@pytest.mark.parametrize("lists", [[], [["a"], ["b"]]])
def test_lists_without_their_cases_are_refused(lists: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="one list per case"):
        quality([case("a")], lists, 3)
    with pytest.raises(ValueError, match="at least one"):
        quality([], [], 3)
