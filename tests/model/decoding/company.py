"""Requests that join and leave a decoder whenever they like: what its answers must not depend on."""

import random
from collections.abc import Sequence
from typing import Any


def in_any_company(running: Any, requests: Sequence[Any], rng: random.Random) -> tuple[dict[str, Any], set[str]]:
    """Decode `requests` with a decoder, some of them cancelled on the way; results by ID, and who was cancelled.
    Nothing may leak."""
    waiting, results, cancelled = list(requests), dict[str, Any](), set[str]()
    while len(results) + len(cancelled) < len(requests):
        joining = waiting[: rng.randrange(running.rows.num_free + 1)]
        waiting = waiting[len(joining) :]
        results |= {r.request_id: r for r in running.admit(joining)}
        held = [running.rows.row(i).request.request_id for i in running.rows.in_use]
        if held and rng.random() < 0.1:
            cancelled.add(victim := rng.choice(held))
            assert running.cancel(victim)
        if running.rows.in_use:
            results |= {r.request_id: r for r in running.round()[0]}
    running.rows.check_integrity()
    return results, cancelled
