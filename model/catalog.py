"""Catalog: the versioned two-way table item ID <-> semantic ID, with popularity and attributes.

Read from and written to `catalog.jsonl` (a header line, then a line per item). Knows nothing of tensors or training.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.semantic_id import Codes


class CatalogError(ValueError):
    """A catalog file that cannot be used; the message names the line and the field."""


@dataclass(frozen=True)
class CatalogItem:
    """One item. `attributes` values are a list of strings (categories) or a number."""

    item_id: str
    codes: Codes
    popularity: int
    attributes: Mapping[str, list[str] | float]


@dataclass(frozen=True)
class Catalog:
    """Items with distinct IDs and distinct semantic IDs."""

    codebook_sizes: tuple[int, ...]
    items: tuple[CatalogItem, ...]

    def __post_init__(self) -> None:
        if not self.items:
            raise CatalogError("a catalog needs at least one item")
        if len({i.item_id for i in self.items}) != len(self.items):
            raise CatalogError("item IDs must be distinct")
        if len({i.codes for i in self.items}) != len(self.items):
            raise CatalogError("semantic IDs must be distinct")
        for item in self.items:
            if len(item.codes) != len(self.codebook_sizes) or not all(
                0 <= c < n for c, n in zip(item.codes, self.codebook_sizes, strict=True)
            ):
                raise CatalogError(f"codes of item {item.item_id!r} do not fit the codebooks")

    @property
    def version(self) -> str:
        """First 12 hex digits of the SHA-256 over the items: equal content, equal version."""
        digest = hashlib.sha256(json.dumps([list(self.codebook_sizes)]).encode())
        for item in self.items:
            digest.update(_line(item).encode())
        return digest.hexdigest()[:12]

    def attribute_schema(self) -> dict[str, dict[str, Any]]:
        """What can be filtered on: categories with their values, numbers with their range."""
        schema: dict[str, dict[str, Any]] = {}
        for item in self.items:
            for name, value in item.attributes.items():
                if isinstance(value, list):
                    schema.setdefault(name, {"type": "categories", "values": set()})["values"].update(value)
                else:
                    entry = schema.setdefault(name, {"type": "number", "min": value, "max": value})
                    entry["min"], entry["max"] = min(entry["min"], value), max(entry["max"], value)
        for entry in schema.values():
            if "values" in entry:
                entry["values"] = sorted(entry["values"])
        return dict(sorted(schema.items()))

    def save(self, path: Path) -> None:
        header = {
            "catalog_version": self.version,
            "num_levels": len(self.codebook_sizes),
            "codebook_sizes": list(self.codebook_sizes),
            "attributes": self.attribute_schema(),
        }
        lines = [json.dumps(header), *(_line(item) for item in self.items)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Catalog":
        """Read a catalog and check it against the version its header names. Raises CatalogError."""
        try:
            # Not splitlines(): JSON strings may hold what it takes for line ends (U+2028, U+0085).
            lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            header = json.loads(lines[0])
            items = tuple(_item(json.loads(line)) for line in lines[1:])
            catalog = cls(tuple(int(n) for n in header["codebook_sizes"]), items)
        except (OSError, ValueError, KeyError, IndexError, TypeError) as exc:
            raise CatalogError(f"{path.name}: {exc}") from exc
        if header.get("catalog_version") != catalog.version:
            raise CatalogError(f"{path.name}: content does not match its catalog_version")
        return catalog


def _line(item: CatalogItem) -> str:
    return json.dumps(
        {
            "item_id": item.item_id,
            "codes": list(item.codes),
            "popularity": item.popularity,
            "attributes": dict(item.attributes),
        },
        ensure_ascii=False,
    )


def _item(values: Mapping[str, Any]) -> CatalogItem:
    item_id, codes, popularity = values["item_id"], values["codes"], values["popularity"]
    if not isinstance(item_id, str):
        raise TypeError("item_id must be a string")
    if not (isinstance(codes, list) and all(type(code) is int for code in codes)):
        raise TypeError(f"codes of item {item_id!r} must be a list of integers")
    if type(popularity) is not int:
        raise TypeError(f"popularity of item {item_id!r} must be an integer")
    return CatalogItem(item_id, tuple(codes), popularity, dict(values["attributes"]))
