"""`padrec bench api`: what one API process sustains, and what it adds, when the worker takes next to no time.

A Valkey, one API process and a stub worker (the worker's wire, no model: popular items after a fixed time) run on this
machine; clients keep connections open and send their next request when the last is answered. Printed for rising
concurrency: requests a second, percentiles, the API's processor time a request, what answers say was spent inside the
API, and its memory at the end. Clients, stub and Valkey take time from the same cores. Knows the two wires; no tensors.
"""

import argparse
import asyncio
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from service import child
from service.api.catalog_file import CatalogFile
from service.api.publish import publish
from service.bench_serve import CONCURRENCIES, finished, load_histories, percentile
from service.embedded_valkey import start_valkey
from service.movielens import BUNDLE, DATA
from service.serve import ServiceFailed, wait_until_ready
from service.supervisor import free_port

# ruff: noqa: T201 - a table on standard output is what this command is for

HOST = "127.0.0.1"
K = 10
TIMED = 8  # one answer in so many is read for its timings: reading all would make the clients the limit
Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class Record:
    """One line of the table; times in milliseconds. `errors`: answers that were no 200."""

    concurrency: int
    requests: int
    requests_per_second: float
    p50_ms: float
    p99_ms: float
    api_added_p50_ms: float
    api_cpu_ms: float
    api_memory_mib: float
    errors: int


class StubWorker:
    """The wire of a worker that needs `seconds` a request and no model, as an ASGI application."""

    def __init__(self, catalog: CatalogFile, seconds: float) -> None:
        self.seconds = seconds
        self.version = catalog.header.version
        popular = [list(item.codes) for item in catalog.by_popularity[: 10 * K]]
        self.items = [{"codes": codes, "score": -1.0} for codes in popular]
        self.model = {"name": "stub", "version": "stub", "catalog_version": self.version, "strategy": "list"}

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        answer = self.info() if scope["path"] == "/info" else {"status": "ready"}
        if scope["path"] == "/generate":
            await asyncio.sleep(self.seconds)
            answer = self.generate(json.loads(body))
        content = json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def info(self) -> dict[str, Any]:
        model = {"name": "stub", "version": "stub"}
        limits = {"max_k": 100, "max_history_items": 20}
        return {"model": model, "catalog_version": self.version, "limits": limits, "in_flight": 0, "waiting": 0}

    def generate(self, asked: dict[str, Any]) -> dict[str, Any]:
        milliseconds = 1e3 * self.seconds
        speculation = {"rounds": 1, "draft_tokens": 0, "accepted_tokens": 0, "forced_tokens": 0}
        return {
            "request_id": asked["request_id"],
            "items": self.items[: asked["k"]],
            "model": self.model,
            "speculation": {**speculation, "acceptance_length": 1.0},
            "timings_ms": {"queue": 0.0, "prefill": 0.0, "decode": milliseconds, "total": milliseconds},
            "degraded": [],
            "history_used": len(asked["history"]),
        }


@contextmanager
def running_api(bundle: Path, worker_seconds: float) -> Iterator[tuple[int, int]]:
    """Port and process ID of an API over a stub worker and a Valkey of its own. Raises ServiceFailed."""
    with tempfile.TemporaryDirectory(prefix="padrec-bench-") as name, start_valkey(Path(name)) as server:
        asyncio.run(publish(bundle / "catalog.jsonl", server.url))
        stub_port, port = free_port(HOST), 0
        command = [sys.executable, "-m", "service.bench_api", "--bundle", str(bundle), "--stub", str(stub_port)]
        stub = child.spawn([*command, "--worker-ms", str(1e3 * worker_seconds)])
        try:
            port = free_port(HOST)
            environ = {**os.environ, "PADREC_REDIS_URL": server.url, "PADREC_LOG_LEVEL": "error"}
            environ["PADREC_WORKER_URLS"] = f"http://{HOST}:{stub_port}"
            command = [sys.executable, "-m", "service.cli", "api", "--host", HOST, "--port", str(port)]
            api = child.spawn([*command, "--drain-seconds", "0"], environ=environ)
            try:
                wait_until_ready(f"http://{HOST}:{port}", api)
                yield port, api.pid
            finally:
                child.stop(api, 20)
        finally:
            child.stop(stub, 5)


