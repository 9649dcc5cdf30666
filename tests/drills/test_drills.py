"""The short subset of the drills that every test run makes, with a tiny bundle: what must hold on any machine.

Times are measured and not judged here; `make drills` judges them.
"""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.drills.drills import DRILLS, Drill, corruption, fault, parent_killed, poison
from tests.drills.redis_between import reply
from tests.drills.run import line
from tests.load.open_loop import Answer
from tests.service.tiny_bundle import write_bundle

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")

GOOD = Answer(0, 0.0, 0.1, 200, ("1", "2"), "model")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.mark.parametrize("run", [poison, corruption, parent_killed], ids=lambda run: run.__name__)
def test_what_must_hold_on_any_machine_holds(run: Callable[[Drill], None], bundle: Path, tmp_path: Path) -> None:
    drill = Drill(bundle, rate=20, scale=0.25, deadline_ms=30_000, data=tmp_path / "none")
    run(drill)
    assert drill.criteria
    missed = [line(each) for each in drill.criteria if not each.ok and not each.timed]
    assert not missed, "\n".join(missed)


def test_there_are_fourteen_and_each_says_what_it_is() -> None:
    assert [int((run.__doc__ or "").split(".")[0]) for run in DRILLS] == list(range(1, 15))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (GOOD, ""),
        (Answer(0, 0.0, 0.1, 200, ("1", "1"), "model"), "an item twice"),
        (Answer(0, 0.0, 0.1, 200, ("1", "9"), "model"), "an item the catalog does not hold"),
        (Answer(0, 0.0, 0.1, 200, (), "model"), "no items"),
        (Answer(0, 0.0, 0.1, 200, ("1",), "popular"), "a fallback that does not say so"),
        (Answer(0, 0.0, 0.1, 200, ("1",), "popular", degraded=("deadline",)), ""),
        (Answer(0, 0.0, 0.1, 500, problem="urn:x"), "status 500 urn:x"),
        (Answer(0, 0.0, 0.1, 503, problem="urn:x"), "status 503 urn:x"),
        (Answer(0, 0.0, 0.1, 0, problem="ReadTimeout"), "status 0 ReadTimeout"),
    ],
)
def test_no_fault_is_overlooked(answer: Answer, why: str) -> None:
    assert fault(answer, {"1", "2"}, may_refuse=False) == why


def test_a_refusal_is_no_fault_where_refusing_is_the_point() -> None:
    refusal = Answer(0, 0.0, 0.1, 503, problem="urn:padrec:problem:overloaded")
    assert fault(refusal, set(), may_refuse=True) == ""
    assert fault(Answer(0, 0.0, 0.1, 500), set(), may_refuse=True) == "status 500"


def test_a_missed_criterion_is_counted_whatever_its_kind(bundle: Path, tmp_path: Path) -> None:
    drill = Drill(bundle, data=tmp_path / "none")
    drill.at_most("a", 2, 1)
    drill.at_least("b", 2, 1)
    drill.equal("c", "x", "y")
    assert [each.ok for each in drill.criteria] == [False, True, False]


def test_information_is_told_and_never_missed(bundle: Path, tmp_path: Path) -> None:
    drill = Drill(bundle, data=tmp_path / "none")
    drill.tell("a", "7 s")
    assert drill.criteria[0].ok
    assert line(drill.criteria[0]).split() == ["a", "7", "s"]


async def test_replies_of_redis_are_told_apart() -> None:
    replies = [b"+OK\r\n", b"$4\r\na\r\nb\r\n", b"*3\r\n$-1\r\n:1\r\n*1\r\n$1\r\na\r\n", b"*-1\r\n"]
    reader = asyncio.StreamReader()
    reader.feed_data(b"".join(replies))
    reader.feed_eof()
    assert [await reply(reader) for _ in replies] == replies
    assert await reply(reader) == b""
