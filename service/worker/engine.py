"""Engine: submit, step, cancel; owns the one thread that touches tensors.

Between two rounds requests join and leave: late and cancelled ones free their rows, waiting ones get them. One bad
request fails alone; the engine goes on. Knows decoder and scheduler; nothing of HTTP or metrics (it tells an observer).
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

from model.decoding.request import InvalidRequest, ListResult
from model.decoding.strategies import Asked, Stats, Strategies
from service.worker.scheduler import Scheduler, Ticket

logger = logging.getLogger("padrec.engine")

MAX_PREFILL = 4  # prompts read between two rounds: a burst of arrivals must not stall the lists being written
HEARTBEAT_SECONDS = 5.0


class EngineError(Exception):
    """Why a request got no list: overloaded, draining, late, cancelled or failed."""


class EngineOverloaded(EngineError):
    """The line is full. `retry_after` seconds from now there should be room."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full; retry after {retry_after:.1f} s")
        self.retry_after = retry_after


class EngineDraining(EngineError):
    """The engine takes no new work."""


class DeadlineExceeded(EngineError):
    """The deadline passed before the list was complete."""


class RequestCancelled(EngineError):
    """The client left."""


class EngineFailed(EngineError):
    """Decoding this request raised; the cause is in the log."""


@dataclass(frozen=True)
class EngineStatus:
    """`alive`: the thread took a step in the last seconds; `ready`: warmed up and not draining."""

    alive: bool
    ready: bool
    running: int
    waiting: int
    oldest_wait_seconds: float


class Engine:
    """Continuous batching over a decoder."""

    def __init__(
        self,
        decoder: Strategies,
        *,
        max_waiting: int,
        observe: Callable[[Stats | ListResult], None],
        warm_up: Callable[[Strategies], None] | None = None,
    ) -> None:
        """`observe` is called on the engine's thread. `warm_up` runs there first; only then the engine is ready."""
        self.decoder, self.observe, self.warm_up = decoder, observe, warm_up
        self.scheduler = Scheduler(max_waiting)
        self._changed = threading.Condition()
        self._leaving: set[str] = set()
        self._warm, self._draining, self._stopping = False, False, False
        self._beat = time.monotonic()
        self._list_seconds = 0.1
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- any thread -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; `status().ready` says when warm-up is over."""
        self._beat = time.monotonic()
        self._thread.start()

    def submit(self, request: Asked) -> Future[ListResult]:
        """Queue a request. Raises EngineOverloaded or EngineDraining; the future raises InvalidRequest,
        DeadlineExceeded, RequestCancelled or EngineFailed. `request_id` must be unique among those in flight."""
        with self._changed:
            if self._draining or self._stopping:
                raise EngineDraining("the engine takes no new work")
            if self.scheduler.is_full:
                raise EngineOverloaded(self._retry_after())
            future: Future[ListResult] = Future()
            self.scheduler.waiting.append(Ticket(request, future))
            self._changed.notify_all()
        return future

    def cancel(self, request_id: str) -> None:
        """The client left: its row is free before the next round."""
        with self._changed:
            self._leaving.add(request_id)
            self._changed.notify_all()

    def drain(self, timeout: float) -> bool:
        """Refuse new work and wait up to `timeout` seconds for the rest; whether all of it was done."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(self._is_idle, timeout)

    def stop(self) -> None:
        """End the thread; whatever is unfinished fails as draining."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=HEARTBEAT_SECONDS)
        for ticket in (*self.scheduler.waiting, *self.scheduler.running.values()):
            _fail(ticket, EngineDraining("the engine stopped"))
        self.scheduler.waiting.clear()
        self.scheduler.running.clear()

    def status(self) -> EngineStatus:
        now = time.monotonic()
        with self._changed:
            alive = self._thread.is_alive() and (not self._warm or now - self._beat < HEARTBEAT_SECONDS)
            return EngineStatus(
                alive=alive,
                ready=alive and self._warm and not self._draining,
                running=len(self.scheduler.running),
                waiting=len(self.scheduler.waiting),
                oldest_wait_seconds=self.scheduler.oldest_wait(now),
            )

    # ---- the engine's thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        if self.warm_up is not None:
            self.warm_up(self.decoder)
        self._beat, self._warm = time.monotonic(), True
        while not self._stopping:
            self._beat = time.monotonic()
            if not self._step():
                with self._changed:
                    self._changed.notify_all()
                    if self._is_idle() and not self._leaving and not self._stopping:
                        self._changed.wait(timeout=1.0)

    def _step(self) -> bool:
        """Let leave, let join, one round. Whether there was anything to do."""
        joining = self._turn_over()
        try:
            finished = self._admit(joining)
            if self.decoder.rows.in_use:
                results, stats = self.decoder.round()
                self.observe(stats)
                finished += results
        except Exception:
            # Whatever it was, the rows' state can't be trusted: start over with those that ran, one by one.
            logger.exception("a round failed; its requests run again, each alone")
            self._start_over()
            return True
        for result in finished:
            self._finish(result)
        if not joining and not self.decoder.rows.in_use:
            self.decoder.rows.check_integrity()
            return False
        return True

    def _turn_over(self) -> list[Ticket]:
        now = time.monotonic()
        with self._changed:
            leaving, self._leaving = self._leaving, set()
            gone = [(t, RequestCancelled("cancelled")) for r in leaving if (t := self.scheduler.forget(r)) is not None]
            late = [(t, DeadlineExceeded("the deadline passed")) for t in self.scheduler.expired(now)]
            joining = self.scheduler.admit(min(self.decoder.rows.num_free, MAX_PREFILL), now)
        for ticket, error in (*gone, *late):
            self.decoder.cancel(ticket.request.request_id)
            _fail(ticket, error)
        return joining

    def _admit(self, joining: list[Ticket]) -> list[ListResult]:
        valid = []
        for ticket in joining:
            try:
                self.decoder.validate(ticket.request)
                valid.append(ticket.request)
            except InvalidRequest as exc:
                with self._changed:
                    self.scheduler.forget(ticket.request.request_id)
                _fail(ticket, exc)
        return self.decoder.admit(valid) if valid else []

    def _finish(self, result: ListResult) -> None:
        with self._changed:
            ticket = self.scheduler.forget(result.request_id)
        if ticket is None:
            return
        queued = ticket.admitted - ticket.submitted
        result = replace(result, queue_seconds=queued)
        self._list_seconds += 0.1 * (time.monotonic() - ticket.admitted - self._list_seconds)
        self.observe(result)
        if ticket.future.set_running_or_notify_cancel():
            ticket.future.set_result(result)

    def _start_over(self) -> None:
        for index in self.decoder.rows.in_use:
            self.decoder.rows.free(index)
        with self._changed:
            guilty = self.scheduler.suspect_all()
        for ticket in guilty:
            _fail(ticket, EngineFailed("decoding this request failed"))

    def _is_idle(self) -> bool:
        return not self.scheduler.waiting and not self.scheduler.running

    def _retry_after(self) -> float:
        """Seconds until the line should have moved: lists ahead times seconds a list, over rows."""
        ahead = len(self.scheduler.waiting) + len(self.scheduler.running)
        return max(0.1, ahead * self._list_seconds / len(self.decoder.rows.held))


def _fail(ticket: Ticket, error: Exception) -> None:
    if ticket.future.set_running_or_notify_cancel():
        ticket.future.set_exception(error)
