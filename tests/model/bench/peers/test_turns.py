import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from model.bench.peers import turns
from model.bench.peers.turns import PeerRequest, Task, equal_groups, export_once, groups

PROGRAM = """
import os
from model.bench.peers.turns import take_turns

def prepare(task):
    print("an engine says hello")
    os.write(1, b"and from C too")
    return lambda requests: [[task.batch, len(r.prompt)] for r in requests]

take_turns(prepare, "torch")
"""
REQUESTS = tuple(PeerRequest(tuple(range(n)), ((3, 4), (5, 6))) for n in (4, 2, 4, 4, 2))
TASK = Task("checkpoint", "folder", "plain", 2, 1, 10, 2, ((3, 4), (5, 6)), REQUESTS)


def test_a_task_is_the_same_after_its_line() -> None:
    assert Task.from_line(TASK.line()) == TASK
    assert "\n" not in TASK.line()
    assert TASK.longest == 14


def test_groups_keep_order_and_equal_groups_never_mix_lengths() -> None:
    assert [len(g) for g in groups(REQUESTS, 2)] == [2, 2, 1]
    assert [r for g in groups(REQUESTS, 2) for r in g] == list(REQUESTS)
    assert list(equal_groups(REQUESTS, 2)) == [[0, 2], [3], [1, 4]]


def test_what_an_engine_prints_never_gets_among_the_answers() -> None:
    lines = "\n".join([TASK.line(), json.dumps({"lists": 1}), json.dumps({"lists": 3})]) + "\n"
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=lines, capture_output=True, text=True, timeout=60)
    ready, one, three = map(json.loads, done.stdout.splitlines())
    assert set(ready["versions"]) == {"python", "torch"}
    assert one["tokens"] == [[2, 4]]
    assert three["tokens"] == [[2, 4], [2, 2], [2, 4]]
    assert three["seconds"] >= 0
    assert "hello" in done.stderr and "from C too" in done.stderr
    assert done.returncode == 0


def test_an_export_is_made_once_and_half_of_one_is_never_used(tmp_path: Path) -> None:
    calls = []

    def export(making: Path) -> None:
        calls.append(making)
        (making / "model").write_text("weights")
        if len(calls) == 1:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        export_once(tmp_path / "engine", export)
    assert not (tmp_path / "engine").exists()
    assert (export_once(tmp_path / "engine", export) / "model").read_text() == "weights"
    export_once(tmp_path / "engine", export)
    assert len(calls) == 2


def test_what_runs_in_a_peers_environment_imports_nothing_else_of_this_project() -> None:
    folder = Path(turns.__file__).parent
    ours = {"model.bench.peers.turns", "model.bench.peers.item_prefixes", "model.bench.peers.words"}
    for path in folder.glob("*.py"):
        if path.stem in ("run", "install"):
            continue
        tree = ast.walk(ast.parse(path.read_text()))
        names = {node.module for node in tree if isinstance(node, ast.ImportFrom)}
        assert {name for name in names if name and name.split(".")[0] in ("model", "service")} <= ours, path.name
