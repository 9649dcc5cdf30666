"""Runs one application under uvicorn and takes it down gently. Knows nothing of what the application does.

On SIGTERM or SIGINT: unready at once, still serving for `drain_seconds` so that load balancers notice; then new
work is refused while running requests finish; then the listener closes and the process exits 0. A second signal
skips the waiting.
"""

import asyncio
import errno
import gc
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.http_head import BoundedHttp
from service.probes import Drain
from service.settings import Settings, SettingsError

CLOSING_SECONDS = 2  # for connections, after all requests have had `finish_seconds`
# So many objects more than before are searched for garbage. A crowd of requests is none, and circles are rare here.
# With Python's 700 an overloaded API spent a hundredth of its time searching, up to 9 ms at once.
GARBAGE_OBJECTS = 20_000

logger = logging.getLogger("padrec.process")


class DrainingServer(uvicorn.Server):
    """uvicorn closes its listener on the first signal and dies of the signal; this one drains and exits 0."""

    def __init__(self, config: uvicorn.Config, drain: Drain, settings: Settings) -> None:
        super().__init__(config)
        self.drain = drain
        self.settings = settings
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What is here now stays. Walking through it again and again, the collector would halt everything for as long as
        # several requests take.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GARBAGE_OBJECTS, *gc.get_threshold()[1:])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.drain.unready or not self.started or self._loop is None:
            self.should_exit = True
            return
        self.drain.unready = True
        self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        logger.info("draining", extra={"in_flight": self.drain.in_flight})
        await asyncio.sleep(self.settings.drain_seconds)
        self.drain.refusing = True
        for _ in range(round(self.settings.finish_seconds / 0.05)):
            if not self.drain.in_flight or self.should_exit:
                break
            await asyncio.sleep(0.05)
        self.should_exit = True


def run_app(
    create: Callable[[Settings, Drain], FastAPI],
    settings: Settings,
    listener: socket.socket | None = None,
) -> None:
    """Serve until a signal. `listener`: an already listening socket, kept open by whoever made it."""
    drain = Drain()
    config = server_config(create(settings, drain), settings)
    sockets = [listener or bind(settings.host, settings.port)]
    DrainingServer(config, drain, settings).run(sockets)


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How every server of ours speaks HTTP."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        loop="uvloop",
        http=BoundedHttp,
        ws="none",
        timeout_keep_alive=75,  # longer than any client of ours keeps an idle connection
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises SettingsError with one line that names the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Naming TCP matters: asyncio turns Nagle's algorithm off only for sockets that do, and without that every answer
    # of two packets waits 40 ms for a delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as exc:
        listener.close()
        if exc.errno == errno.EADDRINUSE:
            raise SettingsError(
                f"port {port} on {host} is already in use; give another with --port, or --port 0"
            ) from None
        raise SettingsError(f"cannot listen on {host} port {port}: {exc.strerror}") from None
    return listener
