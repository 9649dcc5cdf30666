"""FilterTable: filters compiled to counts of passing leaves, shared by the rows that use them.

Slot 0 is "every item in stock"; a further slot is taken per distinct filter and kept until another needs the room.
Knows catalogs and tries; nothing of models.
"""

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from model.catalog import Catalog
from model.decoding.request import CategoryFilter, InvalidRequest, RangeFilter
from model.item_trie import ItemTrie

Filters = Mapping[str, CategoryFilter | RangeFilter]
Key = tuple[tuple[str, CategoryFilter | RangeFilter], ...]


class FilterTable:
    """`passing` [F, V] on the trie's device. One slot more than rows, so that every row can have a filter."""

    def __init__(self, catalog: Catalog, trie: ItemTrie, num_rows: int) -> None:
        self.trie, self.num_slots = trie, num_rows + 1
        self.passing = trie.passing()[None]
        self._schema = catalog.attribute_schema()
        self._values = {
            name: [catalog.items[i].attributes.get(name) for i in trie.item_of_leaf] for name in self._schema
        }
        self._slots: OrderedDict[Key, int] = OrderedDict()
        self._users: dict[int, int] = {}

    def check(self, filters: Filters) -> None:
        """Raises InvalidRequest naming the filter that this catalog cannot apply. Looks at no item."""
        for name, wanted in filters.items():
            kind = self._schema.get(name, {}).get("type")
            if kind is None:
                raise InvalidRequest("/filters", "the catalog has no such attribute")
            if (kind == "categories") != isinstance(wanted, CategoryFilter):
                need = '"any"' if kind == "categories" else '"min" or "max"'
                raise InvalidRequest(f"/filters/{name}", f"this attribute is filtered with {need}")

    def leaves(self, filters: Filters) -> npt.NDArray[np.bool_]:
        """Which leaves pass all filters. Raises InvalidRequest naming the filter."""
        self.check(filters)
        passing = np.ones(self.trie.num_items, dtype=bool)
        for name, wanted in filters.items():
            passing &= np.array([_passes(value, wanted) for value in self._values[name]])
        return passing

    def acquire(self, filters: Filters) -> int:
        """Slot of a filter, compiled on first use; give it back with `release`."""
        if not filters:
            return 0
        key: Key = tuple(sorted(filters.items(), key=lambda f: f[0]))
        if key not in self._slots:
            row = self.trie.passing(self.leaves(filters))[None]
            if len(self.passing) < self.num_slots:
                self._slots[key] = len(self.passing)
                self.passing = torch.cat([self.passing, row])
            else:
                old = next(k for k, slot in self._slots.items() if not self._users.get(slot))
                self._slots[key] = self._slots.pop(old)
                self.passing[self._slots[key]] = row[0]
        self._slots.move_to_end(key)
        slot = self._slots[key]
        self._users[slot] = self._users.get(slot, 0) + 1
        return slot

    def release(self, slot: int) -> None:
        if slot:
            assert self._users.get(slot, 0) > 0, f"filter slot {slot} released twice"
            self._users[slot] -= 1

    @property
    def in_use(self) -> int:
        return sum(self._users.values())


def _passes(value: list[str] | float | None, wanted: CategoryFilter | RangeFilter) -> bool:
    if value is None:
        return False
    if isinstance(wanted, CategoryFilter):
        return isinstance(value, list) and any(v in wanted.any_of for v in value)
    assert not isinstance(value, list)
    return (wanted.minimum is None or value >= wanted.minimum) and (wanted.maximum is None or value <= wanted.maximum)
