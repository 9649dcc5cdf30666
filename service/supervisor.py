"""Supervisor: processes of one machine, started in order, replaced when they die or hang, stopped in reverse.

Kubernetes does this in production; this is for a laptop. Knows processes and ports; nothing of what they serve.
"""

import contextlib
import logging
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType

from service import child

logger = logging.getLogger("padrec.supervisor")

REFUSED = 2  # exit status of a process whose settings or bundle are unusable: starting it again cannot help
BUSY, BUSY_SHARE = 6, 0.2  # of one core
_POLL_SECONDS = 0.05


class PortTaken(RuntimeError):
    """The wanted port is in use; the message names it."""


@dataclass
class Child:
    """One process to keep alive. `stop_seconds`: how long it may take to finish its work after SIGTERM. `healthy` asks
    it how it is, within a second or so; it is called on another thread than `start`.

    `spare` starts one that has taken its time to load code and waits for a line on its standard input: it takes the
    place of one that died, and is made once that one has `settled`, so that it takes no time from its start."""

    name: str
    start: Callable[[], subprocess.Popen[bytes]]
    stop_seconds: float = 10.0
    healthy: Callable[[], bool] | None = None
    spare: Callable[[], subprocess.Popen[bytes]] | None = None
    settled: Callable[[], bool] = lambda: True
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    waiting: subprocess.Popen[bytes] | None = field(default=None, init=False)
    was_settled: bool = field(default=False, init=False)
    failures: int = field(default=0, init=False)
    started: float = field(default=0.0, init=False)
    restart_at: float | None = field(default=None, init=False)
    was_healthy: bool = field(default=False, init=False)
    unwell_since: float | None = field(default=None, init=False)
    unwell_answers: int = field(default=0, init=False)
    unwell_wanted: float = field(default=0.0, init=False)


