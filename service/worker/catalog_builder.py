"""Builds the index of a published catalog version, in a process of its own: `python -m service.worker.catalog_builder`.

Reading and sorting a million items keeps a Python interpreter busy for many seconds; in the worker's own, every round
would wait for its turn. This one reads Redis, checks every entry, builds, compares the index with a search over the
items, and leaves arrays in a folder. The Redis URL comes by environment: it may hold a password.
Exit status: 0 built, 2 the catalog can never be served by this bundle, 1 it could not be read now.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from model.catalog import Catalog, CatalogError, CatalogItem
from model.decoding.catalog_index import CatalogIndex, CatalogRefused
from model.semantic_id import Vocabulary
from service import child
from service.catalog_codec import CatalogHeader, Corrupt, load_sealed, meta_key, popular_key, unseal
from service.redis_client import REDIS_ERRORS, Client, close, connect, get

REDIS_URL = "PADREC_REDIS_URL"
UNREADABLE, REFUSED = 1, 2
BUCKETS_PER_TRIP = 100
TIMEOUT_SECONDS = 5.0


async def read_catalog(client: Client, version: str) -> Catalog:
    """A published version, whole or not at all. Raises Corrupt or a Redis error. Popularity is known of the most
    popular items only; nothing else in a worker asks for it."""
    meta, popular = await get(client, meta_key(version)), await get(client, popular_key(version))
    if meta is None:
        raise Corrupt("no such version is published")
    header = CatalogHeader.from_document(load_sealed(meta))
    counts = {} if popular is None else {i["item_id"]: i["popularity"] for i in load_sealed(popular)["items"]}
    items: list[CatalogItem] = []
    for start in range(0, header.num_buckets, BUCKETS_PER_TRIP):
        pipe = client.pipeline(transaction=False)
        for bucket in range(start, min(start + BUCKETS_PER_TRIP, header.num_buckets)):
            pipe.hgetall(f"padrec:{version}:item:{bucket}")
        for entries in await pipe.execute():
            for field, sealed in entries.items():
                value, item_id = unseal(field, sealed), field.decode()
                codes, attributes = header.unpack(value), header.unpack_attributes(value)
                items.append(CatalogItem(item_id, codes, counts.get(item_id, 0), attributes))
    if len(items) != header.num_items:
        raise Corrupt(f"{len(items)} of {header.num_items} items are stored")
    return Catalog(header.codebook_sizes, tuple(items))


async def build(redis_url: str, version: str, vocabulary: Vocabulary, folder: Path) -> None:
    """Read, build, check, save. Raises Corrupt, CatalogError, CatalogRefused or a Redis error."""
    client = connect(redis_url, TIMEOUT_SECONDS)
    try:
        catalog = await read_catalog(client, version)
    finally:
        await close(client)
    index = CatalogIndex.build(catalog, version, vocabulary)
    index.check(catalog)
    index.save(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Build one version into a folder. What went wrong is one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m service.worker.catalog_builder")
    parser.add_argument("version")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocabulary", required=True, help="the bundle's, as JSON")
    given = parser.parse_args(argv)
    child.die_with_parent()
    os.nice(19)  # whoever writes lists goes first: an index can wait, a round cannot
    try:
        vocabulary = Vocabulary.from_dict(json.loads(given.vocabulary))
        asyncio.run(build(os.environ[REDIS_URL], given.version, vocabulary, given.folder))
    except (CatalogRefused, CatalogError) as error:
        return _say(error, REFUSED)
    except (*REDIS_ERRORS, Corrupt, LookupError, TypeError, UnicodeDecodeError) as error:
        return _say(error, UNREADABLE)
    return 0


def _say(error: Exception, status: int) -> int:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201 - what the worker logs
    return status


if __name__ == "__main__":
    raise SystemExit(main())
