import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from model.catalog import Catalog
from model.decoding.catalog_index import CatalogIndex
from model.decoding.filters import compile_stock
from model.decoding.list_decoder import ListDecoder
from model.decoding.request import InvalidRequest, ListRequest, ListResult, RoundStats
from model.decoding.topology import Budget, FixedBudget
from service.worker.engine import (
    DOUBT,
    DeadlineExceeded,
    Edition,
    EditionRefused,
    Engine,
    EngineDraining,
    EngineFailed,
    EngineOverloaded,
    OtherEdition,
    RequestCancelled,
)
from tests.model.conftest import Tiny, random_catalog, tiny

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
        budget=FixedBudget(Budget(3)),
    )


@contextmanager
def running(
    made: ListDecoder, max_waiting: int = 64, **options: Any
) -> Iterator[tuple[Engine, list[RoundStats | ListResult]]]:
    seen: list[RoundStats | ListResult] = []
    engine = Engine(made, max_waiting=max_waiting, observe=seen.append, **options)
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


def test_a_request_that_the_line_would_keep_past_its_deadline_is_refused_at_once(tiny: Tiny) -> None:
    golden = [request(tiny, "golden", 10)]
    with running(decoder(tiny, SlowDecoder, num_rows=1), golden=golden) as (engine, _):
        lonely = time.monotonic() + 0.01
        # With a row free it is tried, however little time it has: a wrong prediction must not last.
        with pytest.raises(DeadlineExceeded):
            engine.submit(request(tiny, "alone", 20, lonely)).result(timeout=5)
        until(lambda: engine.status().running == 0)
        first = engine.submit(request(tiny, "first", 20))
        until(lambda: engine.status().running == 1)
        with pytest.raises(EngineOverloaded) as caught:
            engine.submit(request(tiny, "hurried", 20, time.monotonic() + 0.05))
        assert caught.value.reason == "deadline"
        patient = engine.submit(request(tiny, "patient", 20, time.monotonic() + 60))
        with pytest.raises(EngineOverloaded) as later:
            engine.submit(request(tiny, "hurried", 20, time.monotonic() + 0.05))
        assert later.value.retry_after > caught.value.retry_after > 0
        assert first.result(timeout=30).items
        assert patient.result(timeout=30).items


