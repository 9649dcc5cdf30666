from pathlib import Path

import pytest
import torch

from model.config import FinetuneConfig, TargetConfig
from model.item_trie import legal_codes_by_search
from model.kv_cache import Sight, Write
from model.semantic_id import Codes
from model.train.ranking import Rankings, most_likely_items, ranking_batch, write_rankings
from tests.model.conftest import Tiny, tiny

__all__ = ["tiny"]


@torch.no_grad()
def brute_force(tiny: Tiny, history: list[Codes]) -> dict[Codes, float]:
    """Log-probability of every item that is not in the history, one pass per item."""
    target, scores = tiny.target, {}
    prompt = target.vocabulary.prompt(history)
    for item in set(tiny.codes) - set(history):
        tokens = torch.tensor([prompt + target.vocabulary.item_tokens(item)])
        positions = torch.arange(tokens.shape[1])[None]
        cache = target.new_cache(1, tokens.shape[1])
        at = Write(positions[:, :1], positions, 0, 0)
        output = target(tokens, positions, cache, at, Sight(None, None, tokens.shape[1]))
        logits = target.item_logits(output.hidden)[0]
        score = 0.0
        for level, code in enumerate(item):
            legal = legal_codes_by_search(tiny.codes, item[:level], set(history))
            column = int(target.head_columns[level])
            log_probs = torch.log_softmax(logits[len(prompt) - 1 + level, [column + c for c in legal]], dim=0)
            score += float(log_probs[legal.index(code)])
        scores[item] = score
    return scores


def test_a_wide_beam_finds_the_most_likely_items_in_order(tiny: Tiny) -> None:
    histories = [tiny.codes[:3], tiny.codes[10:17]]
    found = most_likely_items(tiny.target, tiny.trie, histories, k=8, width=120)
    for history, ranked in zip(histories, found, strict=True):
        scores = brute_force(tiny, history)
        assert [codes for codes, _ in ranked] == sorted(scores, key=lambda item: -scores[item])[:8]
        assert [score for _, score in ranked] == pytest.approx([scores[codes] for codes, _ in ranked], abs=1e-4)


def test_a_narrow_beam_still_returns_distinct_unseen_items_best_first(tiny: Tiny) -> None:
    history = tiny.codes[5:9]
    (ranked,) = most_likely_items(tiny.target, tiny.trie, [history], k=5, width=6)
    scores = brute_force(tiny, history)
    found = [scores[codes] for codes, _ in ranked]
    assert len(found) == len({codes for codes, _ in ranked}) == 5
    assert found == sorted(found, reverse=True)


HISTORIES = ((0, 3), (10, 17))
CONFIG = FinetuneConfig(list_items=4, beam_width=24, history_weight=0.5)
SOON = TargetConfig(soon_items=3, soon_decay=0.9)


@pytest.fixture
def rankings(tiny: Tiny) -> Rankings:
    return write_rankings(tiny.target, tiny.trie, [tiny.codes[a:b] for a, b in HISTORIES], CONFIG)


def test_rankings_survive_a_file(rankings: Rankings, tmp_path: Path) -> None:
    rankings.save(tmp_path / "rankings.safetensors")
    again = Rankings.load(tmp_path / "rankings.safetensors")
    assert all(torch.equal(value, getattr(again, name)) for name, value in vars(rankings).items())


def test_histories_with_too_few_items_left_are_not_ranked(tiny: Tiny) -> None:
    config = FinetuneConfig(list_items=4, beam_width=200)
    few = write_rankings(tiny.target, tiny.trie, [tiny.codes[:3], tiny.codes[:-3]], config)
    assert len(few.scores) == 1
    assert int(few.scores.isfinite().sum()) == len(tiny.codes) - 3


def test_a_list_follows_its_prompt_and_every_question_is_asked_before_its_answer(
    tiny: Tiny, rankings: Rankings
) -> None:
    vocabulary, levels = tiny.target.vocabulary, tiny.trie.num_levels
    batch = ranking_batch(rankings, [0, 1], vocabulary, CONFIG, SOON, None)
    for row, (begin, end) in enumerate(HISTORIES):
        history = tiny.codes[begin:end]
        prompt = vocabulary.list_prompt(history)
        ranked = [tuple(codes) for codes in rankings.ranked[row, :4].tolist()]
        written = [token for item in ranked for token in vocabulary.list_item_tokens(item)]
        assert batch.tokens[row, : len(prompt) + len(written)].tolist() == prompt + written
        asked = batch.labels[row].sum(-1) > 0
        assert int(asked.sum()) == (len(history) + 4) * levels
        answers = batch.tokens[row, batch.asked[row, asked] + 1].tolist()
        assert answers == [t for item in (*history, *ranked) for t in vocabulary.item_tokens(item)[:levels]]
        weight = batch.labels[row][asked].sum(-1)
        assert weight.tolist() == pytest.approx([0.5] * len(history) * levels + [1.0] * 4 * levels, abs=1e-5)


def test_the_label_of_a_list_item_is_what_the_ranking_still_holds(tiny: Tiny, rankings: Rankings) -> None:
    vocabulary, levels = tiny.target.vocabulary, tiny.trie.num_levels
    batch = ranking_batch(rankings, [1], vocabulary, CONFIG, SOON, None)
    ranked = [tuple(codes) for codes in rankings.ranked[1].tolist()]
    weights = [2.718281828 ** (score / CONFIG.label_temperature) for score in rankings.scores[1].tolist()]
    labels = batch.labels[0].unflatten(0, (-1, levels))[-4:]
    for place in range(4):
        for level in range(levels):
            expected: dict[int, float] = {}
            for item, weight in list(zip(ranked, weights, strict=True))[place:]:
                if item[:level] == ranked[place][:level]:
                    token = vocabulary.item_tokens(item)[level]
                    expected[token] = expected.get(token, 0.0) + weight
            dense = torch.zeros(vocabulary.size)
            for token, weight in expected.items():
                dense[token] = weight / sum(expected.values())
            assert torch.allclose(labels[place, level], dense, atol=1e-5), (place, level)


def test_drawn_orders_stay_near_the_ranking_and_repeat_for_a_seed(tiny: Tiny, rankings: Rankings) -> None:
    def first_items(seed: int) -> list[list[int]]:
        rng = torch.Generator().manual_seed(seed)
        batch = ranking_batch(rankings, [0], tiny.target.vocabulary, CONFIG, SOON, rng)
        start = len(tiny.target.vocabulary.list_prompt(tiny.codes[:3]))
        places = tiny.target.vocabulary.tokens_per_item
        return batch.tokens[0, start:].view(-1, places).tolist()[:4]

    drawn = [first_items(seed) for seed in range(40)]
    assert drawn == [first_items(seed) for seed in range(40)]
    assert len({str(d) for d in drawn}) > 5
    best = tiny.target.vocabulary.list_item_tokens(tuple(rankings.ranked[0, 0].tolist()))
    assert sum(d[0] == best for d in drawn) > 40 / CONFIG.beam_width
