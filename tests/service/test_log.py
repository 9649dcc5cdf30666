"""Log lines are JSON objects that name process and request; crashes are logged without their message."""

import json
import logging
from collections.abc import Iterator

import pytest

from service.log import JsonFormatter, configure_logging, crash_fields, request_id


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    kept, level = root.handlers[:], root.level
    yield
    root.handlers[:] = kept
    root.setLevel(level)


def test_a_line_holds_time_level_process_message_and_extra_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "worker")
    token = request_id.set("r1")
    logging.getLogger("padrec.x").info("did %s", "it", extra={"rounds": 3})
    request_id.reset(token)
    logging.getLogger("padrec.x").debug("not this")
    entry = json.loads(capsys.readouterr().err)
    assert entry.pop("time").endswith("Z")
    assert entry == {
        "level": "info",
        "process": "worker",
        "logger": "padrec.x",
        "message": "did it",
        "request_id": "r1",
        "rounds": 3,
    }


def test_an_exception_is_one_line_too() -> None:
    try:
        raise ValueError("broken\nthing")
    except ValueError as exc:
        record = logging.getLogger("x").makeRecord("x", 40, "f", 1, "m", (), (type(exc), exc, None))
    line = JsonFormatter("api").format(record)
    assert "\n" not in line
    assert "broken" in json.loads(line)["exception"]


def test_a_crash_is_told_by_type_and_place_only() -> None:
    try:
        raise ValueError("history: i1, i2")
    except ValueError as exc:
        fields = crash_fields(exc)
    assert fields["error"] == "ValueError"
    assert "test_a_crash_is_told" in fields["frames"][0]
    assert "i1" not in str(fields).replace(__file__, "")
