"""The API process around its dependencies: starting without them, losing them, draining, counting, logging."""

import asyncio
import json
import logging
import time
from pathlib import Path

import httpx
import pytest

from service.api.app import create_app
from service.api.publish import publish
from service.embedded_valkey import ValkeyProcess, start_valkey
from service.log import JsonFormatter
from service.probes import Drain
from tests.service.wire import TinyWorker, Workers, api, api_settings, served, until

ASK = {"history": ["i0", "i1"], "user_id": "user-secret", "k": 2}


def codes(reply: httpx.Response) -> list[str]:
    return [note["code"] for note in reply.json()["degraded"]]


async def test_redis_down_at_start_is_503_then_served_once_it_is_there(
    tmp_path_factory: pytest.TempPathFactory, catalog_path: Path
) -> None:
    folder = tmp_path_factory.mktemp("v")
    async with api(api_settings(f"unix://{folder}/valkey.sock"), Workers(w1=TinyWorker())) as client:
        refused = await client.post("/recommend", json=ASK)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["type"] == "urn:padrec:problem:catalog-unavailable"
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/healthz")).status_code == 200
        with start_valkey(folder) as server:
            await publish(catalog_path, server.url)

            async def answered() -> bool:
                return (await client.post("/recommend", json=ASK)).status_code == 200

            await until(answered)
            reply = await client.post("/recommend", json=ASK)
            assert reply.json()["items"][0]["source"] == "model"
            assert codes(reply) == []


async def test_redis_down_with_a_local_copy_is_served_and_flagged(tmp_path: Path, catalog_path: Path) -> None:
    settings = api_settings(f"unix://{tmp_path}/none.sock", catalog_file=catalog_path)
    async with api(settings, Workers(w1=TinyWorker())) as client:
        reply = await client.post("/recommend", json=ASK | {"include": ["attributes"]})
        ready = await client.get("/readyz")
    assert reply.json()["items"][0]["source"] == "model"
    assert reply.json()["items"][0]["attributes"]["year"] == 1902
    assert codes(reply) == ["redis_unavailable"]
    assert (ready.status_code, ready.json()["checks"]["redis"]) == (200, "down")


async def test_redis_dying_later_is_answered_flagged_and_recovered_from(
    tmp_path_factory: pytest.TempPathFactory, catalog_path: Path
) -> None:
    folder = tmp_path_factory.mktemp("v")
    server = start_valkey(folder)
    await publish(catalog_path, server.url)
    async with api(api_settings(server.url), Workers(w1=TinyWorker())) as client:
        assert codes(await client.post("/recommend", json=ASK)) == []
        server.stop()
        started = time.monotonic()
        cached = await client.post("/recommend", json=ASK | {"k": 1})
        unmapped = await client.post("/recommend", json={"history": ["i30"]})
        refused = await client.post("/recommend", json={"history": ["i30"], "fallback": "none"})
        assert time.monotonic() - started < 3
        assert cached.json()["items"][0]["source"] == "model"
        assert codes(unmapped) == ["history_unread", "redis_unavailable"]
        assert unmapped.json()["items"][0]["source"] == "popular"
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        with start_valkey(folder) as back:
            await publish(catalog_path, back.url)

            async def whole() -> bool:
                return codes(await client.post("/recommend", json={"history": ["i30"]})) == []

            await until(whole)


async def test_a_worker_dying_under_load_loses_no_request(standing: ValkeyProcess) -> None:
    network = Workers(w1=TinyWorker(delay=0.02))
    sources: list[str] = []
    over = asyncio.Event()

    async with api(api_settings(standing.url), network) as client:

        async def load() -> None:
            while not over.is_set():
                reply = await client.post("/recommend", json=ASK | {"deadline_ms": 5000})
                assert reply.status_code == 200
                answer = reply.json()
                source = answer["items"][0]["source"]
                assert (source == "popular") == bool(answer["degraded"])
                sources.append(source)

        async def trouble() -> None:
            worker = network.apps["w1"]
            for app, expected in ((worker, "model"), (None, "popular")) * 2 + ((worker, "model"),):
                network.apps["w1"] = app
                sources.clear()
                await until(lambda expected=expected: sources[-5:] == [expected] * 5, 20)
            over.set()

        await asyncio.gather(trouble(), *(load() for _ in range(4)))


