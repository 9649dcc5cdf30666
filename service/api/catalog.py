"""Item ID ⇄ semantic ID: the one place where the public's words become the worker's.

Look-ups go to a local LRU, then to Redis in one round trip, then to the durable copy if there is one. Every value is
checked on the way in: a damaged or missing entry is taken from the copy, written back and counted, never served.
A Redis that has lost the version knows nothing of it, which is not the same as an item that does not exist. Knows no
requests: it maps IDs of one pinned catalog version.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from service.api.catalog_file import CatalogFile
from service.api.redis_cache import RedisCache, RedisDown
from service.catalog_codec import (
    ACTIVE_KEY,
    CatalogHeader,
    CatalogItem,
    Codes,
    Corrupt,
    active_version,
    load_sealed,
    meta_key,
    popular_key,
    seal,
    stock_key,
    unpack_stock,
    unseal,
)
from service.metrics import ApiMetrics
from service.settings import Settings

K = TypeVar("K")
V = TypeVar("V")
KEPT_VERSIONS = 3

logger = logging.getLogger("padrec.catalog")


class Lru(Generic[K, V]):
    """The `capacity` entries used last."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        self._entries.clear()

    def get(self, key: K) -> V | None:
        value = self._entries.get(key)
        if value is not None:
            self._entries.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self.capacity:
            self._entries.popitem(last=False)


@dataclass
class Mapped(Generic[K, V]):
    """`found` holds what was mapped; `unknown` is not in the catalog; `unread` could not be looked up."""

    found: dict[K, V] = field(default_factory=dict)
    unknown: list[K] = field(default_factory=list)
    unread: list[K] = field(default_factory=list)


class CatalogVersion:
    """One version of the catalog. Maps between item IDs and codes; `popular` by falling popularity."""

    def __init__(
        self,
        header: CatalogHeader,
        popular: Sequence[CatalogItem],
        copy: CatalogFile | None,
        redis: RedisCache,
        metrics: ApiMetrics,
        lru_items: int,
    ) -> None:
        self.header = header
        self.popular = popular
        self.out_of_stock: frozenset[Codes] = frozenset()
        self.stock = b""  # the same as it lies in Redis
        self._copy = copy
        self._redis = redis
        self._metrics = metrics
        self._codes: Lru[str, Codes] = Lru(lru_items)
        self._items: Lru[Codes, str] = Lru(lru_items)
        self._attributes: Lru[str, Mapping[str, Any]] = Lru(lru_items)

    @property
    def version(self) -> str:
        return self.header.version

    def forget(self) -> None:
        """Empty the local caches."""
        for cache in (self._codes, self._items, self._attributes):
            cache.clear()

    async def codes_of(self, item_ids: Iterable[str]) -> Mapped[str, Codes]:
        """Semantic IDs of items."""
        return await self._map("item", self._codes, item_ids, str.encode, self.header.unpack, self._items)

    async def items_of(self, codes: Iterable[Codes]) -> Mapped[Codes, str]:
        """Items of semantic IDs. The codes must fit the codebooks."""
        return await self._map("sid", self._items, codes, self.header.pack, bytes.decode, self._codes)

    async def attributes_of(self, item_ids: Iterable[str]) -> Mapped[str, Mapping[str, Any]]:
        return await self._map("attributes", self._attributes, item_ids, str.encode, self.header.unpack_attributes)

    async def _map(
        self,
        kind: str,
        cache: Lru[K, V],
        keys: Iterable[K],
        encode: Callable[[K], bytes],
        decode: Callable[[bytes], V],
        mirror: Lru[V, K] | None = None,
    ) -> Mapped[K, V]:
        """What was not in `cache` is read and put there, and into `mirror` the other way round."""
        mapped: Mapped[K, V] = Mapped()
        missing: dict[bytes, K] = {}
        for key in keys:
            value = cache.get(key)
            if value is not None:
                mapped.found[key] = value
            else:
                missing[encode(key)] = key
        self._count("local", kind, "hit", len(mapped.found))
        if missing:
            self._count("local", kind, "miss", len(missing))
            await self._read(kind, missing, decode, mapped)
            for key in missing.values():
                if key in mapped.found:
                    cache.put(key, mapped.found[key])
                    if mirror is not None:
                        mirror.put(mapped.found[key], key)
        return mapped

    async def _read(
        self,
        kind: str,
        missing: Mapping[bytes, K],
        decode: Callable[[bytes], V],
        mapped: Mapped[K, V],
    ) -> None:
        by_key: dict[str, list[bytes]] = {}
        for name in missing:
            by_key.setdefault(self._key(kind, name), []).append(name)
        names = [name for group in by_key.values() for name in group]
        raws: Sequence[bytes | None] | None
        try:
            raws = await self._redis.read_fields(kind, by_key)
        except RedisDown:
            raws = None
        lost = raws is None or (None in raws and self._copy is None and not await self._stored())
        repairs: list[tuple[str, bytes, bytes]] = []
        counts = dict.fromkeys(("hit", "miss", "corrupt", "error"), 0)
        for i, name in enumerate(names):
            key, raw = missing[name], None if raws is None else raws[i]
            result = "error" if raws is None else "miss"
            if raw is not None:
                try:
                    mapped.found[key] = decode(unseal(name, raw))
                    counts["hit"] += 1
                    continue
                except (Corrupt, UnicodeDecodeError):
                    result = "corrupt"
            counts[result] += 1
            spare = self._spare(kind, name)
            if spare is not None:
                mapped.found[key] = decode(spare)
                repairs.append((self._key(kind, name), name, seal(name, spare)))
            elif self._copy is not None or (result == "miss" and not lost):
                mapped.unknown.append(key)
            else:
                mapped.unread.append(key)
        for result, amount in counts.items():
            self._count("redis", kind, result, amount)
        if repairs and raws is not None:
            await self._repair(repairs)

    async def _stored(self) -> bool:
        """Whether Redis has this version at all."""
        try:
            return (await self._redis.get(meta_key(self.version)))[0] is not None
        except RedisDown:
            return False

    def _spare(self, kind: str, name: bytes) -> bytes | None:
        """The value the durable copy has for a field."""
        if self._copy is None:
            return None
        item = (
            self._copy.by_codes.get(self.header.unpack(name)) if kind == "sid" else self._copy.by_id.get(name.decode())
        )
        if item is None:
            return None
        by_code, by_id = self.header.entries(item)[::-1]
        return by_code[2] if kind == "sid" else by_id[2]

    def _key(self, kind: str, name: bytes) -> str:
        return self.header.key("sid" if kind == "sid" else "item", name)

    async def _repair(self, repairs: Sequence[tuple[str, bytes, bytes]]) -> None:
        try:
            await self._redis.write_fields(repairs)
        except RedisDown:
            return
        self._count("redis", "refill", "hit", len(repairs))

    def _count(self, cache: str, op: str, result: str, amount: int = 1) -> None:
        if amount:
            self._metrics.cache_operations.labels(cache, op, result).inc(amount)


