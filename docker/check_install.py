"""Runs what a Dockerfile runs, without an engine: the build stage's steps in an empty folder, then the health check.

    python docker/check_install.py api
    python docker/check_install.py worker --build-arg TORCH_INDEX=https://pypi.org/simple

It stands in for `docker build` where there is none: the files that .dockerignore lets in are copied, ENV and ARG are
set, RUN is run with nothing else in the environment, absolute paths of the image lie under the folder. The last stage's
command is then started as it would be, and must pass the image's own health check. What it cannot show: the base image
(this interpreter takes its place, of the same minor version) and packages of the system (`apt-get` is left out).
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# ruff: noqa: T201 - a command's answers

ROOT = Path(__file__).parents[1]
# Where the image keeps things, as far as a Dockerfile of ours names it.
IMAGE_FOLDERS = ("/opt/padrec", "/src")
# How to reach the package index is the machine's business, as it is Docker's.
PASSED_ON = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONFIG_FILE", "PIP_CERT", "SSL_CERT_FILE")


class CheckFailed(Exception):
    """A step failed; the message says which."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check one image. Returns 0, or 1 with the failed step."""
    parser = argparse.ArgumentParser(description="Run a Dockerfile's install steps in an empty folder.")
    parser.add_argument("process", choices=("api", "worker"))
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--bundle", type=Path, default=ROOT / "model" / "bundles" / "movielens-100k")
    options = parser.parse_args(argv)
    arguments = dict(pair.split("=", 1) for pair in options.build_arg)
    with tempfile.TemporaryDirectory(prefix="padrec-image-") as folder:
        try:
            check(options.process, arguments, Path(folder), options.bundle)
        except CheckFailed as error:
            print(f"check_install: {error}", file=sys.stderr)
            return 1
    print(f"{options.process}: installed, started and healthy")
    return 0


def check(process: str, arguments: dict[str, str], root: Path, bundle: Path) -> None:
    """Build below `root`, start, ask for health. Raises CheckFailed."""
    base, build, last = stages(ROOT / "docker" / f"{process}.Dockerfile")
    wanted = re.search(r"python:(\d+\.\d+)", base[0][1])
    have = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not wanted or wanted[1] != have:
        raise CheckFailed(f"the image has Python {wanted and wanted[1]}, this is {have}")
    binaries = root / "bin"
    binaries.mkdir()
    (binaries / "python").symlink_to(sys.executable)
    environ = {"PATH": f"{binaries}:/usr/bin:/bin", "HOME": str(root)}
    environ |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    build_stage(build, arguments, root, environ)
    start(last, root, environ, bundle)


def stages(path: Path) -> list[list[tuple[str, str]]]:
    """Keyword and argument of every instruction, by stage."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines()
    found: list[list[tuple[str, str]]] = []
    for line in joined:
        if line.strip():
            keyword, argument = line.split(maxsplit=1)
            if keyword == "FROM":
                found.append([])
            found[-1].append((keyword, argument))
    return found


def build_stage(stage: list[tuple[str, str]], arguments: dict[str, str], root: Path, environ: dict[str, str]) -> None:
    """WORKDIR, ARG, ENV, COPY and RUN, in order."""
    folder = root
    for keyword, argument in stage:
        if keyword == "WORKDIR":
            folder = Path(below(root, argument))
            folder.mkdir(parents=True, exist_ok=True)
        elif keyword == "ARG":
            name, _, default = argument.partition("=")
            environ[name] = arguments.get(name, default)
        elif keyword == "ENV":
            environ |= dict(pair.split("=", 1) for pair in shlex.split(argument))
        elif keyword == "COPY":
            *sources, target = argument.split()
            for source in sources:
                copy(source, folder / target)
        elif keyword == "RUN" and not argument.startswith("apt-get "):
            print(f"RUN {argument}", flush=True)
            done = subprocess.run(["/bin/sh", "-c", below(root, argument)], cwd=folder, env=environ, check=False)
            if done.returncode:
                raise CheckFailed(f"status {done.returncode} of: RUN {argument}")


def below(root: Path, text: str) -> str:
    """`text` with the image's folders moved under `root`."""
    for folder in IMAGE_FOLDERS:
        text = re.sub(rf"(?<![\w.]){folder}\b", f"{root}{folder}", text)
    return text


def copy(source: str, target: Path) -> None:
    """What COPY copies of the context: files .dockerignore lets in, without what it takes out again."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    if f"!{source}" not in rules:
        raise CheckFailed(f".dockerignore keeps {source} out of the build context")
    left_out = [rule.removeprefix("**/") for rule in rules if not rule.startswith("!") and rule != "*"]

    def ignored(folder: str, names: list[str]) -> Iterator[str]:
        for name in names:
            path = (Path(folder) / name).relative_to(ROOT)
            if any(Path(name).match(rule) or str(path) == rule for rule in left_out):
                yield name

    path = ROOT / source
    if path.is_dir():
        shutil.copytree(path, target, ignore=lambda folder, names: set(ignored(folder, names)))
    else:
        shutil.copy2(path, target / source if target.is_dir() else target)


def start(stage: list[tuple[str, str]], root: Path, environ: dict[str, str], bundle: Path) -> None:
    """Start what the image starts, and ask its HEALTHCHECK until it passes."""
    last = dict(stage)
    image_environ = {**environ, **{k: v for a in (a for k, a in stage if k == "ENV") for k, v in pairs(a)}}
    image_environ["PATH"] = f"{root}/opt/padrec/bin:/usr/bin:/bin"
    image_environ |= {"PADREC_HOST": "127.0.0.1", "PADREC_CATALOG_FILE": str(bundle / "catalog.jsonl")}
    if "PADREC_BUNDLE" in image_environ:
        image_environ["PADREC_BUNDLE"] = str(bundle)
    command = [*json.loads(last["ENTRYPOINT"]), *json.loads(last["CMD"])]
    ask = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])
    installed = root / "opt" / "padrec" / "bin"
    command[0], ask[0] = str(installed / command[0]), str(installed / ask[0])
    workdir = Path(tempfile.mkdtemp(dir=root))
    process = subprocess.Popen(command, cwd=workdir, env=image_environ)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise CheckFailed(f"{' '.join(command)} ended with status {process.returncode}")
            if not subprocess.run(ask, cwd=workdir, env=image_environ, capture_output=True, check=False).returncode:
                return
            time.sleep(0.5)
        raise CheckFailed("the health check did not pass within two minutes")
    finally:
        process.kill()
        process.wait()


def pairs(argument: str) -> list[tuple[str, str]]:
    return [(name, value) for name, _, value in (pair.partition("=") for pair in shlex.split(argument))]


if __name__ == "__main__":
    raise SystemExit(main())
