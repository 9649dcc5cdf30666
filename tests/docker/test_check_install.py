"""The stand-in for `docker build` reads Dockerfiles and .dockerignore as Docker does."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("check_install", ROOT / "docker" / "check_install.py")
assert spec and spec.loader
check_install = importlib.util.module_from_spec(spec)
sys.modules["check_install"] = check_install
spec.loader.exec_module(check_install)


def test_only_what_the_ignore_file_lets_in_is_copied(tmp_path: Path) -> None:
    check_install.copy("service", tmp_path / "service")
    check_install.copy("pyproject.toml", tmp_path)
    names = {path.name for path in tmp_path.rglob("*")}
    assert {"settings.py", "pyproject.toml"} <= names
    assert "__pycache__" not in names
    with pytest.raises(check_install.CheckFailed, match="tests"):
        check_install.copy("tests", tmp_path / "tests")


def test_bundles_stay_out_of_the_worker_s_image(tmp_path: Path) -> None:
    check_install.copy("model", tmp_path / "model")
    assert (tmp_path / "model" / "recipes").is_dir()
    assert not (tmp_path / "model" / "bundles").exists()
    assert not list(tmp_path.rglob("*.so"))


def test_paths_of_the_image_are_moved_and_no_others() -> None:
    moved = check_install.below(Path("/r"), "/opt/padrec/bin/pip install -c constraints.txt /src ./src")
    assert moved == "/r/opt/padrec/bin/pip install -c constraints.txt /r/src ./src"


def test_steps_run_in_order_with_the_image_s_variables_and_nothing_else(tmp_path: Path) -> None:
    stage = [
        ("FROM", "python AS build"),
        ("ARG", "NAME=default"),
        ("ENV", "A=1 B=2"),
        ("WORKDIR", "/src"),
        ("RUN", "apt-get update"),
        ("RUN", 'echo "$NAME $A $B ${HOME_OF_HOST:-none}" > seen'),
    ]
    check_install.build_stage(stage, {"NAME": "given"}, tmp_path, {"PATH": "/usr/bin:/bin"})
    assert (tmp_path / "src" / "seen").read_text() == "given 1 2 none\n"


def test_a_failing_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(check_install.CheckFailed, match="status 3 of: RUN exit 3"):
        check_install.build_stage([("RUN", "exit 3")], {}, tmp_path, {"PATH": "/usr/bin:/bin"})
