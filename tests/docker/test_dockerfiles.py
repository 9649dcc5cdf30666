"""The Dockerfiles keep what they promise: two stages, a pinned base, no root, one process, and a probe that works."""

import json
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from service import cli
from service.settings import Settings

ROOT = Path(__file__).parents[2]
PROCESSES = ("api", "worker")
DEFAULT_PORTS = {"api": Settings.model_fields["port"].default, "worker": cli.WORKER_PORT}
BASE = re.compile(r"python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64} AS (\w+)")

Instruction = tuple[str, str]

each_process = pytest.mark.parametrize("process", PROCESSES)


@cache
def instructions(process: str) -> tuple[Instruction, ...]:
    """Keyword and argument of every instruction, comments dropped and continued lines joined."""
    lines = (ROOT / "docker" / f"{process}.Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    joined = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    words = (line.split(maxsplit=1) for line in joined if line.strip())
    return tuple((keyword, argument) for keyword, argument in words)


def stages(process: str) -> list[list[Instruction]]:
    found: list[list[Instruction]] = []
    for keyword, argument in instructions(process):
        if keyword == "FROM":
            found.append([])
        found[-1].append((keyword, argument))
    return found


def arguments(stage: list[Instruction], keyword: str) -> list[str]:
    return [argument for name, argument in stage if name == keyword]


def environment(process: str) -> dict[str, str]:
    pairs = [pair for argument in arguments(stages(process)[-1], "ENV") for pair in argument.split()]
    return dict(pair.split("=", 1) for pair in pairs)


def health_check(process: str) -> list[str]:
    (argument,) = arguments(stages(process)[-1], "HEALTHCHECK")
    command: list[str] = json.loads(argument.partition("CMD ")[2])
    return command


def test_there_is_one_dockerfile_per_process() -> None:
    found = {path.name for path in (ROOT / "docker").glob("*.Dockerfile")}
    assert found == {f"{name}.Dockerfile" for name in (*PROCESSES, "bundle")}


def test_the_bundle_image_holds_the_bundle_and_runs_nothing() -> None:
    (stage,) = stages("bundle")
    assert arguments(stage, "FROM") == ["scratch"]
    assert arguments(stage, "COPY") == [". /"]
    assert {keyword for keyword, _ in stage} == {"FROM", "LABEL", "COPY", "USER"}


@each_process
def test_every_stage_starts_from_the_one_base_that_is_pinned_by_digest(process: str) -> None:
    bases = [argument for keyword, argument in instructions(process) if keyword == "FROM"]
    pinned = BASE.fullmatch(bases[0])
    assert pinned
    assert bases[1:] == [f"{pinned[1]} AS build", pinned[1]]


def test_both_images_share_their_base() -> None:
    assert len({instructions(process)[0] for process in PROCESSES}) == 1


@each_process
def test_nothing_is_installed_or_downloaded_in_the_last_stage(process: str) -> None:
    last = stages(process)[-1]
    assert not arguments(last, "RUN")
    assert not arguments(last, "ADD")
    assert [copy.split()[0] for copy in arguments(last, "COPY")] == ["--from=build"]


@each_process
def test_the_image_runs_as_a_numeric_user_who_is_not_root(process: str) -> None:
    assert arguments(stages(process)[-1], "USER") == ["10001:0"]


@each_process
def test_the_image_runs_one_padrec_command_that_exists(process: str, capsys: pytest.CaptureFixture[str]) -> None:
    last = stages(process)[-1]
    (entry,), (command,) = arguments(last, "ENTRYPOINT"), arguments(last, "CMD")
    assert json.loads(entry) == ["padrec"]
    assert json.loads(command) == [process]
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main([process, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: padrec {process}")


@each_process
def test_the_exposed_port_is_the_one_listened_on_and_the_process_s_default(process: str) -> None:
    assert arguments(stages(process)[-1], "EXPOSE") == [environment(process)["PADREC_PORT"]]
    assert environment(process)["PADREC_PORT"] == str(DEFAULT_PORTS[process])


def test_the_worker_s_default_port_is_where_the_api_looks_by_default() -> None:
    (url,) = Settings.model_fields["worker_urls"].default
    assert url.endswith(f":{DEFAULT_PORTS['worker']}")


@each_process
def test_every_setting_in_the_environment_exists_and_is_valid(process: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {name: value for name, value in environment(process).items() if name.startswith("PADREC_")}
    assert {name.removeprefix("PADREC_").lower() for name in ours} <= set(Settings.model_fields)
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    assert Settings().host == "0.0.0.0"


def test_the_api_image_holds_neither_torch_nor_model_code() -> None:
    build = stages("api")[1]
    assert "model" not in [word for copy in arguments(build, "COPY") for word in copy.split()]
    assert not re.search(r"\[[\w,]+\]|torch", " ".join(arguments(build, "RUN")))


def test_the_worker_image_takes_cpu_torch_unless_told_otherwise() -> None:
    build = stages("worker")[1]
    assert arguments(build, "ARG") == ["TORCH_INDEX=https://download.pytorch.org/whl/cpu", "EXTRAS=worker"]
    torch, package = (run for run in arguments(build, "RUN") if "pip install" in run)
    assert '--index-url "${TORCH_INDEX}"' in torch
    assert '".[${EXTRAS}]"' in package


@each_process
def test_every_install_obeys_the_constraints(process: str) -> None:
    installs = [run for run in arguments(stages(process)[1], "RUN") if "pip install" in run]
    assert installs
    assert all("-c constraints.txt" in run for run in installs)


@each_process
def test_what_is_copied_is_let_into_the_build_context_and_nothing_else(process: str) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    copied = {word for copy in arguments(stages(process)[1], "COPY") for word in copy.split()[:-1]}
    assert rules[0] == "*"
    assert {f"!{source}" for source in copied} <= set(rules)
    assert all((ROOT / rule[1:]).exists() for rule in rules if rule.startswith("!"))
    assert "model/bundles" in rules[rules.index("!model") :]


class Health(BaseHTTPRequestHandler):
    """Answers /healthz with the server's `status`."""

    def do_GET(self) -> None:
        self.send_response(self.server.status if self.path == "/healthz" else 404)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def health_server() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@each_process
@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_believes_the_process_and_no_proxy(
    process: str, status: int, healthy: bool, health_server: HTTPServer
) -> None:
    health_server.status = status  # type: ignore[attr-defined]
    python, *rest = health_check(process)
    assert python == "python"
    env = {"PADREC_PORT": str(health_server.server_port), "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, *rest], env=env, capture_output=True, timeout=30, check=False)
    assert (done.returncode == 0) is healthy


@each_process
def test_the_health_check_fails_when_nobody_listens(process: str) -> None:
    _, *rest = health_check(process)
    env = {"PADREC_PORT": "9"}
    done = subprocess.run([sys.executable, *rest], env=env, capture_output=True, timeout=30, check=False)
    assert done.returncode == 1


def test_the_command_the_images_start_is_installed_by_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["padrec"] == f"{cli.__name__}:{cli.main.__name__}"


@pytest.mark.parametrize("process", [*PROCESSES, "bundle"])
def test_hadolint_finds_nothing(process: str) -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed (it is in the dev extra)")
    command = [hadolint, "--no-color", "--failure-threshold", "style", f"docker/{process}.Dockerfile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")
