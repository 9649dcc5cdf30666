"""`padrec bench serve`: closed-loop HTTP load at rising concurrency, over loopback, against the real service.

Each client sends its next request when the last is answered. Starts the service from a bundle unless given `--url`.
Knows only the public wire. `api_overhead` is what a client waits beyond the worker's own total.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from service.movielens import BUNDLE, DATA, DataMissing, held_out_histories
from service.serve import ServiceFailed, running_service
from service.supervisor import PortTaken

# ruff: noqa: T201 - a table on standard output is what this command is for

CONCURRENCIES = (1, 2, 4, 8, 16, 32)
DEADLINE_MS = 60_000


@dataclass(frozen=True)
class Sample:
    """One answered request. Milliseconds; `worker_ms` is None when no model answered."""

    total_ms: float
    worker_ms: float | None
    api_ms: float | None
    ok: bool


@dataclass(frozen=True)
class Record:
    """One line of the table. `errors` counts answers other than a 200 that a model wrote."""

    concurrency: int
    requests: int
    requests_per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    worker_p50_ms: float
    api_overhead_p50_ms: float
    api_added_p50_ms: float
    errors: int


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 0, or 1 when the service could not be started or a request failed."""
    parser = argparse.ArgumentParser(prog="padrec bench serve", description="HTTP load at rising concurrency.")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--url", help="a service that runs already; default: start one from the bundle")
    parser.add_argument("--concurrency", type=_numbers, default=CONCURRENCIES, metavar="N,N,...")
    parser.add_argument("--seconds", type=float, default=10.0, help="per concurrency, after the warm-up")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--speculation", choices=("on", "off"), default="on")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records to this file")
    options = parser.parse_args(argv)
    try:
        bodies = [
            {"history": history, "k": options.k, "speculation": options.speculation, "deadline_ms": DEADLINE_MS}
            for history in load_histories(options.bundle, options.data)
        ]
        records = _measure_service(options, bodies)
    except (ServiceFailed, PortTaken, OSError) as error:
        print(f"bench serve: {error}", file=sys.stderr)
        return 1
    return finished(records, options.json)


def finished(records: Sequence[Any], path: Path | None) -> int:
    """Write the records, dataclasses that count `errors`, as JSON where a `path` is given. Returns the exit status: 1
    where there were errors."""
    if path:
        text = json.dumps([asdict(record) for record in records], indent=1)
        path.write_text(text + "\n", encoding="utf-8")
    return 1 if any(record.errors for record in records) else 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def load_histories(bundle: Path, data: Path) -> list[list[str]]:
    """Histories of the bundle's held-out users where the data is at hand, else random ones from its catalog."""
    try:
        return list(held_out_histories(bundle, data).values())
    except DataMissing:
        lines = (bundle / "catalog.jsonl").read_text(encoding="utf-8").splitlines()[1:]
        items = [json.loads(line)["item_id"] for line in lines]
        dice = random.Random(0)
        return [dice.sample(items, min(len(items), dice.randint(5, 50))) for _ in range(100)]


def _measure_service(options: argparse.Namespace, bodies: Sequence[dict[str, Any]]) -> list[Record]:
    if options.url:
        return asyncio.run(measure(options.url, bodies, options.concurrency, options.seconds))
    with running_service(options.bundle) as service:
        return asyncio.run(measure(service.url, bodies, options.concurrency, options.seconds))


async def measure(
    url: str, bodies: Sequence[dict[str, Any]], concurrencies: Sequence[int], seconds: float
) -> list[Record]:
    """One record per concurrency, printed as it is measured. A fifth of `seconds` warms each one up, unrecorded."""
    print(_HEADER, flush=True)
    records = []
    encoded = [json.dumps(body).encode() for body in bodies]
    limits = httpx.Limits(max_connections=max(concurrencies), max_keepalive_connections=max(concurrencies))
    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_MS / 1e3 + 5, limits=limits) as client:
        for concurrency in concurrencies:
            await _load(client, encoded, concurrency, seconds / 5)
            start = time.perf_counter()
            samples = await _load(client, encoded, concurrency, seconds)
            records.append(summarise(concurrency, samples, time.perf_counter() - start))
            print(_line(records[-1]), flush=True)
    return records


async def _load(client: httpx.AsyncClient, bodies: Sequence[bytes], concurrency: int, seconds: float) -> list[Sample]:
    end = time.perf_counter() + seconds
    samples: list[Sample] = []

    async def one_client(first: int) -> None:
        turn = first
        while True:
            samples.append(await _one(client, bodies[turn % len(bodies)]))
            turn += concurrency
            if time.perf_counter() >= end:
                return

    async with asyncio.TaskGroup() as group:
        for first in range(concurrency):
            group.create_task(one_client(first))
    return samples


async def _one(client: httpx.AsyncClient, body: bytes) -> Sample:
    start = time.perf_counter()
    try:
        response = await client.post("/recommend", content=body, headers={"content-type": "application/json"})
    except httpx.TransportError:
        return Sample((time.perf_counter() - start) * 1e3, None, None, ok=False)
    total = (time.perf_counter() - start) * 1e3
    if response.status_code != 200:
        return Sample(total, None, None, ok=False)
    answer = response.json()
    if not answer["items"] or answer["items"][0]["source"] != "model":
        return Sample(total, None, None, ok=False)
    timings = answer["timings_ms"]
    return Sample(total, timings["worker"], timings["total"] - timings["worker"], ok=True)


def summarise(concurrency: int, samples: Sequence[Sample], seconds: float) -> Record:
    """Percentiles over all samples; the worker's and the API's share over those a model answered."""
    totals = [sample.total_ms for sample in samples]
    answered = [s for s in samples if s.worker_ms is not None and s.api_ms is not None]
    return Record(
        concurrency=concurrency,
        requests=len(samples),
        requests_per_second=round(len(samples) / seconds, 2),
        p50_ms=percentile(totals, 50),
        p95_ms=percentile(totals, 95),
        p99_ms=percentile(totals, 99),
        worker_p50_ms=percentile([s.worker_ms for s in answered if s.worker_ms is not None], 50),
        api_overhead_p50_ms=percentile([s.total_ms - s.worker_ms for s in answered if s.worker_ms is not None], 50),
        api_added_p50_ms=percentile([s.api_ms for s in answered if s.api_ms is not None], 50),
        errors=sum(not sample.ok for sample in samples),
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least `percent` of the values do not exceed; 0 without values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return round(ordered[max(0, -(-len(ordered) * percent // 100) - 1)], 3)


_HEADER = (
    f"{'clients':>7} {'requests':>9} {'req/s':>8} {'p50 ms':>9} {'p95 ms':>9} {'p99 ms':>9} "
    f"{'worker p50':>11} {'overhead p50':>13} {'in API p50':>11} {'errors':>7}"
)


def _line(r: Record) -> str:
    return (
        f"{r.concurrency:7d} {r.requests:9d} {r.requests_per_second:8.1f} "
        f"{r.p50_ms:9.1f} {r.p95_ms:9.1f} {r.p99_ms:9.1f} "
        f"{r.worker_p50_ms:11.1f} {r.api_overhead_p50_ms:13.2f} {r.api_added_p50_ms:11.2f} {r.errors:7d}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
