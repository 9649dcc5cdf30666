"""`make fuzz`: schemathesis with every check against a running service; anything it finds is a failure.

python -m tests.fuzz.run SCHEMATHESIS --bundle FOLDER [--examples N]
"""

import argparse
import subprocess
import sys
from pathlib import Path

from service.serve import running_service

CONFIG = Path(__file__).parent / "schemathesis.toml"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run")
    parser.add_argument("schemathesis", type=Path, help="the program")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with running_service(given.bundle) as service:
        command = [str(given.schemathesis), "--config-file", str(CONFIG), "run", f"{service.url}/openapi.json"]
        command += ["--checks", "all", "--max-examples", str(given.examples), "--seed", str(given.seed)]
        command += ["--request-timeout", "30", "--continue-on-failure", "--no-color"]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
