"""`make load`: how much the service can do before users notice, with speculation and without.

    python -m tests.load.knee                          start the demo bundle, search both knees, draw them
    python -m tests.load.knee --url http://host:8000   a service that runs already

Open loop: requests leave at random times at a given rate, answered or not. The rate is raised until the p99 of the
model's answers passes the objective or more than one request in a hundred gets none; between the last good rate and the
first bad one it is halved. The knee is the last good rate.
"""

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from service import child
from service.bench_serve import load_histories
from service.movielens import BUNDLE, DATA
from service.serve import running_service
from tests.load.open_loop import Answers, Body, client_of, poisson, quantile, send

GROWTH = 1.5
HALVINGS = 3
GOOD_SHARE = 0.99


@dataclass(frozen=True)
class Point:
    """One rate. Rates in requests/s, times in milliseconds; `good`: share answered by the model before the deadline."""

    speculation: str
    offered: float
    answered: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    good: float

    def holds(self, objective_ms: float) -> bool:
        return self.good >= GOOD_SHARE and self.p99_ms <= objective_ms


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and draw. Returns 0, or 1 when not even the first rate was sustained."""
    parser = argparse.ArgumentParser(prog="make load", description="Latency over offered load, open loop.")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--url", help="a service that runs already; default: start one from the bundle")
    parser.add_argument("--start", type=float, default=10.0, help="first rate, requests/s")
    parser.add_argument("--seconds", type=float, default=15.0, help="per rate")
    parser.add_argument("--objective-ms", type=float, default=500.0, help="what p99 may reach; also the deadline")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the points to this file")
    options = parser.parse_args(argv)
    child.die_with_parent()
    histories = load_histories(options.bundle, options.data)
    points: list[Point] = []
    with service_at(options.url, options.bundle) as url:
        for speculation in ("on", "off"):

            def body(index: int, speculation: str = speculation) -> Body:
                fields = {"k": options.k, "speculation": speculation, "fallback": "none"}
                return {"history": histories[index % len(histories)], "deadline_ms": options.objective_ms} | fields

            def measure(rate: float, speculation: str = speculation, body: Callable[[int], Body] = body) -> Point:
                point = summarise(
                    speculation, rate, options.seconds, asyncio.run(load(url, body, rate, options.seconds))
                )
                print(line(point), flush=True)
                return point

            print(f"\nspeculation {speculation}\n{HEADER}")
            asyncio.run(load(url, body, options.start, options.seconds / 3))  # connections, caches, code: unrecorded
            points += search(measure, options.start, options.objective_ms)
    print("\n" + draw(points, options.objective_ms))
    knees = {s: knee([p for p in points if p.speculation == s], options.objective_ms) for s in ("on", "off")}
    print("\nknee: " + ", ".join(f"speculation {name} {rate:.1f} requests/s" for name, rate in knees.items()))
    if options.json:
        options.json.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n", encoding="utf-8")
    return 0 if all(knees.values()) else 1


@contextlib.contextmanager
def service_at(url: str | None, bundle: Path) -> Iterator[str]:
    if url:
        yield url
        return
    with running_service(bundle) as service:
        yield service.url


async def load(url: str, body: Callable[[int], Body], rate: float, seconds: float) -> Answers:
    async with client_of(url) as client:
        return await send(lambda: client, body, poisson(rate, seconds, seed=round(rate * 1000)))


def summarise(speculation: str, rate: float, seconds: float, answers: Answers) -> Point:
    """Percentiles over the model's answers; the others count against `good`."""
    times = answers.seconds(lambda answer: answer.from_model)
    p50, p95, p99 = (round(quantile(times, share) * 1e3, 1) if times else float("inf") for share in (0.5, 0.95, 0.99))
    good = len(times) / answers.wanted if answers.wanted else 0.0
    return Point(speculation, round(rate, 1), round(len(times) / seconds, 1), p50, p95, p99, round(good, 4))


def search(measure: Callable[[float], Point], start: float, objective_ms: float) -> list[Point]:
    """Raise the rate until it does not hold, then halve the gap a few times. All points, by rate."""
    points = [measure(start)]
    while points[-1].holds(objective_ms):
        points.append(measure(points[-1].offered * GROWTH))
    good, bad = knee(points, objective_ms), points[-1].offered
    for _ in range(HALVINGS if good else 0):
        point = measure((good + bad) / 2)
        points.append(point)
        good, bad = (point.offered, bad) if point.holds(objective_ms) else (good, point.offered)
    return sorted(points, key=lambda point: point.offered)


def knee(points: Sequence[Point], objective_ms: float) -> float:
    """The highest rate that held; 0 if none did."""
    return max((point.offered for point in points if point.holds(objective_ms)), default=0.0)


HEADER = f"{'offered/s':>10} {'answered/s':>11} {'p50 ms':>9} {'p95 ms':>9} {'p99 ms':>9} {'good':>8}"


def line(p: Point) -> str:
    return f"{p.offered:10.1f} {p.answered:11.1f} {p.p50_ms:9.1f} {p.p95_ms:9.1f} {p.p99_ms:9.1f} {p.good:8.1%}"


def draw(points: Sequence[Point], objective_ms: float, width: int = 64, height: int = 16) -> str:
    """p99 over answered requests/s, as text: `o` with speculation, `x` without, `-` the objective."""
    right = max((point.answered for point in points), default=0.0) or 1.0
    top = objective_ms * 1.5
    grid = [[" "] * (width + 1) for _ in range(height + 1)]

    def row_of(ms: float) -> int:
        return height - round(min(ms, top) / top * height)

    grid[row_of(objective_ms)] = ["-"] * (width + 1)
    for point in points:
        mark = "o" if point.speculation == "on" else "x"
        grid[row_of(point.p99_ms)][round(point.answered / right * width)] = mark
    labels = {0: f"≥{top:.0f}", row_of(objective_ms): f"{objective_ms:.0f}", height: "0"}
    lines = [f"{labels.get(n, ''):>6} |{''.join(cells)}" for n, cells in enumerate(grid)]
    title = "p99 in ms over answers a second; o with speculation, x without"
    return "\n".join([title, *lines, f"{'':6} +{'-' * (width + 1)}", f"{'':8}0{right:>{width}.1f}"])


if __name__ == "__main__":
    sys.exit(main())