async def test_a_worker_that_breaks_off_is_asked_again_or_replaced_by_popular_items(standing: ValkeyProcess) -> None:
    """Over real sockets: the worker closes every connection in the middle of its answer."""

    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
        writer.close()

    listener = await asyncio.start_server(break_off, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    settings = api_settings(standing.url, worker_urls=f"http://127.0.0.1:{port}")
    app = create_app(settings)
    async with (
        listener,
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://api") as client,
    ):
        reply = await client.post("/recommend", json=ASK)
        metrics = (await client.get("/metrics")).text
    assert codes(reply) == ["worker_unavailable"]
    assert 'padrec_worker_retries_total{reason="worker-unavailable"} 1.0' in metrics


async def test_a_client_that_leaves_frees_the_worker(standing: ValkeyProcess) -> None:
    """Over real sockets, through both processes' servers."""
    worker = TinyWorker(delay=60)
    with served(worker) as worker_url, served(create_app(api_settings(standing.url, worker_urls=worker_url))) as url:
        target = httpx.URL(url)
        _, writer = await asyncio.open_connection(target.host, target.port)
        body = json.dumps(ASK | {"deadline_ms": 60_000}).encode()
        head = f"POST /recommend HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        writer.write(head.encode() + b"\r\n\r\n" + body)
        await until(lambda: worker.seen, 20)
        writer.close()
        await until(lambda: worker.abandoned, 20)
        async with httpx.AsyncClient(base_url=url) as client:

            async def counted() -> bool:
                text = (await client.get("/metrics")).text
                return 'outcome="cancelled",route="/recommend"} 1.0' in text

            await until(counted)


async def test_a_draining_process_is_unready_then_refuses_but_stays_alive(standing: ValkeyProcess) -> None:
    drain = Drain()
    async with api(api_settings(standing.url), Workers(w1=TinyWorker()), drain) as client:
        drain.unready = True
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["checks"]["drain"]) == (503, "draining")
        assert (await client.post("/recommend", json=ASK)).status_code == 200
        drain.refusing = True
        refused = await client.post("/recommend", json=ASK)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["type"] == "urn:padrec:problem:draining"
        assert (await client.get("/healthz")).status_code == 200
        metrics = (await client.get("/metrics")).text
    assert 'padrec_admission_rejections_total{reason="draining"} 1.0' in metrics


async def test_too_many_at_once_are_refused_at_the_door(standing: ValkeyProcess) -> None:
    settings = api_settings(standing.url, max_in_flight=2)
    async with api(settings, Workers(w1=TinyWorker(delay=0.1))) as client:
        replies = await asyncio.gather(*(client.post("/recommend", json=ASK) for _ in range(5)))
        assert (await client.post("/recommend", json=ASK)).status_code == 200
    assert sorted(r.status_code for r in replies) == [200, 200, 503, 503, 503]
    assert all(r.headers["retry-after"] for r in replies if r.status_code == 503)


async def test_what_full_workers_cannot_take_is_a_refusal_once_a_request_and_only_where_nobody_answers(
    standing: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.api.worker_client.FULL_SECONDS", 60.0)  # what it said is believed for so long

    def counted(text: str) -> float:
        name = 'padrec_admission_rejections_total{reason="worker"}'
        return next((float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name)), 0.0)

    bare = ASK | {"fallback": "none"}
    async with api(api_settings(standing.url), Workers(w1=TinyWorker(status=503))) as client:
        assert (await client.post("/recommend", json=ASK)).status_code == 200  # the worker says that it is full
        popular = await client.post("/recommend", json=ASK)
        assert popular.json()["items"][0]["source"] == "popular"
        assert counted((await client.get("/metrics")).text) == 0
        assert (await client.post("/recommend", json=bare)).status_code == 503
        assert counted((await client.get("/metrics")).text) == 1
        batch = await client.post("/v1/recommend/batch", json={"requests": [bare] * 8})
        assert [result["status"] for result in batch.json()["results"]] == [503] * 8
        assert counted((await client.get("/metrics")).text) == 2


async def test_metrics_tell_routes_and_outcomes_and_no_ids(standing: ValkeyProcess) -> None:
    async with api(api_settings(standing.url), Workers(w1=TinyWorker())) as client:
        await client.post("/recommend", json=ASK)
        await client.post("/v1/recommend", json={"history": []})
        await client.post("/recommend", json={"history": 1})
        await client.get("/secret-path/i0")
        text = (await client.get("/metrics")).text
    for line in (
        'padrec_requests_total{outcome="ok",route="/recommend"} 1.0',
        'padrec_requests_total{outcome="fallback",route="/v1/recommend"} 1.0',
        'padrec_requests_total{outcome="rejected",route="/recommend"} 1.0',
        'padrec_requests_total{outcome="rejected",route="unmatched"} 1.0',
        'padrec_stage_duration_seconds_count{stage="map_history"} 2.0',
        'padrec_worker_up{worker="http://w1"} 1.0',
        "padrec_catalog_items 60.0",
        'padrec_catalog_version_info{catalog_version="0123456789ab"} 1.0',
        "padrec_inflight_requests 1.0",
    ):
        assert line in text, text
    assert "secret" not in text


async def test_logs_are_json_and_hold_no_history_and_no_user(
    standing: ValkeyProcess, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    secrets = {"history": ["history-secret", "i1"], "user_id": "user-secret", "exclude": ["exclude-secret"]}
    async with api(api_settings(standing.url), Workers(w1=TinyWorker())) as client:
        await client.post("/recommend", json=secrets, headers={"X-Request-Id": "mine-1"})
        await client.post("/recommend", json=secrets | {"k": "k-secret"})
    lines = [JsonFormatter("api").format(record) for record in caplog.records]
    entry = next(json.loads(line) for line in lines if '"request"' in line)
    assert (entry["route"], entry["status"], entry["outcome"]) == ("/recommend", 200, "ok")
    assert entry["process"] == "api"
    assert "secret" not in "".join(lines)


async def test_without_a_readable_copy_the_process_does_not_start(standing: ValkeyProcess, tmp_path: Path) -> None:
    settings = api_settings(standing.url, catalog_file=tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"none\.jsonl"):
        async with api(settings, Workers()):
            pass