class Supervisor:
    """Keeps children running. Backoff doubles from `first_backoff` to 10 s; a child that ends `max_failures` times
    without having lived `steady_seconds` in between is a crash loop and ends everything. One that was healthy and has
    not been for `hung_seconds`, or has not become so `starting_seconds` after its start, is killed; one that works all
    the while, or would if others left it a processor, may be late with its answers and gets BUSY times as long."""

    def __init__(
        self,
        children: Sequence[Child],
        *,
        max_failures: int = 5,
        first_backoff: float = 0.1,
        steady_seconds: float = 30.0,
        hung_seconds: float = 5.0,
        starting_seconds: float = 300.0,
        on_round: Callable[[], None] = lambda: None,
    ) -> None:
        self.children = list(children)
        self.max_failures, self.first_backoff, self.steady_seconds = max_failures, first_backoff, steady_seconds
        self.hung_seconds, self.starting_seconds = hung_seconds, starting_seconds
        self.on_round = on_round
        self._stopping = False
        self._over = threading.Event()

    def request_stop(self) -> None:
        """Safe to call from a signal handler; `run` stops the children and returns."""
        self._stopping = True

    def run(self) -> int:
        """Start every child, watch them until asked to stop. Returns the exit status of the whole.

        Must run in the main thread (see `child.spawn`).
        """
        # On a thread of its own: a process that hangs takes its time to say nothing.
        looking = threading.Thread(target=self._look, name="health", daemon=True)
        try:
            for each in self.children:
                if self._stopping:
                    break
                self._start(each)
            looking.start()
            while not self._stopping:
                for each in self.children:
                    status = self._watch(each)
                    if status is not None:
                        return status
                self.on_round()
                time.sleep(_POLL_SECONDS)
            return 0
        finally:
            self._over.set()
            self._stop_all()

    def _look(self) -> None:
        while not self._over.wait(self.hung_seconds / 10):
            for each in self.children:
                process = each.process
                if each.healthy is None or process is None or process.poll() is not None:
                    continue
                healthy = each.healthy()
                if process is not each.process:
                    continue
                if healthy:
                    each.was_healthy, each.unwell_since, each.unwell_answers = True, None, 0
                    if each.spare is not None and not each.was_settled and each.settled():
                        each.was_settled = process is each.process
                else:
                    if each.unwell_since is None:
                        each.unwell_since, each.unwell_wanted = time.monotonic(), _wanted_seconds(process)
                    each.unwell_answers += 1

    def _hangs(self, each: Child) -> bool:
        """Not by the clock alone: when the whole machine slept, nobody was asked."""
        if each.unwell_since is None or each.unwell_answers < 3:
            return False
        unwell = time.monotonic() - each.unwell_since
        if not each.was_healthy:
            return unwell >= self.starting_seconds
        if unwell < self.hung_seconds or each.process is None:
            return False
        busy = _wanted_seconds(each.process) - each.unwell_wanted >= BUSY_SHARE * unwell
        return not busy or unwell >= BUSY * self.hung_seconds

    def _start(self, each: Child) -> None:
        each.restart_at = None
        each.was_healthy, each.unwell_since, each.unwell_answers, each.was_settled = False, None, 0, False
        each.started = time.monotonic()
        each.process = self._spare(each) or each.start()
        logger.info("started", extra={"child": each.name, "pid": each.process.pid})

    def _spare(self, each: Child) -> subprocess.Popen[bytes] | None:
        """The spare, told to go on; None when there is none, or it has died."""
        spare, each.waiting = each.waiting, None
        if spare is None:
            return None
        assert spare.stdin is not None, "a spare is told by its standard input"
        with contextlib.suppress(BrokenPipeError), spare.stdin as told:
            told.write(b"go\n")
        return spare if spare.poll() is None else None

    def _watch(self, each: Child) -> int | None:
        """Restart a dead child when its time has come. Returns an exit status when there is no point in going on."""
        if each.restart_at is not None:
            if time.monotonic() >= each.restart_at:
                self._start(each)
            return None
        assert each.process is not None, "watched before it was started"
        status = each.process.poll()
        if status is None:
            if each.was_settled and each.spare is not None and each.waiting is None:
                each.waiting = each.spare()
                logger.info("a spare is made", extra={"child": each.name, "pid": each.waiting.pid})
            if self._hangs(each):
                logger.error("%s hangs; replacing it", each.name)
                each.unwell_since = None
                each.process.kill()  # a stopped process does not hear anything milder
            return None
        if status == REFUSED:
            logger.error("%s refused to start; its message is above", each.name)
            return REFUSED
        lived = time.monotonic() - each.started
        each.failures = 1 if lived >= self.steady_seconds else each.failures + 1
        if each.failures >= self.max_failures:
            logger.error("%s ended %d times in a row (%s); giving up", each.name, each.failures, _describe(status))
            return 1
        backoff = min(self.first_backoff * 2 ** (each.failures - 1), 10.0)
        each.restart_at = time.monotonic() + backoff
        logger.warning("%s ended (%s); starting it again in %.1f s", each.name, _describe(status), backoff)
        return None

    def _stop_all(self) -> None:
        for each in reversed(self.children):
            if each.waiting is not None and each.waiting.stdin is not None:
                each.waiting.stdin.close()
                child.stop(each.waiting, 0.5)
            if each.process is not None:
                status = child.stop(each.process, each.stop_seconds)
                logger.info("stopped", extra={"child": each.name, "status": status})


@contextlib.contextmanager
def stop_on_signals(supervisor: Supervisor) -> Iterator[None]:
    """SIGTERM and SIGINT ask the supervisor to stop while the block runs."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        supervisor.request_stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def free_port(host: str, wanted: int = 0, *, tries: int = 1) -> int:
    """The first free TCP port of `tries` from `wanted` on; `wanted` 0 takes any. Raises PortTaken."""
    for port in range(wanted, wanted + tries):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except PermissionError as exc:
                raise PortTaken(f"port {port} on {host} may not be used by this user") from exc
            except OSError:
                continue
            return int(probe.getsockname()[1])
    what = f"port {wanted}" if tries == 1 else f"every port from {wanted} to {wanted + tries - 1}"
    raise PortTaken(f"{what} on {host} is taken; choose another with --port (0 takes the next free one)")


def _wanted_seconds(process: subprocess.Popen[bytes]) -> float:
    """0 where that cannot be known: then nobody counts as busy."""
    try:
        return child.wanted_seconds(process.pid)
    except OSError:
        return 0.0


def _describe(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
