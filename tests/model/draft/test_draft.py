"""The draft is trained on what it will see: unrolled training outputs equal those of serving, step by step."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from model.config import ListsConfig
from model.decoding import draft_tree
from model.decoding.list_decoder import ListDecoder
from model.decoding.offline import decode_all
from model.decoding.request import ListRequest
from model.decoding.topology import Budget, FixedBudget
from model.draft.draft import Draft
from model.draft.network import DraftNetwork
from model.item_trie import Children, ItemTrie
from model.target import Target
from model.train.draft import DraftBatch, _batch, unrolled_outputs
from model.train.lists import write_lists
from tests.model.conftest import Tiny

Tensor = torch.Tensor


@pytest.fixture
def model(tiny: Tiny) -> object:
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
    return AutoModelForCausalLM.from_config(shape).eval()


def test_training_sees_what_serving_sees(tiny: Tiny, model: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve with a draft that is made to guess right; then every round's outputs must be those of the unrolled
    training pass for the same decisions at the same steps."""
    target = Target(model, tiny.target.vocabulary)
    draft = Draft(tiny.draft().network, target.embedding, target.vocabulary)
    request = ListRequest("r", tuple(tiny.codes[:5]), 4)
    lists = write_lists(target, tiny.trie, tiny.catalog, [request], ListsConfig(1, 4, 1), 6)
    truth = lists.log_probs[0].float().argmax(-1).tolist()
    served: list[list[Tensor]] = []
    decided = [0]

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
        target, draft, tiny.trie, tiny.catalog, num_rows=1, max_history_items=6, max_k=4, budget=FixedBudget(Budget(3))
    )
    decoder.admit([request])
    starts = []
    decided[0] = 1
    while decoder.rows.in_use:
        served.append([])
        starts.append(decided[0])
        _, stats = decoder.round()
        decided[0] += 1 + stats.accepted_tokens
    batch: DraftBatch = _batch(lists, model, tiny.target.vocabulary, draft.feature_layers)  # type: ignore[arg-type]
    with torch.no_grad():
        trained = unrolled_outputs(draft.network, target.embedding, batch, 3)
    compared = 0
    for start, outputs in zip(starts, served, strict=True):
        for step, output in enumerate(outputs):
            if start + step < len(truth):
                assert torch.allclose(output, trained[step][0, start + step], atol=2e-2), (start, step)
                compared += 1
    assert compared >= 6
    assert any(step for outputs in served for step in range(1, len(outputs)))


def test_a_saved_draft_comes_back_the_same(tiny: Tiny, tmp_path: Path) -> None:
    network = tiny.draft(seed=5).network
    network.save(tmp_path)
    again = DraftNetwork.load(tmp_path)
    assert again.shape == network.shape
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_weights_of_another_shape_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    tiny.draft().network.save(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_steps": 4', '"num_steps": 5'))
    with pytest.raises(ValueError, match="size mismatch"):
        DraftNetwork.load(tmp_path)


def test_drafting_right_is_accepted_whole(tiny: Tiny) -> None:
    """Acceptance counts what verification kept: an untrained draft on a short list stays within its bounds."""
    decoder = ListDecoder(
        tiny.target,
        tiny.draft(),
        tiny.trie,
        tiny.catalog,
        num_rows=1,
        max_history_items=6,
        max_k=4,
        budget=FixedBudget(Budget(3)),
    )
    decoded = decode_all(decoder, [ListRequest("r", tuple(tiny.codes[:5]), 4)])
    assert 1.0 <= decoded.acceptance_length <= 4.0
    assert len(decoded.survival()) == 3
