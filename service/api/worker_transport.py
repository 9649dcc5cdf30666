"""HTTP/1.1 from the API to its workers, as an httpx transport: connections kept open, one exchange at a time on each.

Made for many short exchanges with few hosts, some of them given up half-way: an exchange that fails or is cancelled
takes its connection with it, so none is ever lost, and no answer can reach the wrong request. Parsing is `httptools`'.
Knows no retries, no redirects and nothing of what is exchanged.
"""

import asyncio
import ssl
import time
from collections import deque
from typing import cast

import httptools
import httpx

IDLE_SECONDS = 30.0  # a worker keeps an idle connection for longer than that
MAX_REPLY_BYTES = 16 * 2**20

_Origin = tuple[str, str, int, str]  # scheme, host, port, name of the certificate


class _Connection(asyncio.Protocol):
    """One connection and the reply that is being read from it."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self.closed = False
        self.reusable = False  # after the reply
        self._transport: asyncio.Transport | None = None
        # Only while connected: it refers to us, and what refers to itself waits for the garbage collector.
        self._parser: httptools.HttpResponseParser | None = None
        self._waiting: asyncio.Future[httpx.Response] | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._size = 0

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by descent
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        self._size += len(data)
        if self._waiting is None or self._parser is None or self._size > MAX_REPLY_BYTES:
            self.abort("The worker sent more than a reply.")
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.abort("The worker's reply is not HTTP.")

    def connection_lost(self, exc: Exception | None) -> None:
        self.abort("The worker closed the connection before its reply was whole.")

    # What the parser calls

    def on_message_begin(self) -> None:
        if self._waiting is None:
            self.abort("The worker sent more than a reply.")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._parser is None:  # given up while it was read
            return
        status = self._parser.get_status_code()
        headers, body = self._headers, b"".join(self._body)
        self._headers, self._body = [], []
        if status < 200:  # "go on"; the reply is still to come
            return
        reply = httpx.Response(status, headers=headers, content=body)  # raises where it is not as encoded as it says
        waiting, self._waiting = self._waiting, None
        self.reusable = self._parser.should_keep_alive() and not self.closed
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)

    # What the pool calls

    async def exchange(self, request: bytes) -> httpx.Response:
        """Send a request as it goes over the wire; the whole reply. Raises httpx.RemoteProtocolError."""
        assert self._transport is not None
        self._size, self.reusable = 0, False
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._waiting

    def abort(self, why: str = "The exchange was given up.") -> None:
        """Close it now, whatever is on its way."""
        self.closed, self.reusable, self._parser = True, False, None
        if self._transport is not None:
            self._transport.abort()
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_exception(httpx.RemoteProtocolError(why))


class WorkerTransport(httpx.AsyncBaseTransport):
    """Exchanges of at most the time the request's `timeout` extension says: `connect` and `read`, in seconds."""

    def __init__(self) -> None:
        self._idle: dict[_Origin, deque[_Connection]] = {}
        self._tls: ssl.SSLContext | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The reply, read whole. Raises httpx.ConnectError, ConnectTimeout, ReadTimeout or RemoteProtocolError."""
        seconds = request.extensions.get("timeout", {})
        wire = _on_the_wire(request)
        origin = _origin(request)
        connection = self._kept(origin) or await self._connect(origin, seconds.get("connect"))
        try:
            async with asyncio.timeout(seconds.get("read")):
                reply = await connection.exchange(wire)
        except TimeoutError:
            raise httpx.ReadTimeout("The worker did not reply in time.") from None
        finally:
            self._leave(origin, connection)
        return reply

    async def aclose(self) -> None:
        for connections in self._idle.values():
            for connection in connections:
                connection.abort()
        self._idle.clear()

    def _kept(self, origin: _Origin) -> _Connection | None:
        """The connection used last, so that those a crowd needed for a moment grow old."""
        connections = self._idle.get(origin, ())
        while connections:
            connection = connections.pop()
            if not connection.closed and time.monotonic() < connection.idle_since + IDLE_SECONDS:
                return connection
            connection.abort()
        return None

    def _leave(self, origin: _Origin, connection: _Connection) -> None:
        if not connection.reusable:
            connection.abort()
            return
        now = connection.idle_since = time.monotonic()
        self._idle.setdefault(origin, deque()).append(connection)
        for where, connections in list(self._idle.items()):
            while connections and (connections[0].closed or now > connections[0].idle_since + IDLE_SECONDS):
                connections.popleft().abort()
            if not connections:
                del self._idle[where]

    async def _connect(self, origin: _Origin, seconds: float | None) -> _Connection:
        scheme, host, port, name = origin
        tls = None
        if scheme == "https":
            tls = self._tls = self._tls or httpx.create_ssl_context()
        try:
            async with asyncio.timeout(seconds):
                _, connection = await asyncio.get_running_loop().create_connection(
                    _Connection, host, port, ssl=tls, server_hostname=name if tls else None
                )
        except TimeoutError:
            raise httpx.ConnectTimeout("The worker did not accept the connection in time.") from None
        except OSError as exc:
            raise httpx.ConnectError(str(exc)) from exc
        return connection


def _origin(request: httpx.Request) -> _Origin:
    url = request.url
    port = url.port or (443 if url.scheme == "https" else 80)
    return url.scheme, url.host, port, request.extensions.get("sni_hostname", url.host)


def _on_the_wire(request: httpx.Request) -> bytes:
    lines = [b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%s: %s" % header for header in request.headers.raw]
    if any(b"\r" in line or b"\n" in line for line in lines):
        raise httpx.LocalProtocolError("A header holds a line break.")
    return b"\r\n".join((*lines, b"", request.content))
