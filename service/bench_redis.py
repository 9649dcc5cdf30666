"""`padrec bench redis`: what a catalog costs in Redis, per item, and how long a history takes to look up.

Publishes a synthetic catalog to a Valkey of its own with the code that publishes real ones, and reads it with the code
that serves requests, its local cache cold. Four levels, item IDs of seven digits, one category and one number an item.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from service.api.catalog import Catalog
from service.api.catalog_file import CatalogFile
from service.api.publish import publish
from service.api.redis_cache import RedisCache
from service.embedded_valkey import start_valkey
from service.metrics import ApiMetrics
from service.redis_client import connect
from service.settings import load_settings

CATEGORIES = [f"category {n}" for n in range(40)]


def synthetic_catalog(num_items: int, codebook_size: int = 256) -> Iterator[str]:
    """Lines of a catalog file: distinct codes over four levels, spread as products of a few thousand clusters are."""
    draw = random.Random(0)
    sizes = [codebook_size] * 4
    header = {
        "catalog_version": f"synthetic{num_items}",
        "num_levels": 4,
        "codebook_sizes": sizes,
        "attributes": {
            "category": {"type": "categories", "values": CATEGORIES},
            "year": {"type": "number", "min": 1950, "max": 2025},
        },
    }
    yield json.dumps(header)
    seen: set[tuple[int, ...]] = set()
    while len(seen) < num_items:
        codes = tuple(min(size - 1, int(draw.paretovariate(0.3)) % size) for size in sizes)
        if codes in seen:
            codes = tuple(draw.randrange(size) for size in sizes)
        if codes in seen:
            continue
        item = {
            "item_id": str(1_000_000 + len(seen)),
            "codes": list(codes),
            "popularity": draw.randrange(1000),
            "attributes": {"category": [draw.choice(CATEGORIES)], "year": draw.randrange(1950, 2026)},
        }
        seen.add(codes)
        yield json.dumps(item)


async def measure(num_items: int, codebook_size: int, history: int, lookups: int) -> dict[str, Any]:
    """Memory per item in bytes, and seconds of `lookups` histories of `history` random items."""
    with tempfile.TemporaryDirectory(prefix="padrec-bench-") as name:
        folder = Path(name)
        path = folder / "catalog.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in synthetic_catalog(num_items, codebook_size))
        with start_valkey(folder, max_memory="0") as server:
            client = connect(server.url, 5.0)
            empty = await _used_memory(client)
            started = time.monotonic()
            header = await publish(path, server.url)
            published = time.monotonic() - started
            per_item = (await _used_memory(client) - empty) / num_items
            settings = load_settings({"redis_url": server.url, "redis_timeout_ms": 1000})
            redis = RedisCache(client, ApiMetrics(CollectorRegistry()), settings.redis_timeout_ms / 1000)
            catalog = Catalog(redis, settings, redis.metrics)
            version = await catalog.version(header.version)
            assert version is not None, "what was just published can be read"
            ids = list(CatalogFile.load(path).by_id)
            draw, seconds = random.Random(1), []
            for _ in range(lookups):
                asked = draw.sample(ids, min(history, len(ids)))
                version.forget()
                started = time.perf_counter()
                found = await version.codes_of(asked)
                seconds.append(time.perf_counter() - started)
                assert len(found.found) == len(asked), "every item is there"
            await redis.close()
    seconds.sort()
    return {
        "items": num_items,
        "codebook_size": codebook_size,
        "bytes_per_item": round(per_item, 1),
        "publish_seconds": round(published, 1),
        "history": history,
        "lookups": lookups,
        "lookup_ms": {
            f"p{p}": round(1e3 * seconds[min(len(seconds) - 1, len(seconds) * p // 100)], 3) for p in (50, 99)
        },
    }


async def _used_memory(client: Any) -> int:
    info = await client.info("memory")
    return int(info["used_memory"])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the measurement; with `--json`, write it down too."""
    parser = argparse.ArgumentParser(prog="padrec bench redis", description="Memory and look-up time of a catalog.")
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument(
        "--codebook-size", type=int, default=256, help="codes a level; above 256 a code takes two bytes"
    )
    parser.add_argument("--history", type=int, default=50)
    parser.add_argument("--lookups", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(argv)
    found = []
    for num_items in given.items:
        found.append(asyncio.run(measure(num_items, given.codebook_size, given.history, given.lookups)))
        print(json.dumps(found[-1]), flush=True)  # noqa: T201 - a command's answer
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