def test_a_row_too_many_that_would_make_everybody_late_is_refused_and_tried_now_and_then(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.worker.engine.TRY_SECONDS", 0.2)
    golden = [request(tiny, "golden", 10)]
    with running(decoder(tiny, SlowDecoder, num_rows=3), golden=golden) as (engine, _):
        first = engine.submit(request(tiny, "first", 20))
        until(lambda: engine.status().running == 1)
        soon = time.monotonic() + 0.05
        tried = engine.submit(request(tiny, "tried", 20, soon))
        with pytest.raises(EngineOverloaded) as caught:
            engine.submit(request(tiny, "late", 20, soon))
        assert caught.value.reason == "deadline"
        assert engine.submit(request(tiny, "patient", 20, time.monotonic() + 60)).result(timeout=30).items
        with pytest.raises(DeadlineExceeded):
            tried.result(timeout=5)
        assert first.result(timeout=30).items
        second = engine.submit(request(tiny, "second", 20))
        time.sleep(0.25)
        engine.submit(request(tiny, "tried again", 20, time.monotonic() + 0.05))
        assert second.result(timeout=30).items


def test_a_request_that_would_only_just_be_in_time_is_refused(tiny: Tiny) -> None:
    """Predictions are sometimes wrong, and a list that comes late has cost as much as one in time."""
    golden = [request(tiny, "golden", 10)]
    with running(decoder(tiny, SlowDecoder, num_rows=3), golden=golden) as (engine, _):
        first = engine.submit(request(tiny, "first", 20))
        until(lambda: engine.status().running == 1)
        tried = engine.submit(request(tiny, "tried", 20, time.monotonic() + 0.01))
        with pytest.raises(DeadlineExceeded):
            tried.result(timeout=5)
        stay = engine.pace.stay(request(tiny, "another", 20), 2)
        with pytest.raises(EngineOverloaded, match="deadline"):
            engine.submit(request(tiny, "close", 20, time.monotonic() + (1 + DOUBT) / 2 * stay))
        engine.submit(request(tiny, "well", 20, time.monotonic() + 10 * stay)).result(timeout=30)
        assert first.result(timeout=30).items


def test_the_line_is_bounded_in_work_too(tiny: Tiny) -> None:
    golden = [request(tiny, "golden", 10)]
    with running(decoder(tiny, SlowDecoder, num_rows=1), golden=golden, max_wait_seconds=0.3) as (engine, _):
        futures = []
        while engine.status().wait_seconds <= 0.3:
            futures.append(engine.submit(request(tiny, f"r{len(futures)}", 20)))
        with pytest.raises(EngineOverloaded) as caught:
            engine.submit(request(tiny, "too much", 20))
        assert caught.value.reason == "work"
        assert all(future.result(timeout=30).items for future in futures)


def edition(tiny: Tiny, catalog: Catalog, kind: Callable[..., ListDecoder] = ListDecoder) -> tuple[Edition, Tiny]:
    """Another catalog as an edition, and the twin's view of it."""
    index = CatalogIndex.build(catalog, catalog.version, tiny.target.vocabulary)
    other = Tiny(catalog, index.trie, tiny.target, [item.codes for item in catalog.items])
    return Edition(catalog.version, decoder(other, kind, num_rows=2), index.golden_requests(6, 6)), other


def test_requests_in_flight_finish_on_their_catalog_and_new_ones_get_the_new_one(tiny: Tiny) -> None:
    new, other = edition(tiny, random_catalog(9), SlowDecoder)
    with running(decoder(tiny, SlowDecoder, num_rows=2), version="old") as (engine, _):
        # Two run and two wait while the catalog changes under them.
        asked = [ListRequest(f"old{i}", (tiny.codes[i],), 12) for i in range(4)]
        futures = [engine.submit(r, "old") for r in asked]
        engine.offer(new).result(timeout=30)
        assert engine.catalog_version == new.version
        fresh = [ListRequest(f"new{i}", (other.codes[i],), 12) for i in range(3)]
        new_futures = [engine.submit(r, new.version) for r in fresh]
        straggler = ListRequest("straggler", (tiny.codes[0],), 3)
        late = engine.submit(straggler, "old")
        for twin, requests, waited in ((tiny, [*asked, straggler], [*futures, late]), (other, fresh, new_futures)):
            for r, future in zip(requests, waited, strict=True):
                assert [i.codes for i in future.result(timeout=30).items] == [i.codes for i in twin.twin(r).items]
        with pytest.raises(OtherEdition) as caught:
            engine.submit(straggler, "nobody's")
        assert caught.value.version == new.version


def test_an_old_catalog_is_let_go_once_nobody_uses_it(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.worker.engine.LINGER_SECONDS", 0.0)
    new, _ = edition(tiny, random_catalog(9))
    with running(decoder(tiny, SlowDecoder, num_rows=2), version="old") as (engine, _):
        future = engine.submit(request(tiny, "in flight", 12), "old")
        engine.offer(new).result(timeout=30)
        with pytest.raises(OtherEdition):
            engine.submit(request(tiny, "too late", 12), "old")
        assert future.result(timeout=30).items
        engine.submit(ListRequest("next", (new.golden[0].history), 2)).result(timeout=30)
        until(lambda: len(engine.editions) == 1)
        assert engine.editions == [new]


@pytest.mark.parametrize("how", ["raises", "repeats", "nonsense"])
def test_a_catalog_that_fails_its_trial_is_refused_and_the_old_one_served(tiny: Tiny, how: str) -> None:
    class Broken(ListDecoder):
        def round(self) -> tuple[list[ListResult], RoundStats]:
            if how == "raises":
                raise RuntimeError("broken")
            results, stats = super().round()
            spoiled = [
                replace(r, items=r.items[:1] * 2 if how == "repeats" else (replace(r.items[0], score=float("nan")),))
                for r in results
            ]
            return spoiled, stats

    new, _ = edition(tiny, random_catalog(9), Broken)
    with running(decoder(tiny), version="old") as (engine, _):
        with pytest.raises(EditionRefused):
            engine.offer(new).result(timeout=30)
        assert engine.catalog_version == "old"
        asked = request(tiny, "after")
        assert [i.codes for i in engine.submit(asked, "old").result(timeout=30).items] == [
            i.codes for i in tiny.twin(asked).items
        ]
        good, _ = edition(tiny, random_catalog(9))
        engine.offer(good).result(timeout=30)
        assert engine.catalog_version == good.version


def test_stock_changes_between_rounds_for_new_requests_only(tiny: Tiny) -> None:
    with running(decoder(tiny, SlowDecoder, num_rows=2), version="v") as (engine, _):
        asked = request(tiny, "before", 10)
        expected = [i.codes for i in tiny.twin(asked).items]
        future = engine.submit(asked, "v")
        until(lambda: engine.status().running == 1)
        engine.set_stock("v", compile_stock(tiny.trie, tiny.trie.leaves(np.array(expected[:4]))))
        after = replace(asked, request_id="after")
        new = engine.submit(after, "v").result(timeout=30)
        twin = tiny.twin(replace(after, exclude=tuple(expected[:4])))
        assert [i.codes for i in new.items] == [i.codes for i in twin.items]
        assert [i.codes for i in future.result(timeout=30).items] == expected
