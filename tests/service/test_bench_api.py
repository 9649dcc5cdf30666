"""The API's benchmark drives a real API over a stub that speaks the worker's wire."""

import json
from pathlib import Path

import pytest

from service.bench_api import encoded, main
from service.movielens import BUNDLE


def test_an_api_process_answers_from_the_stub_and_its_own_time_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "api.json"
    arguments = ["--concurrency", "1", "4", "--seconds", "0.5", "--worker-ms", "1", "--json", str(path)]
    assert main(["--bundle", str(BUNDLE), *arguments]) == 0
    records = json.loads(path.read_text())
    assert [record["concurrency"] for record in records] == [1, 4]
    for record in records:
        assert record["requests"] > 0 and record["errors"] == 0
        assert 1.0 <= record["p50_ms"] <= record["p99_ms"]
        assert 0 < record["api_added_p50_ms"] < record["p99_ms"]
        assert record["api_cpu_ms"] >= 0
        assert record["api_memory_mib"] > 10
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_request_on_the_wire_says_how_long_it_is() -> None:
    ((head, _, body),) = (request.partition(b"\r\n\r\n") for request in encoded([["1", "2"]]))
    assert f"content-length: {len(body)}".encode() in head
    assert json.loads(body)["history"] == ["1", "2"]
