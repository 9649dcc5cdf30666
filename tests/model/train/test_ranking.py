from pathlib import Path

import torch

from model.config import FinetuneConfig
from model.item_trie import legal_codes_by_search
from model.kv_cache import Write
from model.semantic_id import Codes
from model.train.ranking import most_likely_items, ranking_batches, write_rankings
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
        output = target(tokens, positions, cache, Write(positions[:, :1], positions, 0, 0), None, tokens.shape[1])
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
        assert ranked == sorted(scores, key=lambda item: -scores[item])[:8]


def test_a_narrow_beam_still_returns_distinct_unseen_items_best_first(tiny: Tiny) -> None:
    history = tiny.codes[5:9]
    (ranked,) = most_likely_items(tiny.target, tiny.trie, [history], k=5, width=6)
    scores = brute_force(tiny, history)
    assert len(set(ranked)) == 5
    assert [scores[i] for i in ranked] == sorted((scores[i] for i in ranked), reverse=True)


def test_only_the_ranked_items_are_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    histories = [tiny.codes[:3], tiny.codes[10:17]]
    config = FinetuneConfig(list_items=4, beam_width=24)
    path = tmp_path / "train.safetensors"
    assert write_rankings(tiny.target, tiny.trie, histories, config, path) == 2
    (batch,) = ranking_batches(path, tiny.target.vocabulary, 2)
    ranked = most_likely_items(tiny.target, tiny.trie, histories, 4, 24)
    for row, (history, wanted) in enumerate(zip(histories, ranked, strict=True)):
        asked = batch.labels[row].sum(-1) > 0
        assert int(asked.sum()) == 4 * tiny.trie.num_levels
        expected = [t for item in wanted for t in tiny.target.vocabulary.item_tokens(item)[:-1]]
        assert batch.labels[row].argmax(-1)[asked].tolist() == expected
        # Every question is asked at the token before its answer.
        assert batch.tokens[row, batch.asked[asked] + 1].tolist() == expected
        assert batch.tokens[row].tolist()[: len(history) * 5 + 1] == tiny.target.vocabulary.prompt(history)
