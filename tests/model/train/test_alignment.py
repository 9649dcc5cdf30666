import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from model.config import AlignmentConfig
from model.decoding.beam_choice import Beams
from model.decoding.beam_draft import HeadDraft, Lot, Search
from model.decoding.beam_tree import BeamTree
from model.decoding.plain import PlainTwin
from model.draft.draft import Draft
from model.draft.network import DraftNetwork, DraftShape
from model.item_trie import Availability, ItemTrie, legal_codes_by_search
from model.semantic_id import Vocabulary
from model.target import Target
from model.train.alignment import (
    TargetBeams,
    Teacher,
    align,
    alignment_loss,
    decided_at,
    head_logits,
    small_model,
    write_target_beams,
)
from tests.model.conftest import SIZES, random_catalog

LOSSES = ("atspeed-s", "atspeed-r", "word-kd", "tvd-kd", "seq-kd")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=Vocabulary.compact(SIZES).size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(shape).eval()


@pytest.fixture(scope="module")
def trie() -> ItemTrie:
    return ItemTrie(np.array([item.codes for item in random_catalog(0).items]), Vocabulary.compact(SIZES))


@pytest.fixture(scope="module")
def target(model: PreTrainedModel, trie: ItemTrie) -> Target:
    return Target(model, trie.vocabulary)


@pytest.fixture(scope="module")
def beams(target: Target, trie: ItemTrie) -> TargetBeams:
    rng = random.Random(0)
    codes = [item.codes for item in random_catalog(0).items]
    histories = [rng.sample(codes, rng.randrange(1, 5)) for _ in range(12)]
    return write_target_beams(target, trie, histories, 6)


def network(trie: ItemTrie) -> DraftNetwork:
    torch.manual_seed(1)
    return DraftNetwork(DraftShape(32, 2, 48, trie.vocabulary.num_slots, 3, (0, 1, 2), True, "gated"))


