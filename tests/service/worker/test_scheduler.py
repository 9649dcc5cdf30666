from concurrent.futures import Future
from typing import Any, cast

import pytest

from model.decoding.beam_request import BeamRequest
from model.decoding.request import ListRequest
from service.worker.scheduler import Pace, Scheduler, Ticket

EDITION = cast(Any, None)  # the scheduler hands it on and never looks


def ticket(name: str, deadline: float = 100.0) -> Ticket:
    return Ticket(ListRequest(name, ((0,),), 1, deadline=deadline), Future(), EDITION, submitted=0.0)


def names(tickets: list[Ticket]) -> list[str]:
    return [t.request.request_id for t in tickets]


def scheduler(*tickets: Ticket) -> Scheduler:
    made = Scheduler(max_waiting=3)
    made.waiting.extend(tickets)
    return made


def test_first_come_first_served_into_free_rows() -> None:
    line = scheduler(ticket("a"), ticket("b"), ticket("c"))
    assert line.is_full
    assert names(line.admit(2, now=1.0)) == ["a", "b"]
    assert set(line.running) == {"a", "b"}
    assert line.oldest_wait(now=5.0) == 5.0
    assert not line.is_full


def test_late_tickets_leave_wherever_they_are() -> None:
    line = scheduler(ticket("runs", 10.0), ticket("waits", 5.0), ticket("has time", 50.0))
    line.admit(1, now=0.0)
    assert sorted(names(line.expired(now=10.0))) == ["runs", "waits"]
    assert names(list(line.waiting)) == ["has time"]
    assert not line.running


def test_after_a_failed_round_everybody_runs_alone_and_only_the_guilty_fails() -> None:
    line = scheduler(ticket("a"), ticket("b"), ticket("new"))
    line.admit(2, now=0.0)
    assert line.suspect_all() == []
    assert names(line.admit(4, now=1.0)) == ["a"]
    assert names(line.suspect_all()) == ["a"]
    assert names(line.admit(4, now=2.0)) == ["b"]
    assert line.admit(4, now=3.0) == []
    line.forget("b")
    assert names(line.admit(4, now=4.0)) == ["new"]


def test_forgetting_what_is_not_there_is_nothing() -> None:
    assert scheduler().forget("nobody") is None


def test_a_newcomer_waits_for_the_work_before_him_and_not_where_a_row_is_free() -> None:
    pace = Pace()
    pace.prompts(2, 0.2)
    pace.round(False, 2, 10, 5.0)  # half a second an item, a tenth a prompt
    line = scheduler(ticket("a"), ticket("b"))
    assert line.wait_seconds(3, pace) == 0.0
    assert line.wait_seconds(2, pace) == pytest.approx(2 * 0.6)
    line.admit(2, now=0.0)
    assert line.wait_seconds(2, pace) == pytest.approx(0.6)
    line.waiting.append(ticket("c"))
    assert line.wait_seconds(2, pace) == pytest.approx(1.2)
    assert pace.stay(ListRequest("d", ((0,),), 4), 2) == pytest.approx(2 * (0.1 + 4 * 0.5))


def test_lists_and_beams_are_paced_apart() -> None:
    pace = Pace()
    pace.round(False, 1, 10, 5.0)
    assert pace.stay(BeamRequest("b", ((0,),), 10), 1) == 0.0
    pace.round(True, 1, 10, 0.1)
    assert pace.stay(BeamRequest("b", ((0,),), 10), 1) == pytest.approx(0.1)
    assert pace.stay(ListRequest("l", ((0,),), 10), 1) == pytest.approx(5.0)


def test_pace_is_learned_by_load_and_borrowed_where_nothing_was_seen() -> None:
    pace = Pace()
    assert pace.item_seconds(False, 8) == 0.0
    for _ in range(100):
        pace.round(False, 1, 1, 1.0)
        pace.round(False, 8, 8, 2.0)
    assert pace.item_seconds(False, 1) == pace.item_seconds(False, 4) == pytest.approx(1.0)
    assert pace.item_seconds(False, 8) == pace.item_seconds(False, 32) == pytest.approx(0.25)
    for _ in range(1000):
        pace.round(False, 8, 8, 4.0)
    assert pace.item_seconds(False, 8) == pytest.approx(0.5, rel=0.01)
