"""The draft that guesses whole items is trained on what it will see, and changes nothing of what is written."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from model.config import DraftConfig, ListsConfig
from model.decoding import draft_tree
from model.decoding.list_decoder import ListDecoder
from model.decoding.request import ListRequest
from model.decoding.topology import Budget, FixedBudget
from model.draft.item_at_once import ItemDraft
from model.item_trie import Children, ItemTrie
from model.target import Target
from model.train.draft import _batch
from model.train.item_at_once import decisions_of, unrolled_slots
from model.train.lists import write_lists
from model.train.variants import VARIANTS, feature_layers, new_draft
from tests.model.conftest import SIZES, Tiny

Tensor = torch.Tensor
CONFIG = DraftConfig(num_heads=2, intermediate_size=48, steps=4)


class AnyLength(FixedBudget):
    """Rounds of any length."""

    rng = random.Random(0)

    def __call__(self, rows: int) -> Budget:
        return Budget(self.rng.randrange(1, 6))


def test_training_sees_what_serving_sees(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve with a draft made to guess right: inside the item a round begins with, every slot's output is that of
    pass 0, and in the n-th item after it that of pass n, where the round began with an item."""
    torch.manual_seed(1)
    vocabulary = tiny.target.vocabulary
    shape = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(shape).eval()
    target = Target(model, vocabulary)
    network = new_draft(CONFIG, vocabulary, 32, 3, VARIANTS["item-at-once"])
    draft = ItemDraft(network, target.embedding, vocabulary)
    request = ListRequest("r", tuple(tiny.codes[:5]), 40)
    lists = write_lists(target, tiny.trie, tiny.catalog, [request], ListsConfig(1, 40, 1), 6)
    truth = lists.log_probs[0].float().argmax(-1).tolist()
    served: list[list[Tensor]] = []
    decided = [1]

    def guess(logits: Tensor, wanted: Tensor, parent: Tensor, rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parent, choice, valid = ranked(logits, wanted, parent, rank)
        place = decided[0] + len(served[-1]) - 1
        if place < len(truth):
            codes = tiny.trie.code[first[-1] :].tolist()
            choice = torch.full_like(choice, codes.index(truth[place]))
        return parent, choice, valid

    def seen(target: Target, trie: ItemTrie, hidden: Tensor, children: Children) -> Tensor:
        served[-1].append(hidden[0, 0].clone())
        first.append(int(children.nodes[0, 0, 0]))
        return logits_of(target, trie, hidden, children)

    ranked, logits_of = draft_tree._ranked, draft_tree.legal_logits
    first: list[int] = []
    monkeypatch.setattr(draft_tree, "_ranked", guess)
    monkeypatch.setattr(draft_tree, "legal_logits", seen)
    decoder = ListDecoder(
        target,
        draft,
        tiny.trie,
        tiny.catalog,
        num_rows=1,
        max_history_items=6,
        max_k=40,
        budget=AnyLength(Budget(0)),  # some rounds begin with an item, some inside one
    )
    decoder.admit([request])
    starts = []
    while decoder.rows.in_use:
        served.append([])
        starts.append(decided[0])
        _, stats = decoder.round()
        decided[0] += 1 + stats.accepted_tokens
    batch = _batch(lists, model, vocabulary, feature_layers(3))
    with torch.no_grad():
        trained = unrolled_slots(network, target.embedding, batch, 4)
    item, level = lists.item[0].tolist(), lists.level[0].tolist()
    begins = decisions_of(batch, 40, len(SIZES))[1][0].tolist()
    compared = {0: 0, 1: 0, 2: 0}
    for start, outputs in zip(starts, served, strict=True):
        for decision, output in zip(range(start, len(truth)), outputs, strict=False):
            ahead = item[decision] - item[start]
            if not ahead:
                assert torch.allclose(output, trained[0][0, start, level[decision]], atol=2e-2), (start, decision)
            elif start in begins:
                own = trained[ahead][0, item[decision], level[decision]]
                assert torch.allclose(output, own, atol=2e-2), (start, decision)
            else:
                continue
            compared[ahead] += 1
    assert compared[0] > 10
    assert compared[1] > 2
