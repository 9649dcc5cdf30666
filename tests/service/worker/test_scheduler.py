from concurrent.futures import Future

from model.decoding.request import ListRequest
from service.worker.scheduler import Scheduler, Ticket


def ticket(name: str, deadline: float = 100.0) -> Ticket:
    return Ticket(ListRequest(name, ((0,),), 1, deadline=deadline), Future(), submitted=0.0)


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
