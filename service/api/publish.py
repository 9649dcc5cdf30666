"""Publishing: write a catalog version beside the old one, read it back, then make it the active one; or go back; and
say what is out of stock.

Readers see the old version or the new one, never a mixture. The version that was active stays for answers in flight and
for going back; older ones are removed. Stock belongs to items, not to versions: it changes without a new version, and a
new version begins with it.
"""

from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from service.api.catalog_file import CatalogFile
from service.catalog_codec import (
    ACTIVE_KEY,
    NUM_POPULAR,
    OUT_OF_STOCK_KEY,
    PREVIOUS_KEY,
    CatalogHeader,
    Codes,
    Corrupt,
    active_version,
    dump_sealed,
    load_sealed,
    meta_key,
    pack_stock,
    popular_key,
    seal,
    stock_key,
    unseal,
)
from service.redis_client import REDIS_ERRORS, Client, close, connect, get

T = TypeVar("T")
COMMANDS_PER_TRIP = 200
TIMEOUT_SECONDS = 5.0


class PublishError(Exception):
    """It could not be done; what was active still is."""


async def publish(catalog_file: Path, redis_url: str, *, same_codebooks: bool = False) -> CatalogHeader:
    """Publish `catalog_file`. Safe to repeat. With `same_codebooks` a catalog of other codebooks than the active
    version's is refused: the workers' targets could not speak of it. Raises CatalogFileError or PublishError."""
    catalog = CatalogFile.load(catalog_file)
    async with _redis(redis_url) as client:
        previous = await get(client, ACTIVE_KEY)
        if same_codebooks and previous is not None:
            active = await _header(client, _version(previous))
            if active is not None and active.codebook_sizes != catalog.header.codebook_sizes:
                raise PublishError(
                    f"its codebooks have {list(catalog.header.codebook_sizes)} codes, those of the active version "
                    f"{active.version} {list(active.codebook_sizes)}: it needs a bundle of its own"
                )
        version = catalog.header.version
        await write(client, catalog)
        if await _stock_is_known(client, previous):
            await _write_stock(client, catalog.header)
        await check(client, catalog)
        if previous not in (None, version.encode()):
            await client.set(PREVIOUS_KEY, previous)
        await client.set(ACTIVE_KEY, version)
        if previous != version.encode():
            await _remove_old(client, version, previous)
    return catalog.header


async def roll_back(redis_url: str) -> CatalogHeader:
    """Make the version before the active one active again; once more goes forward again. Raises PublishError where
    there is none."""
    async with _redis(redis_url) as client:
        active, previous = await get(client, ACTIVE_KEY), await get(client, PREVIOUS_KEY)
        if previous is None:
            raise PublishError("no version was active before this one")
        header = await _header(client, _version(previous))
        if header is None:
            raise PublishError(f"version {_version(previous)} is no longer stored: publish its catalog again")
        await _write_stock(client, header)
        # First the way back: between the two commands both keys name a version that is there.
        if active is not None:
            await client.set(PREVIOUS_KEY, active)
        await client.set(ACTIVE_KEY, header.version)
        return header


async def set_stock(redis_url: str, *, out: Collection[str] = (), back: Collection[str] = ()) -> tuple[int, int]:
    """Items that are `out` of stock from now on, and those that are `back`. Returns how many items are out of stock,
    and how many of them the active version has. Raises PublishError; an ID that no version knows is kept for one that
    will."""
    async with _redis(redis_url) as client:
        for command, ids in ((client.sadd, out), (client.srem, back)):
            for group in _groups(ids, 1000):
                await command(OUT_OF_STOCK_KEY, *group)
        active, previous = await get(client, ACTIVE_KEY), await get(client, PREVIOUS_KEY)
        if active is None:
            raise PublishError("no catalog is published")
        header = await _header(client, _version(active))
        if header is None:
            raise PublishError("the active version is damaged: publish it again")
        known = await _write_stock(client, header)
        before = None if previous is None else await _header(client, _version(previous))
        if before is not None:
            await _write_stock(client, before)  # workers may not have left it yet
        return int(await client.scard(OUT_OF_STOCK_KEY)), known


