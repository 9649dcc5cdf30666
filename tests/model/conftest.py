"""Tiny real things: a random catalog, a three-layer target, an untrained draft."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from model.catalog import Catalog, CatalogItem
from model.decoding.plain import PlainTwin
from model.decoding.request import CategoryFilter, ListRequest, ListResult
from model.draft.draft import Draft
from model.draft.network import DraftNetwork, DraftShape
from model.item_trie import ItemTrie
from model.semantic_id import Codes, Vocabulary
from model.target import Target

torch.set_num_threads(1)
SIZES = (6, 6, 5, 4)


@dataclass(frozen=True)
class Tiny:
    """Everything a decoder needs, small enough to check by eye."""

    catalog: Catalog
    trie: ItemTrie
    target: Target
    codes: list[Codes]

    def draft(self, seed: int = 0, *, item: bool = True, adversarial: bool = False) -> Draft:
        """A random draft; an adversarial one likes best what the random one likes least."""
        torch.manual_seed(seed)
        slots = self.target.vocabulary.num_slots
        shape = DraftShape(32, 2, 48, slots, 4, (0, 1, 2), item, "gated" if item else "none")
        network = DraftNetwork(shape)
        if adversarial:
            network.norms[2].data.neg_()
        return Draft(network, self.target.embedding, self.target.vocabulary)

    def twin(self, request: ListRequest) -> ListResult:
        return self.twin_and_margin(request)[0]

    def twin_and_margin(self, request: ListRequest) -> tuple[ListResult, float]:
        """The right answer, filters applied by looking at every item, and how near its nearest choice was to another
        one (nats)."""
        allowed = {
            item.codes
            for item in self.catalog.items
            if all(_passes(item.attributes[name], wanted) for name, wanted in request.filters.items())
        }
        twin = PlainTwin(self.target, self.codes, 6)
        return twin.decode(request, allowed), min(twin.margins, default=float("inf"))


def _passes(value: list[str] | float, wanted: object) -> bool:
    if isinstance(wanted, CategoryFilter):
        assert isinstance(value, list)
        return bool(set(value) & set(wanted.any_of))
    assert not isinstance(value, list)
    low, high = getattr(wanted, "minimum", None), getattr(wanted, "maximum", None)
    return (low is None or value >= low) and (high is None or value <= high)


def random_catalog(seed: int, count: int = 120, sizes: tuple[int, ...] = SIZES) -> Catalog:
    rng = random.Random(seed)
    codes = sorted({tuple(rng.randrange(n) for n in sizes) for _ in range(count)})
    rng.shuffle(codes)
    items = [
        CatalogItem(str(i), c, rng.randrange(50), {"genre": [rng.choice("abc")], "year": 1990 + rng.randrange(10)})
        for i, c in enumerate(codes)
    ]
    return Catalog(sizes, tuple(items))


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    torch.manual_seed(0)
    catalog = random_catalog(0)
    vocabulary = Vocabulary.compact(SIZES)
    shape = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
    )
    codes = [item.codes for item in catalog.items]
    target = Target(AutoModelForCausalLM.from_config(shape), vocabulary)
    return Tiny(catalog, ItemTrie(np.array(codes), vocabulary), target, codes)
