"""A worker follows the published catalog: real Redis, real builder process, real engine and wire."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.catalog import Catalog
from model.decoding.catalog_index import CatalogIndex
from model.decoding.list_decoder import ListDecoder
from model.decoding.request import ListRequest
from model.decoding.topology import Budget, FixedBudget
from service.api.publish import publish, roll_back, set_stock
from service.catalog_codec import stock_key
from service.embedded_valkey import ValkeyProcess
from service.metrics import WorkerMetrics, new_registry
from service.probes import Drain
from service.redis_client import connect
from service.settings import load_settings
from service.worker.app import create_app, publisher
from service.worker.catalog_feed import CatalogFeed
from service.worker.engine import Edition, Engine
from service.worker.routes import Served
from tests.model.conftest import Tiny, random_catalog, tiny
from tests.service.wire import until

__all__ = ["tiny"]


def decoder(tiny: Tiny, index: CatalogIndex) -> ListDecoder:
    return ListDecoder(
        tiny.target,
        tiny.draft(),
        index.trie,
        index.attributes,
        num_rows=4,
        max_history_items=6,
        max_k=20,
        budget=FixedBudget(Budget(3)),
    )


class Worker:
    """A worker application that follows a Redis, and a client of it."""

    def __init__(self, tiny: Tiny, url: str, failures: Iterator[Exception]) -> None:
        """`failures`: what the next attempts to make an edition end in."""
        self.tiny, vocabulary = tiny, tiny.target.vocabulary
        registry = new_registry()
        metrics = WorkerMetrics(registry)
        version = tiny.catalog.version
        first = decoder(tiny, CatalogIndex.build(tiny.catalog, version, vocabulary))
        self.engine = Engine(first, max_waiting=64, observe=publisher(metrics, "m1"), version=version)
        settings = load_settings({"redis_url": url, "poll_seconds": 0.05, "num_rows": 4})
        served = Served("tiny", "m1", max_k=20, max_history_items=6)

        def edition(index: CatalogIndex) -> Edition:
            for failure in failures:
                raise failure
            return Edition(index.version, decoder(tiny, index), index.golden_requests(4, 6))

        self.feed = CatalogFeed(self.engine, edition, vocabulary, served, settings, metrics)
        self.app = create_app(self.engine, served, settings, Drain(), metrics, registry, self.feed)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://worker")

    async def ask(self, catalog: Catalog, k: int = 8, **changes: Any) -> httpx.Response:
        history = [list(item.codes) for item in catalog.items[:3]]
        body = {"request_id": "r", "catalog_version": catalog.version, "history": history, "k": k}
        return await self.client.post("/generate", json={**body, "deadline_ms": 20_000, **changes})

    async def metric(self, name: str) -> float:
        lines = (await self.client.get("/metrics")).text.splitlines()
        return float(next(line.rsplit(" ", 1)[1] for line in lines if line.startswith(name)))


@asynccontextmanager
async def following(tiny: Tiny, url: str, *failures: Exception) -> AsyncIterator[Worker]:
    worker = Worker(tiny, url, iter(failures))
    async with worker.app.router.lifespan_context(worker.app), worker.client:
        await until(lambda: worker.engine.status().ready, 20)
        yield worker


def saved(catalog: Catalog, folder: Path) -> Path:
    path = folder / f"{catalog.version}.jsonl"
    catalog.save(path)
    return path


def codes_in(reply: httpx.Response) -> list[tuple[int, ...]]:
    assert reply.status_code == 200, reply.text
    return [tuple(item["codes"]) for item in reply.json()["items"]]


def right(tiny: Tiny, catalog: Catalog, k: int = 8, out: list[tuple[int, ...]] | None = None) -> list[tuple[int, ...]]:
    """What the twin writes over a catalog."""
    codes = [item.codes for item in catalog.items]
    request = ListRequest("twin", tuple(codes[:3]), k, exclude=tuple(out or ()))
    return [item.codes for item in replace(tiny, catalog=catalog, codes=codes).twin(request).items]


async def test_a_published_catalog_is_served_and_a_rollback_goes_back(
    tiny: Tiny, valkey: ValkeyProcess, tmp_path: Path
) -> None:
    old, new = tiny.catalog, random_catalog(9)
    await publish(saved(old, tmp_path), valkey.url)
    async with following(tiny, valkey.url) as worker:
        assert codes_in(await worker.ask(old)) == right(tiny, old)
        await publish(saved(new, tmp_path), valkey.url)
        answers = []
        while worker.engine.catalog_version != new.version:
            answers.append(await worker.ask(old))  # under load, all of them of the old version
        assert all(codes_in(answer) == right(tiny, old) for answer in answers)
        fresh = await worker.ask(new)
        assert codes_in(fresh) == right(tiny, new)
        assert fresh.json()["model"]["catalog_version"] == new.version
        filtered = codes_in(await worker.ask(new, k=20, filters={"genre": {"any": ["b"]}, "year": {"min": 1993}}))
        attributes = {item.codes: item.attributes for item in new.items}
        assert filtered
        assert all(attributes[c]["genre"] == ["b"] and attributes[c]["year"] >= 1993 for c in filtered)  # type: ignore[operator]
        assert (await worker.client.get("/info")).json()["catalog_version"] == new.version
        assert await worker.metric('padrec_catalog_swaps_total{result="ok"}') == 1
        assert await worker.metric(f'padrec_model_info{{catalog_version="{new.version}"') == 1

        assert (await roll_back(valkey.url)).version == old.version
        await until(lambda: worker.engine.catalog_version == old.version, 60)
        assert codes_in(await worker.ask(old)) == right(tiny, old)


async def test_stock_changes_without_a_new_version_and_outlives_a_swap(
    tiny: Tiny, valkey: ValkeyProcess, tmp_path: Path
) -> None:
    old = tiny.catalog
    await publish(saved(old, tmp_path), valkey.url)
    async with following(tiny, valkey.url) as worker:
        before = codes_in(await worker.ask(old))
        item_of = {item.codes: item.item_id for item in old.items}
        out = [item_of[before[0]], item_of[before[2]], "nobody's"]
        assert await set_stock(valkey.url, out=out) == (3, 2)
        expected = right(tiny, old, out=[before[0], before[2]])

        async def changed() -> bool:
            return codes_in(await worker.ask(old)) == expected

        await until(changed)
        assert worker.engine.catalog_version == old.version
        assert await worker.metric("padrec_items_out_of_stock") == 2

        # The same items under other codes: a new version begins with the stock there is.
        swapped = zip(old.items, reversed(old.items), strict=True)
        moved = Catalog(old.codebook_sizes, tuple(replace(item, codes=other.codes) for item, other in swapped))
        await publish(saved(moved, tmp_path), valkey.url)
        await until(lambda: worker.engine.catalog_version == moved.version, 60)
        gone = [item.codes for item in moved.items if item.item_id in out]
        assert codes_in(await worker.ask(moved)) == right(tiny, moved, out=gone)
        assert not set(codes_in(await worker.ask(moved, k=20))) & set(gone)

        assert await set_stock(valkey.url, back=out) == (0, 0)

        async def back() -> bool:
            return codes_in(await worker.ask(moved)) == right(tiny, moved)

        await until(back)


async def test_a_catalog_of_other_codebooks_is_refused_once_and_the_old_one_served(
    tiny: Tiny, valkey: ValkeyProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, foreign = tiny.catalog, random_catalog(1, sizes=(6, 6, 5, 9))
    async with following(tiny, valkey.url) as worker:
        await publish(saved(foreign, tmp_path), valkey.url)

        async def refused() -> bool:
            return 'padrec_catalog_swaps_total{result="refused"} 1' in (await worker.client.get("/metrics")).text

        await until(refused, 60)
        assert codes_in(await worker.ask(old)) == right(tiny, old)
        assert any("codebooks" in str(vars(record).get("reason")) for record in caplog.records)
        await asyncio.sleep(0.3)
        assert await refused()


async def test_a_damaged_catalog_is_not_taken_up(
    tiny: Tiny, valkey: ValkeyProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.worker.catalog_feed.RETRY_SECONDS", 0.1)
    new = random_catalog(9)
    await publish(saved(new, tmp_path), valkey.url)
    redis = connect(valkey.url, 1)
    item = new.items[0].item_id
    buckets = [key async for key in redis.scan_iter(match="padrec:*:item:*")]
    [key] = [bucket for bucket in buckets if await redis.hexists(bucket, item)]
    sound = await redis.hget(key, item)
    await redis.hset(key, item, sound[:-1])
    async with following(tiny, valkey.url) as worker:

        async def unreadable() -> bool:
            return 'result="unreadable"' in (await worker.client.get("/metrics")).text

        await until(unreadable, 60)
        assert worker.engine.catalog_version == tiny.catalog.version
        await redis.hset(key, item, sound)  # mended: it is tried again
        await until(lambda: worker.engine.catalog_version == new.version, 60)
    await redis.aclose()


async def test_a_catalog_there_is_no_room_for_is_tried_again_later(
    tiny: Tiny, valkey: ValkeyProcess, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "padrec.catalog")
    monkeypatch.setattr("service.worker.catalog_feed.RETRY_SECONDS", 1.0)
    new = random_catalog(9)
    await publish(saved(new, tmp_path), valkey.url)
    async with following(tiny, valkey.url, RuntimeError("out of memory")) as worker:
        await until(lambda: worker.engine.catalog_version == new.version, 60)
        assert await worker.metric('padrec_catalog_swaps_total{result="unreadable"}') == 1
        assert await worker.metric('padrec_catalog_swaps_total{result="ok"}') == 1
    (failed,) = (vars(r) for r in caplog.records if "not taken up" in r.getMessage())
    (active,) = (vars(r) for r in caplog.records if r.getMessage() == "catalog active")
    assert failed["reason"] == "RuntimeError: out of memory" and active["created"] - failed["created"] > 1


async def test_without_redis_or_with_damaged_stock_the_worker_serves_on(
    tiny: Tiny, valkey: ValkeyProcess, tmp_path: Path
) -> None:
    old = tiny.catalog
    await publish(saved(old, tmp_path), valkey.url)
    async with following(tiny, valkey.url) as worker:
        redis = connect(valkey.url, 1)
        await redis.set(stock_key(old.version), b"garbage")
        await redis.aclose()
        await asyncio.sleep(0.2)
        assert codes_in(await worker.ask(old)) == right(tiny, old)
        valkey.stop()
        await asyncio.sleep(0.2)
        assert codes_in(await worker.ask(old)) == right(tiny, old)
        assert (await worker.client.get("/readyz")).status_code == 200
