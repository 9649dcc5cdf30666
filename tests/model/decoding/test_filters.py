import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.catalog import Catalog, CatalogItem
from model.decoding.filters import FilterTable, leaves_by_search
from model.decoding.request import CategoryFilter, InvalidRequest, RangeFilter
from model.item_trie import ItemTrie
from model.semantic_id import Vocabulary
from tests.model.conftest import Tiny

NUMBERS = st.one_of(st.integers(-3, 3), st.sampled_from([-0.5, 0.1, 2.5, 1e300]))
BOUNDS = st.one_of(st.none(), NUMBERS)
ATTRIBUTES = st.fixed_dictionaries(
    {}, optional={"genre": st.lists(st.sampled_from("abcd"), max_size=3), "year": NUMBERS, "price": NUMBERS}
)
FILTERS = st.fixed_dictionaries(
    {},
    optional={
        "genre": st.builds(CategoryFilter, st.lists(st.sampled_from("abcdz"), max_size=3).map(tuple)),
        "year": st.builds(RangeFilter, BOUNDS, BOUNDS),
        "price": st.builds(RangeFilter, BOUNDS, BOUNDS),
    },
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ATTRIBUTES, min_size=1, max_size=20), FILTERS, st.randoms(use_true_random=False))
def test_columns_pass_what_a_look_at_every_item_passes(attributes, filters, rng) -> None:  # type: ignore[no-untyped-def]
    codes = [(i // 5, i % 5) for i in range(20)]
    rng.shuffle(codes)
    items = [CatalogItem(str(i), c, 0, values) for i, (c, values) in enumerate(zip(codes, attributes, strict=False))]
    catalog = Catalog((4, 5), tuple(items))
    trie = ItemTrie(np.array([item.codes for item in items]), Vocabulary.compact((4, 5)))
    table = FilterTable(catalog, trie, 1)
    known = {name: wanted for name, wanted in filters.items() if any(name in values for values in attributes)}
    assert table.leaves(known).tolist() == leaves_by_search(catalog, trie, known)


def test_an_item_without_the_attribute_fails_even_a_filter_open_at_both_ends() -> None:
    items = (CatalogItem("a", (0,), 0, {"year": 1990}), CatalogItem("b", (1,), 0, {}))
    trie = ItemTrie(np.array([[0], [1]]), Vocabulary.compact((2,)))
    assert FilterTable(Catalog((2,), items), trie, 1).leaves({"year": RangeFilter()}).tolist() == [True, False]


def test_an_attribute_without_any_value_passes_nothing() -> None:
    items = (CatalogItem("a", (0,), 0, {"genre": []}), CatalogItem("b", (1,), 0, {}))
    trie = ItemTrie(np.array([[0], [1]]), Vocabulary.compact((2,)))
    table = FilterTable(Catalog((2,), items), trie, 1)
    assert table.leaves({"genre": CategoryFilter(("a",))}).tolist() == [False, False]


def test_every_slot_keeps_its_own_filter_as_slots_are_added(tiny: Tiny) -> None:
    table = FilterTable(tiny.catalog, tiny.trie, 6)
    wanted = [{"year": RangeFilter(year, None)} for year in range(1992, 1998)]
    slots = [table.acquire(filters) for filters in wanted]
    assert slots == [1, 2, 3, 4, 5, 6]
    assert table.passing[0].tolist() == tiny.trie.passing().tolist()
    for slot, filters in zip(slots, wanted, strict=True):
        assert table.passing[slot].tolist() == tiny.trie.passing(table.leaves(filters)).tolist()


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
