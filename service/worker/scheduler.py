"""Scheduler: who waits, who runs next, who is too late. Knows tickets and times; no tensors, threads or sockets.

First come, first served; a ticket whose deadline has passed never reaches a row. Tickets that were in a round which
failed run alone, so that only the one at fault fails.
"""

import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from model.decoding.request import ListResult
from model.decoding.strategies import Asked


@dataclass
class Ticket:
    """One accepted request. `submitted` in seconds of `time.monotonic()`; `alone`: suspected of breaking rounds."""

    request: Asked
    future: Future[ListResult]
    submitted: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    alone: bool = False

    def late(self, now: float) -> bool:
        return now >= self.request.deadline


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
