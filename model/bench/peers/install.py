"""`make peers` (`python -m model.bench.peers.install [PEER ...]`): an environment for each peer, with exact pins.

A peer's pins name every package it needs and nothing is resolved, so the same environment comes out each time: also
torch for the CPU where the index offers several, and without those dependencies of a peer that only its other uses need
(image and sound libraries, GPU compilers). An environment whose pins have not changed is left alone. Disk: about 6 GB.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PINS = Path(__file__).with_name("pins")
ENVIRONMENTS = Path(".peers")
DONE = "installed.txt"  # the pins an environment was finished with: without them it is not used


def install(peer: str, environments: Path) -> bool:
    """Make the environment of `peer` anew unless its pins are those it has; whether anything was done.

    Raises CalledProcessError when the pins cannot be installed; the environment is then as good as none.
    """
    pins, folder = PINS / f"{peer}.txt", environments / peer
    if installed(peer, environments) and (folder / DONE).read_text() == pins.read_text():
        return False
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(environments / "exports", ignore_errors=True)  # made by the versions that were
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "-r", str(pins)], check=True)
    (folder / DONE).write_text(pins.read_text())
    return True


def installed(peer: str, environments: Path) -> bool:
    """Whether the environment of `peer` is there and finished."""
    return (environments / peer / DONE).exists()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 when a peer could not be installed; the others are still tried."""
    names = sorted(path.stem for path in PINS.glob("*.txt"))
    parser = argparse.ArgumentParser(prog="make peers", description=__doc__)
    parser.add_argument("peers", nargs="*", metavar="PEER", default=names, help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    options = parser.parse_args(argv)
    unknown = sorted(set(options.peers) - set(names))
    if unknown:
        parser.error(f"no pins for {', '.join(unknown)}")
    failed = 0
    for peer in options.peers:
        try:
            done = install(peer, options.environments)
        except subprocess.CalledProcessError as exc:
            failed = 1
            _say(f"{peer}: not installed ({exc.cmd[0]} ended with status {exc.returncode})")
        else:
            _say(f"{peer}: {'installed' if done else 'already there'}")
    return failed


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a command's answer


if __name__ == "__main__":
    raise SystemExit(main())
