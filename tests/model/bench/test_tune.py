import json
import shutil
from pathlib import Path

import pytest

from model.bench.tune import main
from model.bundle import load_bundle, save_manifest

BUNDLE = Path("model/bundles/movielens-100k")


def test_tune_measures_prints_and_saves_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, written = tmp_path / "bundle", tmp_path / "tune.json"
    shutil.copytree(BUNDLE, folder)
    report = json.loads((folder / "report.json").read_text())
    report["recipe"]["data"] |= {"cases_per_user": 1, "validation_users": 6}
    (folder / "report.json").write_text(json.dumps(report))
    bundle = load_bundle(BUNDLE)
    save_manifest(folder, bundle.info.name, bundle.target.vocabulary, bundle.info.max_history_items)
    command = ["--bundle", str(folder), "--batch", "2", "--steps", "2", "--k", "3", "--threads", "1", "--save"]
    assert main([*command, "--json", str(written)]) == 0
    found = json.loads(written.read_text())
    assert load_bundle(folder).profile("draft").as_dict() == found["profile"]
    assert {record["batch"] for record in found["rounds"]} == {1, 2}
    for load in (1, 2):
        assert sum(record["chosen"] for record in found["rounds"] if record["batch"] == load) == 1
    assert "decisions" in capsys.readouterr().out


def test_a_bundle_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundle", str(tmp_path)]) == 2
    assert "manifest" in capsys.readouterr().err