def slow_loss(
    loss: str, p: list[float], q: list[float], legal: list[int], label: int, weight: float, top: int
) -> float:
    """One decision, from probabilities over everything, as the module's docstring says it."""
    places = legal if loss.startswith("atspeed") else list(range(len(p)))
    p = [p[i] / sum(p[j] for j in places) for i in places]
    q = [q[i] / sum(q[j] for j in places) for i in places]
    cross_entropy = -math.log(q[places.index(label)])
    if loss == "seq-kd":
        return cross_entropy
    if loss == "atspeed-s":
        best = sorted(range(len(q)), key=lambda i: -q[i])[:top]
        reverse = sum(q[i] * (math.log(q[i]) - math.log(p[i])) for i in best)
        value = reverse + p[best[-1]] * -sum(q[i] * math.log(q[i]) for i in best)
    elif loss == "word-kd":
        value = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    else:
        value = sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
    return (1 - weight) * cross_entropy + weight * value


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("top", [1, 3, 50])
def test_each_loss_is_its_formula(loss: str, top: int) -> None:
    rng = torch.Generator().manual_seed(top)
    p, q = torch.randn(2, 5, 4, 9, generator=rng).unbind()
    legal = torch.rand(5, 4, 9, generator=rng) < 0.4
    legal[..., 0] = True
    labels = legal.float().flatten(0, 1).multinomial(1, generator=rng).view(5, 4)
    expected = [
        slow_loss(
            loss,
            torch.softmax(p[n, d], -1).double().tolist(),
            torch.softmax(q[n, d], -1).double().tolist(),
            legal[n, d].nonzero()[:, 0].tolist(),
            int(labels[n, d]),
            0.7,
            top,
        )
        for n in range(5)
        for d in range(4)
        if int(legal[n, d].sum()) > 1
    ]
    found = alignment_loss(loss, p, q, legal, labels, 0.7, top)
    assert float(found) == pytest.approx(sum(expected) / len(expected), rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_have_finite_gradients_and_the_target_itself_has_no_divergence(loss: str) -> None:
    q = torch.randn(3, 2, 7, requires_grad=True)
    legal = torch.rand(3, 2, 7) < 0.5
    legal[..., :2] = True
    alignment_loss(loss, torch.randn(3, 2, 7), q, legal, torch.zeros(3, 2, dtype=torch.int64), 0.7, 3).backward()
    assert q.grad is not None and bool(q.grad.isfinite().all()) and float(q.grad.abs().sum()) > 0
    if loss in ("atspeed-r", "word-kd", "tvd-kd"):
        p = torch.randn(3, 2, 7)
        assert float(alignment_loss(loss, p, p, legal, torch.zeros(3, 2, dtype=torch.int64), 1.0, 3)) == pytest.approx(
            0, abs=1e-5
        )


def test_the_teacher_says_what_the_target_says_after_each_prefix_and_what_is_legal_there(
    model: PreTrainedModel, target: Target, trie: ItemTrie, beams: TargetBeams
) -> None:
    batch = Teacher(model, trie, (0, 2)).batch(beams, [3, 0], [[0, 5], [2, 1]])
    items = [item.codes for item in random_catalog(0).items]
    vocabulary, columns = trie.vocabulary, target.head_columns.tolist()
    twin = PlainTwin(target, items, 6)
    for n, (row, place) in enumerate([(3, 0), (3, 5), (0, 2), (0, 1)]):
        history = [tuple(c) for c in beams.history[row].tolist() if c[0] >= 0]
        codes = tuple(beams.items[row, place].tolist())
        assert batch.codes[n].tolist() == list(codes)
        for level in range(trie.num_levels):
            tokens = vocabulary.prompt(history) + vocabulary.item_tokens(codes)[:level]
            logits = twin._pass(tokens, 0, target.new_cache(1, len(tokens)))
            assert torch.allclose(batch.logits[n, level], logits, atol=1e-3)
            expected = [columns[level] + c for c in legal_codes_by_search(items, codes[:level], [])]
            assert batch.legal[n, level].nonzero()[:, 0].tolist() == expected
    assert batch.features.shape == (*batch.tokens.shape, 64)


def test_the_head_is_trained_on_what_it_says_when_it_serves(
    model: PreTrainedModel, target: Target, trie: ItemTrie, beams: TargetBeams
) -> None:
    made, tree = network(trie), BeamTree(trie)
    batch = Teacher(model, trie, made.shape.feature_layers).batch(beams, [2], [[0, 1, 2, 3, 4, 5]])
    logits = head_logits(made, target.embedding, target.head.weight, batch, trie.vocabulary)
    trained = torch.log_softmax(logits.detach().masked_fill(~batch.legal[:, 1:], float("-inf")), -1)
    length = batch.length[:1]
    prompt = batch.tokens[:1, : int(length)]
    output = model(input_ids=prompt, output_hidden_states=True)
    features = [[output.hidden_states[layer + 1][0] for layer in made.shape.feature_layers]]
    may = Availability(trie.passing()[None], torch.zeros(1, dtype=torch.int64), torch.tensor([[trie.num_items]]))
    roots = trie.children(torch.zeros(1, 1, dtype=torch.int64), may)
    first = roots.nodes[0][roots.available[0] > 0].unique()[None]
    draft = HeadDraft(Draft(made, target.embedding, trie.vocabulary), target, tree, 1, 40, 200)
    start = Beams(first, torch.zeros(first.shape))
    # A relaxed row says what it thought of every continuation, and draws them all where there are fewer than its width.
    search = Search(prompt, length, may, start, 1, [200], [Lot(0, replacement=False)])
    [found] = draft.search(search, trie.num_levels - 1, features)
    compared = 0
    for n, codes in enumerate(batch.codes.tolist()):
        node = trie.first_leaf + trie.leaf(tuple(codes))
        path = [node]
        while path[-1]:
            path.append(int(tree.parent[path[-1]]))
        path = path[::-1]
        score = 0.0
        for step, level in enumerate(found.levels):
            served = float(level.joint[level.nodes.tolist().index(path[2 + step])])
            column = int(target.head_columns[1 + step]) + codes[1 + step]
            assert served - score == pytest.approx(float(trained[n, step, column]), abs=1e-3)
            score, compared = served, compared + 1
    assert compared == 6 * (trie.num_levels - 1)


CONFIG = AlignmentConfig(beams_per_history=3, top=3, hidden_size=16, intermediate_size=32, epochs=4, batch_size=4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["padrec", "model"])
def test_training_lowers_the_loss(
    model: PreTrainedModel, target: Target, trie: ItemTrie, beams: TargetBeams, tmp_path: Path, kind: str, loss: str
) -> None:
    made = network(trie) if kind == "padrec" else small_model(CONFIG, trie.vocabulary, 64)
    teacher = Teacher(model, trie, (0, 1, 2) if kind == "padrec" else ())
    result = align(made, teacher, target, beams, beams, loss, CONFIG, tmp_path)
    assert len(result.validation) == 4
    assert result.validation[-1] < result.validation[0]


def test_levels_are_decided_from_the_end_of_the_prompt_on() -> None:
    assert decided_at(torch.tensor([6, 11]), 3).tolist() == [[5, 6, 7], [10, 11, 12]]


def test_beams_are_the_targets_best_items_and_survive_their_file(beams: TargetBeams, tmp_path: Path) -> None:
    assert beams.items.shape == (12, 6, 4)
    for history, items in zip(beams.history.tolist(), beams.items.tolist(), strict=True):
        assert len({tuple(codes) for codes in items}) == 6
        assert not {tuple(codes) for codes in items} & {tuple(codes) for codes in history}
    beams.save(tmp_path / "beams.safetensors")
    assert torch.equal(TargetBeams.load(tmp_path / "beams.safetensors").items, beams.items)
