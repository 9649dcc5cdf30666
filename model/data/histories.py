"""Logs, time-ordered histories, and the split into training, validation and held-out users.

Knows nothing of file formats, semantic IDs or tensors.
"""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from model.config import DataConfig


class Interaction(NamedTuple):
    """One event. `timestamp` in seconds."""

    user_id: str
    item_id: str
    timestamp: int


@dataclass(frozen=True)
class Logs:
    """All interactions, and what is known of the items."""

    interactions: tuple[Interaction, ...]
    attributes: Mapping[str, Mapping[str, list[str] | float]]


@dataclass(frozen=True)
class History:
    """One user's items, oldest first, each item once (its first time), with the time of each. The first `known` are
    trained on; what is asked of a user that is validated or tested comes behind them (0: held out whole)."""

    user_id: str
    item_ids: tuple[str, ...]
    timestamps: tuple[int, ...]
    known: int = 0


@dataclass(frozen=True)
class Case:
    """One held-out question: after `history`, the user went on to `future` (oldest first)."""

    user_id: str
    history: tuple[str, ...]
    future: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """Users to train on, some for early stopping, some for test. Whoever is not held out whole says what is known."""

    train: tuple[History, ...]
    validation: tuple[History, ...]
    test: tuple[History, ...]


def histories(logs: Logs) -> list[History]:
    """Time-ordered histories, stable for equal timestamps, in order of first appearance of the user."""
    by_user: dict[str, dict[str, int]] = {}
    for user_id, item_id, timestamp in sorted(logs.interactions, key=lambda i: i.timestamp):
        by_user.setdefault(user_id, {}).setdefault(item_id, timestamp)
    return [History(u, tuple(items), tuple(items.values())) for u, items in by_user.items()]


def split_users(all_histories: Iterable[History], config: DataConfig) -> Split:
    """Deterministic split by user. Users with too few items for one test case are trained on."""
    users = sorted(all_histories, key=lambda h: h.user_id)
    rng = random.Random(config.seed)
    rng.shuffle(users)
    if config.max_users:
        users = users[: config.max_users]
    long_enough = [u for u in users if len(u.item_ids) >= config.min_history + 10]
    held_out = config.held_out_users + config.validation_users
    if len(long_enough) <= held_out:
        raise ValueError(f"data.held_out_users: only {len(long_enough)} users have enough items")
    test, validation = long_enough[: config.held_out_users], long_enough[config.held_out_users : held_out]
    taken = {u.user_id for u in long_enough[:held_out]}
    return Split(tuple(u for u in users if u.user_id not in taken), tuple(validation), tuple(test))


def cases(users: Iterable[History], config: DataConfig, future_items: int = 10) -> list[Case]:
    """Up to `cases_per_user` evenly spaced cuts of each user; the last cut leaves exactly `future_items`. A user of
    whom a part is known is one case, cut there."""
    found = []
    for user in users:
        if user.known:
            found.append(Case(user.user_id, user.item_ids[: user.known], user.item_ids[user.known :]))
            continue
        first, last = config.min_history, len(user.item_ids) - future_items
        count = min(config.cases_per_user, last - first + 1)
        cuts = {last - round(i * (last - first) / max(1, config.cases_per_user)) for i in range(count)}
        for cut in sorted(cuts):
            found.append(Case(user.user_id, user.item_ids[:cut], user.item_ids[cut : cut + future_items]))
    return found


def last_cases(users: Iterable[History], config: DataConfig, future_items: int = 10) -> list[Case]:
    """One case per user: everything but the last `future_items`, or all that is known."""
    by_user = {case.user_id: case for case in cases(users, config, future_items)}
    return list(by_user.values())
