"""Engine: submit, step, cancel; owns the one thread that touches tensors.

Between two rounds requests join and leave: late and cancelled ones free their rows, waiting ones get them. One bad
request fails alone; the engine goes on. Between two rounds the catalog changes, too: a new edition is tried out beside
the old one, then new requests are served from it while those that run finish on theirs. Knows decoders and scheduler;
nothing of HTTP or metrics (it tells an observer).
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from model.decoding.beam_request import BeamStats
from model.decoding.filters import Stock
from model.decoding.request import InvalidRequest, ListResult
from model.decoding.strategies import Asked, Stats, Strategies
from service.worker.scheduler import Pace, Scheduler, Ticket

logger = logging.getLogger("padrec.engine")

MAX_PREFILL = 4  # prompts read between two rounds: a burst of arrivals must not stall the lists being written
HEARTBEAT_SECONDS = 5.0
DOUBT = 1.3  # a stay may take so many times what is predicted: a list that comes late is work for nothing
TRY_SECONDS = 1.0  # between requests that are tried although they are predicted to be late
LINGER_SECONDS = 10.0  # a replaced edition takes requests for so long: API processes learn of the new one by and by


class EngineError(Exception):
    """Why a request got no list: overloaded, draining, late, cancelled or failed."""


class EngineOverloaded(EngineError):
    """Refused at the door. `retry_after` seconds from now what waits should have been served; `reason`: the line is
    full of requests ("queue"), of work ("work"), or would keep this request past its deadline ("deadline")."""

    def __init__(self, reason: str, retry_after: float) -> None:
        super().__init__(f"refused for {reason}; retry after {retry_after:.1f} s")
        self.reason, self.retry_after = reason, retry_after


class EngineDraining(EngineError):
    """The engine takes no new work."""


class OtherEdition(EngineError):
    """The catalog version asked for is not served, `version` is."""

    def __init__(self, version: str) -> None:
        super().__init__(f"catalog version {version} is served")
        self.version = version


class EditionRefused(EngineError):
    """A new edition failed its trial; the message says how. The old one is still served."""


class DeadlineExceeded(EngineError):
    """The deadline passed before the list was complete."""


class RequestCancelled(EngineError):
    """The client left."""


class EngineFailed(EngineError):
    """Decoding this request raised; the cause is in the log."""


@dataclass(frozen=True)
class EngineStatus:
    """`alive`: the thread took a step in the last seconds; `ready`: warmed up and not draining; `wait_seconds`: how
    long a newcomer would wait for a row."""

    alive: bool
    ready: bool
    running: int
    waiting: int
    oldest_wait_seconds: float
    wait_seconds: float


@dataclass(eq=False)
class Edition:
    """One catalog version as it is served. `golden` requests try its decoder out before anybody is served by it."""

    version: str
    decoder: Strategies
    golden: Sequence[Asked] = ()
    open_until: float = math.inf  # `time.monotonic()`; until then it takes new requests


@dataclass(eq=False)
class _Trial:
    """A new edition being tried out, a piece of work at a time, between the rounds of those that are served."""

    edition: Edition
    outcome: Future[None]
    todo: list[Asked]
    wrong: str = ""

    def step(self) -> bool:
        """One piece of work; whether the trial is over. Raises whatever decoding raises."""
        decoder = self.edition.decoder
        if decoder.rows.in_use:
            finished = decoder.round()[0]
        else:
            room = min(MAX_PREFILL, decoder.rows.num_free)
            batch, self.todo = self.todo[:room], self.todo[room:]
            for request in batch:
                decoder.validate(request)
            finished = decoder.admit(batch) if batch else []
        for result in finished:
            self.wrong = self.wrong or _fault(result, decoder)
        return not self.todo and not decoder.rows.in_use


class Engine:
    """Continuous batching over a decoder, or over several while the catalog changes."""

    def __init__(
        self,
        decoder: Strategies,
        *,
        max_waiting: int,
        observe: Callable[[Stats | ListResult], None],
        warm_up: Callable[[Strategies], None] | None = None,
        version: str = "",
        golden: Sequence[Asked] = (),
        max_wait_seconds: float = math.inf,
    ) -> None:
        """`observe` is called on the engine's thread. `warm_up` runs there first, then `golden` requests are decoded
        in a full batch, which shows what work costs; only then the engine is ready. `version`: of the catalog.
        `max_wait_seconds`: predicted wait the line may reach."""
        self.observe, self.warm_up, self.max_wait_seconds = observe, warm_up, max_wait_seconds
        self.editions = [Edition(version, decoder, golden)]  # oldest first
        self.scheduler, self.pace = Scheduler(max_waiting), Pace()
        self._tried = 0.0
        self._changed = threading.Condition()
        self._leaving: set[str] = set()
        self._trial: _Trial | None = None
        self._stock: dict[str, Stock | None] = {}
        self._warm, self._draining, self._stopping = False, False, False
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- any thread -------------------------------------------------------------------------------------------

    @property
    def decoder(self) -> Strategies:
        """The newest edition's."""
        return self.editions[-1].decoder

    @property
    def num_rows(self) -> int:
        return len(self.decoder.rows.held)

    @property
    def catalog_version(self) -> str:
        """The version new requests should name."""
        return self.editions[-1].version

    def start(self) -> None:
        """Start the thread; `status().ready` says when warm-up is over."""
        self._beat = time.monotonic()
        self._thread.start()

    def submit(self, request: Asked, catalog_version: str | None = None) -> Future[ListResult]:
        """Queue a request against a catalog version (the newest unless told). Raises OtherEdition, EngineOverloaded or
        EngineDraining; the future raises InvalidRequest, DeadlineExceeded, RequestCancelled or EngineFailed.
        `request_id` must be unique among those in flight."""
        with self._changed:
            if self._draining or self._stopping:
                raise EngineDraining("the engine takes no new work")
            edition = self._edition(catalog_version)
            self._refuse_what_cannot_be_done(request)
            future: Future[ListResult] = Future()
            self.scheduler.waiting.append(Ticket(request, future, edition))
            self._changed.notify_all()
        return future

    def cancel(self, request_id: str) -> None:
        """The client left: its row is free before the next round."""
        with self._changed:
            self._leaving.add(request_id)
            self._changed.notify_all()

    def offer(self, edition: Edition) -> Future[None]:
        """Try `edition` out and serve it. The future raises EditionRefused, and then nothing has changed."""
        outcome: Future[None] = Future()
        with self._changed:
            assert self._trial is None, "one new edition at a time"
            self._trial = _Trial(edition, outcome, list(edition.golden))
            self._changed.notify_all()
        return outcome

    def set_stock(self, catalog_version: str, stock: Stock | None) -> None:
        """What requests of this version may be given from the next round on; None: everything. Requests that have a
        row keep what they began with."""
        with self._changed:
            self._stock[catalog_version] = stock
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
            _fail(ticket.future, EngineDraining("the engine stopped"))
        self.scheduler.waiting.clear()
        self.scheduler.running.clear()
        if self._trial is not None:
            _fail(self._trial.outcome, EditionRefused("the engine stopped"))

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
                wait_seconds=self.scheduler.wait_seconds(self.num_rows, self.pace),
            )

    def _edition(self, version: str | None) -> Edition:
        newest, now = self.editions[-1], time.monotonic()
        for edition in self.editions:
            if edition.version == version and now < edition.open_until:
                return edition
        if version is None:
            return newest
        raise OtherEdition(newest.version)

    def _refuse_what_cannot_be_done(self, request: Asked) -> None:
        wait, now = self.scheduler.wait_seconds(self.num_rows, self.pace), time.monotonic()
        others = len(self.scheduler.running) + len(self.scheduler.waiting)
        reason = None
        if self.scheduler.is_full:
            reason = "queue"
        elif wait > self.max_wait_seconds:
            reason = "work"
        elif others and now + wait + DOUBT * self.pace.stay(request, min(self.num_rows, others + 1)) > request.deadline:
            # Also with a row free: one row too many makes every list late. Not by prediction alone: now and then a
            # request is tried, or a wrong prediction would last for ever.
            if wait or now < self._tried + TRY_SECONDS:
                reason = "deadline"
            else:
                self._tried = now
        if reason is not None:
            raise EngineOverloaded(reason, max(wait, 0.1))

    # ---- the engine's thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        if self.warm_up is not None:
            self.warm_up(self.decoder)
        self._rehearse()
        self._beat, self._warm = time.monotonic(), True
        while not self._stopping:
            self._beat = time.monotonic()
            if not self._step():
                with self._changed:
                    self._changed.notify_all()
                    if self._is_idle() and not (self._leaving or self._stock or self._trial or self._stopping):
                        self._changed.wait(timeout=1.0)

    def _rehearse(self) -> None:
        """The first edition's trial, in a batch as full as it gets."""
        golden = self.editions[0].golden
        if not golden:
            return
        batch = [replace(golden[i % len(golden)], request_id=f"golden-{i}") for i in range(self.num_rows)]
        for i in range(0, len(batch), MAX_PREFILL):
            self._read(self.editions[0], batch[i : i + MAX_PREFILL])
        while self.decoder.rows.in_use:
            for result in self._round(self.editions[0])[0]:
                if wrong := _fault(result, self.decoder):
                    raise EngineFailed(wrong)

    def _step(self) -> bool:
        """Let leave, let join, one round. Whether there was anything to do."""
        joining = self._turn_over()
        try:
            finished, busy = self._admit(joining), bool(joining)
            for edition in self.editions:
                if edition.decoder.rows.in_use:
                    results, stats = self._round(edition)
                    self.observe(stats)
                    finished += results
                    busy = True
        except Exception:
            # Whatever it was, the rows' state can't be trusted: start over with those that ran, one by one.
            logger.exception("a round failed; its requests run again, each alone")
            self._start_over()
            return True
        for result in finished:
            self._finish(result)
        if self._trial is not None:
            self._try_out(self._trial)
            return True
        if not busy:
            self.decoder.rows.check_integrity()
        return busy

    def _turn_over(self) -> list[Ticket]:
        now = time.monotonic()
        with self._changed:
            leaving, self._leaving = self._leaving, set()
            gone = [(t, RequestCancelled("cancelled")) for r in leaving if (t := self.scheduler.forget(r)) is not None]
            late = [(t, DeadlineExceeded("the deadline passed")) for t in self.scheduler.expired(now)]
            self._close_old_editions(now)
            for edition in self.editions:
                if edition.version in self._stock:
                    edition.decoder.set_stock(self._stock.pop(edition.version))
            self._stock.clear()
            free = self.num_rows - len(self.scheduler.running)
        for ticket, error in (*gone, *late):
            ticket.edition.decoder.cancel(ticket.request.request_id)
            _fail(ticket.future, error)
        with self._changed:
            # By the clock of now: who came since the turn began must not seem to have waited less than nothing.
            return self.scheduler.admit(min(free, MAX_PREFILL), time.monotonic())

    def _close_old_editions(self, now: float) -> None:
        if len(self.editions) > 1:
            tickets = (*self.scheduler.waiting, *self.scheduler.running.values())
            used = {id(ticket.edition) for ticket in tickets} | {id(self.editions[-1])}
            self.editions = [e for e in self.editions if id(e) in used or now < e.open_until]

    def _admit(self, joining: list[Ticket]) -> list[ListResult]:
        valid: dict[Edition, list[Asked]] = {}
        for ticket in joining:
            try:
                ticket.edition.decoder.validate(ticket.request)
                valid.setdefault(ticket.edition, []).append(ticket.request)
            except InvalidRequest as exc:
                with self._changed:
                    self.scheduler.forget(ticket.request.request_id)
                _fail(ticket.future, exc)
        return [result for edition, requests in valid.items() for result in self._read(edition, requests)]

    def _read(self, edition: Edition, requests: list[Asked]) -> list[ListResult]:
        started = time.monotonic()
        finished = edition.decoder.admit(requests)
        self.pace.prompts(len(requests), time.monotonic() - started)
        return finished

    def _round(self, edition: Edition) -> tuple[list[ListResult], Stats]:
        started = time.monotonic()
        results, stats = edition.decoder.round()
        items = sum(len(result.items) for result in results)
        self.pace.round(isinstance(stats, BeamStats), stats.rows, items, time.monotonic() - started)
        return results, stats

    def _finish(self, result: ListResult) -> None:
        with self._changed:
            ticket = self.scheduler.forget(result.request_id)
        if ticket is None:
            return
        result = replace(result, queue_seconds=ticket.admitted - ticket.submitted)
        self.observe(result)
        if ticket.future.set_running_or_notify_cancel():
            ticket.future.set_result(result)

    def _try_out(self, trial: _Trial) -> None:
        """One piece of a new edition's trial; at its end the edition is served, or refused."""
        try:
            if not trial.step():
                return
        except Exception as exc:
            logger.exception("a new edition failed its trial")
            trial.wrong = f"decoding raised {type(exc).__name__}"
        with self._changed:
            self._trial = None
            if not trial.wrong:
                self.editions[-1].open_until = time.monotonic() + LINGER_SECONDS
                self.editions = [*self.editions, trial.edition]
        if trial.wrong:
            _fail(trial.outcome, EditionRefused(trial.wrong))
        elif trial.outcome.set_running_or_notify_cancel():
            trial.outcome.set_result(None)

    def _start_over(self) -> None:
        for edition in self.editions:
            for index in edition.decoder.rows.in_use:
                edition.decoder.rows.free(index)
        with self._changed:
            guilty = self.scheduler.suspect_all()
        for ticket in guilty:
            _fail(ticket.future, EngineFailed("decoding this request failed"))

    def _is_idle(self) -> bool:
        return not self.scheduler.waiting and not self.scheduler.running


def _fault(result: ListResult, decoder: Strategies) -> str:
    """What is wrong with the list of a golden request; empty if nothing is."""
    codes = [item.codes for item in result.items]
    if not codes:
        return "a golden request got an empty list"
    if len(set(codes)) < len(codes) or any(decoder.trie.leaf(c) is None for c in codes):
        return "a golden request got items twice, or items that are not in the catalog"
    if not all(math.isfinite(item.score) and item.score <= 1e-6 for item in result.items):
        return "a golden request got scores that are no log-probabilities"
    return ""


def _fail(future: Future[ListResult] | Future[None], error: Exception) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
