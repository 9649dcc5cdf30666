import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.bench.gpu import (
    catalog_requests,
    compared,
    copy_bandwidth,
    held_out_requests,
    main,
    twin_lists,
    weight_bytes,
)
from model.bench.sessions import MAX_HISTORY_ITEMS, NEXT, TINY, Sessions, list_tokens, new_target
from model.bundle import Bundle, load_bundle
from model.decoding.request import ListResult
from model.semantic_id import Vocabulary
from model.target import Target

KEYS = {"batch", "variant", "graphs", "ms_per_list", "lists_per_second", "ratio_to_plain", "ms_per_round"}
KEYS |= {"fraction_of_floor", "rounds", "acceptance_length", "identical", "near_ties", "mismatches", "programs"}
KEYS |= {"device", "date", "torch", "dtype", "weight_bytes", "copy_bytes_per_second", "widest_margin", "compared"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    assert main(["--folder", str(folder), "--train-only"]) == 0
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return load_bundle(folder / "bundle-cpu")


def test_a_run_without_a_gpu_says_so_and_still_measures_and_compares(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = (folder / "bundle-cpu" / "manifest.json").read_text()
    path = tmp_path / "records.json"
    options = ["--batch", "2", "--lists", "4", "--checked", "4", "--repeats", "1", "--json", str(path)]
    assert main(["--folder", str(folder), *options]) == 0
    assert "not GPU figures" in capsys.readouterr().out
    assert (folder / "bundle-cpu" / "manifest.json").read_text() == bundle, "trained a second time"
    records = json.loads(path.read_text())
    assert [r["variant"] for r in records] == ["plain", "plain-forced", "draft", "padrec", "plain", "padrec"]
    for record in records:
        assert record.keys() >= KEYS
        assert record["compared"] == record["identical"] + record["near_ties"] == 4
        assert record["mismatches"] == record["invalid"] == record["repeated"] == record["excluded"] == 0
        assert "not GPU figures" in record["device"]
        assert record["fraction_of_floor"] > 0


def test_a_folder_that_holds_no_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundle", str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err


def test_a_profile_names_both_variants(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.txt"
    assert main(["--folder", str(folder), "--batch", "1", "--lists", "1", "--profile", str(path)]) == 0
    text = path.read_text()
    assert "padrec" in text and "plain" in text
    assert "aten::" in text


def test_lists_part_at_near_ties_or_count_as_mismatches(bundle: Bundle) -> None:
    requests = held_out_requests(bundle, 2, 3)
    twins = twin_lists(bundle, requests)
    results: dict[str, ListResult] = {name: result for name, (result, _) in twins.items()}
    same = compared(bundle, requests, results, twins, 1e-4)
    assert (same["identical"], same["near_ties"], same["mismatches"], same["widest_margin"]) == (2, 0, 0, 0.0)
    first, margins = twins["gpu-0"]
    swapped = replace(first, items=(first.items[0], first.items[2], first.items[1]))
    parted = bundle.target.vocabulary.num_levels + next(
        i for i, (a, b) in enumerate(zip(first.items[1].codes, first.items[2].codes, strict=True)) if a != b
    )
    for margin, near_ties in ((1e-5, 1), (1.0, 0)):
        close = {**twins, "gpu-0": (first, [margin if i == parted else 9.0 for i in range(len(margins))])}
        found = compared(bundle, requests, {**results, "gpu-0": swapped}, close, 1e-4)
        assert (found["identical"], found["near_ties"], found["mismatches"]) == (1, near_ties, 1 - near_ties)
        assert found["widest_margin"] == pytest.approx(margin, abs=1e-4)
    short = compared(bundle, requests, {**results, "gpu-0": replace(first, items=first.items[:2])}, twins, 1e-4)
    assert short["mismatches"] == 1
    twice = replace(first, items=(first.items[0],) * 3)
    assert compared(bundle, requests, {**results, "gpu-0": twice}, twins, 1e-4)["repeated"] == 2


def test_requests_are_the_sessions_kept_from_training_or_the_catalogs(bundle: Bundle) -> None:
    kept = bundle.info.report["held_out_histories"]
    requests = held_out_requests(bundle, len(kept) + 1, 4)
    assert [list(map(list, r.history)) for r in requests] == [*kept, kept[0]]
    assert len({r.request_id for r in requests}) == len(requests)
    stranger = replace(bundle, info=replace(bundle.info, report={}))
    assert held_out_requests(stranger, 3, 4) == catalog_requests(bundle, 3, 4)


def test_the_weights_of_a_pass_are_those_of_the_layers_and_the_head(bundle: Bundle, folder: Path) -> None:
    model = new_target(TINY, bundle.target.vocabulary)
    expected = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    assert weight_bytes(folder / "bundle-cpu", torch.float32) == 4 * expected
    assert weight_bytes(folder / "bundle-cpu", torch.bfloat16) == 2 * expected


def test_a_copy_has_a_speed() -> None:
    assert copy_bandwidth(torch.device("cpu")) > 1e6


# ---- sessions -------------------------------------------------------------------------------------------------------


def test_items_are_distinct_and_share_what_clusters_share() -> None:
    sessions = Sessions(TINY)
    assert len({tuple(c) for c in sessions.codes.tolist()}) == TINY.num_items
    assert (sessions.codes < np.array(TINY.codebook_sizes)).all()
    assert (Sessions(TINY).codes == sessions.codes).all()
    assert len(sessions._start) < TINY.num_items / 2


def test_a_session_walks_from_cluster_to_likely_cluster() -> None:
    sessions = Sessions(TINY)
    items = sessions.draw(2000, 8, np.random.default_rng(0))
    cluster = sessions._cluster[items]
    followed = sessions._next[cluster[:, :-1]] == cluster[:, 1:, None]
    assert followed.any(-1).all()
    first = (sessions._next[cluster[:, :-1], 0] == cluster[:, 1:]).mean()
    assert first == pytest.approx(NEXT[0], abs=0.1)


def test_tokens_are_the_prompt_that_serving_makes_and_the_list_after_it() -> None:
    sessions, vocabulary = Sessions(TINY), Vocabulary.compact(TINY.codebook_sizes)
    items = sessions.draw(3, 7, np.random.default_rng(0))
    codes = [tuple(c) for c in sessions.codes.tolist()]
    for row, tokens in zip(items.tolist(), list_tokens(items, 4, sessions.codes, vocabulary).tolist(), strict=True):
        expected = vocabulary.list_prompt([codes[i] for i in row[:4]])
        for item in row[4:]:
            expected += vocabulary.list_item_tokens(codes[item])
        assert tokens == expected


def test_training_learns_something_and_the_bundle_says_what(bundle: Bundle) -> None:
    report = bundle.info.report
    before, after = report["validation"]["target"]
    assert after < before
    assert {"acceptance_length", "profile"} <= report["draft"].keys() & report["draft-plain"].keys()
    assert bundle.info.max_history_items == MAX_HISTORY_ITEMS
    assert isinstance(bundle.target, Target)
