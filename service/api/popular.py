"""Filters and popular items: what to answer when the model cannot. Pure functions over catalog items."""

from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from typing import Any

from service.catalog_codec import CatalogItem, Codes
from service.errors import Invalid, pointer
from service.schemas import Filter

MAX_SCANNED = 50_000


def check_filters(filters: Mapping[str, Filter], attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises Invalid where a filter does not fit the catalog's `attributes`."""
    for name, wanted in filters.items():
        schema = attributes.get(name)
        if schema is None:
            raise Invalid.field(pointer("filters", name), "is not an attribute of the catalog")
        if schema.get("type") == "categories":
            if wanted.any is None:
                raise Invalid.field(pointer("filters", name), 'should be {"any": [...]}')
            known = schema.get("values", ())
            for i, value in enumerate(wanted.any):
                if value not in known:
                    where = pointer("filters", name, "any", i)
                    raise Invalid.field(where, "is not a value of this attribute")
        elif wanted.any is not None:
            raise Invalid.field(pointer("filters", name), 'should be {"min": ..., "max": ...}')


def passes(attributes: Mapping[str, Any], filters: Mapping[str, Filter]) -> bool:
    """Whether an item with `attributes` passes every filter; a missing attribute passes none."""
    for name, wanted in filters.items():
        value = attributes.get(name)
        if wanted.any is not None:
            if not isinstance(value, list) or not any(v in wanted.any for v in value):
                return False
        elif (
            not isinstance(value, int | float)
            or (wanted.min is not None and value < wanted.min)
            or (wanted.max is not None and value > wanted.max)
        ):
            return False
    return True


def most_popular(
    items: Iterable[CatalogItem],
    k: int,
    filters: Mapping[str, Filter],
    excluded: Collection[str],
    out_of_stock: Collection[Codes] = (),
) -> list[CatalogItem]:
    """The first `k` of `items` (by falling popularity) that pass; looks at `MAX_SCANNED` at most."""
    chosen = (
        item
        for item in islice(items, MAX_SCANNED)
        if item.item_id not in excluded and item.codes not in out_of_stock and passes(item.attributes, filters)
    )
    return list(islice(chosen, k))
