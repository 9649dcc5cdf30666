"""The demo prints a real user's list decoded both ways, and says in one line what is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.demo import main
from tests.service.tiny_bundle import item_ids, write_bundle, write_data


def test_what_is_missing_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path / "nowhere")]) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "make data" in printed


def test_once_prints_titles_scores_speculation_and_a_curl_line_and_ends_with_status_0(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "tiny")
    data = write_data(tmp_path / "data", item_ids(bundle)[:14])
    command = [sys.executable, "-m", "service.demo", "--once", "--bundle", str(bundle), "--data", str(data)]
    environ = {**os.environ, "PADREC_NUM_ROWS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environ)
    assert done.returncode == 0, done.stderr
    for expected in (
        "user 7 watched 4 films",
        "Film ",
        "recommended:",
        "acceptance length",
        "the same list",
        "curl -s",
    ):
        assert expected in done.stdout
    assert "degraded" not in done.stdout
