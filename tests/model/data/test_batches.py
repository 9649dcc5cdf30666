import random
from collections import Counter

import pytest
import torch

from model.data.batches import (
    by_length,
    held_out_windows,
    shuffled_within_ties,
    soon_labels,
    token_batch,
    training_windows,
)
from model.data.histories import History
from model.semantic_id import Codes, Vocabulary

SIZES = (3, 3, 4)
VOCABULARY = Vocabulary.compact(SIZES)


def history(count: int, name: str = "u", every: int = 1) -> History:
    return History(name, tuple(f"{name}{i}" for i in range(count)), tuple(i // every for i in range(count)))


def test_only_items_of_equal_time_change_places() -> None:
    rng = random.Random(3)
    seen = set()
    for _ in range(50):
        items = shuffled_within_ties(history(6, every=3), rng)
        assert sorted(items[:3]) == ["u0", "u1", "u2"]
        assert sorted(items[3:]) == ["u3", "u4", "u5"]
        seen.add(tuple(items))
    assert len(seen) > 10
    assert shuffled_within_ties(history(6), rng) == [f"u{i}" for i in range(6)]


def test_windows_neither_lose_nor_repeat_items_and_keep_their_order() -> None:
    users = [history(n, f"{n}-") for n in (2, 3, 7, 16, 40)]
    for seed in range(30):
        windows = training_windows(users, 8, 0.0, random.Random(seed))
        assert all(2 <= len(window) <= 8 for window in windows)
        counts = Counter(item for window in windows for item in window)
        assert set(counts.values()) == {1}
        for user in users:
            own = [i for i in user.item_ids if i in counts]
            # A window of one item asks nothing: at most the first and the last item of a user are left out so.
            assert set(user.item_ids) - set(own) <= {user.item_ids[0], user.item_ids[-1]}
            place = {item: n for n, item in enumerate(user.item_ids)}
            for window in windows:
                if window[0] in place:
                    assert [place[i] for i in window] == list(range(place[window[0]], place[window[-1]] + 1))


def test_windows_of_an_epoch_begin_at_another_phase() -> None:
    first = {min(training_windows([history(30)], 10, 0.0, random.Random(s)), key=len)[0] for s in range(20)}
    assert len(first) > 3


def test_dropout_leaves_about_that_share_out_and_equal_seeds_agree() -> None:
    users = [history(50, f"{n}-") for n in range(40)]
    windows = training_windows(users, 10, 0.3, random.Random(0))
    kept = sum(map(len, windows))
    assert 1250 < kept < 1480
    assert windows == training_windows(users, 10, 0.3, random.Random(0))


def slow_labels(window: list[Codes], item: int, level: int, soon_items: int, decay: float) -> dict[int, float]:
    """The label in words: what comes soon and shares the codes so far, weighted by distance."""
    weights: dict[int, float] = {}
    for distance in range(soon_items):
        if item + distance < len(window) and window[item + distance][:level] == window[item][:level]:
            token = VOCABULARY.item_tokens(window[item + distance])[level]
            weights[token] = weights.get(token, 0.0) + decay**distance
    return {token: weight / sum(weights.values()) for token, weight in weights.items()}


def random_window(rng: random.Random, count: int) -> list[Codes]:
    return [tuple(rng.randrange(n) for n in SIZES) for _ in range(count)]


@pytest.mark.parametrize(("soon_items", "decay"), [(1, 0.9), (4, 0.8), (20, 1.0), (5, 0.0)])
def test_labels_are_what_comes_soon_among_what_shares_the_codes_so_far(soon_items: int, decay: float) -> None:
    rng = random.Random(soon_items)
    windows = [random_window(rng, n) for n in (9, 2, 6)]
    items = torch.full((3, 9, 3), -1)
    for row, window in enumerate(windows):
        items[row, : len(window)] = torch.tensor(window)
    labels = soon_labels(items, VOCABULARY, soon_items, decay)
    for row, window in enumerate(windows):
        for item in range(9):
            for level in range(3):
                expected = torch.zeros(VOCABULARY.size)
                if item < len(window):
                    for token, share in slow_labels(window, item, level, soon_items, decay).items():
                        expected[token] = share
                assert torch.allclose(labels[row, item, level], expected, atol=1e-6), (row, item, level)


def test_a_horizon_of_one_asks_for_the_next_item_alone() -> None:
    window = [(0, 1, 2), (2, 1, 3)]
    labels = soon_labels(torch.tensor([window]), VOCABULARY, 1, 0.5)
    assert labels.argmax(-1).flatten().tolist() == [t for c in window for t in VOCABULARY.item_tokens(c)[:3]]
    assert bool(((labels == 0) | (labels == 1)).all())


def test_labels_are_asked_at_the_position_before_the_code_they_name() -> None:
    rng = random.Random(0)
    codes = {str(i): tuple(rng.randrange(n) for n in SIZES) for i in range(20)}
    windows = [[str(i) for i in range(5)], ["7", "8"], ["9", "10", "11"]]
    for chunk in (windows[:2], windows[2:]):
        batch = token_batch(chunk, codes, VOCABULARY, 1, 0.9)
        assert len(batch.tokens) == len(chunk)
        for row, window in enumerate(chunk):
            prompt = VOCABULARY.prompt(codes[i] for i in window)
            assert batch.tokens[row, : len(prompt)].tolist() == prompt
            assert bool((batch.tokens[row, len(prompt) :] == 0).all())
            real = batch.labels[row].sum(-1) > 0
            assert int(real.sum()) == len(window) * 3
            following = batch.tokens[row, batch.asked[row, real] + 1]
            assert batch.labels[row][real].argmax(-1).tolist() == following.tolist()


def test_a_longer_prefix_moves_every_question() -> None:
    wide = Vocabulary(SIZES, (10, 20, 30), 5, (1, 2, 3), 5, 40)
    batch = token_batch([["a", "b"]], {"a": (0, 1, 2), "b": (2, 2, 3)}, wide, 1, 0.9)
    assert batch.tokens[0].tolist() == [1, 2, 3, 10, 21, 32, 5, 12, 22, 33, 5]
    assert batch.asked.tolist() == [[2, 3, 4, 6, 7, 8]]
    assert batch.labels[0].argmax(-1).tolist() == [10, 21, 32, 12, 22, 33]


def test_windows_sorted_by_length_are_the_same_windows_with_less_padding() -> None:
    rng = random.Random(1)
    windows = [[f"{n}-{i}" for i in range(rng.randrange(2, 30))] for n in range(203)]
    found = by_length(windows, 8, 10, random.Random(0))
    assert sorted(found) == sorted(windows)
    assert found != by_length(windows, 8, 10, random.Random(1))

    def padding(some: list[list[str]]) -> int:
        chunks = [some[begin : begin + 8] for begin in range(0, len(some), 8)]
        return sum(len(c) * max(map(len, c)) - sum(map(len, c)) for c in chunks)

    assert padding(found) < padding(windows) / 4


def test_only_what_is_not_known_of_a_user_is_asked() -> None:
    partly = History("p", tuple("abcdefgh"), tuple(range(8)), 6)
    whole = history(3, "w")
    windows, known = held_out_windows([partly, whole], 4)
    assert dict(zip(map("".join, windows), known, strict=True))["efgh"] == 2
    assert sum(known) == 2
    assert held_out_windows([partly], 20) == ([list("abcdefgh")], [6])
    codes = dict.fromkeys("abcdefgh", (0, 1, 2))
    batch = token_batch([list("efgh"), list("ab")], codes, VOCABULARY, 1, 0.9, [2, 0])
    asked = batch.labels.sum(-1).view(2, 4, 3)
    assert asked[0].tolist() == [[0] * 3, [0] * 3, [1] * 3, [1] * 3]
    assert asked[1, :2].tolist() == [[1] * 3, [1] * 3]
