"""Scheduler: who waits, who runs next, who is too late, and how long a newcomer would wait. Knows tickets and times; no
tensors, threads or sockets.

First come, first served; a ticket whose deadline has passed never reaches a row. Tickets that were in a round which
failed run alone, so that only the one at fault fails.
"""

import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from model.decoding.beam_request import BeamRequest
from model.decoding.request import ListResult
from model.decoding.strategies import Asked

if TYPE_CHECKING:
    from service.worker.engine import Edition


@dataclass
class Ticket:
    """One accepted request, to be served from one edition of the catalog. `submitted` in seconds of
    `time.monotonic()`; `alone`: suspected of breaking rounds."""

    request: Asked
    future: Future[ListResult]
    edition: "Edition"
    submitted: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    alone: bool = False

    def late(self, now: float) -> bool:
        return now >= self.request.deadline


class Pace:
    """What work costs, learned from what it did cost: seconds a prompt, and seconds an item at each load, of lists and
    of beams apart: a list grows item by item, beams come all at once. Loads are learned by powers of two; what was seen
    fades round by round."""

    FADE = 0.99

    def __init__(self) -> None:
        self.prompt_seconds = 0.0
        self._seen: tuple[dict[int, tuple[float, float]], ...] = ({}, {})  # of lists, of beams

    def prompts(self, count: int, seconds: float) -> None:
        """`count` prompts were read in `seconds`."""
        each = seconds / count
        self.prompt_seconds += (0.1 if self.prompt_seconds else 1.0) * (each - self.prompt_seconds)

    def round(self, beams: bool, rows: int, items: int, seconds: float) -> None:
        """A round of `rows` took `seconds`; the answers it completed hold `items`."""
        load, seen = 1 << (rows - 1).bit_length(), self._seen[beams]
        before = seen.get(load, (0.0, 0.0))
        seen[load] = (self.FADE * before[0] + seconds, self.FADE * before[1] + items)

    def item_seconds(self, beams: bool, rows: int) -> float:
        """Seconds an item at `rows`, by the nearest load seen that is no larger (else the smallest one); 0 before any
        such answer was completed."""
        known = {load: seconds / items for load, (seconds, items) in self._seen[beams].items() if items > 0.01}
        if not known:
            return 0.0
        smaller = [load for load in known if load < 2 * rows]
        return known[max(smaller) if smaller else min(known)]

    def work(self, request: Asked, rows: int) -> float:
        """Seconds of the engine's time that a request's items take at `rows`."""
        return request.k * self.item_seconds(isinstance(request, BeamRequest), rows)

    def stay(self, request: Asked, rows: int) -> float:
        """Seconds from getting a row to the answer: the engine's time is shared by `rows`, each of which reads a prompt
        meanwhile, this one's or that of the next request to have it."""
        return rows * (self.prompt_seconds + self.work(request, rows))


class Scheduler:
    """The waiting line and the running set."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self.waiting: deque[Ticket] = deque()
        self.running: dict[str, Ticket] = {}

    @property
    def is_full(self) -> bool:
        return len(self.waiting) >= self.max_waiting

    def oldest_wait(self, now: float) -> float:
        """Seconds the head of the line has waited."""
        return now - self.waiting[0].submitted if self.waiting else 0.0

    def wait_seconds(self, num_rows: int, pace: Pace) -> float:
        """Seconds until a newcomer gets a row. With every row taken, rows come free one by one, each after the work
        of one list: of those that wait before him, and of one of those that run."""
        if len(self.waiting) + len(self.running) < num_rows:
            return 0.0
        work = sum(pace.work(ticket.request, num_rows) for ticket in self.waiting)
        if self.running:
            work += sum(pace.work(t.request, num_rows) for t in self.running.values()) / len(self.running)
        answers = len(self.waiting) + bool(self.running)
        return answers * pace.prompt_seconds + work

    def expired(self, now: float) -> list[Ticket]:
        """Take every late ticket out, waiting or running."""
        late = [t for t in (*self.waiting, *self.running.values()) if t.late(now)]
        for ticket in late:
            self.forget(ticket.request.request_id)
        return late

    def admit(self, num_free: int, now: float) -> list[Ticket]:
        """The next tickets for `num_free` rows; a suspected one only when nothing else runs."""
        chosen: list[Ticket] = []
        while self.waiting and len(chosen) < num_free:
            if any(t.alone for t in (*chosen, *self.running.values())):
                break
            if self.waiting[0].alone and (chosen or self.running):
                break
            ticket = self.waiting.popleft()
            ticket.admitted = now
            self.running[ticket.request.request_id] = ticket
            chosen.append(ticket)
        return chosen

    def suspect_all(self) -> list[Ticket]:
        """A round failed: put what was running back to the head of the line, each to run alone. Returns the tickets
        that already did run alone: theirs is the fault."""
        guilty = [t for t in self.running.values() if t.alone]
        innocent = [t for t in self.running.values() if not t.alone]
        for ticket in innocent:
            ticket.alone = True
        self.waiting.extendleft(reversed(innocent))
        self.running.clear()
        return guilty

    def forget(self, request_id: str) -> Ticket | None:
        """Take a ticket out, wherever it is."""
        ticket = self.running.pop(request_id, None)
        if ticket is None:
            ticket = next((t for t in self.waiting if t.request.request_id == request_id), None)
            if ticket is not None:
                self.waiting.remove(ticket)
        return ticket
