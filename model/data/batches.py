"""Token batches: windows of histories as padded token matrices, with the augmentation used in training.

Knows the vocabulary and the histories; nothing of models.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from model.data.histories import History
from model.semantic_id import Codes, Vocabulary


@dataclass(frozen=True)
class TokenBatch:
    """`tokens` and `labels` [B, T] int64; labels are -100 where nothing is to be predicted."""

    tokens: torch.Tensor
    labels: torch.Tensor


def jittered(history: History, jitter: float, rng: random.Random) -> list[str]:
    """The history with its order loosened: ties in the log shuffled, since their order there means nothing, and every
    item moved later by up to `jitter` places. A target trained on it learns what is watched soon rather than what the
    log happens to list next, which is what a list is for."""
    keyed = [(t, rng.random(), item) for t, item in zip(history.timestamps, history.item_ids, strict=True)]
    placed = [(place + rng.uniform(0.0, jitter), item) for place, (_, _, item) in enumerate(sorted(keyed))]
    return [item for _, item in sorted(placed)]


def training_windows(
    users: Sequence[History], window_items: int, jitter: float, item_dropout: float, rng: random.Random
) -> list[list[str]]:
    """One epoch: every user cut at a random phase into windows of `window_items`, some items left out."""
    windows = []
    for user in users:
        items = [i for i in jittered(user, jitter, rng) if rng.random() >= item_dropout]
        start = -rng.randrange(window_items)
        for begin in range(start, len(items), window_items):
            window = items[max(begin, 0) : begin + window_items]
            if len(window) > 1:
                windows.append(window)
    rng.shuffle(windows)
    return windows


def token_batches(
    windows: Sequence[Sequence[str]], codes: Mapping[str, Codes], vocabulary: Vocabulary, batch_size: int
) -> Iterator[TokenBatch]:
    """Next-token batches. The prefix and separators are context, not questions: serving forces them."""
    for begin in range(0, len(windows), batch_size):
        chunk = [vocabulary.prompt(codes[i] for i in w) for w in windows[begin : begin + batch_size]]
        length = max(len(tokens) for tokens, _ in chunk)
        tokens = torch.zeros(len(chunk), length, dtype=torch.int64)
        labels = torch.full((len(chunk), length), -100, dtype=torch.int64)
        for row, (sequence, slots) in enumerate(chunk):
            tokens[row, : len(sequence)] = torch.tensor(sequence)
            asked = torch.tensor(slots) < vocabulary.num_levels
            labels[row, : len(sequence)] = torch.where(asked, tokens[row, : len(sequence)], -100)
        yield TokenBatch(tokens, labels)
