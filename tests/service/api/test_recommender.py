"""What a caller gets: a list from the model, or popular items that say why, or a refusal; never a hang."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.publish import publish
from service.embedded_valkey import ValkeyProcess
from service.redis_client import connect
from tests.service.wire import (
    NUM_ITEMS,
    OTHER_VERSION,
    VERSION,
    TinyWorker,
    Workers,
    api,
    api_settings,
    codes_of,
    write_catalog,
)


async def ask(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    reply = await client.post("/recommend", json={"history": ["i0", "i1"]} | body)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def codes(answer: dict[str, Any]) -> list[str]:
    return [note["code"] for note in answer["degraded"]]


async def test_a_history_is_answered_with_items_of_the_model(standing: ValkeyProcess) -> None:
    worker = TinyWorker()
    async with api(api_settings(standing.url), Workers(w1=worker)) as client:
        reply = await client.post("/v1/recommend", json={"history": ["i0", {"item_id": "i1"}], "k": 3, "user_id": "u7"})
    answer = reply.json()
    assert answer["items"] == [
        {"item_id": f"i{n}", "rank": rank, "score": -0.5 - (rank - 1), "source": "model"}
        for rank, n in enumerate((2, 3, 4), start=1)
    ]
    assert answer["model"] == {"name": "tiny", "version": "1", "catalog_version": VERSION, "strategy": "list"}
    assert answer["speculation"]["acceptance_length"] == 3.0
    assert answer["history_used"] == 2
    assert (answer["unknown_items"], answer["unknown_items_count"]) == ([], 0)
    assert answer["degraded"] == []
    assert answer["timings_ms"]["worker"] == 3.5
    assert answer["timings_ms"]["total"] > 0
    assert answer["request_id"] == reply.headers["x-request-id"]


async def test_the_worker_is_told_everything_and_only_semantic_ids(standing: ValkeyProcess) -> None:
    worker = TinyWorker()
    filters = {"genre": {"any": ["Drama"]}, "year": {"min": 1910, "max": 1950}}
    async with api(api_settings(standing.url), Workers(w1=worker)) as client:
        await ask(client, exclude=["i7", "nobody"], filters=filters, speculation="off", deadline_ms=700, k=2)
        await client.post(
            "/recommend", json={"history": ["i1"], "exclude_history": False}, headers={"X-Request-Timeout-Ms": "300"}
        )
    first, second = worker.seen
    assert first["history"] == [codes_of(0), codes_of(1)]
    assert first["exclude"] == [codes_of(7)]
    assert first["filters"] == filters
    assert (first["k"], first["speculation"], first["exclude_history"]) == (2, "off", True)
    assert 500 < first["deadline_ms"] < 700
    assert 200 < second["deadline_ms"] < 300
    assert second["exclude_history"] is False
    assert "user_id" not in first


async def test_the_worker_is_told_how_to_sample_and_of_greedy_requests_nothing_new(standing: ValkeyProcess) -> None:
    worker = TinyWorker()
    async with api(api_settings(standing.url), Workers(w1=worker)) as client:
        await ask(client, temperature=0.7, top_p=0.9, seed=2**53 - 1)
        await ask(client, temperature=2)
        await ask(client, temperature=0, top_p=0.9, seed=1)
        await ask(client, temperature=None, top_p=None, seed=None)
    sampling = [{n: s[n] for n in ("temperature", "top_p", "seed") if n in s} for s in worker.seen]
    assert sampling == [{"temperature": 0.7, "top_p": 0.9, "seed": 2**53 - 1}, {"temperature": 2.0}, {}, {}]


async def test_a_worker_is_told_the_strategy_and_of_verification_only_when_it_is_relaxed(
    standing: ValkeyProcess,
) -> None:
    worker = TinyWorker()
    async with api(api_settings(standing.url), Workers(w1=worker)) as client:
        await ask(client, strategy="beam", seed=4)
        await ask(client, strategy="beam", verification="relaxed", seed=4)
        await ask(client, strategy="beam", verification="relaxed", temperature=0)
    told = [{n: s[n] for n in ("strategy", "verification", "seed") if n in s} for s in worker.seen]
    relaxed = {"strategy": "beam", "verification": "relaxed"}
    assert told == [{"strategy": "beam"}, {**relaxed, "seed": 4}, relaxed]


async def test_how_beams_were_verified_reaches_the_caller(standing: ValkeyProcess) -> None:
    model = {"name": "tiny", "version": "1", "catalog_version": VERSION, "strategy": "beam", "verification": "relaxed"}
    worker = TinyWorker(spoil={"model": model})
    async with api(api_settings(standing.url), Workers(w1=worker)) as client:
        assert (await ask(client, strategy="beam", verification="relaxed"))["model"] == model


async def test_attributes_and_semantic_ids_come_when_included(standing: ValkeyProcess) -> None:
    async with api(api_settings(standing.url), Workers(w1=TinyWorker())) as client:
        answer = await ask(client, k=1, include=["attributes", "semantic_id"])
        popular = await ask(client, history=[], k=1, include=["attributes", "semantic_id"])
    assert answer["items"][0]["attributes"] == {"genre": ["Horror"], "year": 1902}
    assert answer["items"][0]["semantic_id"] == codes_of(2)
    assert popular["items"][0]["attributes"] == {"genre": ["Comedy"], "year": 1900}
    assert popular["items"][0]["semantic_id"] == codes_of(0)


async def test_unknown_items_are_named_and_the_rest_is_used(standing: ValkeyProcess) -> None:
    unknown = [f"u{n}" for n in range(25)]
    async with api(api_settings(standing.url), Workers(w1=TinyWorker())) as client:
        answer = await ask(client, history=[*unknown, "i5"])
    assert answer["unknown_items"] == unknown[:20]
    assert answer["unknown_items_count"] == 25
    assert answer["history_used"] == 1
    assert answer["items"][0]["source"] == "model"


@pytest.mark.parametrize("history", [[], ["nobody", "none"]])
async def test_a_cold_start_is_popular_items_that_respect_filters_and_exclusions(
    standing: ValkeyProcess, history: list[str]
) -> None:
    async with api(api_settings(standing.url), Workers(w1=TinyWorker())) as client:
        answer = await ask(
            client, history=history, exclude=["i0"], filters={"genre": {"any": ["Comedy"]}, "year": {"max": 1909}}
        )
    assert ids(answer) == ["i3", "i6", "i9"]
    assert {item["source"] for item in answer["items"]} == {"popular"}
    assert answer["items"][0]["score"] is None
    assert answer["speculation"] is None
    assert codes(answer) == ["cold_start", "fewer_items"]


async def test_popular_items_leave_the_history_out_unless_told_otherwise(standing: ValkeyProcess) -> None:
    async with api(api_settings(standing.url), Workers()) as client:
        assert ids(await ask(client, k=2)) == ["i2", "i3"]
        assert ids(await ask(client, k=2, exclude_history=False)) == ["i0", "i1"]


async def test_an_item_without_an_attribute_passes_no_filter_on_it(standing: ValkeyProcess) -> None:
    async with api(api_settings(standing.url), Workers()) as client:
        everything = await ask(client, history=[], k=100)
        filtered = await ask(client, history=[], k=100, filters={"year": {"min": 0}})
    assert len(everything["items"]) == NUM_ITEMS
    assert len(filtered["items"]) == NUM_ITEMS - 1


@pytest.mark.parametrize(
    ("filters", "pointer"),
    [
        ({"colour": {"any": ["red"]}}, "/filters/colour"),
        ({"genre": {"min": 3}}, "/filters/genre"),
        ({"genre": {"any": ["Comedy", "Polka"]}}, "/filters/genre/any/1"),
        ({"year": {"any": ["1999"]}}, "/filters/year"),
    ],
)
async def test_a_filter_the_catalog_cannot_apply_is_refused_by_name(
    standing: ValkeyProcess, filters: dict[str, Any], pointer: str
) -> None:
    async with api(api_settings(standing.url), Workers(w1=TinyWorker())) as client:
        reply = await client.post("/recommend", json={"history": ["i1"], "filters": filters})
    assert reply.status_code == 422
    assert reply.json()["errors"][0]["pointer"] == pointer
    assert "Polka" not in reply.text


async def test_a_dead_worker_means_popular_items_or_503_and_it_recovers_by_itself(standing: ValkeyProcess) -> None:
    network = Workers()
    async with api(api_settings(standing.url), network) as client:
        assert codes(await ask(client)) == ["worker_unavailable"]
        refused = await client.post("/recommend", json={"history": ["i0"], "fallback": "none"})
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["retryable"] is True
        ready = (await client.get("/readyz")).json()
        assert ready["checks"]["worker"] == "down"
        network.apps["w1"] = TinyWorker()
        assert (await ask(client))["items"][0]["source"] == "model"


async def test_a_worker_that_refuses_for_itself_is_unavailable_not_overloaded(standing: ValkeyProcess) -> None:
    worker = TinyWorker(status=503, problem="urn:padrec:problem:draining")
    async with api(api_settings(standing.url), Workers(w1=worker)) as client:
        assert codes(await ask(client)) == ["worker_unavailable"]
        refused = await client.post("/recommend", json={"history": ["i0"], "fallback": "none"})
    assert (refused.status_code, refused.json()["type"]) == (503, "urn:padrec:problem:worker-unavailable")


async def test_a_redis_that_has_lost_its_data_makes_no_item_unknown_or_invalid(
    published: ValkeyProcess, tmp_path: Path
) -> None:
    """The page for invalid semantic IDs says that a worker is wrong, and histories are not cold starts."""
    async with api(api_settings(published.url), Workers(w1=TinyWorker())) as client:
        assert ids(await ask(client))
        redis = connect(published.url, 1)
        await redis.flushall()
        lost = await ask(client, history=["i50"])
        assert (codes(lost), lost["unknown_items"]) == (["history_unread"], [])
        assert codes(await ask(client, k=20)) == ["items_unread"]
        metrics = (await client.get("/metrics")).text
        assert "padrec_invalid_semantic_ids_total 0.0" in metrics and "padrec_unknown_items_total 0.0" in metrics
        await redis.aclose()
        await publish(write_catalog(tmp_path), published.url)
        assert codes(await ask(client, history=["i50"])) == []


@pytest.mark.parametrize(
    ("status", "code", "refusal"),
    [(503, "worker_overloaded", 503), (504, "deadline", 504), (500, "worker_unavailable", 503)],
)
async def test_a_worker_that_refuses_is_translated(
    standing: ValkeyProcess, status: int, code: str, refusal: int
) -> None:
    async with api(api_settings(standing.url), Workers(w1=TinyWorker(status=status))) as client:
        assert codes(await ask(client)) == [code]
        assert (await client.post("/recommend", json={"history": ["i0"], "fallback": "none"})).status_code == refusal


async def test_a_worker_that_finds_a_field_invalid_is_passed_on(standing: ValkeyProcess) -> None:
    async with api(api_settings(standing.url), Workers(w1=TinyWorker(status=422))) as client:
        reply = await client.post("/recommend", json={"history": ["i0"]})
    assert reply.status_code == 422
    assert reply.json()["errors"] == [{"pointer": "/k", "reason": "should be less"}]


async def answered_without_the_model_in_time(client: httpx.AsyncClient) -> None:
    started = time.monotonic()
    answer = await ask(client, deadline_ms=200)
    assert time.monotonic() - started < 1
    assert codes(answer) == ["deadline"]
    late = await client.post("/recommend", json={"history": ["i0"], "deadline_ms": 50, "fallback": "none"})
    assert late.status_code == 504


async def test_a_slow_worker_is_answered_for_before_the_deadline(standing: ValkeyProcess) -> None:
    worker = TinyWorker(delay=5)
    async with api(api_settings(standing.url), Workers(w1=worker)) as client:
        await answered_without_the_model_in_time(client)
    assert worker.abandoned == 2


async def test_a_silent_redis_is_not_waited_for_beyond_the_deadline(published: ValkeyProcess) -> None:
    redis = connect(published.url, 1)
    async with api(api_settings(published.url, redis_timeout_ms=2000), Workers(w1=TinyWorker())) as client:
        await redis.execute_command("CLIENT", "PAUSE", 1000, "ALL")
        await answered_without_the_model_in_time(client)
    await redis.aclose()


async def test_items_that_name_nothing_are_dropped_and_counted(standing: ValkeyProcess) -> None:
    wrong = [{"codes": c, "score": -1.0} for c in ([3, 3, 3, 0], [9, 9, 9, 9], codes_of(5))]
    async with api(api_settings(standing.url), Workers(w1=TinyWorker(spoil={"items": wrong}))) as client:
        answer = await ask(client)
        metrics = (await client.get("/metrics")).text
    assert ids(answer) == ["i5"]
    assert codes(answer) == ["items_unread"]
    assert "padrec_invalid_semantic_ids_total 2.0" in metrics


async def test_a_list_of_which_nothing_can_be_looked_up_becomes_popular_items(published: ValkeyProcess) -> None:
    redis = connect(published.url, 1)
    async with api(api_settings(published.url), Workers(w1=TinyWorker())) as client:
        await redis.delete(f"padrec:{VERSION}:sid:0")
        answer = await ask(client, k=1)
    await redis.aclose()
    assert (answer["items"][0]["source"], codes(answer)) == ("popular", ["items_unread"])


async def test_an_exclusion_that_cannot_be_looked_up_still_holds(published: ValkeyProcess) -> None:
    async with api(api_settings(published.url), Workers(w1=TinyWorker())) as client:
        await ask(client, k=4)
        redis = connect(published.url, 1)
        await redis.hset(f"padrec:{VERSION}:item:0", "i7", b"damaged")
        answer = await ask(client, exclude=["i7"], k=8)
        await redis.aclose()
    assert ids(answer) == ["i2", "i3", "i4", "i5", "i6", "i8", "i9"]
    assert codes(answer) == ["history_unread"]


async def test_notes_of_the_worker_reach_the_caller(standing: ValkeyProcess) -> None:
    spoil = {"degraded": [{"code": "fewer_items", "detail": "Only 3."}]}
    async with api(api_settings(standing.url), Workers(w1=TinyWorker(spoil=spoil))) as client:
        assert (await ask(client))["degraded"] == spoil["degraded"]


async def test_a_worker_on_an_unknown_catalog_is_never_mixed_in(standing: ValkeyProcess) -> None:
    async with api(api_settings(standing.url), Workers(w1=TinyWorker(version=OTHER_VERSION))) as client:
        answer = await ask(client)
        assert codes(answer) == ["catalog_mismatch"]
        assert answer["model"]["catalog_version"] == VERSION
        assert (await client.post("/recommend", json={"history": ["i0"], "fallback": "none"})).status_code == 503


async def test_a_swap_under_way_is_answered_on_the_version_the_worker_has(
    published: ValkeyProcess, tmp_path: Path
) -> None:
    worker = TinyWorker()
    # One slow poll: the API learns of the swap from the worker's refusal.
    async with api(api_settings(published.url, poll_seconds=30), Workers(w1=worker)) as client:
        await publish(write_catalog(tmp_path, OTHER_VERSION), published.url)
        worker.version = OTHER_VERSION
        answer = await ask(client, k=1)
    assert answer["model"]["catalog_version"] == OTHER_VERSION
    assert answer["degraded"] == []
    assert [request["catalog_version"] for request in worker.seen] == [VERSION, OTHER_VERSION]


async def test_attributes_that_cannot_be_read_are_left_out_and_flagged(published: ValkeyProcess) -> None:
    redis = connect(published.url, 1)
    async with api(api_settings(published.url), Workers(w1=TinyWorker())) as client:
        item_id = (await ask(client, k=1))["items"][0]["item_id"]
        await redis.hdel(f"padrec:{VERSION}:item:0", item_id)
        answer = await ask(client, k=1, include=["attributes"])
    await redis.aclose()
    assert answer["items"][0]["attributes"] is None
    assert codes(answer) == ["attributes_unread"]


async def test_without_popular_items_a_cold_start_is_refused(published: ValkeyProcess) -> None:
    redis = connect(published.url, 1)
    await redis.delete(f"padrec:{VERSION}:popular")
    await redis.aclose()
    async with api(api_settings(published.url), Workers(w1=TinyWorker())) as client:
        assert (await client.post("/recommend", json={"history": []})).status_code == 503
        assert (await ask(client))["items"][0]["source"] == "model"


async def test_time_that_has_run_out_before_the_work_is_a_504_without_fallback(standing: ValkeyProcess) -> None:
    async def slowly() -> AsyncIterator[bytes]:
        await asyncio.sleep(0.05)
        yield b'{"history": ["i0"], "deadline_ms": 10, "fallback": "none"}'

    worker = TinyWorker()
    async with api(api_settings(standing.url), Workers(w1=worker)) as client:
        reply = await client.post("/recommend", content=slowly(), headers={"Content-Type": "application/json"})
    assert reply.status_code == 504
    assert worker.seen == []


async def test_many_at_once_get_their_own_answers(standing: ValkeyProcess) -> None:
    async with api(api_settings(standing.url), Workers(w1=TinyWorker(delay=0.01))) as client:
        answers = await asyncio.gather(*(ask(client, history=[f"i{n}"], k=1) for n in range(40)))
    assert [ids(a) for a in answers] == [["i1"], *[["i0"]] * 39]
