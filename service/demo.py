"""`make demo`: start everything from the bundle in the repository, recommend to one real user, then keep serving.

Talks to the service over HTTP like any client.
"""

import argparse
import json
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import httpx

from service import child
from service.movielens import BUNDLE, DATA, DataMissing, held_out_histories, read_titles
from service.serve import NEXT_FREE, ServiceFailed, running_service
from service.supervisor import PortTaken

# ruff: noqa: T201 - printing is what a demo is for

REPEATS = 5


class DemoFailed(RuntimeError):
    """The demo cannot go on; the message is one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo. Returns 0, also after Ctrl-C; 1 with a message when something is missing."""
    parser = argparse.ArgumentParser(prog="padrec demo", description="One recommendation for a real user.")
    parser.add_argument("--once", action="store_true", help="exit after printing")
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with ml-100k.item and ml-100k.inter")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=NEXT_FREE.start, help="first port to try")
    options = parser.parse_args(argv)
    try:
        return _demo(options)
    except (DemoFailed, DataMissing, PortTaken, ServiceFailed) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise KeyboardInterrupt


def _demo(options: argparse.Namespace) -> int:
    titles = read_titles(options.data)
    user, history = next(iter(held_out_histories(options.bundle, options.data).items()))
    # `make` killed must not leave a service behind; told to end, this process stops the service first.
    child.die_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGTERM, _interrupt)
    print("starting Valkey, worker and API ...", flush=True)
    with running_service(options.bundle, options.host, first_port=options.port) as service:
        try:
            _show(service.url, user, history, titles)
            if not options.once:
                print("serving until Ctrl-C", flush=True)
                raise DemoFailed(f"the service ended with status {service.process.wait()}")
        finally:
            # A second Ctrl-C must not leave the service half stopped.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return 0


def _show(url: str, user: str, history: list[str], titles: dict[str, str]) -> None:
    body = {"history": history, "k": 10, "deadline_ms": 30_000}
    with httpx.Client(base_url=url, timeout=60.0) as client:
        answer = post(client, body)
        # Taken in turns, so that what else the machine does falls on both alike.
        pairs = [(timed(client, body), timed(client, {**body, "speculation": "off"})) for _ in range(REPEATS)]
    (fast, _), (slow, plain) = pairs[-1]
    fast, slow = (statistics.median(pair[i][0] for pair in pairs) for i in (0, 1))
    print(f"\nuser {user} watched {len(history)} films, most recently:")
    for item in history[-8:]:
        print(f"    {titles.get(item, item)}")
    print("\nrecommended:")
    for item in answer["items"]:
        score = "popular" if item["score"] is None else f"{item['score']:8.3f}"
        print(f"  {item['rank']:2d}. {score}  {titles.get(item['item_id'], item['item_id'])}")
    for note in answer["degraded"]:
        print(f"  degraded: {note['code']}: {note['detail']}")
    counts, plain_counts = answer["speculation"], plain["speculation"]
    if counts and plain_counts:
        print(f"\n{'':24}{'rounds':>8}{'acceptance length':>20}{'milliseconds':>15}")
        print(f"{'PAD-Rec speculation':24}{counts['rounds']:8d}{counts['acceptance_length']:20.2f}{fast:15.1f}")
        print(f"{'without speculation':24}{plain_counts['rounds']:8d}{'':>20}{slow:15.1f}")
        same = [i["item_id"] for i in answer["items"]] == [i["item_id"] for i in plain["items"]]
        print(f"{slow / fast:.2f} times as fast (medians of {REPEATS}), {'the same' if same else 'NOT the same'} list")
    short = shlex.quote(json.dumps({"history": history[-5:], "k": 5}))
    print(f"\ntry it:\ncurl -s {url}/recommend -H 'content-type: application/json' -d {short}\n", flush=True)


def timed(client: httpx.Client, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """One request: milliseconds seen by this client, and the answer."""
    start = time.perf_counter()
    answer = post(client, body)
    return (time.perf_counter() - start) * 1e3, answer


def post(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """The answer of `/recommend`. Raises DemoFailed with the problem's own words."""
    response = client.post("/recommend", json=body)
    answer: dict[str, Any] = response.json()
    if response.status_code != 200:
        raise DemoFailed(f"{response.status_code} {answer.get('title')}: {answer.get('detail')}")
    return answer


if __name__ == "__main__":
    raise SystemExit(main())
