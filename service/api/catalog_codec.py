"""How a catalog version lies in Redis: key names, values with a checksum, the meta document. No I/O here.

    padrec:active                     the version to serve
    padrec:{version}:meta             header: levels, codebooks, attributes, counts
    padrec:{version}:popular          the most popular items, with codes and attributes
    padrec:{version}:item:{bucket}    hash: item ID → codes
    padrec:{version}:sid:{bucket}     hash: codes → item ID
    padrec:{version}:attributes:{bucket}   hash: item ID → attributes as JSON

About 100 fields a bucket keep small hashes in Redis's packed encoding. A value's first four bytes are the CRC-32 of
field and value, so one read tells a sound entry from a damaged, truncated or misplaced one.
"""

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Codes = tuple[int, ...]

ACTIVE_KEY = "padrec:active"
FIELDS_PER_BUCKET = 100
NUM_POPULAR = 1000
_CRC = struct.Struct(">I")


class Corrupt(ValueError):
    """A stored value that cannot be trusted."""


@dataclass(frozen=True)
class CatalogHeader:
    """What is true of a whole catalog version. `attributes`: name → {"type": "categories" | "number", ...}."""

    version: str
    codebook_sizes: tuple[int, ...]
    attributes: Mapping[str, Mapping[str, Any]]
    num_items: int
    num_buckets: int

    @classmethod
    def from_document(cls, document: Any, num_items: int | None = None) -> "CatalogHeader":
        """From the first line of `catalog.jsonl` (with `num_items`) or from the meta document. Raises Corrupt."""
        try:
            sizes = tuple(document["codebook_sizes"])
            count = document["num_items"] if num_items is None else num_items
            header = cls(
                document["catalog_version"],
                sizes,
                document["attributes"],
                count,
                document.get("num_buckets") or num_buckets(count),
            )
        except (KeyError, TypeError, AttributeError) as exc:
            raise Corrupt("the catalog header lacks a field") from exc
        if (
            not isinstance(header.version, str)
            or not header.version
            or not isinstance(header.attributes, dict)
            or not all(type(n) is int and 0 < n <= 65536 for n in sizes)
            or document.get("num_levels") != len(sizes)
            or not all(type(n) is int and n > 0 for n in (header.num_items, header.num_buckets))
        ):
            raise Corrupt("the catalog header has a wrong field")
        return header

    def document(self) -> dict[str, Any]:
        return {
            "catalog_version": self.version,
            "num_levels": len(self.codebook_sizes),
            "codebook_sizes": list(self.codebook_sizes),
            "attributes": dict(self.attributes),
            "num_items": self.num_items,
            "num_buckets": self.num_buckets,
        }

    def fits(self, codes: Sequence[int]) -> bool:
        """Whether `codes` has a code for every level, each inside its codebook."""
        return len(codes) == len(self.codebook_sizes) and all(
            0 <= c < n for c, n in zip(codes, self.codebook_sizes, strict=True)
        )

    def key(self, kind: str, field: bytes) -> str:
        return f"padrec:{self.version}:{kind}:{zlib.crc32(field) % self.num_buckets}"

    def keys(self) -> list[str]:
        """Every key of this version."""
        kinds = ("item", "sid", "attributes")
        buckets = [f"{kind}:{b}" for kind in kinds for b in range(self.num_buckets)]
        return [f"padrec:{self.version}:{name}" for name in ("meta", "popular", *buckets)]

    def entries(self, item: "CatalogItem") -> list[tuple[str, bytes, bytes]]:
        """What is stored of one item: (kind, field, value) triples."""
        name, packed = item.item_id.encode(), self.pack(item.codes)
        return [
            ("item", name, packed),
            ("sid", packed, name),
            ("attributes", name, dump(item.attributes)),
        ]

    def pack(self, codes: Codes) -> bytes:
        return struct.pack(f"<{len(self.codebook_sizes)}H", *codes)

    def unpack(self, packed: bytes) -> Codes:
        """Raises Corrupt."""
        if len(packed) != 2 * len(self.codebook_sizes):
            raise Corrupt("wrong length")
        codes: Codes = struct.unpack(f"<{len(self.codebook_sizes)}H", packed)
        if not self.fits(codes):
            raise Corrupt("a code outside its codebook")
        return codes


@dataclass(frozen=True)
class CatalogItem:
    """One item; `attributes` values are lists of strings or numbers."""

    item_id: str
    codes: Codes
    popularity: int
    attributes: Mapping[str, Any]

    @classmethod
    def from_document(cls, document: Any, header: CatalogHeader) -> "CatalogItem":
        """Raises Corrupt."""
        try:
            item = cls(
                document["item_id"],
                tuple(document["codes"]),
                document.get("popularity", 0),
                document.get("attributes", {}),
            )
        except (KeyError, TypeError, AttributeError) as exc:
            raise Corrupt("an item lacks a field") from exc
        if (
            not isinstance(item.item_id, str)
            or not isinstance(item.attributes, dict)
            or not all(type(c) is int for c in item.codes)
            or not header.fits(item.codes)
        ):
            raise Corrupt("an item has a wrong field")
        return item

    def document(self) -> dict[str, Any]:
        return {
            "item_id": self.item_id,
            "codes": list(self.codes),
            "popularity": self.popularity,
            "attributes": dict(self.attributes),
        }


def num_buckets(num_items: int) -> int:
    return max(1, -(-num_items // FIELDS_PER_BUCKET))


def active_version(raw: bytes) -> str:
    """Raises Corrupt."""
    version = raw.decode("ascii", "replace")
    if not version.isalnum() or len(version) > 64:
        raise Corrupt("the active version is no version")
    return version


def meta_key(version: str) -> str:
    return f"padrec:{version}:meta"


def popular_key(version: str) -> str:
    return f"padrec:{version}:popular"


def seal(field: bytes, value: bytes) -> bytes:
    """`value` under a checksum that also ties it to `field`."""
    return _CRC.pack(zlib.crc32(value, zlib.crc32(field))) + value


def unseal(field: bytes, sealed: bytes) -> bytes:
    """Raises Corrupt."""
    value = sealed[_CRC.size :]
    if len(sealed) < _CRC.size or _CRC.unpack_from(sealed)[0] != zlib.crc32(value, zlib.crc32(field)):
        raise Corrupt("checksum does not match")
    return value


def dump(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def load(raw: bytes) -> Any:
    """Raises Corrupt."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise Corrupt("not JSON") from exc


def dump_sealed(document: Mapping[str, Any]) -> bytes:
    """JSON that carries its own checksum."""
    return dump({**document, "crc32": zlib.crc32(dump(document))})


def load_sealed(raw: bytes) -> dict[str, Any]:
    """Raises Corrupt."""
    document = load(raw)
    if not isinstance(document, dict) or document.pop("crc32", None) != zlib.crc32(dump(document)):
        raise Corrupt("checksum does not match")
    return document
