"""Token batches: windows of histories as padded token matrices, with the labels and augmentation used in training.

The label of an item is not the next item alone but what is watched soon: the next `soon_items` items, weighted by
distance, at each level those that share the codes so far. A log's exact order is mostly chance (half of all
neighbours in MovieLens carry the same timestamp), a list is meant to hold what comes soon, and averaging over the
near future takes most of the noise out of the gradient. Knows the vocabulary and the histories; nothing of models.

Shapes: B windows, I items a window, T tokens, L levels, V vocabulary, P items asked for, A = P L questions.
"""

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from model.data.histories import History
from model.semantic_id import Codes, Vocabulary

Tensor = torch.Tensor


class TokenBatch(NamedTuple):
    """`tokens` [B, T] int64; `labels` [B, A, V] distributions (times a weight) for the code tokens, which are predicted
    from the positions `asked` [B, A]; where nothing is asked they are all zero."""

    tokens: Tensor
    labels: Tensor
    asked: Tensor


def shuffled_within_ties(history: History, rng: random.Random) -> list[str]:
    """The history with items of equal timestamp in a random order: their order in the log means nothing."""
    keyed = [(t, rng.random(), item) for t, item in zip(history.timestamps, history.item_ids, strict=True)]
    return [item for _, _, item in sorted(keyed)]


def training_windows(
    users: Sequence[History], window_items: int, item_dropout: float, rng: random.Random
) -> list[list[str]]:
    """One epoch: every user cut at a random phase into windows of `window_items`, some items left out."""
    windows = []
    for user in users:
        items = [i for i in shuffled_within_ties(user, rng) if rng.random() >= item_dropout]
        start = -rng.randrange(window_items)
        for begin in range(start, len(items), window_items):
            window = items[max(begin, 0) : begin + window_items]
            if len(window) > 1:
                windows.append(window)
    rng.shuffle(windows)
    return windows


def held_out_windows(users: Sequence[History], window_items: int) -> tuple[list[list[str]], list[int]]:
    """The newest window of every user, and how many of its items are known: context, not questions. Users held out
    whole are cut into windows from end to end."""
    whole = training_windows([u for u in users if not u.known], window_items, 0.0, random.Random(0))
    partly = [u for u in users if u.known]
    windows = [list(u.item_ids[-window_items:]) for u in partly]
    known = [max(0, u.known - max(0, len(u.item_ids) - window_items)) for u in partly]
    return whole + windows, [0] * len(whole) + known


def by_length(windows: list[list[str]], batch_size: int, pool: int, rng: random.Random) -> list[list[str]]:
    """The windows in another order: `pool` batches at a time sorted by length, so that a batch has little padding,
    and the batches shuffled."""
    windows = [
        window
        for begin in range(0, len(windows), batch_size * pool)
        for window in sorted(windows[begin : begin + batch_size * pool], key=len)
    ]
    batches = [windows[begin : begin + batch_size] for begin in range(0, len(windows), batch_size)]
    last = batches.pop() if len(windows) % batch_size else []
    rng.shuffle(batches)
    return [window for batch in [*batches, last] for window in batch]


def token_batch(
    windows: Sequence[Sequence[str]],
    codes: Mapping[str, Codes],
    vocabulary: Vocabulary,
    soon_items: int,
    soon_decay: float,
    known: Sequence[int] = (),
) -> TokenBatch:
    """A batch of windows. The prefix and separators are context, not questions: serving forces them. So are the first
    `known` items of each window."""
    chunk = [[codes[i] for i in window] for window in windows]
    items = padded_items(chunk)
    tokens = padded_tokens([vocabulary.prompt(window) for window in chunk])
    asked = questions(torch.full((len(chunk),), len(vocabulary.prompt_prefix)), items.shape[1], vocabulary)
    labels = soon_labels(items, vocabulary, soon_items, soon_decay)
    for row, count in enumerate(known):
        labels[row, :count] = 0.0
    return TokenBatch(tokens, labels.flatten(1, 2), asked)


def padded_items(windows: Sequence[Sequence[Codes]]) -> Tensor:
    """[B, I, L] codes, -1 behind the shorter windows."""
    items = torch.full((len(windows), max(map(len, windows)), len(windows[0][0])), -1)
    for row, window in enumerate(windows):
        items[row, : len(window)] = torch.tensor(window)
    return items


def padded_tokens(sequences: Sequence[Sequence[int]]) -> Tensor:
    """[B, T] tokens, zeros behind the shorter sequences: causality hides them."""
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences])


def questions(first: Tensor, count: int, vocabulary: Vocabulary) -> Tensor:
    """[B, count * L] positions that predict the codes of `count` items, the first of which begins at `first` [B]."""
    offsets = torch.arange(count)[:, None] * vocabulary.tokens_per_item + torch.arange(vocabulary.num_levels) - 1
    return first[:, None] + offsets.flatten()


def soon_labels(items: Tensor, vocabulary: Vocabulary, soon_items: int, decay: float) -> Tensor:
    """[B, I, L, V] label distributions from `items` [B, I, L] codes (-1: padding)."""
    count = items.shape[1]
    ahead = torch.arange(count)[None, :] - torch.arange(count)[:, None]
    weight = torch.where((ahead >= 0) & (ahead < soon_items), decay ** ahead.clamp(min=0).float(), 0.0)
    real = items[..., 0] >= 0
    return labels_from(weight * (real.unsqueeze(1) & real.unsqueeze(2)), items, items, vocabulary)


def labels_from(shares: Tensor, written: Tensor, items: Tensor, vocabulary: Vocabulary) -> Tensor:
    """[B, P, L, V] label distributions of `written` [B, P, L]: at each level, what the codes written so far leave of
    `items` [B, I, L] weighted by `shares` [B, P, I]."""
    rows, count, levels = written.shape
    labels = torch.zeros(rows, count, levels, vocabulary.size)
    for level in range(levels):
        token = (items[..., level].clamp(min=0) + vocabulary.level_offsets[level]).unsqueeze(1).expand_as(shares)
        total = shares.sum(-1, keepdim=True).clamp(min=1e-9)
        labels[:, :, level].scatter_add_(2, token, shares / total)
        shares = shares * (written[:, :, None, level] == items[:, None, :, level])
    return labels
