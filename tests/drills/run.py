"""`make drills`: run the fault drills one after another and print what was measured against what was wanted.

    python -m tests.drills.run                       all, about fourteen minutes
    python -m tests.drills.run --only 3 7 11         some
    python -m tests.drills.run --only 13 --soak 7200 the nightly soak

Exit status 1 where a criterion was missed. Criteria marked ~ are times: on a machine that does something else they
may be missed without anything being wrong. A line without "ok" is information.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from service import child
from service.movielens import BUNDLE, DATA
from tests.drills.drills import DRILLS, MOST_RATE, Criterion, Drill, fitting_rate


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print. Returns 0 if every criterion was met."""
    parser = argparse.ArgumentParser(prog="make drills", description="Fault drills against the real service.")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--data", type=Path, default=DATA, help="MovieLens files; without them histories are random")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers of drills, 1 to 14")
    help_of_rate = f"requests a second in most drills; default: half of what can be done, at most {MOST_RATE:g}"
    parser.add_argument("--rate", type=float, help=help_of_rate)
    parser.add_argument("--scale", type=float, default=1.0, help="shortens (below 1) or lengthens every phase")
    parser.add_argument("--soak", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args(argv)
    child.die_with_parent()
    started = time.monotonic()
    rate = options.rate or fitting_rate(options.bundle, options.data)
    print(f"{rate:.1f} requests a second")
    missed = 0
    results = []
    for number, run in enumerate(DRILLS, start=1):
        if options.only and number not in options.only:
            continue
        drill = Drill(options.bundle, rate, options.scale, options.soak, data=options.data)
        begun = time.monotonic()
        print(f"\n{(run.__doc__ or '').strip()}", flush=True)
        try:
            run(drill)
        except Exception as exc:  # the other drills are still worth running
            drill.criteria.append(Criterion("the drill itself", "runs", f"{type(exc).__name__}: {exc}", False))
        for each in drill.criteria:
            print(line(each))
        seconds = time.monotonic() - begun
        bad = sum(not each.ok for each in drill.criteria)
        missed += bad
        print(f"  {'passed' if not bad else f'{bad} MISSED'} in {seconds:.0f} s", flush=True)
        results.append({"drill": number, "seconds": seconds, "criteria": [asdict(each) for each in drill.criteria]})
    print(f"\n{len(results)} drills in {time.monotonic() - started:.0f} s, {missed} criteria missed")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if missed else 0


def line(criterion: Criterion) -> str:
    """One row of the table."""
    mark = ("ok    " if criterion.wanted else "      ") if criterion.ok else "MISSED"
    timed = "~" if criterion.timed else " "
    return f"  {mark} {timed} {criterion.what:46} {criterion.measured:>24}   {criterion.wanted}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