def resident_mib(pid: int) -> float:
    """Memory of a process (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[bytes, bytes]:
    """Send a request as it goes over the wire; head, in lower case, and body of the answer.
    An HTTP client's own work would be a good part of what is measured."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    return head, await reader.readexactly(int(field_of(head, b"content-length")))


def field_of(head: bytes, name: bytes) -> bytes:
    """A field of a head; empty where it has none."""
    return head.partition(b"\r\n" + name + b":")[2].partition(b"\r\n")[0].strip()


async def load(
    port: int, requests: Sequence[bytes], concurrency: int, seconds: float
) -> list[tuple[float, int, bytes]]:
    """(milliseconds, status, body of one in TIMED) of every request of a closed loop."""
    end, answers = time.perf_counter() + seconds, list[tuple[float, int, bytes]]()
    turn = itertools.count()

    async def one_client() -> None:
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            while time.perf_counter() < end:
                number = next(turn)
                started = time.perf_counter()
                head, body = await exchange(reader, writer, requests[number % len(requests)])
                taken = 1e3 * (time.perf_counter() - started)
                answers.append((taken, int(head.split(b" ", 2)[1]), b"" if number % TIMED else body))
        finally:
            writer.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(one_client())
    return answers


def encoded(histories: Sequence[Sequence[str]]) -> list[bytes]:
    """Requests as they go over the wire."""
    made = []
    for history in histories:
        body = json.dumps({"history": list(history), "k": K, "deadline_ms": 10_000}).encode()
        head = "POST /recommend HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        made.append(head.encode() + body)
    return made


def measure(port: int, pid: int, requests: Sequence[bytes], concurrency: int, seconds: float) -> Record:
    """A fifth of `seconds` warms up, unrecorded."""
    asyncio.run(load(port, requests, concurrency, seconds / 5))
    cpu, started = child.cpu_seconds(pid), time.perf_counter()
    answers = asyncio.run(load(port, requests, concurrency, seconds))
    taken, cpu = time.perf_counter() - started, child.cpu_seconds(pid) - cpu
    timings = [json.loads(body)["timings_ms"] for _, status, body in answers if body and status == 200]
    totals = [milliseconds for milliseconds, _, _ in answers]
    return Record(
        concurrency=concurrency,
        requests=len(answers),
        requests_per_second=round(len(answers) / taken, 1),
        p50_ms=percentile(totals, 50),
        p99_ms=percentile(totals, 99),
        api_added_p50_ms=percentile([t["total"] - t["worker"] for t in timings], 50),
        api_cpu_ms=round(1e3 * cpu / max(1, len(answers)), 3),
        api_memory_mib=round(resident_mib(pid), 2),
        errors=sum(status != 200 for _, status, _ in answers),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 0, or 1 when something could not be started or a request failed."""
    parser = argparse.ArgumentParser(prog="padrec bench api", description="One API process over a stub worker.")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--worker-ms", type=float, default=5.0, help="what the stub takes a request")
    parser.add_argument("--concurrency", type=int, nargs="+", default=CONCURRENCIES)
    parser.add_argument("--seconds", type=float, default=5.0, help="per concurrency")
    parser.add_argument("--stub", type=int, default=0, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records to this file")
    options = parser.parse_args(argv)
    if options.stub:
        stub = StubWorker(CatalogFile.load(options.bundle / "catalog.jsonl"), options.worker_ms / 1e3)
        uvicorn.run(stub, host=HOST, port=options.stub, log_level="error", access_log=False)
        return 0
    records = []
    try:
        requests = encoded(load_histories(options.bundle, options.data))
        print(
            f"{'clients':>7} {'requests':>9} {'req/s':>8} {'p50 ms':>8} {'p99 ms':>8} {'in API p50':>11} {'CPU ms':>7} "
            f"{'MiB':>7}"
        )
        with running_api(options.bundle, options.worker_ms / 1e3) as (port, pid):
            for concurrency in options.concurrency:
                r = measure(port, pid, requests, concurrency, options.seconds)
                records.append(r)
                print(
                    f"{r.concurrency:7d} {r.requests:9d} {r.requests_per_second:8.1f} {r.p50_ms:8.1f} {r.p99_ms:8.1f} "
                    f"{r.api_added_p50_ms:11.2f} {r.api_cpu_ms:7.2f} {r.api_memory_mib:7.2f}",
                    flush=True,
                )
    except (ServiceFailed, OSError) as error:
        print(f"bench api: {error}", file=sys.stderr)
        return 1
    return finished(records, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
