"""The open-loop client sends when the clock says so and judges honestly; the search finds the knee there is."""

import asyncio
import contextlib
import json
import time
from typing import Any

import httpx
import pytest

from tests.load.knee import Point, draw, knee, search, summarise
from tests.load.open_loop import Answer, Answers, Crowd, even, poisson, quantile, send

GOOD = {
    "items": [{"item_id": "1", "source": "model"}, {"item_id": "2", "source": "model"}],
    "model": {"catalog_version": "c"},
    "degraded": [{"code": "fewer_items"}],
}


async def test_a_slow_service_does_not_slow_the_departures_down() -> None:
    arrived: list[float] = []

    async def slow(request: httpx.Request) -> httpx.Response:
        arrived.append(time.monotonic())
        await asyncio.sleep(0.3)
        return httpx.Response(200, json=GOOD)

    async with httpx.AsyncClient(transport=httpx.MockTransport(slow), base_url="http://s") as client:
        answers = await send(lambda: client, lambda n: {"history": [str(n)]}, even(100, 20))
    assert arrived[-1] - arrived[0] < 0.3 < min(answers.seconds())
    assert [answer.index for answer in answers.all] == list(range(20))


@pytest.mark.parametrize(
    ("reply", "status", "from_model"),
    [
        (httpx.Response(200, json=GOOD), 200, True),
        (httpx.Response(200, json=GOOD | {"items": [{"item_id": "1", "source": "popular"}]}), 200, False),
        (httpx.Response(200, json=GOOD | {"items": []}), 200, False),
        (httpx.Response(503, json={"type": "urn:x"}, headers={"retry-after": "2"}), 503, False),
        (httpx.Response(200, text="<html>"), 599, False),
        (httpx.Response(200, json={"items": [{}]}), 599, False),
        (httpx.ReadTimeout("silence"), 0, False),
        (httpx.ConnectError("refused"), 0, False),
    ],
)
async def test_every_request_gets_a_verdict(
    reply: httpx.Response | httpx.HTTPError, status: int, from_model: bool
) -> None:
    def service(request: httpx.Request) -> httpx.Response:
        if isinstance(reply, httpx.HTTPError):
            raise reply
        return reply

    async with httpx.AsyncClient(transport=httpx.MockTransport(service), base_url="http://s") as client:
        (answer,) = (await send(lambda: client, lambda n: {}, [0.0])).all
    assert (answer.status, answer.from_model) == (status, from_model)
    assert answer.retry_after == ("2" if status == 503 else "")


async def test_a_crowd_uses_its_connections_again_and_says_when_one_breaks() -> None:
    served, asked = list[asyncio.Task[None] | None](), list[dict[str, Any]]()

    async def head_of(reader: asyncio.StreamReader) -> bytes:
        with contextlib.suppress(asyncio.IncompleteReadError):
            return await reader.readuntil(b"\r\n\r\n")
        return b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.current_task())
        while head := await head_of(reader):
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            asked.append(json.loads(await reader.readexactly(length)))
            if asked[-1].get("break"):
                break
            content = json.dumps(GOOD).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        async with Crowd(f"http://127.0.0.1:{port}") as crowd:
            answers = [await crowd.ask(n, {"history": [str(n)]}) for n in range(3)]
            assert [(a.status, a.from_model) for a in answers] == [(200, True)] * 3
            assert len(served) == 1
            assert (await crowd.ask(3, {"break": True})).status == 0
            assert (await crowd.ask(4, {})).status == 200
            assert len(served) == 2
        await asyncio.gather(*(task for task in served if task is not None))
    assert [body.get("history") for body in asked] == [["0"], ["1"], ["2"], None, None]


def test_users_come_at_the_rate_they_should_and_the_same_ones_every_time() -> None:
    departures = list(poisson(200, 10))
    assert 1800 < len(departures) < 2200 and departures == sorted(departures) and departures[-1] < 10
    assert departures == list(poisson(200, 10)) != list(poisson(200, 10, seed=1))


def test_a_quantile_is_a_value_that_was_seen() -> None:
    assert [quantile([1.0, 2.0, 3.0, 4.0], share) for share in (0.0, 0.25, 0.5, 0.51, 1.0)] == [1, 1, 2, 3, 4]
    assert quantile([7.0], 0.99) == 7


def service_with_knee_at(rate: float, objective_ms: float = 500.0) -> list[Point]:
    def measure(offered: float) -> Point:
        late = objective_ms * 2 if offered > rate else 100.0
        return Point("on", offered, min(offered, rate), 10, 20, late, 1.0)

    return search(measure, 10.0, objective_ms)


@pytest.mark.parametrize("true", [14.0, 100.0, 333.0])
def test_the_search_comes_within_a_few_percent_of_the_knee(true: float) -> None:
    found = knee(service_with_knee_at(true), 500.0)
    assert 0.93 * true <= found <= true


def test_there_is_no_knee_where_the_first_rate_is_too_much() -> None:
    assert len(service_with_knee_at(1.0)) == 1
    assert knee(service_with_knee_at(1.0), 500.0) == 0


def test_unanswered_requests_count_against_a_rate_though_they_took_no_time() -> None:
    answers = [Answer(n, 0.0, 0.01, 200, ("1",), "model") for n in range(90)]
    answers += [Answer(n, 0.0, 0.001, 503) for n in range(90, 100)]
    point = summarise("on", 100, 1.0, Answers(100, answers))
    assert (point.good, point.answered, point.p99_ms) == (0.9, 90, 10)
    assert not point.holds(500)


def test_the_picture_shows_both_and_the_objective() -> None:
    picture = draw(
        [Point("on", 10, 10, 1, 1, 50, 1.0), Point("off", 10, 8, 1, 1, 900, 0.9)], objective_ms=500.0
    ).splitlines()
    assert "o" in picture[-4] + picture[-5] and "x" in picture[1]
    assert any(row.count("-") > 60 and "500" in row for row in picture)
