"""The mapping is right or absent: damaged entries are never served, and Redis may come and go."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service.api.catalog import Catalog, CatalogVersion, Lru
from service.api.catalog_file import CatalogFile, CatalogFileError
from service.api.publish import publish
from service.api.redis_cache import RedisCache
from service.catalog_codec import CatalogHeader, seal
from service.embedded_valkey import ValkeyProcess, start_valkey
from service.metrics import ApiMetrics
from service.middleware import cancel
from service.redis_client import connect
from tests.service.wire import NUM_ITEMS, OTHER_VERSION, VERSION, api_settings, codes_of, until, write_catalog


@asynccontextmanager
async def opened(url: str, copy: Path | None = None, **others: Any) -> AsyncIterator[tuple[Catalog, RedisCache]]:
    metrics = ApiMetrics(CollectorRegistry())
    redis = RedisCache(connect(url, 0.2), metrics, 0.2)
    catalog = Catalog(redis, api_settings(url, catalog_file=copy, **others), metrics)
    await catalog.start()
    try:
        yield catalog, redis
    finally:
        await redis.close()


def active(catalog: Catalog) -> CatalogVersion:
    assert catalog.current is not None
    return catalog.current


def count(redis: RedisCache, result: str, op: str = "item", cache: str = "redis") -> float:
    labels = {"cache": cache, "op": op, "result": result}
    metric = redis.metrics.cache_operations
    return next((s.value for m in metric.collect() for s in m.samples if s.labels == labels), 0.0)


def everything() -> dict[str, tuple[int, ...]]:
    return {f"i{n}": tuple(codes_of(n)) for n in range(NUM_ITEMS)}


async def test_every_item_maps_to_its_codes_and_back(published: ValkeyProcess) -> None:
    async with opened(published.url) as (catalog, _):
        ids = await active(catalog).codes_of(everything())
        back = await active(catalog).items_of(everything().values())
    assert ids.found == everything()
    assert back.found == {codes: item_id for item_id, codes in everything().items()}


async def test_what_was_looked_up_is_not_asked_for_again(published: ValkeyProcess) -> None:
    async with opened(published.url) as (catalog, redis):
        await active(catalog).codes_of(["i1", "i2"])
        asked = count(redis, "hit")
        assert (await active(catalog).codes_of(["i1", "i2"])).found == {i: everything()[i] for i in ("i1", "i2")}
        assert (await active(catalog).items_of([everything()["i1"]])).found == {everything()["i1"]: "i1"}
        assert count(redis, "hit") == asked == 2
        assert count(redis, "hit", "sid") == 0
        assert count(redis, "hit", cache="local") == 2


async def test_an_unknown_item_is_unknown(published: ValkeyProcess) -> None:
    async with opened(published.url) as (catalog, _):
        mapped = await active(catalog).codes_of(["i1", "nobody"])
        assert (list(mapped.found), mapped.unknown, mapped.unread) == (["i1"], ["nobody"], [])
        assert (await active(catalog).items_of([(3, 3, 3, 0)])).unknown == [(3, 3, 3, 0)]


def damages(header: CatalogHeader) -> dict[str, bytes]:
    """Values for i1 that must not be believed."""
    own, other = header.pack((0, 0, 1, 0)), header.pack((0, 0, 2, 0))
    return {
        "empty": b"",
        "without checksum": own,
        "truncated": seal(b"i1", own)[:-1],
        "bit flipped": seal(b"i1", own)[:-1] + b"\x01",
        "of another item": seal(b"i2", other),
        "of another item, under no checksum": b"\0\0\0\0" + other,
        "too short": seal(b"i1", own[:-2]),
        "outside its codebook": seal(b"i1", header.pack((99, 0, 1, 0))),
        "text": seal(b"i1", b"\xff\xfe"),
    }


async def damage(redis: RedisCache, header: CatalogHeader, value: bytes) -> None:
    await redis.write_fields([(header.key("item", b"i1"), b"i1", value)])


@pytest.mark.parametrize("kind", list(damages(CatalogHeader("v", (4, 4, 4, 2), {}, 1, 1))))
async def test_a_damaged_entry_is_refilled_from_the_copy_and_counted(
    published: ValkeyProcess, catalog_path: Path, kind: str
) -> None:
    async with opened(published.url, catalog_path) as (catalog, redis):
        header = active(catalog).header
        await damage(redis, header, damages(header)[kind])
        assert (await active(catalog).codes_of(["i1"])).found == {"i1": everything()["i1"]}
        assert count(redis, "corrupt") == 1
    async with opened(published.url) as (catalog, redis):
        assert (await active(catalog).codes_of(["i1"])).found == {"i1": everything()["i1"]}
        assert count(redis, "corrupt") == 0


@pytest.mark.parametrize("kind", list(damages(CatalogHeader("v", (4, 4, 4, 2), {}, 1, 1))))
async def test_without_a_copy_a_damaged_entry_is_not_served(published: ValkeyProcess, kind: str) -> None:
    async with opened(published.url) as (catalog, redis):
        header = active(catalog).header
        await damage(redis, header, damages(header)[kind])
        mapped = await active(catalog).codes_of(["i1", "i2"])
        assert (list(mapped.found), mapped.unread) == (["i2"], ["i1"])
        assert count(redis, "corrupt") == 1


async def test_damaged_names_and_attributes_are_not_served_either(published: ValkeyProcess) -> None:
    async with opened(published.url) as (catalog, redis):
        header = active(catalog).header
        packed = header.pack((0, 0, 1, 0))
        await redis.write_fields(
            [
                (header.key("sid", packed), packed, seal(packed, b"\xff")),
                (header.key("item", b"i1"), b"i1", seal(b"i1", packed + b"[0")),
            ]
        )
        assert (await active(catalog).items_of([(0, 0, 1, 0)])).unread == [(0, 0, 1, 0)]
        assert (await active(catalog).attributes_of(["i1"])).unread == ["i1"]


async def test_a_lost_entry_comes_back_from_the_copy(published: ValkeyProcess, catalog_path: Path) -> None:
    async with opened(published.url, catalog_path) as (catalog, redis):
        await redis.client.flushall()
        assert (await active(catalog).codes_of(everything())).found == everything()
        await redis.client.flushall()
        assert (await active(catalog).attributes_of(["i1"])).found["i1"]["year"] == 1901
        assert count(redis, "hit", "refill") == NUM_ITEMS + 1


async def test_an_item_the_copy_does_not_know_is_unknown(published: ValkeyProcess, catalog_path: Path) -> None:
    async with opened(published.url, catalog_path) as (catalog, _):
        assert (await active(catalog).codes_of(["nobody"])).unknown == ["nobody"]
        assert (await active(catalog).items_of([(3, 3, 3, 0), (0, 0, 1, 0)])).unknown == [(3, 3, 3, 0)]
    published.stop()
    async with opened(published.url, catalog_path) as (catalog, _):
        assert (await active(catalog).items_of([(0, 0, 1, 0)])).found == {(0, 0, 1, 0): "i1"}
        assert (await active(catalog).codes_of(["nobody"])).unknown == ["nobody"]


async def test_a_redis_that_takes_no_repairs_still_gets_right_answers(
    published: ValkeyProcess, catalog_path: Path
) -> None:
    async with opened(published.url, catalog_path) as (catalog, redis):
        await redis.client.flushall()
        await redis.client.acl_setuser("default", enabled=True, nopass=True, commands=["-hset"], keys=["*"])
        assert (await active(catalog).codes_of(["i1"])).found == {"i1": everything()["i1"]}
        assert count(redis, "hit", "refill") == 0


async def test_a_version_that_vanishes_is_not_switched_to(published: ValkeyProcess) -> None:
    async with opened(published.url) as (catalog, redis):
        await redis.client.set("padrec:active", "vanished")
        await catalog.refresh()
        assert active(catalog).version == VERSION


async def test_a_header_under_anothers_name_is_not_believed(published: ValkeyProcess) -> None:
    async with opened(published.url) as (catalog, redis):
        await redis.client.copy(f"padrec:{VERSION}:meta", "padrec:copied:meta")
        assert await catalog.version("copied") is None
        published.stop()
        assert await catalog.version("other") is None


async def test_a_bug_in_one_refresh_does_not_end_the_following(published: ValkeyProcess) -> None:
    class Stumbling(Catalog):
        refreshes = 0

        async def refresh(self) -> None:
            self.refreshes += 1
            if self.refreshes == 1:
                raise RuntimeError("a bug")

    metrics = ApiMetrics(CollectorRegistry())
    redis = RedisCache(connect(published.url, 0.2), metrics, 0.2)
    catalog = Stumbling(redis, api_settings(published.url), metrics)
    following = asyncio.create_task(catalog.follow())
    await until(lambda: catalog.refreshes > 1)
    await cancel(following)
    await redis.close()


async def test_only_a_few_versions_are_kept(published: ValkeyProcess, tmp_path: Path) -> None:
    async with opened(published.url) as (catalog, _):
        first = active(catalog)
        for n in range(4):
            await publish(write_catalog(tmp_path, f"version{n}"), published.url)
            await catalog.refresh()
        assert active(catalog).version == "version3"
        assert await catalog.version(VERSION) is not first


async def test_redis_down_at_start_leaves_the_copy_or_nothing(tmp_path: Path, catalog_path: Path) -> None:
    url = f"unix://{tmp_path}/none.sock"
    async with opened(url, catalog_path) as (catalog, _):
        assert (await active(catalog).codes_of(everything())).found == everything()
        assert not catalog.redis_up
    async with opened(url) as (catalog, _):
        assert catalog.current is None


async def test_redis_that_appears_later_is_found(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("v")
    async with opened(f"unix://{folder}/valkey.sock") as (catalog, redis):
        following = asyncio.create_task(catalog.follow())
        assert catalog.current is None
        with start_valkey(folder) as server:
            await publish(write_catalog(tmp_path), server.url)
            await until(lambda: catalog.current)
            assert redis.up
        await cancel(following)


async def test_redis_dying_later_leaves_what_is_cached(published: ValkeyProcess) -> None:
    async with opened(published.url) as (catalog, _):
        await active(catalog).codes_of(["i1"])
        published.stop()
        mapped = await active(catalog).codes_of(["i1", "i2"])
        assert (list(mapped.found), mapped.unknown, mapped.unread) == (["i1"], [], ["i2"])
        assert not catalog.redis_up
        assert len(active(catalog).popular) == NUM_ITEMS


async def test_a_new_version_is_followed_and_the_old_one_stays_at_hand(
    published: ValkeyProcess, tmp_path: Path
) -> None:
    async with opened(published.url) as (catalog, _):
        following = asyncio.create_task(catalog.follow())
        old = active(catalog)
        await publish(write_catalog(tmp_path, OTHER_VERSION, first=100), published.url)
        await until(lambda: active(catalog).version == OTHER_VERSION)
        await cancel(following)
        assert (await active(catalog).codes_of(["i100"])).found == {"i100": (0, 0, 0, 0)}
        assert (await old.codes_of(["i3"])).found == {"i3": (0, 0, 3, 0)}
        assert await catalog.version(VERSION) is old
        assert await catalog.version("neverheardof") is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("padrec:active", b"\xff!"),
        ("padrec:active", b"neverheardof"),
        (f"padrec:{VERSION}:meta", b"{}"),
        (f"padrec:{VERSION}:meta", b"not json"),
        (f"padrec:{VERSION}:popular", b'{"items": [], "crc32": 1}'),
    ],
)
async def test_a_damaged_header_is_not_believed(
    published: ValkeyProcess, catalog_path: Path, key: str, value: bytes
) -> None:
    client = connect(published.url, 1)
    await client.set(key, value)
    await client.aclose()
    async with opened(published.url) as (catalog, _):
        assert catalog.current is None
    async with opened(published.url, catalog_path) as (catalog, _):
        assert active(catalog).version == VERSION


async def test_a_silent_redis_costs_its_budget_and_is_left_alone_for_a_while(tmp_path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(silent, path=tmp_path / "s"):
        metrics = ApiMetrics(CollectorRegistry())
        redis = RedisCache(connect(f"unix://{tmp_path}/s", 0.05), metrics, 0.05)
        catalog = Catalog(redis, api_settings(f"unix://{tmp_path}/s"), metrics)
        loop = asyncio.get_running_loop()
        started = loop.time()
        await catalog.refresh()
        assert 0.04 < loop.time() - started < 1
        await catalog.refresh()
        started = loop.time()
        for _ in range(20):
            await catalog.refresh()
        assert loop.time() - started < 0.5  # and not 20 times 0.05
        await redis.close()


@pytest.mark.parametrize(
    ("line", "damage", "complaint"),
    [
        (0, "", "line 1: not JSON"),
        (0, "{}", "line 1: the catalog header lacks a field"),
        (0, '{"catalog_version":"", "num_levels":1, "codebook_sizes":[1], "attributes":{}}', "wrong field"),
        (2, "[]", "line 3: an item lacks a field"),
        (2, '{"item_id":"x","codes":[9,0,0,0]}', "line 3: an item has a wrong field"),
        (2, '{"item_id":"i0","codes":[3,3,3,0]}', "must be distinct"),
    ],
)
def test_a_catalog_file_is_refused_by_line(catalog_path: Path, line: int, damage: str, complaint: str) -> None:
    lines = catalog_path.read_text().splitlines()
    lines[line] = damage
    catalog_path.write_text("\n".join(lines))
    with pytest.raises(CatalogFileError, match=complaint):
        CatalogFile.load(catalog_path)


def test_a_missing_or_empty_catalog_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogFileError, match="No such file"):
        CatalogFile.load(tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(CatalogFileError, match="line 1"):
        CatalogFile.load(tmp_path / "empty")


def test_the_local_cache_keeps_what_was_used_last() -> None:
    cache: Lru[str, int] = Lru(2)
    cache.put("a", 1)
    cache.put("b", 2)
    cache.get("a")
    cache.put("c", 3)
    assert (cache.get("a"), cache.get("b"), cache.get("c"), len(cache)) == (1, None, 3, 2)
