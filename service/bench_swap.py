"""`padrec bench swap`: how long a catalog swap holds up a worker that is writing lists.

A worker process serves a bundle and follows a Valkey of its own; requests are asked one after another, for their
longest delay is the engine's longest pause. Then a synthetic catalog of many items over the bundle's codebooks is
published, and the same goes on until the worker serves it. Printed: the slowest request and the 99th percentile before,
during the build, and around the moment of the swap.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from service import child
from service.api.catalog_file import CatalogFile
from service.api.publish import publish
from service.embedded_valkey import start_valkey
from service.supervisor import free_port

HOST = "127.0.0.1"
AROUND_SECONDS = 1.0  # before and after the swap


def grown(catalog: CatalogFile, num_items: int) -> list[str]:
    """Lines of a catalog file: the items of `catalog`, and others under codes that are free, `num_items` in all."""
    draw, sizes = random.Random(0), catalog.header.codebook_sizes
    items = [item.document() for item in catalog.by_id.values()]
    seen = set(catalog.by_codes)
    attributes = [item["attributes"] for item in items]
    while len(items) < num_items:
        codes = tuple(draw.randrange(size) for size in sizes)
        if codes not in seen:
            seen.add(codes)
            item_id = f"synthetic-{len(items)}"
            items.append(
                {"item_id": item_id, "codes": list(codes), "popularity": 0, "attributes": draw.choice(attributes)}
            )
    header = catalog.header.document() | {"catalog_version": f"grown{num_items}"}
    return [json.dumps({k: v for k, v in header.items() if k not in ("format", "num_items", "num_buckets")})] + [
        json.dumps(item) for item in items
    ]


async def measure(bundle: Path, num_items: int, seconds: float) -> dict[str, Any]:
    """Times in milliseconds of requests before, during the build and around the swap. Raises RuntimeError when the
    worker does not take the catalog up."""
    with tempfile.TemporaryDirectory(prefix="padrec-bench-") as name:
        folder = Path(name)
        catalog = CatalogFile.load(bundle / "catalog.jsonl")
        path = folder / "grown.jsonl"
        path.write_text("".join(f"{line}\n" for line in grown(catalog, num_items)), encoding="utf-8")
        with start_valkey(folder, max_memory="0") as server:
            await publish(bundle / "catalog.jsonl", server.url)
            port = free_port(HOST)
            command = [sys.executable, "-m", "service.cli", "worker", "--port", str(port), "--bundle", str(bundle)]
            environ = {**os.environ, "PADREC_REDIS_URL": server.url, "PADREC_LOG_LEVEL": "warning"}
            worker = child.spawn([*command, "--drain-seconds", "0"], environ=environ)
            try:
                return await _watch(f"http://{HOST}:{port}", catalog, path, server.url, seconds)
            finally:
                child.stop(worker, 20)


async def _watch(url: str, catalog: CatalogFile, path: Path, redis_url: str, seconds: float) -> dict[str, Any]:
    history = [list(item.codes) for item in catalog.by_popularity[:10]]
    with path.open(encoding="utf-8") as file:
        versions = (catalog.header.version, str(json.loads(file.readline())["catalog_version"]))
    samples: list[tuple[float, float]] = []  # when it was asked, and how long it took
    async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client:
        await _ready(client)
        number = failed = 0

        async def ask(version: str) -> None:
            nonlocal number, failed
            number += 1
            body = {"request_id": f"r{number}", "catalog_version": version, "history": history, "k": 1}
            started = time.monotonic()
            reply = await client.post("/generate", json={**body, "deadline_ms": 30_000})
            samples.append((started, time.monotonic() - started))
            failed += reply.status_code != 200

        async def served() -> str:
            return str((await client.get("/info")).json()["catalog_version"])

        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await ask(versions[0])
        before, began = list(samples), time.monotonic()
        samples.clear()
        publishing = asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service.cli", "publish", "--catalog", str(path)),
            env={**os.environ, "PADREC_REDIS_URL": redis_url},
            stdout=asyncio.subprocess.DEVNULL,
        )
        process, version, swapped = await publishing, versions[0], 0.0
        while not swapped or time.monotonic() < swapped + AROUND_SECONDS:
            await ask(version)
            if not swapped and await served() == versions[1]:
                swapped, version = time.monotonic(), versions[1]
            if time.monotonic() > began + 600:
                raise RuntimeError("the worker has not taken the catalog up in 600 s")
        await process.wait()
    near = [s for s in samples if s[0] > swapped - AROUND_SECONDS]
    building = [s for s in samples if s[0] <= swapped - AROUND_SECONDS]
    parts = {"before": before, "building": building, "swapping": near}
    return {
        "seconds_to_swap": round(swapped - began, 1),
        "failed": failed,
        **{name: _summary(part) for name, part in parts.items()},
    }


async def _ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(120):
        while True:
            try:
                if (await client.get("/readyz")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)


def _summary(samples: list[tuple[float, float]]) -> dict[str, float]:
    took = sorted(1e3 * seconds for _, seconds in samples) or [0.0]
    place = {"median": len(took) // 2, "p99": len(took) * 99 // 100, "slowest": len(took) - 1}
    return {"requests": len(samples), **{name: round(took[i], 2) for name, i in place.items()}}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the measurement; with `--json`, write it down too."""
    parser = argparse.ArgumentParser(prog="padrec bench swap", description="A catalog swap under load.")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to look before publishing")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(argv)
    found = {"items": given.items, **asyncio.run(measure(given.bundle, given.items, given.seconds))}
    print(json.dumps(found, indent=1))  # noqa: T201 - a command's answer
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
