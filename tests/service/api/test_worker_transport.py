"""An exchange with a worker: over a connection that is used again, and never over one that something went wrong on."""

import asyncio
import gc
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api import worker_transport
from service.api.worker_transport import WorkerTransport
from tests.service.tls import certificate

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
REPLY = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello"


class Peer:
    """A server that notes what arrives over each connection and answers with what `answers` says."""

    def __init__(self, *answers: bytes, forever: bytes = REPLY, delay: float = 0.0) -> None:
        self.answers, self.forever, self.delay = list(answers), forever, delay
        self.heads: list[list[bytes]] = []  # by connection
        self.left = 0

    async def __call__(self, reader: Reader, writer: Writer) -> None:
        heads: list[bytes] = []
        self.heads.append(heads)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
                heads.append(head + await reader.readexactly(length))
                await asyncio.sleep(self.delay)
                answer = self.answers.pop(0) if self.answers else self.forever
                writer.write(answer)
                if b"Connection: close" in answer or not answer:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            self.left += 1
        finally:
            writer.close()


@asynccontextmanager
async def met(serve: Callable[[Reader, Writer], Awaitable[None]], **others: Any) -> AsyncIterator[tuple[Any, str]]:
    """A transport, and the URL of a server."""
    handlers: set[asyncio.Task[None] | None] = set()

    async def handle(reader: Reader, writer: Writer) -> None:
        handlers.add(asyncio.current_task())
        await serve(reader, writer)

    server = await asyncio.start_server(handle, "127.0.0.1", 0, **others)
    async with server, WorkerTransport() as transport:
        yield transport, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x?y=1"
    await asyncio.gather(*(task for task in handlers if task is not None))


def asked(url: str, method: str = "POST", read: float = 2.0, connect: float = 1.0, **others: Any) -> httpx.Request:
    return httpx.Request(method, url, extensions={"timeout": {"read": read, "connect": connect}}, **others)


async def test_one_connection_serves_one_exchange_after_the_other() -> None:
    peer = Peer()
    async with met(peer) as (transport, url):
        for _ in range(3):
            reply = await transport.handle_async_request(asked(url, content=b"what?", headers={"a": "b"}))
            assert (reply.status_code, reply.content, reply.headers["content-type"]) == (200, b"hello", "text/plain")
    (heads,) = peer.heads
    assert len(heads) == 3
    assert heads[0].startswith(b"POST /x?y=1 HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\na: b\r\n" in heads[0] and heads[0].endswith(b"\r\n\r\nwhat?")


async def test_a_crowd_gets_as_many_connections_as_it_needs_and_each_its_own_answer() -> None:
    async def echo(reader: Reader, writer: Writer) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                number = head.partition(b"number: ")[2].partition(b"\r\n")[0]
                await asyncio.sleep(0.001 * (int(number) % 7))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(number), number))
        except asyncio.IncompleteReadError:
            writer.close()

    async with met(echo) as (transport, url):

        async def ask(number: int) -> bytes:
            reply = await transport.handle_async_request(asked(url, "GET", headers={"number": str(number)}))
            return bytes(reply.content)

        for _ in range(3):
            assert await asyncio.gather(*map(ask, range(50))) == [b"%d" % n for n in range(50)]


@pytest.mark.parametrize(
    ("reply", "content", "connections"),
    [
        (b"HTTP/1.1 100 Continue\r\n\r\n" + REPLY, b"hello", 1),
        (b"HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n", b"hello", 1),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", 1),
        (REPLY.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"), b"hello", 2),
        (REPLY.replace(b"1.1", b"1.0"), b"hello", 2),
    ],
    ids=["after 100", "chunked", "nothing", "closing", "1.0"],
)
async def test_replies_of_every_shape_are_read_whole(reply: bytes, content: bytes, connections: int) -> None:
    peer = Peer(reply)
    async with met(peer) as (transport, url):
        first = await transport.handle_async_request(asked(url))
        assert first.content == content
        assert (await transport.handle_async_request(asked(url))).content == b"hello"
    assert len(peer.heads) == connections


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"", httpx.RemoteProtocolError),
        (REPLY[:-1], httpx.ReadTimeout),
        (b"\x16\x03 no HTTP\r\n\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", httpx.RemoteProtocolError),
        (REPLY.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"), httpx.RemoteProtocolError),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", httpx.RemoteProtocolError),
    ],
    ids=["nothing", "cut off", "no HTTP", "bad length", "no gzip", "another protocol"],
)
async def test_a_broken_reply_is_an_error_and_its_connection_is_not_used_again(
    reply: bytes, error: type[httpx.HTTPError]
) -> None:
    peer = Peer(reply)
    async with met(peer) as (transport, url):
        with pytest.raises(error):
            await transport.handle_async_request(asked(url, read=0.1))
        assert (await transport.handle_async_request(asked(url))).content == b"hello"
    assert [len(heads) for heads in peer.heads] == [1, 1]


