"""How a catalog version lies in Redis: key names, values with a checksum, the meta document. No I/O here.

    padrec:active                     the version to serve
    padrec:previous                   the version to go back to
    padrec:out_of_stock               set: items that may not be recommended, whatever the version
    padrec:{version}:meta             header: levels, codebooks, attributes, counts
    padrec:{version}:popular          the most popular items, with codes and attributes
    padrec:{version}:stock            codes of the items of this version that are out of stock
    padrec:{version}:item:{bucket}    hash: item ID → codes and attributes
    padrec:{version}:sid:{bucket}     hash: codes → item ID

About 100 fields a bucket, and values below 64 bytes, keep small hashes in Redis's packed encoding: a million items take
about 50 bytes each. A value's first four bytes are the CRC-32 of field and value, so one read tells a sound entry from
a damaged, truncated or misplaced one. A code takes one byte where its codebook has at most 256, else two; attributes
are a JSON list in the header's order, categories by their number in the header.
"""

import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Codes = tuple[int, ...]

ACTIVE_KEY = "padrec:active"
PREVIOUS_KEY = "padrec:previous"
OUT_OF_STOCK_KEY = "padrec:out_of_stock"
FORMAT = 2
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
            if num_items is None and document["format"] != FORMAT:
                raise Corrupt("the catalog is stored in another format: publish it again")
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
            "format": FORMAT,
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
        buckets = [f"{kind}:{b}" for kind in ("item", "sid") for b in range(self.num_buckets)]
        return [f"padrec:{self.version}:{name}" for name in ("meta", "popular", "stock", *buckets)]

    def entries(self, item: "CatalogItem") -> list[tuple[str, bytes, bytes]]:
        """What is stored of one item: (kind, field, value) triples."""
        name, packed = item.item_id.encode(), self.pack(item.codes)
        return [("item", name, packed + self.pack_attributes(item.attributes)), ("sid", packed, name)]

    @cached_property
    def _codes(self) -> struct.Struct:
        return struct.Struct("<" + "".join("B" if size <= 256 else "H" for size in self.codebook_sizes))

    @cached_property
    def _values(self) -> dict[str, dict[str, int]]:
        """For every category attribute the number of each of its values."""
        of = {name: schema for name, schema in self.attributes.items() if schema.get("type") == "categories"}
        return {name: {value: i for i, value in enumerate(schema.get("values", ()))} for name, schema in of.items()}

    def pack(self, codes: Codes) -> bytes:
        return self._codes.pack(*codes)

    def unpack(self, packed: bytes) -> Codes:
        """The codes a field or a value begins with. Raises Corrupt."""
        if len(packed) < self._codes.size:
            raise Corrupt("too short")
        codes: Codes = self._codes.unpack_from(packed)
        if not self.fits(codes):
            raise Corrupt("a code outside its codebook")
        return codes

    def pack_attributes(self, attributes: Mapping[str, Any]) -> bytes:
        """Empty for none. Raises Corrupt for what the header does not describe."""
        if not attributes:
            return b""
        if not attributes.keys() <= self.attributes.keys():
            raise Corrupt("an attribute that the header does not have")
        packed: list[Any] = []
        for name in self.attributes:
            value = attributes.get(name)
            if value is not None and name in self._values:
                try:
                    numbers = [self._values[name][each] for each in value]
                except (KeyError, TypeError) as exc:
                    raise Corrupt("a category that the header does not have") from exc
                value = numbers[0] if len(numbers) == 1 else numbers
            elif not (value is None or (isinstance(value, int | float) and not isinstance(value, bool))):
                raise Corrupt("an attribute of another type than the header says")
            packed.append(value)
        return dump(packed)

    def unpack_attributes(self, packed: bytes) -> dict[str, Any]:
        """The attributes in an item's value. Raises Corrupt."""
        packed = packed[self._codes.size :]
        if not packed:
            return {}
        attributes: dict[str, Any] = {}
        try:
            for name, value in zip(self.attributes, load(packed), strict=True):
                if value is None:
                    continue
                if name in self._values:
                    names = self.attributes[name]["values"]
                    value = [names[i] for i in (value if isinstance(value, list) else [value])]
                attributes[name] = value
        except (TypeError, ValueError, LookupError) as exc:
            raise Corrupt("attributes that the header does not describe") from exc
        return attributes


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
        header.pack_attributes(item.attributes)
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


def stock_key(version: str) -> str:
    return f"padrec:{version}:stock"


def pack_stock(header: CatalogHeader, codes: Iterable[Codes]) -> bytes:
    """Codes of what is out of stock, under a checksum. Equal stock, equal bytes."""
    return seal(header.version.encode(), b"".join(sorted(header.pack(each) for each in codes)))


def unpack_stock(header: CatalogHeader, sealed: bytes) -> list[Codes]:
    """Raises Corrupt."""
    packed, size = unseal(header.version.encode(), sealed), len(header.pack((0,) * len(header.codebook_sizes)))
    if len(packed) % size:
        raise Corrupt("wrong length")
    return [header.unpack(packed[i : i + size]) for i in range(0, len(packed), size)]


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
