"""Every draft that is compared learns, each from the same lists."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from model.config import DraftConfig, ListsConfig
from model.decoding.request import ListRequest
from model.target import Target
from model.train.draft import DraftBatch, cross_entropy, draft_batches, draft_loss, train_draft
from model.train.item_at_once import decisions_of, item_loss
from model.train.lists import write_lists
from model.train.variants import VARIANTS, feature_layers, new_draft
from tests.model.conftest import SIZES, Tiny

Tensor = torch.Tensor
CONFIG = DraftConfig(num_heads=2, intermediate_size=48, steps=3, epochs=6, batch_size=8, learning_rate=1e-2)


@pytest.fixture(scope="module")
def target(tiny: Tiny) -> tuple[Target, object]:
    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=tiny.target.vocabulary.size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(shape).eval().requires_grad_(False)
    return Target(model, tiny.target.vocabulary), model


@pytest.fixture(scope="module")
def batches(tiny: Tiny, target: tuple[Target, object]) -> list[DraftBatch]:
    rng = random.Random(0)
    requests = [ListRequest(str(n), tuple(rng.sample(tiny.codes, rng.randrange(1, 6))), 4) for n in range(24)]
    lists = write_lists(target[0], tiny.trie, tiny.catalog, requests, ListsConfig(1, 4, 8), 6)
    return draft_batches(lists, target[1], tiny.target.vocabulary, feature_layers(3), 8)  # type: ignore[arg-type]


def loss_of(name: str, target: Target, batch: DraftBatch, network: torch.nn.Module) -> Tensor:
    config = CONFIG if VARIANTS[name].unrolled else replace(CONFIG, steps=1)
    of_batch = item_loss if VARIANTS[name].whole_items else draft_loss
    return of_batch(network, target.embedding, target.head.weight, target.head_columns, batch, config)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", VARIANTS)
def test_training_brings_the_loss_down(
    tiny: Tiny, target: tuple[Target, object], batches: list[DraftBatch], name: str, tmp_path: Path
) -> None:
    network = new_draft(CONFIG, tiny.target.vocabulary, 32, 3, VARIANTS[name])
    with torch.no_grad():
        before = sum(loss_of(name, target[0], b, network).item() for b in batches) / len(batches)
    start = {n: p.detach().clone() for n, p in network.named_parameters()}
    result = train_draft(
        network, lambda b: loss_of(name, target[0], b, network), batches, batches, CONFIG, tmp_path, name
    )
    assert min(result.validation) < before - 0.1
    # Every parameter takes part; a step that is not unrolled is no variant's.
    assert all(not torch.equal(p, start[n]) for n, p in network.named_parameters())


def test_lists_of_a_batch_have_about_as_many_decisions_and_no_column_for_nothing(batches: list[DraftBatch]) -> None:
    counts = [(b.level >= 0).sum(1).tolist() for b in batches]
    assert sum(map(len, counts)) == 24
    assert all(max(count) == b.level.shape[1] for count, b in zip(counts, batches, strict=True))
    assert [c for count in counts for c in count] == sorted(c for count in counts for c in count)


def test_cross_entropy_is_that_of_each_decision_by_itself(target: tuple[Target, object]) -> None:
    torch.manual_seed(2)
    columns, head = target[0].head_columns, torch.randn(sum(SIZES), 32)
    level, output = torch.randint(0, 4, (30,)), torch.randn(30, 32)
    log_probs = torch.full((30, max(SIZES)), float("-inf"))
    slow = []
    for n, of in enumerate(level.tolist()):
        legal = sorted(random.Random(n).sample(range(SIZES[of]), 2))
        log_probs[n, legal] = torch.log_softmax(torch.randn(2), 0)
        log_q = torch.log_softmax(head[columns[of] + torch.tensor(legal)] @ output[n], 0)
        slow.append(-(log_probs[n, legal].exp() * log_q).sum())
    found = cross_entropy(output, head, columns, level, log_probs)
    assert torch.allclose(found.sort().values, torch.stack(slow).sort().values, atol=1e-5)


def test_the_decisions_of_an_item_are_found_by_slot(batches: list[DraftBatch]) -> None:
    for batch in batches:
        made, first = decisions_of(batch, 4, len(SIZES))
        for row in range(len(batch.level)):
            decisions = list(zip(batch.item[row].tolist(), batch.level[row].tolist(), strict=True))
            for item in range(4):
                own = {level: d for d, (of, level) in enumerate(decisions) if of == item and level >= 0}
                assert made[row, item].tolist() == [own.get(level, -1) for level in range(len(SIZES))]
                assert int(first[row, item]) == min(own.values())
