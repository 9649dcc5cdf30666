"""A connection may send one head of bounded size, in bounded time, and few requests ahead; whatever else is closed."""

import asyncio
import gc
import json
import logging
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from service.http_head import HEAD_BYTES, HEADERS, PIPELINED, BoundedHttp
from service.process import server_config
from service.settings import load_settings
from tests.service.wire import running_server

GET = b"GET /get HTTP/1.1\r\nhost: x\r\n\r\n"
START = b"GET /get HTTP/1.1\r\nhost: x\r\nx-pad: "


SECONDS = 0.3


class Hasty(BoundedHttp):
    head_seconds = SECONDS


@dataclass
class App:
    """Answers with the length of the body; `/at-once` before it has come, `/gate` when the gate opens."""

    seen: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope["path"])
        size, more = 0, scope["path"] != "/at-once"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size, more = size + len(message["body"]), message["more_body"]
        while scope["path"] == "/gate" and not self.gate.is_set():  # noqa: ASYNC110 - of another thread
            await asyncio.sleep(0.01)
        body = str(size).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Client:
    """A socket to the server, and the replies on it."""

    def __init__(self, address: Any) -> None:
        self.socket = socket.create_connection(address, timeout=10)
        self.replies = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def reply(self) -> tuple[int, dict[str, str], bytes]:
        status = int(self.replies.readline().split()[1])
        headers = {}
        while line := self.replies.readline().strip():
            name, _, value = line.decode().partition(": ")
            headers[name] = value
        return status, headers, self.replies.read(int(headers["content-length"]))

    def is_closed(self) -> bool:
        """Waits for it."""
        return self.replies.read(1) == b""

    def close(self) -> None:
        self.replies.close()
        self.socket.close()


@dataclass
class Running:
    app: App
    server: uvicorn.Server
    address: Any
    clients: list[Client] = field(default_factory=list)

    def connect(self) -> Client:
        self.clients.append(Client(self.address))
        return self.clients[-1]


@contextmanager
def serving(http: type[BoundedHttp] = BoundedHttp, keep_alive: int = 75) -> Iterator[Running]:
    """As `run_app` serves, in a thread."""
    app = App()
    config = server_config(app, load_settings())
    config.http, config.lifespan, config.timeout_keep_alive = http, "off", keep_alive
    clients: list[Client] = []
    try:
        with running_server(config) as (server, address):
            try:
                yield Running(app, server, address, clients)
            finally:
                app.gate.set()
    finally:
        for client in clients:
            client.close()


@pytest.fixture(scope="module")
def patient_server() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def hasty_server() -> Iterator[Running]:
    with serving(Hasty) as running:
        yield running


@pytest.fixture
def running(patient_server: Running, caplog: pytest.LogCaptureFixture) -> Iterator[Running]:
    yield from _fresh(patient_server, caplog)


@pytest.fixture
def hasty(hasty_server: Running, caplog: pytest.LogCaptureFixture) -> Iterator[Running]:
    yield from _fresh(hasty_server, caplog)


def _fresh(running: Running, caplog: pytest.LogCaptureFixture) -> Iterator[Running]:
    running.app.seen.clear()
    running.app.gate.clear()
    yield running
    running.app.gate.set()
    while running.clients:
        running.clients.pop().close()
    while running.server.server_state.connections:
        time.sleep(0.005)
    assert not [record for record in caplog.get_records("call") if record.levelno > logging.WARNING]


def head_of(size: int) -> bytes:
    """A whole head of that many bytes."""
    return START + b"x" * (size - len(START) - 4) + b"\r\n\r\n"


def is_cut_off(client: Client, data: bytes) -> bool:
    """Whether sending it again and again ends."""
    for _ in range(500):
        try:
            client.send(data)
        except ConnectionError:
            return True
        time.sleep(0.01)
    return False


def test_a_head_that_is_too_large_is_refused_before_anybody_sees_it(running: Running) -> None:
    client = running.connect()
    client.send(head_of(2 * HEAD_BYTES))
    status, headers, body = client.reply()
    assert client.is_closed()
    problem = json.loads(body)
    assert (status, headers["connection"], running.app.seen) == (431, "close", [])
    assert (headers["content-type"], problem["status"]) == ("application/problem+json", 431)
    assert problem["request_id"] == headers["x-request-id"] != ""


