"""Redis with short patience: bounded round trips, no retries, and a breaker that stops asking a dead server.

Knows no catalogs: it runs commands, times them, and turns every Redis error into `RedisDown`.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from service.metrics import ApiMetrics
from service.redis_client import MAX_CONNECTIONS, REDIS_ERRORS, Client, close

T = TypeVar("T")
OPEN_AFTER_FAILURES = 2
OPEN_SECONDS = 0.5

logger = logging.getLogger("padrec.redis")


class RedisDown(Exception):
    """Redis did not answer, answered with an error, or is not being asked for the moment."""


class RedisCache:
    """The few commands the catalog needs. `up` is the outcome of the last round trip."""

    def __init__(self, client: Client, metrics: ApiMetrics, budget_seconds: float) -> None:
        """`budget_seconds`: for a round trip from wish to answer. The client's own patience is for each reply of a
        pipeline, each of the steps of connecting, and so on: many times as much in all."""
        self.client = client
        self.metrics = metrics
        self.up = True
        self._budget = budget_seconds
        # Pools of Sentinel and Cluster clients refuse who comes when all connections are taken; here he waits.
        self._room = asyncio.Semaphore(MAX_CONNECTIONS)
        self._failures = 0
        self._open_until = 0.0

    async def get(self, *keys: str) -> list[bytes | None]:
        """Raises RedisDown."""
        pipe = self.client.pipeline(transaction=False)  # not MGET: in a cluster the keys lie on several servers
        for key in keys:
            pipe.get(key)
        return list(await self._bounded("get", pipe.execute()))

    async def read_fields(self, op: str, fields: Mapping[str, Sequence[bytes]]) -> list[bytes | None]:
        """Hash fields, keyed by hash, in one round trip; answers in the order given. Raises RedisDown."""
        pipe = self.client.pipeline(transaction=False)
        for key, names in fields.items():
            pipe.hmget(key, list(names))
        return [value for values in await self._bounded(op, pipe.execute()) for value in values]

    async def write_fields(self, entries: Sequence[tuple[str, bytes, bytes]]) -> None:
        """(hash, field, value) triples in one round trip. Raises RedisDown."""
        pipe = self.client.pipeline(transaction=False)
        for key, field, value in entries:
            pipe.hset(key, field, value)
        await self._bounded("refill", pipe.execute())

    async def close(self) -> None:
        await close(self.client)

    async def _bounded(self, op: str, reply: Coroutine[Any, Any, T]) -> T:
        started = time.monotonic()
        if started < self._open_until:
            reply.close()
            raise RedisDown("not being asked")
        try:
            async with asyncio.timeout(self._budget), self._room:
                answer = await reply
        except REDIS_ERRORS as exc:
            self._failed(op, exc)
            raise RedisDown(type(exc).__name__) from exc
        finally:
            reply.close()  # who found no room in time has not begun
            self.metrics.redis_duration.labels(op).observe(time.monotonic() - started)
        if not self.up:
            logger.info("redis is back")
        self.up, self._failures = True, 0
        return answer

    def _failed(self, op: str, exc: Exception) -> None:
        self.metrics.redis_errors.labels(op).inc()
        self._failures += 1
        if self._failures >= OPEN_AFTER_FAILURES:
            self._open_until = time.monotonic() + OPEN_SECONDS
        if self.up:
            logger.warning("redis does not answer", extra={"error": type(exc).__name__})
        self.up = False
