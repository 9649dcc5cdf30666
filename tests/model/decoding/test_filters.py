import pytest

from model.decoding.filters import FilterTable
from model.decoding.request import CategoryFilter, InvalidRequest, RangeFilter
from tests.model.conftest import Tiny


def test_a_filter_passes_exactly_the_items_that_carry_the_attribute(tiny: Tiny) -> None:
    table = FilterTable(tiny.catalog, tiny.trie, 2)
    leaves = table.leaves({"genre": CategoryFilter(("a",)), "year": RangeFilter(1993, None)})
    expected = {
        item.codes
        for item in tiny.catalog.items
        if "a" in item.attributes["genre"] and item.attributes["year"] >= 1993  # type: ignore[operator]
    }
    assert {tuple(c) for c, passes in zip(tiny.trie.sorted_codes.tolist(), leaves, strict=True) if passes} == expected


def test_equal_filters_share_a_slot_and_idle_slots_are_reused(tiny: Tiny) -> None:
    table = FilterTable(tiny.catalog, tiny.trie, 2)
    first = table.acquire({"genre": CategoryFilter(("a",))})
    assert table.acquire({"genre": CategoryFilter(("a",))}) == first
    second = table.acquire({"genre": CategoryFilter(("b",))})
    assert {first, second} == {1, 2}
    table.release(first)
    table.release(first)
    assert table.acquire({"year": RangeFilter(None, 1994)}) == first
    assert int(table.passing[first, -1]) == sum(i.attributes["year"] <= 1994 for i in tiny.catalog.items)  # type: ignore[operator]
    assert table.in_use == 2


def test_no_filter_needs_no_slot(tiny: Tiny) -> None:
    table = FilterTable(tiny.catalog, tiny.trie, 1)
    assert table.acquire({}) == 0
    table.release(0)
    assert table.in_use == 0


def test_an_unknown_attribute_is_refused_without_repeating_it(tiny: Tiny) -> None:
    with pytest.raises(InvalidRequest) as caught:
        FilterTable(tiny.catalog, tiny.trie, 1).leaves({"<script>": CategoryFilter(("a",))})
    assert "script" not in str(caught.value)