def test_the_largest_head_is_served_and_one_byte_more_is_not(running: Running) -> None:
    largest, larger = running.connect(), running.connect()
    largest.send(head_of(HEAD_BYTES))
    larger.send(head_of(HEAD_BYTES + 1))
    assert (largest.reply()[0], larger.reply()[0]) == (200, 431)
    assert larger.is_closed()
    with_body = b"POST /post HTTP/1.1\r\ncontent-length: 2\r\nx-pad: "
    largest.send(with_body + b"x" * (HEAD_BYTES - len(with_body) - 4) + b"\r\n\r\n")
    time.sleep(0.05)
    largest.send(b"bb")
    assert largest.reply()[::2] == (200, b"2")
    assert running.app.seen == ["/get", "/post"]


@pytest.mark.parametrize("begin", [b"GET /", b"GET / HTTP/1.1\r\nx-pad: ", b"GET / HTTP/1.1\r\nx-pad", b"\r\n"])
def test_a_part_of_a_head_that_never_ends_is_refused(running: Running, begin: bytes) -> None:
    client = running.connect()
    client.send(begin)
    for _ in range(40):
        client.send(b"\r\n" * 512 if begin == b"\r\n" else b"x" * 1024)
        time.sleep(0.001)
    assert client.reply()[0] == 431
    assert client.is_closed()
    assert running.app.seen == []


def test_headers_of_moderate_size_add_up(running: Running) -> None:
    client = running.connect()
    client.send(START)
    for n in range(HEADERS - 2):
        client.send(b"x\r\nx-%d: " % n + b"y" * 500)
    client.send(b"\r\n\r\n")
    assert client.reply()[0] == 431
    assert running.app.seen == []


@pytest.mark.parametrize("end", [b"\r\n", b""])
def test_so_do_tiny_ones_which_take_more_memory_than_bytes(running: Running, end: bytes) -> None:
    client = running.connect()
    client.send(b"GET /get HTTP/1.1\r\n" + b"a: b\r\n" * HEADERS + b"\r\n")
    assert client.reply()[0] == 200
    client.send(b"GET /get HTTP/1.1\r\n" + b"a: b\r\n" * (HEADERS + 2) + end)
    assert client.reply()[0] == 431
    assert client.is_closed()
    assert running.app.seen == ["/get"]


def test_one_that_goes_on_sending_still_gets_its_refusal(running: Running) -> None:
    client = running.connect()
    client.send(START + b"x" * (20 << 20) + b"\r\n\r\n")
    assert client.reply()[0] == 431
    assert client.is_closed()


def test_one_that_does_not_close_after_its_refusal_is_closed(hasty: Running) -> None:
    client = hasty.connect()
    client.send(START)
    time.sleep(0.75 * SECONDS)
    client.send(b"x" * HEAD_BYTES)
    assert client.reply()[0] == 431
    started = time.monotonic()
    assert is_cut_off(client, b"x")
    assert time.monotonic() - started > 0.75 * SECONDS


