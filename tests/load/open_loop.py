"""An open-loop client: requests leave when the clock says so, whether or not earlier ones were answered.

A closed loop slows down with the service and hides what users would wait for; this one does not. Every request gets a
verdict of its own. Knows only the public wire.
"""

import asyncio
import contextlib
import gc
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from service.bench_api import exchange, field_of

Body = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What became of one request. `sent` in `time.monotonic()` seconds; `status` 0: the connection broke or hung."""

    index: int
    sent: float
    seconds: float
    status: int
    items: tuple[str, ...] = ()
    source: str = ""
    catalog_version: str = ""
    degraded: tuple[str, ...] = ()
    retry_after: str = ""
    problem: str = ""

    @property
    def from_model(self) -> bool:
        return self.status == 200 and self.source == "model"


@dataclass
class Answers:
    """All answers of a load, in the order the requests left."""

    wanted: int
    all: list[Answer] = field(default_factory=list)

    def seconds(self, only: Callable[[Answer], bool] = lambda answer: True) -> list[float]:
        return sorted(answer.seconds for answer in self.all if only(answer))

    def statuses(self) -> str:
        counts = Counter(answer.status for answer in self.all)
        return ", ".join(f"{count} of {status or 'lost'}" for status, count in sorted(counts.items()))

    def between(self, start: float, end: float) -> "Answers":
        """The answers to requests that left in this time."""
        chosen = [answer for answer in self.all if start <= answer.sent < end]
        return Answers(len(chosen), chosen)


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the sorted values do not exceed; nan without values."""
    if not ordered:
        return float("nan")
    return ordered[max(0, -(-len(ordered) * round(share * 1000) // 1000) - 1)]


@asynccontextmanager
async def client_of(url: str, seconds: float = 10.0) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=2000, max_keepalive_connections=500)
    async with httpx.AsyncClient(base_url=url, timeout=seconds, limits=limits, trust_env=False) as client:
        yield client


class Crowd:
    """Hundreds of requests a second to one address, for a client that must not be what is measured: `httpx` takes a
    millisecond for each, and its pool looks at every connection for every request."""

    def __init__(self, url: str, seconds: float = 10.0) -> None:
        parts = urlsplit(url)
        self._host, self._port, self._seconds = parts.hostname or "", parts.port or 80, seconds
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __aenter__(self) -> "Crowd":
        return self

    async def __aexit__(self, *exc: object) -> None:
        for _, writer in self._idle:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def ask(self, index: int, body: Body) -> Answer:
        """As `one` does."""
        sent, content = time.monotonic(), json.dumps(body).encode()
        head = f"POST /recommend HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
        try:
            async with asyncio.timeout(self._seconds):
                answer = await self._exchange(head.encode() + b"content-length: %d\r\n\r\n" % len(content) + content)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as exc:
            return Answer(index, sent, time.monotonic() - sent, 0, problem=type(exc).__name__)
        return read(index, sent, *answer)

    async def _exchange(self, request: bytes) -> tuple[int, str, bytes]:
        """Status, Retry-After and body."""
        reader, writer = await self._connection()
        try:
            head, content = await exchange(reader, writer, request)
        except BaseException:
            writer.close()
            raise
        self._idle.append((reader, writer))
        return int(head.split(b" ", 2)[1]), field_of(head, b"retry-after").decode(), content

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():  # the other side may have closed it
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port)


def even(rate: float, count: int) -> Iterable[float]:
    """Departures in seconds from the start, evenly spaced."""
    return (n / rate for n in range(count))


def poisson(rate: float, seconds: float, seed: int = 0) -> Iterable[float]:
    """Departures of independent users: exponential gaps."""
    dice, now = random.Random(seed), 0.0
    while (now := now + dice.expovariate(rate)) < seconds:
        yield now


async def send(
    choose: Callable[[], httpx.AsyncClient], body_of: Callable[[int], Body], departures: Iterable[float]
) -> Answers:
    """Send one request per departure, from the client `choose` names at that moment."""
    return await depart(lambda index: one(choose(), index, body_of(index)), departures)


async def depart(ask: Callable[[int], Coroutine[Any, Any, Answer]], departures: Iterable[float]) -> Answers:
    """Begin to `ask` at every departure, whatever became of those before."""
    tasks: list[asyncio.Task[Answer]] = []
    gc.disable()  # walking through thousands of answers takes a quarter of a second, and would be the service's fault
    try:
        start = time.monotonic()
        for index, departure in enumerate(departures):
            await asyncio.sleep(max(0.0, start + departure - time.monotonic()))
            tasks.append(asyncio.create_task(ask(index)))
        return Answers(len(tasks), list(await asyncio.gather(*tasks)))
    finally:
        gc.enable()


async def one(client: httpx.AsyncClient, index: int, body: Body) -> Answer:
    """Send one request and judge its answer; nothing is raised for what the service does."""
    sent = time.monotonic()
    try:
        reply = await client.post("/recommend", content=json.dumps(body), headers={"content-type": "application/json"})
    except httpx.HTTPError as exc:
        return Answer(index, sent, time.monotonic() - sent, 0, problem=type(exc).__name__)
    return read(index, sent, reply.status_code, reply.headers.get("retry-after", ""), reply.content)


def read(index: int, sent: float, status: int, retry_after: str, body: bytes) -> Answer:
    seconds = time.monotonic() - sent
    try:
        content = json.loads(body)
        if status != 200:
            return Answer(index, sent, seconds, status, retry_after=retry_after, problem=str(content.get("type")))
        items = content["items"]
        return Answer(
            index,
            sent,
            seconds,
            200,
            items=tuple(item["item_id"] for item in items),
            source=items[0]["source"] if items else "",
            catalog_version=content["model"]["catalog_version"],
            degraded=tuple(note["code"] for note in content["degraded"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        return Answer(index, sent, seconds, 599, problem=f"unreadable: {type(exc).__name__}")
