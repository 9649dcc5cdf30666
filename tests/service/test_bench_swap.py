"""The measurement of a catalog swap runs end to end: a worker process takes up what is published while it is asked."""

import json
from pathlib import Path

from service.api.catalog_file import CatalogFile
from service.bench_swap import grown, main
from tests.service.tiny_bundle import write_bundle


def test_a_swap_is_seen_and_measured(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "tiny")
    path = tmp_path / "swap.json"
    assert main(["--bundle", str(bundle), "--items", "300", "--seconds", "0.5", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["items"] == 300
    assert found["seconds_to_swap"] > 0
    assert found["failed"] == 0
    for part in ("before", "swapping"):
        assert found[part]["requests"] > 0
        assert 0 < found[part]["median"] <= found[part]["p99"] <= found[part]["slowest"]


def test_a_grown_catalog_keeps_its_items_and_adds_distinct_ones(tmp_path: Path) -> None:
    small = CatalogFile.load(write_bundle(tmp_path / "tiny") / "catalog.jsonl")
    path = tmp_path / "grown.jsonl"
    path.write_text("\n".join(grown(small, 400)))
    large = CatalogFile.load(path)
    assert len(large.by_codes) == large.header.num_items == 400
    assert small.by_codes.items() <= large.by_codes.items()
    assert large.header.codebook_sizes == small.header.codebook_sizes