async def write(client: Client, catalog: CatalogFile) -> None:
    """Store every key of the version but the switch."""
    header = catalog.header
    for group in _groups(_buckets(catalog).items(), COMMANDS_PER_TRIP):
        pipe = client.pipeline(transaction=False)
        for key, fields in group:
            pipe.hset(key, mapping=fields)
        await pipe.execute()
    popular = [item.document() for item in catalog.by_popularity[:NUM_POPULAR]]
    await client.set(popular_key(header.version), dump_sealed({"items": popular}))
    await client.set(meta_key(header.version), dump_sealed(header.document()))


async def check(client: Client, catalog: CatalogFile) -> None:
    """Raises PublishError where the stored version is not the catalog's."""
    header = catalog.header
    for group in _groups(_buckets(catalog).items(), COMMANDS_PER_TRIP):
        pipe = client.pipeline(transaction=False)
        for key, _ in group:
            pipe.hgetall(key)
        stored = await pipe.execute()
        # A version published before may have left fields of items that are gone: never asked for, harmless.
        if any(fields.items() - found.items() for (_, fields), found in zip(group, stored, strict=True)):
            raise PublishError("read back something else than was written")
    stored_header = await _header(client, header.version)
    if stored_header is None:
        raise PublishError("read back a damaged header")
    if stored_header != header:
        raise PublishError("read back another header than was written")


def _buckets(catalog: CatalogFile) -> dict[str, dict[Any, Any]]:
    """Every hash of the version with its fields and values, as bytes."""
    buckets: dict[str, dict[Any, Any]] = {}
    for item in catalog.by_id.values():
        for kind, field, value in catalog.header.entries(item):
            buckets.setdefault(catalog.header.key(kind, field), {})[field] = seal(field, value)
    return buckets


async def _stock_is_known(client: Client, active: bytes | None) -> bool:
    """Whether Redis has ever been told what is out of stock. One that has lost its data has not: what running processes
    were told is all that is known, and must not be taken back."""
    if await client.scard(OUT_OF_STOCK_KEY):
        return True
    return active is not None and await get(client, stock_key(_version(active))) is not None


async def _write_stock(client: Client, header: CatalogHeader) -> int:
    """Translate the items that are out of stock into codes of a version. Returns how many of them it has."""
    raw: Any = await client.smembers(OUT_OF_STOCK_KEY)
    ids = sorted(bytes(each) for each in raw)
    codes: list[Codes] = []
    for group in _groups(ids, COMMANDS_PER_TRIP * 10):
        pipe = client.pipeline(transaction=False)
        for item_id in group:
            pipe.hget(header.key("item", item_id), item_id)
        for item_id, value in zip(group, await pipe.execute(), strict=True):
            if value is not None:
                try:
                    codes.append(header.unpack(unseal(item_id, value)))
                except Corrupt as exc:
                    raise PublishError(f"a stored item is damaged ({exc}): publish the catalog again") from exc
    await client.set(stock_key(header.version), pack_stock(header, codes))
    return len(codes)


async def _remove_old(client: Client, version: str, previous: bytes | None) -> None:
    kept = {meta_key(version)}
    if previous is not None:
        kept.add(meta_key(_version(previous)))
    async for key in client.scan_iter(match="padrec:*:meta", count=1000):
        if key.decode() in kept:
            continue
        header = await _header(client, key.decode().split(":")[1])
        for group in _groups([key.decode()] if header is None else header.keys(), 1000):
            pipe = client.pipeline(transaction=False)
            for each in group:
                pipe.unlink(each)
            await pipe.execute()


async def _header(client: Client, version: str) -> CatalogHeader | None:
    """The header of a stored version; None if it is missing or damaged."""
    try:
        return CatalogHeader.from_document(load_sealed(await get(client, meta_key(version)) or b""))
    except Corrupt:
        return None


def _version(raw: bytes) -> str:
    try:
        return active_version(raw)
    except Corrupt as exc:
        raise PublishError(f"{ACTIVE_KEY} or {PREVIOUS_KEY} in Redis: {exc}") from exc


@asynccontextmanager
async def _redis(url: str) -> AsyncIterator[Client]:
    """A client whose errors become PublishError."""
    client = connect(url, TIMEOUT_SECONDS)
    try:
        yield client
    except REDIS_ERRORS as exc:
        raise PublishError(f"Redis: {exc}") from exc
    finally:
        await close(client)


def _groups(values: Iterable[T], size: int) -> Iterator[Sequence[T]]:
    remaining = iter(values)
    while group := list(islice(remaining, size)):
        yield group