async def test_what_comes_after_a_reply_answers_nothing() -> None:
    peer = Peer(REPLY + REPLY, REPLY)
    async with met(peer) as (transport, url):
        for _ in range(3):
            assert (await transport.handle_async_request(asked(url))).content == b"hello"
            await asyncio.sleep(0.01)
    assert [len(heads) for heads in peer.heads] == [1, 2]


async def test_a_reply_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_transport, "MAX_REPLY_BYTES", 1000)
    peer = Peer(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 2000)
    async with met(peer) as (transport, url):
        with pytest.raises(httpx.RemoteProtocolError, match="more than"):
            await transport.handle_async_request(asked(url))


async def test_who_gives_up_takes_his_connection_with_him_and_leaves_none_behind() -> None:
    """A pool that keeps what was given up fills with connections that nobody uses."""
    peer = Peer(delay=0.2)
    async with met(peer) as (transport, url):
        tasks = [asyncio.create_task(transport.handle_async_request(asked(url))) for _ in range(20)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        assert all(isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*tasks, return_exceptions=True))
        with pytest.raises(httpx.ReadTimeout):
            await transport.handle_async_request(asked(url, read=0.05))
        assert not transport._idle
        peer.delay = 0.0
        assert (await transport.handle_async_request(asked(url))).content == b"hello"
        await asyncio.sleep(0.3)
        assert peer.left == 21  # every one was told


async def test_a_connection_that_ends_is_freed_at_once() -> None:
    """What waits for the garbage collector makes it run, and everybody waits while it does."""
    gc.collect()
    gc.disable()
    try:
        async with met(Peer(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\n!", b"nonsense")) as (
            transport,
            url,
        ):
            await transport.handle_async_request(asked(url))
            with pytest.raises(httpx.RemoteProtocolError):
                await transport.handle_async_request(asked(url))
            await transport.handle_async_request(asked(url))
        async with WorkerTransport() as transport:
            with pytest.raises(httpx.ConnectError):
                await transport.handle_async_request(asked(url))
        await asyncio.sleep(0.05)
        assert not [kept for kept in gc.get_objects() if type(kept).__name__ in ("_Connection", "HttpResponseParser")]
    finally:
        gc.enable()


async def test_a_connection_that_has_grown_old_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer()
    async with met(peer) as (transport, url):
        for seconds in (30.0, 0.0, 30.0):
            monkeypatch.setattr(worker_transport, "IDLE_SECONDS", seconds)
            await transport.handle_async_request(asked(url))
    assert [len(heads) for heads in peer.heads] == [1, 2]


async def test_a_connection_that_the_worker_has_closed_is_not_used() -> None:
    connections: list[Writer] = []

    async def once(reader: Reader, writer: Writer) -> None:
        connections.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(REPLY)
        writer.close()  # without a word of it in the reply

    async with met(once) as (transport, url):
        for _ in range(3):
            assert (await transport.handle_async_request(asked(url))).content == b"hello"
            await asyncio.sleep(0.02)
    assert len(connections) == 3


async def test_who_cannot_be_reached_is_named_so() -> None:
    async with met(Peer()) as (_, url):
        pass
    async with WorkerTransport() as transport:
        with pytest.raises(httpx.ConnectError):
            await transport.handle_async_request(asked(url))
        # A network for documentation: nobody answers, or it is unreachable at once.
        with pytest.raises((httpx.ConnectTimeout, httpx.ConnectError)):
            await transport.handle_async_request(asked("http://192.0.2.1/", connect=0.05))


async def test_a_header_cannot_hold_a_line_break() -> None:
    async with WorkerTransport() as transport:
        with pytest.raises(httpx.LocalProtocolError):
            await transport.handle_async_request(asked("http://127.0.0.1:1/", headers={"a": "b\r\nc: d"}))


@pytest.mark.parametrize(
    ("name", "trusted"), [("worker", True), ("other", True), ("127.0.0.1", True), ("worker", False)]
)
async def test_a_certificate_is_checked_against_the_name_not_the_address(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, trusted: bool
) -> None:
    cert, key = certificate(tmp_path, "worker", "worker")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    async with met(Peer(), ssl=context) as (transport, url):
        request = asked(url.replace("http:", "https:"))
        request.extensions["sni_hostname"] = name
        if (name, trusted) == ("worker", True):
            assert (await transport.handle_async_request(request)).content == b"hello"
            return
        with pytest.raises(httpx.ConnectError, match="certificate"):
            await transport.handle_async_request(request)