def test_bodies_do_not_count_and_every_request_of_a_connection_has_its_own_head(running: Running) -> None:
    client = running.connect()
    for size in (5 * HEAD_BYTES, 0, 3 * HEAD_BYTES, 20):
        client.send(b"POST /post HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\nx-pad: " % size)
        client.send(b"x" * (HEAD_BYTES // 2) + b"\r\n\r\n" + b"b" * size)
        assert client.reply()[::2] == (200, b"%d" % size)
    chunk = b"%x\r\n" % HEAD_BYTES + b"b" * HEAD_BYTES + b"\r\n"
    client.send(b"POST /post HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + 5 * chunk + b"0\r\n\r\n")
    assert client.reply()[::2] == (200, b"%d" % (5 * HEAD_BYTES))
    client.send(head_of(HEAD_BYTES + 1))
    assert client.reply()[0] == 431
    assert client.is_closed()


def test_a_body_of_tiny_chunks_is_a_body(running: Running) -> None:
    client = running.connect()
    client.send(b"POST /post HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
    client.send(b"1\r\nb\r\n" * HEAD_BYTES + b"0\r\n\r\n")
    assert client.reply()[::2] == (200, b"%d" % HEAD_BYTES)


@pytest.mark.parametrize("after", [b"x-pad: " + b"x" * 3 * HEAD_BYTES, b"a: b\r\n" * 2 * HEADERS, b"1;" + b"x" * 99999])
def test_what_follows_a_body_is_bounded_as_what_precedes_it(running: Running, after: bytes) -> None:
    """Trailers, and notes on chunks."""
    client = running.connect()
    client.send(b"POST /at-once HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\nb\r\n")
    assert client.reply()[0] == 200
    if not after.startswith(b"1;"):
        client.send(b"0\r\n")
    assert is_cut_off(client, after)


def test_the_head_of_a_request_sent_ahead_is_bounded_and_does_not_cost_the_first_its_answer(running: Running) -> None:
    client = running.connect()
    client.send(b"GET /gate HTTP/1.1\r\nhost: x\r\n\r\n" + head_of(3 * HEAD_BYTES))
    time.sleep(0.1)
    client.send(b"x" * HEAD_BYTES)
    running.app.gate.set()
    status, headers, _ = client.reply()
    assert (status, headers["connection"]) == (200, "close")
    assert client.is_closed()
    assert running.app.seen == ["/gate"]


def test_requests_sent_ahead_are_answered_in_their_order(running: Running) -> None:
    client = running.connect()
    post = b"POST /post HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
    sizes = (0, 1, 3 * HEAD_BYTES, 7, 20_000)
    for _ in range(3):
        client.send(b"".join(post % size + b"b" * size for size in sizes))
        assert [client.reply()[2] for _ in sizes] == [b"%d" % size for size in sizes]


def test_too_many_of_them_are_not_even_kept(running: Running) -> None:
    """Each would take seventy times the memory of its bytes."""
    client = running.connect()
    client.send(b"GET /gate HTTP/1.1\r\nhost: x\r\n\r\n" + GET * 500)
    time.sleep(0.1)
    client.send(GET)
    running.app.gate.set()
    headers = [client.reply()[1] for _ in range(1 + PIPELINED)]
    assert ["connection" in named for named in headers] == [False] * PIPELINED + [True]
    assert client.is_closed()
    assert len(running.app.seen) == 1 + PIPELINED


@pytest.mark.parametrize("size", [20, 2 * HEAD_BYTES])
def test_an_offer_to_speak_http_2_is_not_taken_up_and_costs_no_body(running: Running, size: int) -> None:
    # As Java's HttpClient does with the first request of a connection, and `curl --http2`.
    offer = b"connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"
    body = (b"\r\nupgrade: no head\r\n" * size)[:size]
    request = b"POST /post HTTP/1.1\r\nhost: x\r\n%scontent-length: %d\r\n\r\n" % (offer, size)
    client = running.connect()
    for data in (request + body, request + body):  # the connection stays what it was
        client.send(data)
        status, _, answer = client.reply()
        assert (status, int(answer)) == (200, size)
    client.send(request)
    time.sleep(0.05)
    client.send(body)  # what comes later is body, whatever it looks like
    assert client.reply()[2] == str(size).encode()


def test_what_is_no_http_is_a_problem_too(running: Running) -> None:
    client = running.connect()
    client.send(b"\x16\x03\x01 hello\r\n\r\n")
    status, _, body = client.reply()
    assert (status, json.loads(body)["title"]) == (400, "Bad Request")
    assert client.is_closed()


def test_a_client_that_is_gone_before_its_refusal_troubles_nobody(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as running, caplog.at_level(logging.WARNING):
        for _ in range(20):
            client = running.connect()
            client.send(head_of(2 * HEAD_BYTES))
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        client = running.connect()
        client.send(GET)
        assert client.reply()[0] == 200
    assert caplog.records == []


def closed_after(client: Client, piece: bytes = b"") -> float:
    """Seconds until the server closes it, a `piece` every 50 ms."""
    client.socket.settimeout(0.05)
    started = time.monotonic()
    while time.monotonic() < started + 10:
        try:
            client.send(piece)
            if client.socket.recv(1) == b"":
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    return time.monotonic() - started


def test_a_connection_on_which_nothing_comes_is_closed(hasty: Running) -> None:
    assert SECONDS - 0.1 < closed_after(hasty.connect()) < 5


@pytest.mark.parametrize(
    ("begin", "piece"),
    [(START, b""), (START, b"x"), (b"\r\n", b"\r\n")],
    ids=["no more", "byte by byte", "empty lines"],
)
@pytest.mark.parametrize("first", [b"", GET], ids=["new", "kept alive"])
def test_a_head_that_does_not_end_in_time_closes_its_connection(
    hasty: Running, first: bytes, begin: bytes, piece: bytes
) -> None:
    client = hasty.connect()
    if first:
        client.send(first)
        assert client.reply()[0] == 200
        time.sleep(1.5 * SECONDS)
    client.send(begin)
    assert SECONDS - 0.1 < closed_after(client, piece) < 5
    assert len(hasty.app.seen) == bool(first)


def test_its_time_begins_with_its_first_byte_and_between_requests_there_is_more(hasty: Running) -> None:
    client = hasty.connect()
    post = b"POST /post HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    for pause, head, rest in (0.75, post, [b"1\r\nb\r\n", b"0\r\n\r\n"]), (1.5, GET, []), (1.5, GET, []):
        time.sleep(pause * SECONDS)
        client.send(head[:9])
        time.sleep(0.75 * SECONDS)
        client.send(head[9:])
        for piece in rest:
            time.sleep(0.05)
            client.send(piece)
        assert client.reply()[0] == 200


def test_slow_bodies_and_slow_answers_are_none_of_its_business(hasty: Running) -> None:
    slow, waiting = hasty.connect(), hasty.connect()
    waiting.send(b"GET /gate HTTP/1.1\r\nhost: x\r\n\r\n")
    slow.send(b"POST /post HTTP/1.1\r\nhost: x\r\ncontent-length: 6\r\n\r\n")
    for _ in range(6):
        time.sleep(SECONDS / 2)
        slow.send(b"b")
    hasty.app.gate.set()
    for client in (slow, waiting):
        assert client.reply()[0] == 200
        client.send(GET)
        assert client.reply()[0] == 200


@pytest.mark.parametrize("ends", [True, False])
def test_the_time_of_a_head_sent_ahead_begins_when_its_turn_comes(hasty: Running, ends: bool) -> None:
    client = hasty.connect()
    client.send(b"GET /gate HTTP/1.1\r\nhost: x\r\n\r\n" + START)
    time.sleep(1.5 * SECONDS)
    hasty.app.gate.set()
    assert client.reply()[0] == 200
    if ends:
        time.sleep(0.75 * SECONDS)
        client.send(b"\r\n\r\n")
        assert client.reply()[0] == 200
    else:
        assert SECONDS - 0.1 < closed_after(client) < 5


@pytest.mark.parametrize("piece", [b"", b"b"])
def test_a_body_that_does_not_end_after_its_answer_closes_its_connection(hasty: Running, piece: bytes) -> None:
    client = hasty.connect()
    client.send(b"POST /at-once HTTP/1.1\r\nhost: x\r\ncontent-length: 999\r\n\r\n")
    assert client.reply()[0] == 200
    assert SECONDS - 0.1 < closed_after(client, piece) < 5


def test_one_that_does_end_leaves_it_as_idle_as_any() -> None:
    """uvicorn's own timer stops with the first byte after the answer, and would never start again."""
    with serving(Hasty, keep_alive=1) as running:
        client = running.connect()
        for _ in range(2):
            client.send(b"POST /at-once HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\n")
            assert client.reply()[0] == 200
            client.send(b"bbb")
            time.sleep(1.5 * SECONDS)
        assert 0.9 - 1.5 * SECONDS < closed_after(client) < 5


def test_connections_that_owe_something_do_not_hold_up_the_end() -> None:
    with serving() as running:
        silent, begun, idle, refused = clients = [running.connect() for _ in range(4)]
        begun.send(START)
        idle.send(GET)
        refused.send(head_of(2 * HEAD_BYTES))
        assert (idle.reply()[0], refused.reply()[0]) == (200, 431)
        running.server.should_exit = True
        started = time.monotonic()
        assert all(client.is_closed() for client in clients)
        assert time.monotonic() - started < 1.5
        assert silent.is_closed()


@pytest.mark.parametrize("data", [b"", START, GET, head_of(2 * HEAD_BYTES)], ids=["nothing", "a part", "all", "more"])
def test_nothing_is_left_of_a_connection_that_has_ended(running: Running, data: bytes) -> None:
    """Not even for the garbage collector, or until some timer ends."""
    client = running.connect()
    client.send(data)
    time.sleep(0.1)
    connections = running.server.server_state.connections
    (connection,) = map(weakref.ref, connections)
    client.close()
    gc.disable()
    try:
        end = time.monotonic() + 3
        while connection() is not None and time.monotonic() < end:
            time.sleep(0.01)
        assert connection() is None
    finally:
        gc.enable()
