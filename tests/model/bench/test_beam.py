import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from model.bench.beam import (
    PLANS,
    Subject,
    bench_transformers,
    compared,
    judged,
    main,
    of_bundle,
    quality,
    run,
    twins_of,
)
from model.bench.beam_plain import PlainBeams
from model.bundle import load_bundle
from model.data.movielens import DataError
from model.decoding.beam_plan import TREE_ATTENTION
from model.decoding.beam_request import BeamResult
from model.train import alignment

ROOT = Path(__file__).parents[3]
DATA = ROOT / ".data" / "ml-100k"
KEYS = {"data", "plan", "k", "batch", "requests", "ms_per_request", "ms_min", "ms_max", "speedup", "target_passes"}
KEYS |= {"accepted_levels", "forced_levels", "nodes_along", "identical", "near_ties", "mismatches"}
KEYS |= {"judged", "overlap", "recall", "ndcg", "recall_lost", "ndcg_lost", "threads", "cores", "torch", "cpu"}


@pytest.fixture(scope="module")
def subject(debug_run: tuple[Path, Path]) -> Subject:
    return of_bundle(load_bundle(debug_run[1]), debug_run[1], DATA).first(6)


@pytest.fixture(scope="module")
def twins(subject: Subject) -> dict[str, tuple[BeamResult, float]]:
    return twins_of(subject, 7)


def test_cases_end_before_the_item_that_came_next(subject: Subject) -> None:
    assert len(subject.cases) == 6
    for case in subject.cases:
        assert case.next not in case.history and len(case.history) > 0


def test_a_bundle_from_other_data_is_a_data_error(debug_run: tuple[Path, Path]) -> None:
    bundle = load_bundle(debug_run[1])
    for report in ({}, {"held_out_users": ["nobody"]}):
        with pytest.raises(DataError):
            of_bundle(replace(bundle, info=replace(bundle.info, report=report)), debug_run[1], DATA)


@pytest.mark.parametrize("batch", [1, 4])
def test_plain_beams_are_the_twins(subject: Subject, twins: dict[str, tuple[BeamResult, float]], batch: int) -> None:
    plain, requests = PlainBeams(subject.target, subject.trie, batch, 7, 8), subject.requests(7)
    found = [items for b in range(0, 6, batch) for items in plain.decode(requests[b : b + batch])]
    told = compared(found, twins, exact=True)
    assert told["mismatches"] == 0
    assert told["identical"] >= 0.5


def test_what_differs_is_a_mismatch_unless_it_is_a_near_tie_or_lossy(
    subject: Subject, twins: dict[str, tuple[BeamResult, float]]
) -> None:
    right = [[item.codes for item in twins[str(n)][0].items] for n in range(6)]
    assert compared(right, twins, exact=True)["identical"] == 1.0
    wrong = [*right[:5], right[5][::-1]]
    clear = {name: (result, 1.0) for name, (result, _) in twins.items()}
    tied = {name: (result, 1e-6) for name, (result, _) in twins.items()}
    assert compared(wrong, clear, exact=True)["mismatches"] == 1
    assert compared(wrong, tied, exact=True)["near_ties"] == 1
    assert compared(wrong, clear, exact=False)["mismatches"] == 0


def test_quality_lost_is_that_of_the_exact_answers_less_what_came(
    subject: Subject, twins: dict[str, tuple[BeamResult, float]]
) -> None:
    right = [[item.codes for item in twins[str(n)][0].items] for n in range(6)]
    perfect = [[case.next, *items[1:]] for case, items in zip(subject.cases, right, strict=True)]
    told = judged(subject, [*perfect[:5], perfect[5][1:4]], perfect)
    assert told == {
        "judged": 6,
        "overlap": pytest.approx((5 + 3 / 7) / 6, abs=1e-3),
        "recall": pytest.approx(5 / 6, abs=1e-4),
        "ndcg": pytest.approx(5 / 6, abs=1e-4),
        "recall_lost": pytest.approx(1 / 6, abs=1e-4),
        "ndcg_lost": pytest.approx(1 / 6, abs=1e-4),
    }


