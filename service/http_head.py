"""uvicorn's HTTP/1.1 with the bounds it lacks: a request's head in bytes, headers and time, and requests sent ahead.

A connection is also closed when nothing comes, at its start or in the middle of something. Bodies are the
application's affair, idle connections uvicorn's. An offer to speak HTTP/2 is not taken up, and costs nobody his body.
Knows no routes and no keys.
"""

import asyncio
import logging
import re
import uuid

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import PROBLEM_JSON, HttpError, problem_bytes

HEAD_BYTES = 32 * 1024  # request line and headers; trailers, and what else of a body is no body, count the same
HEADERS = 100  # 200 bytes of memory each, of 7 sent
HEAD_SECONDS = 10.0
PIPELINED = 8  # requests taken while one before them is worked on

_MALFORMED = HttpError(400, "Bad Request")
_TOO_LARGE = HttpError(431, "Request Header Fields Too Large")
_REFUSED = HEAD_BYTES + 1
_UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:", re.IGNORECASE)

logger = logging.getLogger("padrec.http")


class BoundedHttp(HttpToolsProtocol):
    """One connection. What is over a bound is refused and ends it, after the answers to what came before.

    Overrides what uvicorn 0.54 calls; the tests speak to real sockets, so that another uvicorn cannot lose a bound.
    """

    head_seconds = HEAD_SECONDS
    # Bytes since the end of a head, a message or a piece of body; `_REFUSED`: no more is read. The parser tells no
    # places in what it is fed: a head that begins within a piece counts from the next piece on. So pieces are bounded.
    _size = 0
    # Whether what comes next belongs to a request that has begun.
    _begun = False
    # When the client's turn ends; None: it owes nothing. Means nothing while a request is worked on.
    _deadline: float | None = None
    _timer: asyncio.TimerHandle

    # What asyncio calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn does
        super().connection_made(transport)
        self.headers = []
        self._clients_turn()
        self._timer = self.loop.call_later(self.head_seconds, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        self._unset_keepalive_if_required()  # or all of this stays until it ends: uvicorn forgets it after a reset
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._begun and b"pgrade" in data:
            # Java's HttpClient and `curl --http2` offer h2c with their first request. The parser would end there,
            # before the body; a server may ignore the offer (RFC 9110, 7.8).
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(b"\r\nx-upgrade:", head) + end + rest
        self._read(data)

    def _read(self, data: bytes | memoryview) -> None:
        if len(data) > HEAD_BYTES - self._size:
            self._in_pieces(memoryview(data))
            return
        self._size += len(data)
        HttpToolsProtocol.data_received(self, data)  # type: ignore[arg-type]  # the parser takes any buffer
        if len(self.headers) > HEADERS:
            self._refuse(_TOO_LARGE)
        elif self._size and self._deadline is None:  # empty lines: they begin nothing, and stop uvicorn's timer
            self._clients_turn()

    def _in_pieces(self, rest: memoryview) -> None:
        while rest and self._size < _REFUSED:
            room = HEAD_BYTES - self._size
            if room:
                self._read(rest[:room])
                rest = rest[room:]
            else:
                self._refuse(_TOO_LARGE)

    # What the parser calls. Not by super(), which takes longer than all the rest.

    def on_message_begin(self) -> None:
        HttpToolsProtocol.on_message_begin(self)
        self._begun = True
        self._clients_turn()

    def on_headers_complete(self) -> None:
        if len(self.headers) > HEADERS or len(self.pipeline) == PIPELINED:
            raise ValueError  # stops the parser, and uvicorn calls `send_400_response`
        HttpToolsProtocol.on_headers_complete(self)
        self._size = 0

    def on_body(self, body: bytes) -> None:
        HttpToolsProtocol.on_body(self, body)
        self._size = 0

    def on_message_complete(self) -> None:
        HttpToolsProtocol.on_message_complete(self)
        self._begun = False
        self._size = 0
        self._deadline = None
        if self.cycle.response_complete:  # answered before it ended: its rest has stopped uvicorn's timer
            self._deadline = self.loop.time() + self.timeout_keep_alive

    # What uvicorn calls

    def on_response_complete(self) -> None:
        HttpToolsProtocol.on_response_complete(self)
        if self._deadline is not None:  # this request has not ended, or another has begun
            self._clients_turn()

    def send_400_response(self, msg: str) -> None:
        self._refuse(_TOO_LARGE if len(self.headers) > HEADERS else _MALFORMED)

    def _clients_turn(self) -> None:
        self._deadline = self.loop.time() + self.head_seconds

    def _working(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _look(self) -> None:
        """Once in `head_seconds`, or when a deadline is nearer, so that a request costs no timer."""
        wait = self.head_seconds
        if self._deadline is not None and not self._working():
            wait = min(wait, self._deadline - self.loop.time())
        if wait > 0:
            self._timer = self.loop.call_later(wait, self._look)
        else:
            logger.debug("closed a connection whose client took too long")
            self.transport.abort()  # an answer not fetched in all that time is not waited for

    def _refuse(self, error: HttpError) -> None:
        self._size = _REFUSED
        in_head = self.cycle is None or self.cycle.scope is not self.scope
        if in_head:
            self.headers.clear()  # nobody gets them, and the connection may stay for a while
        if self._working() or not in_head:  # an answer now would be taken for that of an earlier request
            self.shutdown()
            return
        request_id = uuid.uuid4().hex
        logger.info("refused a request by its head", extra={"status": error.status, "request_id": request_id})
        body = problem_bytes(error, request_id)
        headers = [
            *self.server_state.default_headers,
            (b"content-type", PROBLEM_JSON.encode()),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            (b"x-request-id", request_id.encode()),
        ]
        status_line = f"HTTP/1.1 {error.status} {error.title}\r\n".encode()
        self.transport.write(b"".join([status_line, *(b"%s: %s\r\n" % header for header in headers), b"\r\n", body]))
        # Closed with bytes unread it would be reset, and the client might never see the answer. They are read and
        # dropped, until it closes too or its turn ends.
        self.transport.write_eof()
        self._clients_turn()
