"""The shadow sample: some lists are written a second time without speculation, and must come out the same.

The promise that speculation changes no list is tested offline; this watches it where it is served. A shadow runs like
any request, but only while nobody waits, and one at a time, so it never takes a row from a request. Knows the engine
and counts; nothing of HTTP. Where torch runs the layers, as on GPUs, two nearly equal tokens may swap: a single
mismatch there is a reason to look, many are a defect.
"""

import random
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

from model.decoding.beam_request import BeamRequest
from model.decoding.request import ListResult
from model.decoding.strategies import Asked
from service.metrics import WorkerMetrics
from service.worker.engine import EngineError, EngineStatus

DEADLINE_SECONDS = 30.0


class Engine(Protocol):
    """What the sample needs of `service.worker.engine.Engine`."""

    def submit(self, request: Asked, catalog_version: str) -> Future[ListResult]: ...

    def status(self) -> EngineStatus: ...


class Shadow:
    """Writes `percent` of the lists again. `look` may be called from any thread; results come on the engine's."""

    def __init__(
        self, engine: Engine, percent: float, metrics: WorkerMetrics, dice: random.Random | None = None
    ) -> None:
        self.engine, self.percent = engine, percent
        self._lists = metrics.shadow_lists
        self._dice = dice or random.Random()
        self._running = False

    def look(self, asked: Asked, answer: ListResult, catalog_version: str) -> None:
        """Perhaps decode this answer again. Without a seed a drawn list is another one every time, relaxed beams are
        lossy and say so, and what was asked for without speculation has nothing to be compared with. After a swap its
        catalog may be gone: skipped."""
        if self._dice.random() * 100 >= self.percent or not asked.speculation:
            return
        if isinstance(asked, BeamRequest):
            if asked.verification == "relaxed":
                return
        elif asked.temperature and asked.seed is None:
            return
        if self._running or self.engine.status().waiting:
            self._lists.labels("skipped").inc()
            return
        again = replace(
            asked,
            request_id=f"{asked.request_id}-shadow",
            speculation=False,
            deadline=time.monotonic() + DEADLINE_SECONDS,
        )
        self._running = True
        try:
            future = self.engine.submit(again, catalog_version)
        except EngineError:
            self._running = False
            self._lists.labels("skipped").inc()
            return
        future.add_done_callback(lambda done: self._compare(answer, done))

    def _compare(self, answer: ListResult, done: Future[ListResult]) -> None:
        self._running = False
        if done.cancelled() or done.exception() is not None:
            self._lists.labels("failed").inc()
            return
        same = [item.codes for item in done.result().items] == [item.codes for item in answer.items]
        self._lists.labels("same" if same else "different").inc()
