"""The shadow sample writes lists again without speculation, counts what differs, and never takes a request's place."""

import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from model.decoding.beam_request import BeamRequest
from model.decoding.request import ListRequest, ListResult, SpeculationStats
from model.decoding.strategies import Asked
from service.metrics import WorkerMetrics
from service.worker.engine import Engine, EngineDraining, EngineFailed, EngineStatus
from service.worker.shadow import Shadow
from tests.model.conftest import Tiny, tiny
from tests.service.worker.test_engine import decoder, until

__all__ = ["tiny"]

RESULTS = ("same", "different", "skipped", "failed")


class Line:
    """An engine that holds what it is given."""

    def __init__(self, waiting: int = 0, refuse: bool = False) -> None:
        self.waiting, self.refuse = waiting, refuse
        self.held: list[tuple[Asked, Future[ListResult]]] = []

    def submit(self, request: Asked, catalog_version: str) -> Future[ListResult]:
        if self.refuse:
            raise EngineDraining("going")
        self.held.append((request, Future()))
        return self.held[-1][1]

    def status(self) -> EngineStatus:
        return EngineStatus(True, True, 0, self.waiting, 0.0, 0.0)


ASKED = ListRequest("r", ((0, 0, 0, 0),), 3, deadline=1.0)
ANSWER = ListResult("r", (), SpeculationStats(), 1)


def shadow(engine: Any, percent: float = 100.0) -> tuple[Shadow, CollectorRegistry]:
    registry = CollectorRegistry()
    return Shadow(engine, percent, WorkerMetrics(registry)), registry


def counts(registry: CollectorRegistry) -> dict[str, float]:
    found = {r: registry.get_sample_value("padrec_shadow_lists_total", {"result": r}) for r in RESULTS}
    return {result: count for result, count in found.items() if count}


def test_a_list_is_the_same_without_speculation_and_counted_so(tiny: Tiny) -> None:
    made = decoder(tiny)
    engine = Engine(made, max_waiting=8, observe=lambda seen: None)
    engine.start()
    until(lambda: engine.status().ready)
    try:
        looking, registry = shadow(engine)
        asked = ListRequest("r", tuple(tiny.codes[:4]), 8, deadline=time.monotonic() + 30)
        for temperature in (0.0, 0.8):
            drawn = replace(asked, temperature=temperature, seed=1)
            answer = engine.submit(drawn).result(30)
            before = counts(registry).get("same", 0)
            looking.look(drawn, answer, engine.catalog_version)
            until(lambda before=before: counts(registry).get("same", 0) == before + 1)
        spoilt = replace(answer, items=answer.items[::-1])
        looking.look(replace(asked, temperature=0.8, seed=1), spoilt, engine.catalog_version)
        until(lambda: counts(registry) == {"same": 2, "different": 1})
    finally:
        engine.stop()


def test_exact_beams_are_searched_again_too() -> None:
    line = Line()
    looking, registry = shadow(line)
    looking.look(BeamRequest("b", ((0, 0, 0, 0),), 3), ANSWER, "v")
    ((again, future),) = line.held
    assert isinstance(again, BeamRequest) and not again.speculation
    future.set_result(ANSWER)
    assert counts(registry) == {"same": 1}


def test_the_second_writing_has_a_name_and_a_time_of_its_own_and_no_speculation() -> None:
    line = Line()
    shadow(line)[0].look(ASKED, ANSWER, "v")
    ((again, _),) = line.held
    assert again.request_id != ASKED.request_id and not again.speculation
    assert again.deadline > time.monotonic()
    assert replace(again, request_id="r", speculation=True, deadline=1.0) == ASKED


@pytest.mark.parametrize(
    "asked",
    [
        replace(ASKED, speculation=False),
        replace(ASKED, temperature=1.0),
        BeamRequest("b", ((0, 0, 0, 0),), 3, verification="relaxed"),
    ],
    ids=["plain", "drawn without a seed", "relaxed beams"],
)
def test_what_cannot_be_compared_is_not_written_again(asked: Asked) -> None:
    line = Line()
    looking, registry = shadow(line)
    looking.look(asked, ANSWER, "v")
    assert not line.held and not counts(registry)


def test_a_shadow_waits_for_no_row_that_a_request_waits_for() -> None:
    looking, registry = shadow(Line(waiting=1))
    looking.look(ASKED, ANSWER, "v")
    assert counts(registry) == {"skipped": 1}


def test_one_shadow_runs_at_a_time() -> None:
    line = Line()
    looking, registry = shadow(line)
    looking.look(ASKED, ANSWER, "v")
    looking.look(ASKED, ANSWER, "v")
    assert len(line.held) == 1 and counts(registry) == {"skipped": 1}
    line.held[0][1].set_result(ANSWER)
    looking.look(ASKED, ANSWER, "v")
    assert len(line.held) == 2 and counts(registry) == {"skipped": 1, "same": 1}


def test_a_shadow_that_fails_or_is_refused_is_counted_and_the_next_one_runs() -> None:
    line = Line()
    looking, registry = shadow(line)
    looking.look(ASKED, ANSWER, "v")
    line.held[0][1].set_exception(EngineFailed("poisoned"))
    line.refuse = True
    looking.look(ASKED, ANSWER, "v")
    line.refuse = False
    looking.look(ASKED, ANSWER, "v")
    assert counts(registry) == {"failed": 1, "skipped": 1} and len(line.held) == 2


def test_none_is_written_again_unless_asked_for() -> None:
    line = Line()
    looking, registry = shadow(line, percent=0.0)
    for _ in range(100):
        looking.look(ASKED, ANSWER, "v")
    assert not line.held and not counts(registry)
