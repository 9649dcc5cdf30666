"""On a CUDA device: everything decodes as the slow twin does. Needs torch, transformers, numpy and pytest alone."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from model.catalog import Catalog, CatalogItem
from model.decoding.list_decoder import ListDecoder
from model.decoding.offline import decode_all
from model.decoding.plain import PlainTwin
from model.decoding.request import CategoryFilter, ListRequest
from model.decoding.sampling import gumbel
from model.decoding.topology import Budget
from model.draft.draft import Draft
from model.draft.network import DraftNetwork, DraftShape
from model.item_trie import ItemTrie
from model.kv_cache import Sight, Write
from model.semantic_id import Vocabulary
from model.target import Target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZES = (6, 6, 5, 4)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    shape = LlamaConfig(
        vocab_size=Vocabulary.compact(SIZES).size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(shape).eval().cuda()


@torch.no_grad()
def test_logits_equal_transformers(model: Any) -> None:
    target = Target(model, Vocabulary.compact(SIZES), "cuda")
    tokens = torch.randint(3, target.vocabulary.size, (2, 12), device="cuda")
    positions = torch.arange(12, device="cuda").expand(2, -1)
    at = Write(torch.arange(2, device="cuda")[:, None], positions)
    output = target(tokens, positions, target.new_cache(2, 12), at, Sight(None, None, 12))
    expected = model(tokens).logits[..., 3:]
    assert torch.allclose(target.item_logits(output.hidden), expected, atol=1e-3, rtol=1e-3)


def test_the_noise_is_that_of_the_cpu() -> None:
    seed, decision, code = torch.arange(50)[:, None, None] * 2**57, torch.arange(40)[:, None], torch.arange(64)
    on_device = gumbel(seed.cuda(), decision.cuda(), code.cuda()).cpu()
    assert torch.allclose(on_device, gumbel(seed, decision, code), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("budget", [Budget(0), Budget(4), Budget(3, 3)], ids=["forced", "chain", "tree"])
def test_every_mode_writes_what_the_slow_twin_writes(model: Any, budget: Budget) -> None:
    rng = random.Random(0)
    codes = sorted({tuple(rng.randrange(n) for n in SIZES) for _ in range(120)})
    items = tuple(CatalogItem(str(i), c, 1, {"genre": [rng.choice("abc")]}) for i, c in enumerate(codes))
    vocabulary = Vocabulary.compact(SIZES)
    target, trie = Target(model, vocabulary, "cuda"), ItemTrie(np.array(codes), vocabulary, "cuda")
    shape = DraftShape(64, 4, 96, vocabulary.num_slots, 4, (0, 1, 2), True, "gated")
    draft = Draft(DraftNetwork(shape), target.embedding, vocabulary)
    decoder = ListDecoder(
        target,
        draft if budget.steps else None,
        trie,
        Catalog(SIZES, items),
        num_rows=4,
        max_history_items=6,
        max_k=10,
        budget=lambda rows: budget,
    )
    requests = [
        ListRequest(
            str(i),
            tuple(rng.sample(codes, 4)),
            10,
            tuple(rng.sample(codes, 5)),
            filters={"genre": CategoryFilter(("a", "b"))} if i % 2 else {},
            temperature=i % 3 / 2,
            top_p=0.9 if i % 2 else 1.0,
            seed=i,
        )
        for i in range(9)
    ]
    decoded = decode_all(decoder, requests)
    twin = PlainTwin(target, codes, 6)
    for request in requests:
        allowed = {i.codes for i in items if not request.filters or i.attributes["genre"] != ["c"]}
        expected, got = twin.decode(request, allowed), decoded.results[request.request_id]
        near_tie = min(twin.margins, default=1.0) < 1e-4
        assert near_tie or [i.codes for i in got.items] == [i.codes for i in expected.items]