class Catalog:
    """The versions at hand; `current` is the active one, or None before any could be loaded."""

    def __init__(self, redis: RedisCache, settings: Settings, metrics: ApiMetrics) -> None:
        self.current: CatalogVersion | None = None
        self._redis = redis
        self._settings = settings
        self._metrics = metrics
        self._copy: CatalogFile | None = None
        self._known: OrderedDict[str, CatalogVersion] = OrderedDict()

    @property
    def redis_up(self) -> bool:
        return self._redis.up

    async def start(self) -> None:
        """Load the durable copy, if one is configured, and the active version. Raises CatalogFileError."""
        if self._settings.catalog_file is not None:
            self._copy = await asyncio.to_thread(CatalogFile.load, self._settings.catalog_file)
        await self.refresh()

    async def follow(self) -> None:
        """Keep up with the active version, and notice Redis going and coming. Never returns."""
        while True:
            await asyncio.sleep(self._settings.poll_seconds)
            try:
                await self.refresh()
            except Exception:
                logger.exception("catalog refresh failed")

    async def refresh(self) -> None:
        """Switch to the version Redis calls active; without one, to the durable copy's."""
        version = self._copy.header.version if self._copy and self.current is None else None
        stocks = list(self._known.values())
        try:
            raw, *stock = await self._redis.get(ACTIVE_KEY, *(stock_key(known.version) for known in stocks))
            if raw is not None:
                version = active_version(raw)
            for known, sealed in zip(stocks, stock, strict=True):
                self._take_stock(known, sealed)
        except RedisDown:
            pass
        except Corrupt:
            self._metrics.cache_operations.labels("redis", "active", "corrupt").inc()
        if version is None or (self.current is not None and self.current.version == version):
            return
        found = await self.version(version)
        if found is None and self.current is None and self._copy is not None:
            found = await self.version(self._copy.header.version)
        if found is not None:
            self._switch(found)

    async def version(self, version: str) -> CatalogVersion | None:
        """One version, wherever it can be had; None if nowhere."""
        known = self._known.get(version)
        if known is None:
            known = self._from_copy(version) or await self._from_redis(version)
            if known is None:
                return None
            self._known[version] = known
            with contextlib.suppress(RedisDown):  # the next refresh asks again
                self._take_stock(known, (await self._redis.get(stock_key(version)))[0])
            while len(self._known) > KEPT_VERSIONS:
                self._known.popitem(last=False)
        return known

    def _switch(self, version: CatalogVersion) -> None:
        self.current = version
        self._metrics.set_catalog(version.version, version.header.num_items)
        logger.info("catalog active", extra={"catalog_version": version.version})

    def _take_stock(self, known: CatalogVersion, sealed: bytes | None) -> None:
        """Believe what Redis says is out of stock; what it does not know, or has damaged, changes nothing."""
        if sealed is None or sealed == known.stock:
            return
        try:
            known.out_of_stock = frozenset(unpack_stock(known.header, sealed))
            known.stock = sealed
        except Corrupt:
            self._metrics.cache_operations.labels("redis", "stock", "corrupt").inc()

    def _from_copy(self, version: str) -> CatalogVersion | None:
        if self._copy is None or self._copy.header.version != version:
            return None
        return self._new(self._copy.header, self._copy.by_popularity, self._copy)

    async def _from_redis(self, version: str) -> CatalogVersion | None:
        try:
            meta, popular = await self._redis.get(meta_key(version), popular_key(version))
            if meta is None:
                return None
            header = CatalogHeader.from_document(load_sealed(meta))
            if header.version != version:
                raise Corrupt("meta of another version")
            items = load_sealed(popular)["items"] if popular is not None else []
            return self._new(header, [CatalogItem.from_document(i, header) for i in items], None)
        except RedisDown:
            return None
        except (Corrupt, KeyError, TypeError):
            self._metrics.cache_operations.labels("redis", "meta", "corrupt").inc()
            return None

    def _new(self, header: CatalogHeader, popular: Sequence[CatalogItem], copy: CatalogFile | None) -> CatalogVersion:
        return CatalogVersion(header, popular, copy, self._redis, self._metrics, self._settings.lru_items)
