"""Publishing: write a catalog version beside the old one, read it back, then make it the active one.

Readers see the old version or the new one, never a mixture. The version that was active stays for answers in
flight and for going back; older ones are removed.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from service.api.catalog_codec import (
    ACTIVE_KEY,
    NUM_POPULAR,
    CatalogHeader,
    Corrupt,
    dump_sealed,
    load_sealed,
    meta_key,
    popular_key,
    seal,
)
from service.api.catalog_file import CatalogFile
from service.api.redis_cache import connect

T = TypeVar("T")
ITEMS_PER_TRIP = 500
TIMEOUT_SECONDS = 5.0


class PublishError(Exception):
    """The catalog could not be published; what was active still is."""


async def publish(catalog_file: Path, redis_url: str) -> CatalogHeader:
    """Publish `catalog_file`. Safe to repeat. Raises CatalogFileError or PublishError."""
    catalog = CatalogFile.load(catalog_file)
    client = connect(redis_url, TIMEOUT_SECONDS)
    try:
        await write(client, catalog)
        await check(client, catalog)
        previous = await _get(client, ACTIVE_KEY)
        await client.set(ACTIVE_KEY, catalog.header.version)
        if previous != catalog.header.version.encode():
            await _remove_old(client, catalog.header.version, previous)
    except RedisError as exc:
        raise PublishError(f"Redis: {exc}") from exc
    finally:
        await client.aclose()
        await client.connection_pool.disconnect()
    return catalog.header


async def write(client: "Redis", catalog: CatalogFile) -> None:
    """Store every key of the version but the switch."""
    header = catalog.header
    for group in _groups(list(catalog.by_id.values()), ITEMS_PER_TRIP):
        pipe = client.pipeline(transaction=False)
        for item in group:
            for kind, field, value in header.entries(item):
                pipe.hset(header.key(kind, field), field, seal(field, value))
        await pipe.execute()
    popular = [item.document() for item in catalog.by_popularity[:NUM_POPULAR]]
    await client.set(popular_key(header.version), dump_sealed({"items": popular}))
    await client.set(meta_key(header.version), dump_sealed(header.document()))


async def check(client: "Redis", catalog: CatalogFile) -> None:
    """Raises PublishError where the stored version is not the catalog's."""
    header = catalog.header
    for group in _groups(list(catalog.by_id.values()), ITEMS_PER_TRIP):
        pipe = client.pipeline(transaction=False)
        expected = []
        for item in group:
            for kind, field, value in header.entries(item):
                pipe.hget(header.key(kind, field), field)
                expected.append(seal(field, value))
        if await pipe.execute() != expected:
            raise PublishError("read back something else than was written")
    stored = await _get(client, meta_key(header.version))
    try:
        if CatalogHeader.from_document(load_sealed(stored or b"")) != header:
            raise PublishError("read back another header than was written")
    except Corrupt as exc:
        raise PublishError(f"read back a damaged header: {exc}") from exc


async def _remove_old(client: "Redis", version: str, previous: bytes | None) -> None:
    kept = {meta_key(version)}
    if previous is not None:
        kept.add(f"padrec:{previous.decode('ascii', 'replace')}:meta")
    async for key in client.scan_iter(match="padrec:*:meta", count=1000):
        if key.decode() in kept:
            continue
        try:
            header = CatalogHeader.from_document(load_sealed(await _get(client, key.decode()) or b""))
        except Corrupt:
            await client.unlink(key)
            continue
        for group in _groups(header.keys(), 1000):
            await client.unlink(*group)


async def _get(client: "Redis", key: str) -> bytes | None:
    value: Any = await client.get(key)
    return value if value is None else bytes(value)


def _groups(values: Sequence[T], size: int) -> Iterator[list[T]]:
    remaining = iter(values)
    while group := list(islice(remaining, size)):
        yield group
