"""The measurement of a catalog in Redis runs end to end, on a catalog small enough for a test."""

import json
from pathlib import Path

import pytest

from service.bench_redis import main, synthetic_catalog


def test_measures_memory_and_lookups_of_what_was_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "redis.json"
    assert main(["--items", "2000", "5000", "--lookups", "5", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found
    assert [each["items"] for each in found] == [2000, 5000]
    for each in found:
        assert 30 < each["bytes_per_item"] < 250  # of few items, what a version costs as a whole is the larger part
        assert 0 < each["lookup_ms"]["p50"] <= each["lookup_ms"]["p99"]


def test_the_synthetic_catalog_is_distinct_and_of_the_size_asked_for() -> None:
    header, *items = (json.loads(line) for line in synthetic_catalog(3000, 300))
    assert header["codebook_sizes"] == [300] * 4
    assert len(items) == len({tuple(i["codes"]) for i in items}) == len({i["item_id"] for i in items}) == 3000
