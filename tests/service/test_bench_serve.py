"""The load bench measures what its clients saw, counts what is not a model's answer, and says what the API added."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from service.bench_serve import Sample, load_histories, main, measure, percentile, summarise
from service.supervisor import free_port
from tests.service.tiny_bundle import item_ids, write_bundle, write_data


def test_percentiles_are_values_that_were_seen() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 99) == 99.0
    assert percentile([5.0], 99) == 5.0
    assert percentile([], 50) == 0.0


def test_the_apis_share_is_taken_request_by_request() -> None:
    samples = [Sample(10.0, 8.0, 1.5, ok=True), Sample(30.0, 27.0, 2.5, ok=True), Sample(5.0, None, None, ok=False)]
    record = summarise(4, samples, 2.0)
    assert (record.requests, record.requests_per_second, record.errors) == (3, 1.5, 1)
    assert (record.p50_ms, record.worker_p50_ms) == (10.0, 8.0)
    assert (record.api_overhead_p50_ms, record.api_added_p50_ms) == (2.0, 1.5)


def test_histories_are_the_held_out_users_or_random_ones_of_the_catalog(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "tiny")
    items = item_ids(bundle)
    random_ones = load_histories(bundle, tmp_path)
    assert random_ones
    assert all(set(history) <= set(items) for history in random_ones)
    assert load_histories(bundle, write_data(tmp_path / "data", items[:14])) == [items[:14][::-1][:-10]]


@asynccontextmanager
async def answering() -> AsyncIterator[tuple[str, list[object]]]:
    """A service that takes 2 ms, 1 of them in its worker, and knows nobody called "cold"; and the histories it saw."""
    service, seen = FastAPI(), []

    @service.post("/recommend")
    async def recommend(body: dict[str, object]) -> JSONResponse:
        seen.append(body["history"])
        await asyncio.sleep(0.002)
        source = "popular" if body["history"] == ["cold"] else "model"
        return JSONResponse({"items": [{"source": source}], "timings_ms": {"worker": 1.0, "total": 1.5}})

    port = free_port("127.0.0.1")
    server = uvicorn.Server(uvicorn.Config(service, port=port, log_config=None, access_log=False))
    running = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event to wait for
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}", seen
    finally:
        server.should_exit = True
        await running


async def test_every_request_is_counted_and_popular_answers_are_errors() -> None:
    async with answering() as (url, seen):
        one, two = await measure(url, [{"history": ["a"]}, {"history": ["b"]}], [1, 2], 0.2)
        (cold,) = await measure(url, [{"history": ["cold"]}], [1], 0.05)
    assert (one.concurrency, two.concurrency) == (1, 2)
    assert one.errors == two.errors == 0
    assert one.worker_p50_ms == 1.0
    assert one.api_added_p50_ms == 0.5
    assert one.api_overhead_p50_ms == pytest.approx(one.p50_ms - 1.0, abs=0.01)
    assert cold.errors == cold.requests
    assert len(seen) > one.requests + two.requests + cold.requests


async def test_writes_one_flat_record_a_concurrency(tmp_path: Path) -> None:
    bundle, out = write_bundle(tmp_path / "tiny"), tmp_path / "out.json"
    arguments = ["--bundle", str(bundle), "--data", str(tmp_path), "--concurrency", "1,2", "--seconds", "0.2"]
    async with answering() as (url, _):
        assert await asyncio.to_thread(main, [*arguments, "--url", url, "--json", str(out)]) == 0
    records = json.loads(out.read_text())
    assert [record["concurrency"] for record in records] == [1, 2]
    assert all(record["errors"] == 0 and record["p50_ms"] > 0 for record in records)


def test_a_bundle_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundle", str(tmp_path / "none"), "--data", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
