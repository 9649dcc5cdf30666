"""Stands between the API and Redis and misbehaves on demand: refuses, keeps silent, is slow, lets replies through one
by one, or leads elsewhere."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from service.supervisor import free_port

Mode = Literal["pass", "refuse", "silent", "slow", "trickle"]
SLOW_SECONDS = 0.2
TRICKLE_SECONDS = 0.04  # before every reply: less than the API waits for one


class RedisBetween:
    """Listens on TCP and hands on to a Valkey's unix socket, on a thread of its own. Leave the `with` to end it."""

    def __init__(self) -> None:
        self.port = free_port("127.0.0.1")
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._target = ""
        self._mode: Mode = "pass"
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, *error: object) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def lead_to(self, redis_url: str) -> None:
        """Whoever connects from now on reaches this Valkey (unix:// URL)."""
        self._target = urlsplit(redis_url).path

    def become(self, mode: Mode) -> None:
        """Change behaviour; whoever is connected is cut off, as in a failover."""
        self._mode = mode
        self._do(self._close())
        if mode != "refuse":
            self._do(self._listen())

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _close(self) -> None:
        if self._server is None:
            return
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        # Handlers that were cut off must end before the loop does.
        while self._open:  # noqa: ASYNC110 - they tell nobody when they end
            await asyncio.sleep(0.01)
        self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            if self._mode == "silent":
                await reader.read()
                return
            there, back = await asyncio.open_unix_connection(self._target)
            try:
                replies = self._trickle if self._mode == "trickle" else self._pump
                done, others = await asyncio.wait(
                    [asyncio.create_task(self._pump(reader, back)), asyncio.create_task(replies(there, writer))],
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for each in others:
                    each.cancel()
                await asyncio.gather(*done, *others, return_exceptions=True)
            finally:
                back.transport.abort()
        except OSError:
            pass
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if self._mode == "slow":
                    await asyncio.sleep(SLOW_SECONDS / 2)
                writer.write(data)
                await writer.drain()

    async def _trickle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reply(reader):
                if not data.startswith(b"+"):  # +OK: what sets a connection up passes, or there would be none
                    await asyncio.sleep(TRICKLE_SECONDS)
                writer.write(data)
                await writer.drain()


async def reply(reader: asyncio.StreamReader) -> bytes:
    """One whole reply of Redis as it goes over the wire (RESP 2); empty at the end."""
    line = await reader.readline()
    kind, size = line[:1], line[1:].strip()
    if kind == b"$" and size != b"-1":
        return line + await reader.readexactly(int(size) + 2)
    if kind == b"*":
        return line + b"".join([await reply(reader) for _ in range(int(size))])
    return line
