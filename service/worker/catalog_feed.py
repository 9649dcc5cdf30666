"""CatalogFeed: follows the catalog version and the stock that Redis calls active, and has the engine serve them.

A new version is built by another process, mapped, tried out by the engine and then served; whatever goes wrong, the
version served before stays. Knows Redis and the builder; decides nothing about requests. A worker without Redis serves
its bundle's catalog.
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from model.decoding.catalog_index import CatalogIndex, CatalogRefused
from model.decoding.filters import Stock, compile_stock
from model.semantic_id import Vocabulary
from service.catalog_codec import (
    ACTIVE_KEY,
    CatalogHeader,
    Corrupt,
    active_version,
    load_sealed,
    meta_key,
    stock_key,
    unpack_stock,
)
from service.metrics import WorkerMetrics
from service.middleware import cancel
from service.redis_client import REDIS_ERRORS, close, connect, get
from service.settings import Settings
from service.worker import catalog_builder
from service.worker.engine import Edition, EditionRefused, Engine
from service.worker.routes import Served

TIMEOUT_SECONDS = 1.0
RETRY_SECONDS = 10.0  # before a version that could not be read is tried again

logger = logging.getLogger("padrec.catalog")


class CatalogFeed:
    """Run `follow` in the background."""

    def __init__(
        self,
        engine: Engine,
        edition: Callable[[CatalogIndex], Edition],
        vocabulary: Vocabulary,
        served: Served,
        settings: Settings,
        metrics: WorkerMetrics,
    ) -> None:
        """`edition` makes what serves an index; it is called on a thread of its own."""
        self.engine, self.edition, self.vocabulary, self.served = engine, edition, vocabulary, served
        self.metrics, self.poll_seconds = metrics, settings.poll_seconds
        self._url = settings.redis_url.get_secret_value()
        self._redis = connect(self._url, TIMEOUT_SECONDS)
        self._up: bool | None = None
        self._stock = b""
        self._not_before: dict[str, float] = {}
        self._taking: asyncio.Task[None] | None = None

    async def follow(self) -> None:
        """Keep up for ever."""
        while True:
            try:
                await self.look()
            except Exception:
                logger.exception("the catalog cannot be followed")
            await asyncio.sleep(self.poll_seconds)

    async def close(self) -> None:
        if self._taking is not None:
            await cancel(self._taking)
        with contextlib.suppress(*REDIS_ERRORS):
            await close(self._redis)

    async def look(self) -> None:
        """One look at Redis, and whatever follows from it."""
        try:
            active = await get(self._redis, ACTIVE_KEY)
            if active is None:
                return
            version = active_version(active)
            is_new = version != self.engine.catalog_version and time.monotonic() >= self._not_before.get(version, 0.0)
            if is_new and (self._taking is None or self._taking.done()):
                # Beside the looks: it takes many seconds, in which the stock goes on changing.
                self._taking = asyncio.create_task(self._take_up(version))
            await self._take_stock()
            self._note(up=True)
        except REDIS_ERRORS as exc:
            self._note(up=False, error=type(exc).__name__)
        except Corrupt as exc:
            logger.warning("what Redis says of the catalog is damaged", extra={"reason": str(exc)})

    async def _take_up(self, version: str) -> None:
        """Build, load, try out, serve. What goes wrong is logged and counted; then nothing has changed."""
        started = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix="padrec-catalog-") as folder:
                status, reason = await self._build(version, Path(folder))
                if status == 0:
                    stock = await self._serve(version, Path(folder))
        except (CatalogRefused, EditionRefused) as exc:
            status, reason = catalog_builder.REFUSED, str(exc)
        except Exception as exc:
            # Redis, a damaged entry, a full disk, a GPU without room for two editions: all of them may pass.
            status, reason = catalog_builder.UNREADABLE, f"{type(exc).__name__}: {exc}"
        result = {0: "ok", catalog_builder.REFUSED: "refused"}.get(status, "unreadable")
        self.metrics.catalog_swaps.labels(result).inc()
        fields = {"catalog_version": version, "seconds": round(time.monotonic() - started, 3)}
        if result == "ok":
            self._stock = stock
            self.metrics.set_model(self.served.name, self.served.version, version)
            logger.info("catalog active", extra=fields)
            return
        self._not_before[version] = np.inf if result == "refused" else time.monotonic() + RETRY_SECONDS
        logger.error("catalog not taken up, the old one is served", extra=fields | {"reason": reason})

    async def _build(self, version: str, folder: Path) -> tuple[int, str]:
        """Exit status of the builder, and what it said."""
        command = [sys.executable, "-m", "service.worker.catalog_builder", version, str(folder)]
        command += ["--vocabulary", json.dumps(self.vocabulary.as_dict())]
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, catalog_builder.REDIS_URL: self._url, "OMP_NUM_THREADS": "1"},
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            _, said = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        lines = said.decode("utf-8", "replace").strip().splitlines()
        return process.returncode, lines[-1][:500] if lines else ""

    async def _serve(self, version: str, folder: Path) -> bytes:
        """Have the engine serve the index in `folder`, with what is in stock. Returns the stock as it lies in Redis."""
        device = self.engine.decoder.trie.device

        def make() -> Edition:
            return self.edition(CatalogIndex.load(folder, self.vocabulary, device))

        edition = await asyncio.to_thread(make)
        stock, sealed = await self._read_stock(edition)
        edition.decoder.set_stock(stock)
        await asyncio.wrap_future(self.engine.offer(edition))
        return sealed

    async def _take_stock(self) -> None:
        """Tell the engine when the stock has changed."""
        edition = self.engine.editions[-1]
        sealed = await get(self._redis, stock_key(edition.version))
        if sealed is None or sealed == self._stock:
            return
        stock, self._stock = await self._read_stock(edition)
        self.engine.set_stock(edition.version, stock)

    async def _read_stock(self, edition: Edition) -> tuple[Stock | None, bytes]:
        """The stock of an edition's version; None while everything is in stock."""
        meta = await get(self._redis, meta_key(edition.version))
        sealed = await get(self._redis, stock_key(edition.version))
        if meta is None or sealed is None:
            return None, b""
        codes = unpack_stock(CatalogHeader.from_document(load_sealed(meta)), sealed)
        self.metrics.items_out_of_stock.set(len(codes))
        if not codes:
            return None, sealed
        trie = edition.decoder.trie

        def compiled() -> Stock:
            return compile_stock(trie, trie.leaves(np.array(codes, dtype=np.int64)))

        return await asyncio.to_thread(compiled), sealed

    def _note(self, *, up: bool, error: str = "") -> None:
        if up is not self._up:
            logger.log(
                logging.INFO if up else logging.WARNING,
                "the catalog is followed" if up else "the catalog is not followed: Redis does not answer",
                extra={"error": error} if error else {},
            )
        self._up = up
