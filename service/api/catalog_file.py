"""The durable copy of a catalog: `catalog.jsonl` of a bundle, held in memory. Redis is a cache of it.

A header line, then a line per item. Knows no sockets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.catalog_codec import CatalogHeader, CatalogItem, Codes, Corrupt, load


class CatalogFileError(ValueError):
    """A catalog file that cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class CatalogFile:
    """A whole catalog version, both ways, and its items by falling popularity."""

    header: CatalogHeader
    by_id: Mapping[str, CatalogItem]
    by_codes: Mapping[Codes, CatalogItem]
    by_popularity: Sequence[CatalogItem]

    @classmethod
    def load(cls, path: Path) -> "CatalogFile":
        """Blocking; seconds for millions of items. Raises CatalogFileError."""
        number = 1
        try:
            lines = path.read_bytes().splitlines()
            header = CatalogHeader.from_document(load(lines[0] if lines else b""), len(lines) - 1)
            items = []
            for line in lines[1:]:
                number += 1
                items.append(CatalogItem.from_document(load(line), header))
        except OSError as exc:
            raise CatalogFileError(f"{path}: {exc.strerror}") from exc
        except Corrupt as exc:
            raise CatalogFileError(f"{path} line {number}: {exc}") from exc
        by_id = {item.item_id: item for item in items}
        by_codes = {item.codes: item for item in items}
        if not len(by_id) == len(by_codes) == len(items):
            raise CatalogFileError(f"{path}: item IDs and semantic IDs must be distinct")
        popular = sorted(items, key=lambda item: -item.popularity)
        return cls(header, by_id, by_codes, popular)