def test_quality_is_recall_and_ndcg_of_the_next_item(subject: Subject) -> None:
    cases = subject.cases[:2]
    two = replace(subject, cases=cases)
    first = [[cases[0].next, (0, 0, 0, 0)], [(0, 0, 0, 0), cases[1].next]]
    assert quality(two, first) == pytest.approx((1.0, (1 + 1 / 1.5849625) / 2))
    assert quality(two, [[], [(9, 9, 9, 9)]]) == (0.0, 0.0)


def test_transformers_beam_search_finds_the_same_items(
    subject: Subject, twins: dict[str, tuple[BeamResult, float]]
) -> None:
    [record] = bench_transformers(subject, [7], 1, lambda text: None)
    assert record["mismatches"] == 0
    assert record["identical"] >= 0.5


def test_the_command_writes_a_record_for_every_plan_and_a_drawing(
    debug_run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, drawing = tmp_path / "beam.json", tmp_path / "beam.svg"
    arguments = ["--bundle", str(debug_run[1]), "--data", str(DATA), "--users", "3", "--repeats", "1", "--threads", "1"]
    arguments += ["--judged", "5", "--batch", "1", "2", "--k", "2", "5", "--json", str(out), "--plot", str(drawing)]
    assert main(arguments) == 0
    records = json.loads(out.read_text())
    assert [r["plan"] for r in records[: len(PLANS)]] == list(PLANS)
    assert len(records) == 2 * 2 * len(PLANS)
    for record in records:
        assert set(record) == KEYS
        assert record["mismatches"] == 0
        assert (record["requests"], record["judged"]) == (3, 5)
        if record["plan"] not in ("plain", "atspeed-r"):
            passes = record["target_passes"] + record["accepted_levels"] + record["forced_levels"]
            assert passes == pytest.approx(3, abs=0.01)
    assert drawing.read_text().startswith("<svg")
    assert "LOSSY" in capsys.readouterr().out


def test_the_exactness_proof_runs_every_draft(debug_run: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "exact.json"
    arguments = ["--bundle", str(debug_run[1]), "--data", str(DATA), "--users", "3", "--threads", "1"]
    assert main([*arguments, "--exact", "--k", "6", "--json", str(out)]) == 0
    records = json.loads(out.read_text())
    assert {r["draft"] for r in records} == {"none", "trained", "random", "adversarial", "independent"}
    assert sum(r["mismatches"] for r in records) == 0


def test_a_run_is_measured_with_a_draft_aligned_in_it(
    debug_run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe, runs, out = ROOT / "model" / "recipes" / "debug.toml", tmp_path / "runs", tmp_path / "beam.json"
    shutil.copytree(debug_run[0], runs / "debug")
    for kind in ("padrec", "model"):
        assert alignment.main([str(recipe), "--runs", str(runs), "--draft", kind, "--loss", "atspeed-r"]) == 0
        arguments = ["--recipe", str(recipe), "--runs", str(runs), "--users", "2", "--repeats", "1", "--threads", "1"]
        arguments += ["--judged", "2"]
        arguments += ["--draft", str(runs / "debug" / f"align-{kind}-atspeed-r"), "--batch", "1", "--k", "3"]
        assert main([*arguments, "--json", str(out)]) == 0
        records = {r["plan"]: r for r in json.loads(out.read_text())}
        assert set(records) == set(PLANS)
        assert records["atspeed-s"]["nodes_along"] > 0


def test_a_run_that_is_not_trained_cannot_be_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert alignment.main(["model/recipes/debug.toml", "--runs", str(tmp_path)]) == 2


def test_no_bundle_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundle", str(tmp_path)]) == 2
    assert "padrec bench beam" in capsys.readouterr().err


def test_decoding_in_batches_changes_nothing(subject: Subject) -> None:
    alone = run(subject.decoder(TREE_ATTENTION, 1, 7), subject.requests(7))
    together = run(subject.decoder(TREE_ATTENTION, 6, 7), subject.requests(7))
    for name, result in alone.items():
        assert [item.codes for item in together[name].items] == [item.codes for item in result.items]
