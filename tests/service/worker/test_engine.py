import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from model.decoding.list_decoder import ListDecoder
from model.decoding.request import InvalidRequest, ListRequest, ListResult, RoundStats
from model.decoding.topology import Budget
from service.worker.engine import (
    DeadlineExceeded,
    Engine,
    EngineDraining,
    EngineFailed,
    EngineOverloaded,
    RequestCancelled,
)
from tests.model.conftest import Tiny, tiny

__all__ = ["tiny"]


class PoisonedDecoder(ListDecoder):
    """Raises in every round that a request called "poison" takes part in."""

    def round(self) -> tuple[list[ListResult], RoundStats]:
        if any(self.rows.row(i).request.request_id == "poison" for i in self.rows.in_use):
            raise RuntimeError("poisoned")
        return super().round()


class SlowDecoder(ListDecoder):
    """Takes its time over every round."""

    def round(self) -> tuple[list[ListResult], RoundStats]:
        time.sleep(0.05)
        return super().round()


def decoder(tiny: Tiny, kind: Callable[..., ListDecoder] = ListDecoder, num_rows: int = 4) -> ListDecoder:
    return kind(
        tiny.target,
        tiny.draft(),
        tiny.trie,
        tiny.catalog,
        num_rows=num_rows,
        max_history_items=6,
        max_k=20,
        budget=lambda rows: Budget(3),
    )


@contextmanager
def running(made: ListDecoder, max_waiting: int = 64) -> Iterator[tuple[Engine, list[RoundStats | ListResult]]]:
    seen: list[RoundStats | ListResult] = []
    engine = Engine(made, max_waiting=max_waiting, observe=seen.append)
    engine.start()
    until(lambda: engine.status().ready)
    try:
        yield engine, seen
    finally:
        engine.stop()
        assert not engine.status().alive


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, "waited too long"
        time.sleep(0.002)


def request(tiny: Tiny, name: str, k: int = 5, deadline: float = float("inf")) -> ListRequest:
    return ListRequest(name, (tiny.codes[len(name)], tiny.codes[k]), k, deadline=deadline)


def test_every_request_gets_its_own_right_list(tiny: Tiny) -> None:
    requests = [request(tiny, f"r{i}", k=1 + i % 7) for i in range(30)]
    with running(decoder(tiny)) as (engine, seen):
        futures = [engine.submit(r) for r in requests]
        for asked, future in zip(requests, futures, strict=True):
            result = future.result(timeout=30)
            assert result.request_id == asked.request_id
            assert [i.codes for i in result.items] == [i.codes for i in tiny.twin(asked).items]
            assert result.queue_seconds >= 0
    assert sum(isinstance(s, ListResult) for s in seen) == 30
    assert max(s.rows for s in seen if isinstance(s, RoundStats)) > 1


def test_a_poisoned_request_fails_alone(tiny: Tiny) -> None:
    mates = [request(tiny, f"mate{i}") for i in range(6)]
    with running(decoder(tiny, PoisonedDecoder)) as (engine, _):
        futures = [engine.submit(r) for r in (*mates[:3], request(tiny, "poison"), *mates[3:])]
        poison = futures.pop(3)
        with pytest.raises(EngineFailed):
            poison.result(timeout=30)
        for mate, future in zip(mates, futures, strict=True):
            assert [i.codes for i in future.result(timeout=30).items] == [i.codes for i in tiny.twin(mate).items]
        assert engine.submit(request(tiny, "after")).result(timeout=30).items


def test_bad_content_fails_alone_and_names_the_field(tiny: Tiny) -> None:
    with running(decoder(tiny)) as (engine, _):
        good, bad = engine.submit(request(tiny, "good")), engine.submit(request(tiny, "bad", k=21))
        with pytest.raises(InvalidRequest, match="/k"):
            bad.result(timeout=30)
        assert good.result(timeout=30).items


def test_what_is_late_is_dropped_wherever_it_is(tiny: Tiny) -> None:
    with running(decoder(tiny, SlowDecoder, num_rows=1)) as (engine, _):
        soon = time.monotonic() + 0.12
        runs, waits = engine.submit(request(tiny, "a", 20, soon)), engine.submit(request(tiny, "b", 20, soon))
        for future in (runs, waits):
            with pytest.raises(DeadlineExceeded):
                future.result(timeout=5)
        until(lambda: engine.decoder.rows.num_free == 1)


def test_a_cancelled_request_frees_its_row(tiny: Tiny) -> None:
    with running(decoder(tiny, SlowDecoder, num_rows=1)) as (engine, _):
        future = engine.submit(request(tiny, "leaves", 20))
        until(lambda: engine.status().running == 1)
        engine.cancel("leaves")
        with pytest.raises(RequestCancelled):
            future.result(timeout=5)
        until(lambda: engine.decoder.rows.num_free == 1)
        assert engine.submit(request(tiny, "next", 1)).result(timeout=10).items


def test_a_full_line_refuses_and_says_when_to_come_back(tiny: Tiny) -> None:
    with running(decoder(tiny, SlowDecoder, num_rows=1), max_waiting=2) as (engine, _):
        first = engine.submit(request(tiny, "first", 20))
        until(lambda: engine.status().running == 1)
        waiting = [engine.submit(request(tiny, f"r{i}", 20)) for i in range(2)]
        with pytest.raises(EngineOverloaded) as caught:
            engine.submit(request(tiny, "one too many", 20))
        assert caught.value.retry_after > 0
        assert all(future.result(timeout=30).items for future in (first, *waiting))


def test_draining_finishes_what_it_has_and_takes_nothing_new(tiny: Tiny) -> None:
    with running(decoder(tiny)) as (engine, _):
        futures = [engine.submit(request(tiny, f"r{i}")) for i in range(6)]
        assert engine.drain(timeout=30)
        assert all(f.done() and f.result().items for f in futures)
        assert not engine.status().ready
        with pytest.raises(EngineDraining):
            engine.submit(request(tiny, "too late"))


def test_stopping_answers_everybody(tiny: Tiny) -> None:
    made = decoder(tiny, SlowDecoder, num_rows=1)
    with running(made) as (engine, _):
        futures = [engine.submit(request(tiny, f"r{i}", 20)) for i in range(3)]
    assert all(isinstance(f.exception(timeout=1), EngineDraining) for f in futures)


def test_a_client_that_cancels_its_future_stops_nothing(tiny: Tiny) -> None:
    with running(decoder(tiny)) as (engine, _):
        future = engine.submit(request(tiny, "gone", 20))
        future.cancel()
        assert engine.submit(request(tiny, "stays")).result(timeout=30).items
