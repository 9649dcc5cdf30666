"""The worker over its wire: real engine, real tiny decoder, every refusal a problem in the wire's words."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from model.decoding.beam_decoder import BeamDecoder
from model.decoding.beam_plan import ATSPEED
from model.decoding.beam_request import BeamRequest
from model.decoding.beam_twin import BeamTwin
from model.decoding.list_decoder import ListDecoder
from model.decoding.request import ListRequest, ListResult, RoundStats
from model.decoding.strategies import Strategies
from model.decoding.topology import Budget, FixedBudget
from service.metrics import WorkerMetrics, new_registry
from service.probes import Drain
from service.settings import load_settings
from service.supervisor import free_port
from service.worker.app import create_app, publisher
from service.worker.engine import Engine
from service.worker.routes import Served
from tests.model.conftest import Tiny, tiny

__all__ = ["tiny"]


class SlowDecoder(ListDecoder):
    """Takes its time over every round."""

    def round(self) -> tuple[list[ListResult], RoundStats]:
        time.sleep(0.1)
        return super().round()


class PoisonedDecoder(ListDecoder):
    """Raises whenever a list of 13 is asked for."""

    def round(self) -> tuple[list[ListResult], RoundStats]:
        if any(self.rows.row(i).request.k == 13 for i in self.rows.in_use):
            raise RuntimeError("poisoned")
        return super().round()


class Worker:
    """One worker application, its engine running, and a client of it."""

    def __init__(self, tiny: Tiny, kind: type[ListDecoder], max_waiting: int, num_rows: int, **flags: Any):
        self.tiny, self.drain, registry = tiny, Drain(), new_registry()
        metrics = WorkerMetrics(registry)
        draft, limits = tiny.draft(), {"num_rows": num_rows, "max_history_items": 6, "max_k": 20}
        lists = kind(tiny.target, draft, tiny.trie, tiny.catalog, budget=FixedBudget(Budget(3)), **limits)
        beams = BeamDecoder(tiny.target, tiny.trie, tiny.catalog, plan=ATSPEED, draft=draft, draft_width=8, **limits)
        self.engine = Engine(
            Strategies(lists, beams),
            max_waiting=max_waiting,
            observe=publisher(metrics, "m1"),
            version=tiny.catalog.version,
        )
        self.served = Served("tiny", "m1", max_k=20, max_history_items=6)
        settings = load_settings({"num_rows": num_rows, "max_waiting": max_waiting} | flags)
        self.app: FastAPI = create_app(self.engine, self.served, settings, self.drain, metrics, registry)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://worker")

    def body(self, **changes: Any) -> dict[str, Any]:
        history = [list(codes) for codes in self.tiny.codes[:4]]
        body = {"request_id": "r1", "catalog_version": self.tiny.catalog.version, "history": history, "k": 5}
        return {**body, "deadline_ms": 10_000, **changes}

    async def generate(self, **changes: Any) -> httpx.Response:
        return await self.client.post("/generate", json=self.body(**changes))

    async def idle(self) -> None:
        """Wait until the engine has neither rows nor a line."""
        async with asyncio.timeout(5):
            while (status := self.engine.status()).running or status.waiting:  # noqa: ASYNC110 - the engine has no event to wait for
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running(
    tiny: Tiny, kind: type[ListDecoder] = ListDecoder, *, max_waiting: int = 64, num_rows: int = 4, **flags: Any
) -> AsyncIterator[Worker]:
    worker = Worker(tiny, kind, max_waiting, num_rows, **flags)
    async with worker.app.router.lifespan_context(worker.app), worker.client:
        async with asyncio.timeout(10):
            while not worker.engine.status().ready:  # noqa: ASYNC110 - the engine has no event to wait for
                await asyncio.sleep(0.01)
        yield worker
    assert not worker.engine.status().alive


def field_of(response: httpx.Response) -> str:
    pointer: str = response.json()["errors"][0]["pointer"]
    return pointer


def codes_in(response: httpx.Response) -> list[list[int]]:
    return [item["codes"] for item in response.json()["items"]]


async def test_writes_the_list_the_target_alone_would_write(tiny: Tiny) -> None:
    async with running(tiny) as worker:
        response = await worker.generate()
    answer = response.json()
    twin = tiny.twin(ListRequest("twin", tuple(tiny.codes[:4]), 5))
    assert response.status_code == 200
    assert [tuple(item["codes"]) for item in answer["items"]] == [item.codes for item in twin.items]
    assert [item["score"] for item in answer["items"]] == pytest.approx([i.score for i in twin.items], abs=1e-3)
    assert answer["request_id"] == "r1"
    assert answer["model"] == {
        "name": "tiny",
        "version": "m1",
        "catalog_version": tiny.catalog.version,
        "strategy": "list",
    }
    assert answer["history_used"] == 4
    assert answer["degraded"] == []
    counts, times = answer["speculation"], answer["timings_ms"]
    assert counts["acceptance_length"] == pytest.approx(1 + counts["accepted_tokens"] / counts["rounds"])
    assert 0 < times["prefill"] + times["decode"] <= times["total"] + 1e-3


async def test_beam_search_gives_what_the_targets_own_gives_and_says_how_it_was_verified(tiny: Tiny) -> None:
    excluded, filters = tiny.codes[5], {"genre": {"any": ["a"]}}
    async with running(tiny) as worker:
        plain = await worker.generate(strategy="beam")
        narrow = await worker.generate(strategy="beam", exclude=[list(excluded)], filters=filters, k=20)
    twin = BeamTwin(tiny.target, tiny.codes, 6)
    asked = BeamRequest("twin", tuple(tiny.codes[:4]), 5)
    expected = twin.decode(asked)
    assert [tuple(item["codes"]) for item in plain.json()["items"]] == [item.codes for item in expected.items]
    assert plain.json()["model"]["strategy"] == "beam"
    assert plain.json()["model"]["verification"] == "strict"
    allowed = {i.codes for i in tiny.catalog.items if i.attributes["genre"] == ["a"]}
    expected = twin.decode(BeamRequest("twin", tuple(tiny.codes[:4]), 20, (excluded,)), allowed)
    assert [tuple(item["codes"]) for item in narrow.json()["items"]] == [item.codes for item in expected.items]


async def test_a_relaxed_answer_says_so_in_the_answer_and_in_the_metrics(tiny: Tiny) -> None:
    async with running(tiny) as worker:
        relaxed = [
            (await worker.generate(strategy="beam", verification="relaxed", seed=seed, request_id=f"r{seed}")).json()
            for seed in (1, 1, 2, 3)
        ]
        strict = (await worker.generate(strategy="beam")).json()
        text = (await worker.client.get("/metrics")).text
    assert [answer["model"]["verification"] for answer in relaxed] == ["relaxed"] * 4
    assert relaxed[0]["items"] == relaxed[1]["items"]
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    passes = {s: float(values['padrec_target_passes_total{strategy="' + s + '"}']) for s in ("beam", "beam-relaxed")}
    assert passes["beam-relaxed"] == sum(answer["speculation"]["rounds"] for answer in relaxed)
    assert passes["beam"] == strict["speculation"]["rounds"]
    assert float(values['padrec_batch_size_sum{phase="prefill"}']) == 5
    saved = 'padrec_target_passes_saved_total{strategy="beam"}'
    counts = strict["speculation"]
    assert float(values[saved]) == counts["accepted_tokens"] + counts["forced_tokens"]
    assert counts["rounds"] + counts["accepted_tokens"] + counts["forced_tokens"] == tiny.trie.num_levels - 1


async def test_lists_and_beams_share_rows_and_rounds_and_leave_each_other_alone(tiny: Tiny) -> None:
    async with running(tiny, num_rows=3) as worker:
        strategies = ["list", "beam"] * 8
        replies = await asyncio.gather(
            *(
                worker.generate(request_id=f"r{i}", strategy=strategy, k=1 + i % 7)
                for i, strategy in enumerate(strategies)
            )
        )
        await worker.idle()
        assert worker.engine.decoder.rows.num_free == 3
        worker.engine.decoder.rows.check_integrity()
    twin = BeamTwin(tiny.target, tiny.codes, 6)
    for i, (strategy, reply) in enumerate(zip(strategies, replies, strict=True)):
        history, k = tuple(tiny.codes[:4]), 1 + i % 7
        right = tiny.twin(ListRequest("t", history, k))
        if strategy == "beam":
            right = twin.decode(BeamRequest("t", history, k))
        assert [tuple(codes) for codes in codes_in(reply)] == [item.codes for item in right.items]


async def test_filters_and_exclusions_reach_the_decoder(tiny: Tiny) -> None:
    excluded = tiny.codes[5]
    async with running(tiny) as worker:
        filters = {"genre": {"any": ["a"]}, "year": {"min": 1993}}
        response = await worker.generate(filters=filters, exclude=[list(excluded)], k=20, speculation="off")
    attributes = {item.codes: item.attributes for item in tiny.catalog.items}
    found = [tuple(item["codes"]) for item in response.json()["items"]]
    assert found
    assert excluded not in found
    assert not set(found) & set(tiny.codes[:4])
    assert all(attributes[c]["genre"] == ["a"] and attributes[c]["year"] >= 1993 for c in found)  # type: ignore[operator]
    assert response.json()["speculation"]["draft_tokens"] == 0


async def test_a_seed_draws_the_same_list_twice_in_company_and_without_speculation(tiny: Tiny) -> None:
    drawn = {"temperature": 1.5, "top_p": 0.9, "seed": 11, "k": 8}
    async with running(tiny) as worker:
        first = await worker.generate(**drawn)
        again, unspeculated, other, _ = await asyncio.gather(
            worker.generate(request_id="r2", **drawn),
            worker.generate(request_id="r3", speculation="off", **drawn),
            worker.generate(request_id="r4", **drawn | {"seed": 12}),
            worker.generate(request_id="r5"),
        )
    twin = tiny.twin(ListRequest("twin", tuple(tiny.codes[:4]), 8, temperature=1.5, top_p=0.9, seed=11))
    assert [tuple(codes) for codes in codes_in(first)] == [item.codes for item in twin.items]
    assert codes_in(again) == codes_in(unspeculated) == codes_in(first)
    assert codes_in(other) != codes_in(first)


async def test_without_a_seed_every_list_is_another(tiny: Tiny) -> None:
    async with running(tiny) as worker:
        replies = [await worker.generate(request_id=f"r{n}", temperature=2, k=20) for n in range(3)]
    assert [reply.status_code for reply in replies] == [200] * 3
    lists = {json.dumps(codes_in(reply)) for reply in replies}
    assert len(lists) == 3


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"k": 0}, "/k"),
        ({"k": 21}, "/k"),
        ({"k": "5"}, "/k"),
        ({"history": []}, "/history"),
        ({"history": [[0, 0]]}, "/history"),
        ({"filters": {"colour": {"any": ["red"]}}}, "/filters"),
        ({"filters": {"genre": {"min": 3}}}, "/filters/genre"),
        ({"strategy": "tree"}, "/strategy"),
        ({"strategy": "beam", "k": 21}, "/k"),
        ({"strategy": "beam", "history": [[0, 0]]}, "/history"),
        ({"strategy": "beam", "filters": {"genre": {"min": 3}}}, "/filters/genre"),
        ({"verification": "sloppy"}, "/verification"),
        ({"temperature": -1}, "/temperature"),
        ({"temperature": 2.5}, "/temperature"),
        ({"temperature": None}, "/temperature"),
        ({"top_p": 0}, "/top_p"),
        ({"top_p": 1.5}, "/top_p"),
        ({"seed": -1}, "/seed"),
        ({"seed": 2**53}, "/seed"),
        ({"seed": 0.5}, "/seed"),
    ],
)
async def test_bad_content_is_a_422_that_names_the_field(tiny: Tiny, changes: dict[str, Any], pointer: str) -> None:
    async with running(tiny) as worker:
        response = await worker.generate(**changes)
        assert response.status_code == 422
        assert response.headers["content-type"] == "application/problem+json"
        assert field_of(response).startswith(pointer)
        assert (await worker.generate()).status_code == 200


async def test_another_catalog_version_is_a_409_that_names_ours(tiny: Tiny) -> None:
    async with running(tiny) as worker:
        response = await worker.generate(catalog_version="000000000000")
    assert response.status_code == 409
    assert response.json()["catalog_version"] == tiny.catalog.version


async def test_malformed_json_is_a_400(tiny: Tiny) -> None:
    async with running(tiny) as worker:
        headers = {"content-type": "application/json"}
        response = await worker.client.post("/generate", content=b'{"k": NaN}', headers=headers)
    assert response.status_code == 400


async def test_a_full_line_is_a_503_with_retry_after(tiny: Tiny) -> None:
    async with running(tiny, SlowDecoder, max_waiting=1, num_rows=1) as worker:
        answers = await asyncio.gather(*(worker.generate(request_id=f"r{i}") for i in range(6)))
        statuses = sorted(answer.status_code for answer in answers)
    refused = [answer for answer in answers if answer.status_code == 503]
    assert statuses[0] == 200
    assert refused
    assert all(int(answer.headers["retry-after"]) >= 1 and answer.json()["retryable"] for answer in refused)


async def test_a_passed_deadline_is_a_504_in_time_and_frees_the_row(tiny: Tiny) -> None:
    async with running(tiny, SlowDecoder) as worker:
        start = time.monotonic()
        response = await worker.generate(k=20, deadline_ms=120)
        assert response.status_code == 504
        assert time.monotonic() - start < 1.0
        await worker.idle()


async def test_a_request_that_breaks_decoding_fails_alone(tiny: Tiny) -> None:
    async with running(tiny, PoisonedDecoder) as worker:
        poisoned, sound = await asyncio.gather(worker.generate(k=13), worker.generate(request_id="r2"))
        assert poisoned.status_code == 503
        assert sound.status_code == 200
        again = await worker.generate()
        assert codes_in(sound) == codes_in(again)


async def test_two_requests_of_one_id_are_answered_both(tiny: Tiny) -> None:
    async with running(tiny, SlowDecoder) as worker:
        answers = await asyncio.gather(worker.generate(), worker.generate())
    assert [answer.status_code for answer in answers] == [200, 200]
    assert codes_in(answers[0]) == codes_in(answers[1])


async def test_a_client_that_leaves_frees_its_row(tiny: Tiny) -> None:
    async with running(tiny, SlowDecoder) as worker:
        raw = json.dumps(worker.body(k=20)).encode()
        incoming: asyncio.Queue[Message] = asyncio.Queue()
        incoming.put_nowait({"type": "http.request", "body": raw, "more_body": False})
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/generate", "query_string": b"", "headers": headers}
        asked = asyncio.create_task(worker.app(scope, incoming.get, send))
        async with asyncio.timeout(5):
            while not worker.engine.status().running:  # noqa: ASYNC110 - the engine has no event to wait for
                await asyncio.sleep(0.005)
        incoming.put_nowait({"type": "http.disconnect"})
        async with asyncio.timeout(1.5):
            await worker.idle()
            await asked


async def test_says_what_it_serves(tiny: Tiny) -> None:
    async with running(tiny) as worker:
        info = (await worker.client.get("/info")).json()
    assert info["model"] == {"name": "tiny", "version": "m1"}
    assert info["catalog_version"] == tiny.catalog.version
    assert info["limits"] == {"max_k": 20, "max_history_items": 6}
    assert (info["in_flight"], info["waiting"]) == (0, 0)


async def test_is_alive_and_ready_after_warm_up_and_unready_while_draining(tiny: Tiny) -> None:
    async with running(tiny) as worker:
        assert (await worker.client.get("/healthz")).status_code == 200
        assert (await worker.client.get("/readyz")).status_code == 200
        worker.drain.unready = True
        assert (await worker.client.get("/readyz")).status_code == 503
        assert (await worker.client.get("/info")).status_code == 503
        assert (await worker.client.get("/healthz")).status_code == 200
        assert (await worker.generate()).status_code == 200
        worker.drain.refusing = True
        refused = await worker.generate()
    assert refused.status_code == 503
    assert refused.json()["type"].endswith("draining")
    assert "retry-after" in refused.headers


async def test_a_stopped_engine_is_neither_alive_nor_asked(tiny: Tiny) -> None:
    async with running(tiny) as worker:
        worker.engine.stop()
        assert (await worker.client.get("/healthz")).status_code == 503
        refused = await worker.generate()
        assert refused.status_code == 503
        assert "retry-after" in refused.headers


async def test_metrics_tell_acceptance_length_stages_and_counts(tiny: Tiny) -> None:
    async with running(tiny) as worker:
        counts = (await worker.generate()).json()["speculation"]
        text = (await worker.client.get("/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    labels = '{model_version="m1",strategy="list"}'
    assert float(values["padrec_acceptance_length_count" + '{strategy="list"}']) == 1
    assert float(values["padrec_acceptance_length_sum" + '{strategy="list"}']) == counts["acceptance_length"]
    assert float(values["padrec_spec_rounds_total" + labels]) == counts["rounds"]
    assert float(values["padrec_spec_draft_tokens_total" + labels]) == counts["draft_tokens"]
    assert float(values["padrec_spec_accepted_tokens_total" + labels]) == counts["accepted_tokens"]
    assert float(values["padrec_spec_forced_tokens_total" + labels]) == counts["forced_tokens"]
    assert float(values['padrec_batch_size_sum{phase="prefill"}']) == 1
    assert float(values['padrec_batch_size_count{phase="decode"}']) == counts["rounds"]
    for stage in ("queue", "prefill", "draft", "verify"):
        assert float(values[f'padrec_stage_duration_seconds_count{{stage="{stage}"}}']) >= 1
    assert float(values['padrec_requests_total{outcome="ok",route="/generate"}']) == 1
    assert "padrec_warmup_seconds" in values


async def test_metrics_have_a_port_of_their_own_if_asked(tiny: Tiny) -> None:
    port = free_port("127.0.0.1")
    async with running(tiny, metrics_port=port, worker_key="a-secret-of-16-or-more") as worker:
        headers = {"authorization": "Bearer a-secret-of-16-or-more"}
        assert (await worker.client.get("/metrics")).status_code == 401
        assert (await worker.client.get("/metrics", headers=headers)).status_code == 404
        assert (await worker.client.get("/healthz")).status_code == 200
        assert (await worker.generate()).status_code == 401
        assert (await worker.client.post("/generate", json=worker.body(), headers=headers)).status_code == 200
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    assert 'padrec_requests_total{outcome="ok",route="/generate"} 1.0' in text
    assert "padrec_queue_requests 0.0" in text
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_a_wait_past_the_deadline_is_a_503_that_says_so_and_is_counted(tiny: Tiny) -> None:
    async with running(tiny, SlowDecoder, num_rows=1) as worker:
        await worker.generate()  # what work costs is known now
        first = asyncio.create_task(worker.generate(k=20, request_id="r1", deadline_ms=60_000))
        async with asyncio.timeout(5):
            while not worker.engine.status().running:  # noqa: ASYNC110 - the engine has no event to wait for
                await asyncio.sleep(0.005)
        hurried = await worker.generate(deadline_ms=60, request_id="r2")
        text = (await worker.client.get("/metrics")).text
        assert (await first).status_code == 200
    assert hurried.status_code == 503
    assert "deadline" in hurried.json()["detail"]
    assert int(hurried.headers["retry-after"]) >= 1
    assert 'padrec_admission_rejections_total{reason="deadline"} 1.0' in text
