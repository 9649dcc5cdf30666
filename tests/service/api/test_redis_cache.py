"""RedisCache: a round trip is bounded as a whole, however its replies come."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from service.api.redis_cache import RedisCache, RedisDown
from service.metrics import ApiMetrics
from service.redis_client import MAX_CONNECTIONS, connect

REPLY = b"*1\r\n$-1\r\n"


@asynccontextmanager
async def slow_redis(folder: Path, seconds: float, budget: float) -> AsyncIterator[RedisCache]:
    """A cache whose Redis sends replies that many seconds apart, as long as there is a connection."""
    replies: list[asyncio.Task[None]] = []

    async def reply(writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            await asyncio.sleep(seconds)
            writer.write(REPLY)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        replies.append(replying := asyncio.create_task(reply(writer)))
        await reader.read()
        replying.cancel()
        writer.close()

    async with await asyncio.start_unix_server(connected, path=folder / "s"):
        cache = RedisCache(connect(f"unix://{folder}/s", budget), ApiMetrics(CollectorRegistry()), budget)
        yield cache
        await cache.close()
        await asyncio.wait(replies, timeout=5)


async def test_replies_that_each_come_in_time_are_not_waited_for_beyond_the_budget(tmp_path: Path) -> None:
    async with slow_redis(tmp_path, 0.04, 0.1) as cache:
        started = time.monotonic()
        with pytest.raises(RedisDown, match="Timeout"):
            await cache.read_fields("items", {f"bucket{n}": [b"x"] for n in range(30)})
        assert 0.08 < time.monotonic() - started < 0.5  # and not 30 times 0.04
        assert not cache.up


async def test_who_finds_no_connection_free_is_not_waited_for_beyond_the_budget(tmp_path: Path) -> None:
    async with slow_redis(tmp_path, 10, 0.2) as cache:
        started = time.monotonic()
        crowd = (cache.get("x") for _ in range(2 * MAX_CONNECTIONS))
        found = await asyncio.gather(*crowd, return_exceptions=True)
        assert all(isinstance(each, RedisDown) for each in found)
        assert time.monotonic() - started < 1
