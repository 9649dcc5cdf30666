"""The door: every request is named, bounded, counted, logged and answered, even when the application crashes."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry

from service.errors import ClientGone
from service.metrics import HttpMetrics
from service.middleware import Door, cancel, install_errors, read_json_body, while_connected
from service.probes import Drain
from service.settings import Settings
from service.tracing import Spans


@pytest.fixture
def drain() -> Drain:
    return Drain()


@pytest.fixture
async def client(drain: Drain) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    metrics = HttpMetrics(CollectorRegistry())
    app.add_middleware(Door, metrics=metrics, drain=drain, spans=Spans(Settings(), "door", "1", metrics))
    install_errors(app)

    @app.get("/ids")
    async def ids(request: Request) -> dict[str, str]:
        ticket = request.state.ticket
        return {"request": ticket.request_id, "internal": ticket.internal_id}

    @app.get("/crash")
    async def crash() -> None:
        raise RuntimeError("secret history")

    @app.post("/slow")
    async def slow(request: Request) -> int:
        return len(await read_json_body(request, max_bytes=10, seconds=0.05))

    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
        yield client


@pytest.mark.parametrize("given", ["abc", "A-1._z", "x" * 64])
async def test_a_plain_request_id_is_echoed_and_never_used_inside(client: httpx.AsyncClient, given: str) -> None:
    reply = await client.get("/ids", headers={"X-Request-Id": given})
    assert reply.headers["x-request-id"] == reply.json()["request"] == given
    assert reply.json()["internal"] != given


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "a\tb", '{"a":1}', "\xe9"])
async def test_any_other_request_id_is_replaced(client: httpx.AsyncClient, given: str) -> None:
    reply = await client.get("/ids", headers=[(b"X-Request-Id", given.encode("latin-1"))])
    assert reply.headers["x-request-id"] == reply.json()["internal"]
    assert len(reply.json()["internal"]) == 32


async def test_internal_ids_are_always_fresh(client: httpx.AsyncClient) -> None:
    replies = [await client.get("/ids", headers={"X-Request-Id": "same"}) for _ in range(5)]
    assert len({reply.json()["internal"] for reply in replies}) == 5


async def test_a_crash_is_a_500_problem_and_its_message_stays_inside(
    client: httpx.AsyncClient, drain: Drain, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        reply = await client.get("/crash")
    assert reply.status_code == 500
    assert reply.json()["type"] == "urn:padrec:problem:internal-error"
    assert "secret" not in reply.text + caplog.text
    assert any(getattr(record, "error", "") == "RuntimeError" for record in caplog.records)
    assert drain.in_flight == 0


async def test_a_body_that_does_not_arrive_is_not_waited_for(client: httpx.AsyncClient) -> None:
    async def trickle() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(1)
        yield b"}"

    reply = await client.post("/slow", content=trickle(), headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["retryable"]) == (408, True)


def _messages(*types: str) -> Any:
    queue = list(types)

    async def receive() -> MutableMapping[str, Any]:
        if not queue:
            await asyncio.sleep(3600)
        return {"type": queue.pop(0), "body": b"", "more_body": True}

    return receive


async def test_a_client_that_leaves_while_sending_is_noticed() -> None:
    headers = [(b"content-type", b"application/json")]
    request = Request({"type": "http", "headers": headers}, _messages("http.request", "http.disconnect"))
    with pytest.raises(ClientGone):
        await read_json_body(request, max_bytes=10, seconds=1)


async def test_work_is_cancelled_when_the_client_leaves_and_not_before() -> None:
    cancelled = asyncio.Event()

    async def work(seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return "done"

    assert await while_connected(_messages("http.request"), work(0)) == "done"
    with pytest.raises(ClientGone):
        await while_connected(_messages("http.request", "http.disconnect"), work(60))
    assert cancelled.is_set()


async def test_work_is_cancelled_with_the_request() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    task = asyncio.create_task(while_connected(_messages(), work()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled.is_set()


async def test_work_that_swallows_a_cancellation_is_cancelled_again() -> None:
    async def stubborn() -> None:
        for seconds in (60, 60):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(seconds)

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await asyncio.wait_for(cancel(task), 2)
    assert task.done()


async def test_the_error_of_the_work_is_the_callers() -> None:
    async def work() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await while_connected(_messages(), work())
