import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.bundle import load_bundle
from model.config import EvaluateConfig, Recipe, RecipeError, load_recipe
from model.data.histories import History, cases, histories
from model.data.movielens import read_movielens
from model.decoding.profile import Profile
from model.train.run import GateError, Run, check_gates, main, same_recipe, some_users

ROOT = Path(__file__).parents[3]
STAGES = ("tokenizer", "target", "rankings", "finetune", "lists", "draft", "draft-plain", "evaluate")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name their data relative to it."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def copied(debug_run: tuple[Path, Path], tmp_path: Path) -> Path:
    """A finished run that a test may spoil."""
    shutil.copytree(debug_run[0], tmp_path / "runs" / "debug")
    return tmp_path / "runs" / "debug"


def debug_recipe() -> Recipe:
    return load_recipe(Path("model/recipes/debug.toml"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_stage_says_that_it_is_done_and_the_bundle_can_be_served(debug_run: tuple[Path, Path]) -> None:
    folder, bundle = debug_run
    for name in STAGES:
        assert json.loads((folder / name / "done.json").read_text())["seconds"] >= 0
    loaded = load_bundle(bundle)
    assert loaded.info.name == "debug"
    assert loaded.draft is not None
    assert loaded.plain_draft is not None
    assert json.loads((folder / "evaluate" / "recipe.json").read_text())["evaluate"]["list_items"] == 5
    assert not bundle.with_name("debug.tmp").exists()


def test_a_stage_that_is_done_is_not_run_again(copied: Path) -> None:
    run = Run(debug_recipe(), copied)
    report = json.loads((copied / "target" / "done.json").read_text())

    def work(folder: Path) -> dict[str, Any]:
        raise AssertionError(f"{folder.name} was run again")

    for name in STAGES:
        run.stage(name, work)
    assert run.stage("target", work) == report


def test_a_stage_that_failed_is_run_again_with_what_it_left(tmp_path: Path) -> None:
    run = Run(debug_recipe(), tmp_path / "new")

    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("done")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.stage("target", fail)
    assert run.stage("target", lambda folder: {"found": (folder / "half").read_text()})["found"] == "done"


def test_a_stage_begun_with_another_recipe_is_not_passed_off_as_this_ones(copied: Path) -> None:
    recipe = debug_recipe()
    changed = Run(replace(recipe, lists=replace(recipe.lists, lists_per_user=3)), copied)
    assert changed.stage("finetune", lambda folder: {})["seconds"] >= 0
    with pytest.raises(RecipeError, match=r"'lists'.*another recipe"):
        changed.stage("lists", lambda folder: {})


def test_where_the_data_lies_and_fields_that_came_later_make_no_other_recipe() -> None:
    now = debug_recipe().as_dict()
    before = {"data": dict(now["data"], folder="elsewhere"), "target": dict(now["target"])}
    del before["target"]["length_pool"]
    same = {section: now[section] for section in before}
    assert same_recipe(before, same)
    assert not same_recipe(before, same | {"target": now["target"] | {"length_pool": 3}})
    assert not same_recipe(before, same | {"lists": now["lists"]})
    assert not same_recipe(before | {"target": before["target"] | {"gone": 1}}, same)


def test_a_draft_that_was_compared_is_not_trained_again_with_the_same_budget(copied: Path) -> None:
    recipe = debug_recipe()
    alike = Run(replace(recipe, ablation=replace(recipe.ablation, epochs=recipe.draft.epochs)), copied)
    assert alike.run_compared(copied / "ablation" / "draft", "draft") == json.loads(
        (copied / "draft" / "done.json").read_text()
    )
    served, taken = contents(copied / "draft" / "network"), contents(copied / "ablation" / "draft" / "network")
    assert served == taken
    assert "seconds" not in Run(recipe, copied).run_compared(copied / "ablation" / "draft-plain", "draft-plain")


def test_some_users_are_spread_over_all() -> None:
    users = [History(str(n), (), ()) for n in range(10)]
    assert [u.user_id for u in some_users(users, 4)] == ["0", "2", "5", "7"]
    assert some_users(users, 0) == some_users(users, 10) == users


def test_a_second_run_writes_the_same_bundle_without_training(copied: Path, debug_run: tuple[Path, Path]) -> None:
    before = contents(copied)
    bundles = copied.parent.parent / "bundles"
    (bundles / "debug").mkdir(parents=True)
    (bundles / "debug" / "stale.json").write_text("{}")
    assert main(["model/recipes/debug.toml", "--runs", str(copied.parent), "--bundles", str(bundles)]) == 0
    assert contents(copied) == before
    assert contents(bundles / "debug") == contents(debug_run[1])


def test_held_out_users_are_in_no_stage_but_the_last(debug_run: tuple[Path, Path]) -> None:
    folder, _ = debug_run
    recipe = debug_recipe()
    run = Run(recipe, folder)
    report = json.loads((folder / "evaluate" / "done.json").read_text())
    held_out = set(report["held_out_users"])
    assert held_out == {u.user_id for u in run.split.test}
    assert not held_out & {u.user_id for u in (*run.split.train, *run.split.validation)}
    seen = sum(len(u.item_ids) for u in run.split.train)
    assert sum(item.popularity for item in run.catalog.items) == seen
    assert report["cases"] == len(cases(run.split.test, recipe.data))


def test_the_catalog_holds_every_item_of_the_logs(debug_run: tuple[Path, Path]) -> None:
    logs = read_movielens(Path(".data/ml-100k"))
    watched = {i for h in histories(logs) for i in h.item_ids}
    assert watched <= {item.item_id for item in load_bundle(debug_run[1]).catalog.items}


def test_the_report_compares_the_target_with_every_baseline_and_both_drafts(debug_run: tuple[Path, Path]) -> None:
    report = load_bundle(debug_run[1]).info.report
    assert set(report["quality"]) == {"target", "target-list", "popularity", "item-knn", "markov"}
    assert all(0 <= v <= 1 for row in report["quality"].values() for v in row.values())
    assert report["quality"]["popularity"]["future_recall@5"] > 0
    for name in ("draft", "draft-plain"):
        assert report[name]["acceptance_length"] >= 1.0
        profile = Profile.from_dict(report[name]["profile"], 4)
        assert profile.steps == 3
        assert sum(profile.begins) == pytest.approx(1.0, abs=0.01)
    assert set(report["stage_seconds"]) == set(STAGES)
    assert report["recipe"]["target"]["num_layers"] == 3
    assert (debug_run[1] / "README.md").read_text().startswith("# debug\n")


def gated(target: float, baseline: float, acceptance: float, lists: float = 0.5, **gates: Any) -> None:
    recipe = replace(Recipe("x"), evaluate=EvaluateConfig(**gates))
    quality = {
        "target": {"a@5": 0.5, "b@5": target},
        "target-list": {"a@5": 0.5, "b@5": lists},
        "popularity": {"a@5": 0.1, "b@5": baseline},
    }
    check_gates(recipe, {"quality": quality, "draft": {"acceptance_length": acceptance}})


def test_the_gates_let_a_good_bundle_pass() -> None:
    gated(0.3, 0.2, 1.5, min_acceptance_length=1.5)


@pytest.mark.parametrize("target", [0.2, 0.1])
def test_a_target_no_better_than_a_baseline_in_one_metric_is_refused(target: float) -> None:
    with pytest.raises(GateError, match=r"popularity.*b@5"):
        gated(target, 0.2, 2.0)
    gated(target, 0.2, 2.0, require_beats_baselines=False)


def test_lists_worse_than_a_baseline_are_refused_however_well_the_target_ranks() -> None:
    with pytest.raises(GateError, match=r"popularity.*lists in b@5"):
        gated(0.3, 0.2, 2.0, lists=0.19)
    gated(0.3, 0.2, 2.0, lists=0.2)


def test_a_draft_that_accepts_too_little_is_refused() -> None:
    with pytest.raises(GateError, match=r"acceptance length 1\.49"):
        gated(0.3, 0.2, 1.49, min_acceptance_length=1.5)


def test_a_failed_gate_writes_no_bundle_and_exits_3(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    strict = Path("model/recipes/debug.toml").read_text() + "min_acceptance_length = 9.0\n"
    recipe.write_text(strict)
    bundles = tmp_path / "bundles"
    assert main([str(recipe), "--runs", str(copied.parent), "--bundles", str(bundles)]) == 3
    assert "acceptance length" in capsys.readouterr().err
    assert list(bundles.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('name = "x"\n[target]\nlayers = 3\n', "'layers'"),
        ('name = "x"\n[data]\nfolder = "nowhere"\n', "make data"),
        ('name = "x"\n[data]\nheld_out_users = 943\n', "data.held_out_users"),
    ],
)
def test_a_bad_recipe_or_missing_data_exits_2_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, named: str
) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    options = ["--runs", str(tmp_path / "runs"), "--bundles", str(tmp_path / "bundles")]
    assert main([str(tmp_path / "recipe.toml"), *options]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
