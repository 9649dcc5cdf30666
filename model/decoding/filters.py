"""FilterTable: filters and stock compiled to counts of passing leaves, shared by the rows that use them.

Slot 0 is "every item"; a further slot is taken per distinct filter and kept until another needs the room. What is in
stock is part of every slot compiled from then on: rows keep the slot they began with. Attributes are columns, so that a
filter new to ten million items does not hold up the rows being decoded: numbers an array, categories the leaves of each
value. The slow twin is `leaves_by_search`. Knows catalogs and tries; nothing of models.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model.catalog import Catalog
from model.decoding.request import CategoryFilter, InvalidRequest, RangeFilter
from model.item_trie import ItemTrie

Filters = Mapping[str, CategoryFilter | RangeFilter]
Key = tuple[int, tuple[tuple[str, CategoryFilter | RangeFilter], ...]]
Leaves = npt.NDArray[np.bool_]


class Numbers:
    """A number attribute as an array over leaves. NaN: the item has none."""

    def __init__(self, values: npt.NDArray[np.float64]) -> None:
        self.values = values

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Numbers":
        return cls(np.array([np.nan if value is None else value for value in values], dtype=np.float64))

    def passing(self, wanted: RangeFilter) -> Leaves:
        passing = ~np.isnan(self.values)
        if wanted.minimum is not None:
            passing &= self.values >= wanted.minimum
        if wanted.maximum is not None:
            passing &= self.values <= wanted.maximum
        return passing


class Categories:
    """A category attribute as the leaves that carry each of its values, one behind the other."""

    def __init__(self, num_leaves: int, names: Iterable[str], carriers: npt.NDArray[np.int32], ends: Iterable[int]):
        """`carriers` holds the leaves of the first of `names`, up to the first of `ends`, then those of the second."""
        self.num_leaves, self.carriers = num_leaves, carriers
        self.ends = dict(zip(names, ends, strict=True))
        starts = [0, *self.ends.values()]
        self.leaves = {n: carriers[start:end] for (n, end), start in zip(self.ends.items(), starts, strict=False)}

    @classmethod
    def of(cls, values: Iterable[list[str] | None]) -> "Categories":
        number: dict[str, int] = {}
        carried, carrier = array("i"), array("i")
        num_leaves = 0
        for leaf, of_item in enumerate(values):
            num_leaves += 1
            for value in of_item or ():
                carried.append(number.setdefault(value, len(number)))
                carrier.append(leaf)
        numbers = np.array(carried, dtype=np.int32)
        by_value = np.array(carrier, dtype=np.int32)[np.argsort(numbers, kind="stable")]
        return cls(num_leaves, number, by_value, np.bincount(numbers, minlength=len(number)).cumsum().tolist())

    def passing(self, wanted: CategoryFilter) -> Leaves:
        passing = np.zeros(self.num_leaves, dtype=bool)
        for value in wanted.any_of:
            if value in self.leaves:
                passing[self.leaves[value]] = True
        return passing


class Attributes:
    """The attributes of a catalog version, as columns over the leaves of its trie."""

    def __init__(self, numbers: Mapping[str, Numbers], categories: Mapping[str, Categories]) -> None:
        self.numbers, self.categories = numbers, categories

    @classmethod
    def of(cls, catalog: Catalog, trie: ItemTrie) -> "Attributes":
        by_leaf = [catalog.items[item].attributes for item in trie.item_of_leaf.tolist()]
        numbers: dict[str, Numbers] = {}
        categories: dict[str, Categories] = {}
        for name, entry in catalog.attribute_schema().items():
            values: list[Any] = [attributes.get(name) for attributes in by_leaf]
            if entry["type"] == "categories":
                categories[name] = Categories.of(values)
            else:
                numbers[name] = Numbers.of(values)
        return cls(numbers, categories)


class Stock(NamedTuple):
    """Which leaves can be had, and the same as counts by node: `compile_stock` may run on any thread."""

    leaves: Leaves
    passing: torch.Tensor


def compile_stock(trie: ItemTrie, out: npt.NDArray[np.int64]) -> Stock:
    """The stock without the leaves `out`."""
    leaves = np.ones(trie.num_items, dtype=bool)
    leaves[out] = False
    return Stock(leaves, trie.passing(leaves))


class FilterTable:
    """`passing` [F, V] on the trie's device. One slot more than rows, so that every row can have a filter."""

    def __init__(self, catalog: Catalog | Attributes, trie: ItemTrie, num_rows: int, *, static: bool = False) -> None:
        """`static`: all slots have their place from the beginning, so that `passing` stays where it is."""
        self.trie, self.num_slots = trie, num_rows + 1
        self.passing = self._room = trie.passing()[None].repeat(self.num_slots if static else 1, 1)
        self._next_slot = 1
        # What a device holds is read back once per filter, not once per request.
        self._on_host = {0: self.passing[0].cpu().numpy()}
        self.attributes = catalog if isinstance(catalog, Attributes) else Attributes.of(catalog, trie)
        self._stock: Stock | None = None
        self._stock_number = 0
        self._slots: OrderedDict[Key, int] = OrderedDict()
        self._users: dict[int, int] = {}

    def set_stock(self, stock: Stock | None) -> None:
        """What slots acquired from now on let pass; None: everything."""
        self._stock = stock
        self._stock_number += 1

    def check(self, filters: Filters) -> None:
        """Raises InvalidRequest naming the filter that this catalog cannot apply. Looks at no item."""
        for name, wanted in filters.items():
            is_category = name in self.attributes.categories
            if not is_category and name not in self.attributes.numbers:
                raise InvalidRequest("/filters", "the catalog has no such attribute")
            if is_category != isinstance(wanted, CategoryFilter):
                need = '"any"' if is_category else '"min" or "max"'
                raise InvalidRequest(f"/filters/{name}", f"this attribute is filtered with {need}")

    def leaves(self, filters: Filters) -> Leaves:
        """Which leaves pass all filters and are in stock. Raises InvalidRequest naming the filter."""
        self.check(filters)
        passing = np.ones(self.trie.num_items, dtype=bool) if self._stock is None else self._stock.leaves.copy()
        for name, wanted in filters.items():
            if isinstance(wanted, CategoryFilter):
                passing &= self.attributes.categories[name].passing(wanted)
            else:
                passing &= self.attributes.numbers[name].passing(wanted)
        return passing

    def acquire(self, filters: Filters) -> int:
        """Slot of a filter, compiled on first use; give it back with `release`."""
        if not filters and self._stock is None:
            return 0
        key: Key = (self._stock_number, tuple(sorted(filters.items(), key=lambda f: f[0])))
        if key not in self._slots:
            row = self.trie.passing(self.leaves(filters)) if filters or self._stock is None else self._stock.passing
            if self._next_slot < self.num_slots:
                self._slots[key] = self._add_slot()
            else:
                old = next(k for k, slot in self._slots.items() if not self._users.get(slot))
                self._slots[key] = self._slots.pop(old)
            self.passing[self._slots[key]] = row
            self._on_host[self._slots[key]] = row.cpu().numpy()
        self._slots.move_to_end(key)
        slot = self._slots[key]
        self._users[slot] = self._users.get(slot, 0) + 1
        return slot

    def release(self, slot: int) -> None:
        if slot:
            assert self._users.get(slot, 0) > 0, f"filter slot {slot} released twice"
            self._users[slot] -= 1

    def counts(self, slot: int) -> npt.NDArray[np.int32]:
        """How many leaves before each node pass the filter of a slot, [V] on the host."""
        return self._on_host[slot]

    @property
    def in_use(self) -> int:
        return sum(self._users.values())

    def _add_slot(self) -> int:
        """One more slot; room for them doubles, so that a new filter seldom copies the others."""
        slot, self._next_slot = self._next_slot, self._next_slot + 1
        if slot == len(self._room):
            self._room = self.passing.new_empty(min(2 * slot, self.num_slots), self.trie.num_nodes)
            self._room[:slot] = self.passing
        self.passing = self._room[: max(slot + 1, len(self.passing))]
        return slot


def leaves_by_search(catalog: Catalog, trie: ItemTrie, filters: Filters) -> list[bool]:
    """The slow twin of `FilterTable.leaves`: look at every item."""
    items = [catalog.items[item] for item in trie.item_of_leaf.tolist()]
    return [all(_passes(item.attributes.get(name), wanted) for name, wanted in filters.items()) for item in items]


def _passes(value: list[str] | float | None, wanted: CategoryFilter | RangeFilter) -> bool:
    if value is None:
        return False
    if isinstance(wanted, CategoryFilter):
        return isinstance(value, list) and any(v in wanted.any_of for v in value)
    assert not isinstance(value, list)
    return (wanted.minimum is None or value >= wanted.minimum) and (wanted.maximum is None or value <= wanted.maximum)
