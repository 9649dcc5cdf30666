"""A tiny catalog, a tiny worker that speaks the internal wire, and the API application around them."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.app import create_app
from service.probes import Drain
from service.process import bind
from service.settings import Settings, load_settings

VERSION = "0123456789ab"
OTHER_VERSION = "ba9876543210"
SIZES = (4, 4, 4, 2)
NUM_ITEMS = 60
GENRES = ("Comedy", "Drama", "Horror")


def codes_of(index: int) -> list[int]:
    return [index // 16 % 4, index // 4 % 4, index % 4, index // 64]


def catalog_lines(version: str = VERSION, num_items: int = NUM_ITEMS, first: int = 0) -> list[dict[str, Any]]:
    """Item `i<n>` has the codes of n - first; the last one has no attributes; popularity falls with n."""
    header = {
        "catalog_version": version,
        "num_levels": len(SIZES),
        "codebook_sizes": list(SIZES),
        "attributes": {
            "genre": {"type": "categories", "values": list(GENRES)},
            "year": {"type": "number", "min": 1900, "max": 1999},
        },
    }
    items = [
        {
            "item_id": f"i{n}",
            "codes": codes_of(n - first),
            "popularity": 1000 - n,
            "attributes": {"genre": [GENRES[n % 3]], "year": 1900 + n},
        }
        for n in range(first, first + num_items)
    ]
    items[-1]["attributes"] = {}
    return [header, *items]


def write_catalog(folder: Path, version: str = VERSION, num_items: int = NUM_ITEMS, first: int = 0) -> Path:
    path = folder / f"{version}.jsonl"
    lines = catalog_lines(version, num_items, first)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@dataclass
class TinyWorker:
    """The wire of a worker without a model: the first free codes, best first. Knobs make it slow, busy or wrong."""

    version: str = VERSION
    ready: bool = True
    delay: float = 0.0
    status: int = 200
    problem: str = "urn:padrec:problem:overloaded"
    spoil: dict[str, Any] = field(default_factory=dict)
    others: int = 0
    instance: str = "first"
    seen: list[dict[str, Any]] = field(default_factory=list)
    abandoned: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _lifespan(receive, send)
        elif scope["path"] == "/readyz":
            await _reply(send, 200 if self.ready else 503, {})
        elif scope["path"] == "/info":
            await (_reply(send, 200, self._info()) if self.ready else _reply(send, 503, {}))
        else:
            await self._generate(receive, send)

    async def _generate(self, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        request = json.loads(body + message["body"])
        self.seen.append(request)
        waiting = asyncio.ensure_future(asyncio.sleep(self.delay))
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait((waiting, gone), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                self.abandoned += 1
                return
        except asyncio.CancelledError:
            self.abandoned += 1
            raise
        finally:
            waiting.cancel()
            gone.cancel()
        await _reply(send, *self._answer(request))

    def _answer(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.status != 200:
            errors = [{"pointer": "/k", "reason": "should be less"}]
            return self.status, {"type": self.problem, "errors": errors, "catalog_version": "x"}
        if request["catalog_version"] != self.version:
            return 409, {"catalog_version": self.version}
        taken = request["exclude"] + (request["history"] if request["exclude_history"] else [])
        free = [codes for codes in map(codes_of, range(NUM_ITEMS)) if codes not in taken]
        answer = {
            "request_id": request["request_id"],
            "items": [{"codes": codes, "score": -0.5 - i} for i, codes in enumerate(free[: request["k"]])],
            "model": {"name": "tiny", "version": "1", "catalog_version": self.version, "strategy": "list"},
            "speculation": {
                "rounds": 4,
                "draft_tokens": 12,
                "accepted_tokens": 8,
                "forced_tokens": 3,
                "acceptance_length": 3.0,
            },
            "timings_ms": {"queue": 0.1, "prefill": 1.0, "decode": 2.0, "total": 3.5},
            "degraded": [],
            "history_used": len(request["history"]),
        }
        return 200, answer | self.spoil

    def _info(self) -> dict[str, Any]:
        return {
            "model": {"name": "tiny", "version": "1"},
            "catalog_version": self.version,
            "limits": {"max_k": 100, "max_history_items": 32},
            "in_flight": 0,
            "waiting": self.others,
            "instance": self.instance,
        }


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        stage = (await receive())["type"]
        await send({"type": f"{stage}.complete"})
        if stage == "lifespan.shutdown":
            return


async def _reply(send: Send, status: int, document: dict[str, Any]) -> None:
    body = json.dumps(document).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Workers(httpx.AsyncBaseTransport):
    """The network between API and workers, in memory: an application by host; a host without one refuses."""

    def __init__(self, **apps: ASGIApp) -> None:
        self.apps: dict[str, ASGIApp | None] = dict(apps)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        app = self.apps.get(request.url.host)
        if app is None:
            raise httpx.ConnectError("refused", request=request)
        return await httpx.ASGITransport(app=app).handle_async_request(request)


def api_settings(redis_url: str = "unix:///nowhere.sock", **others: Any) -> Settings:
    """Quick polls, one worker called `w1`."""
    return load_settings(
        {"redis_url": redis_url, "worker_urls": "http://w1", "poll_seconds": 0.05, "redis_timeout_ms": 1000} | others
    )


@asynccontextmanager
async def api(settings: Settings, network: Workers, drain: Drain | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """The API application, started, with a client in front of it."""
    app = create_app(settings, drain, worker_transport=network)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://api") as client,
    ):
        yield client


@contextmanager
def served(app: ASGIApp | FastAPI) -> Iterator[str]:
    """`app` under a real uvicorn on a free port, in a thread; yields its URL."""
    with running_server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1)) as (_, address):
        yield f"http://127.0.0.1:{address[1]}"


@contextmanager
def running_server(config: uvicorn.Config) -> Iterator[tuple[uvicorn.Server, tuple[str, int]]]:
    """A real uvicorn on a free port, in a thread that ends with the block; yields it and its address."""
    server = uvicorn.Server(config)
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            yield server, listener.getsockname()
        finally:
            server.should_exit = True
            thread.join(10)
    assert not thread.is_alive()


async def until(condition: Any, seconds: float = 5.0) -> None:
    """Wait until `condition()` (maybe a coroutine) is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"not within {seconds} s")
