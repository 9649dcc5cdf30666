"""Whatever decodes it, a sampled list has the target's own distribution: counted against every list there is.

The oracle knows neither trie nor cache nor noise: it enumerates all lists over a handful of items and multiplies
probabilities that `transformers` computes.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, LlamaConfig

from model.catalog import Catalog, CatalogItem
from model.config import DraftConfig, ListsConfig
from model.decoding.list_decoder import ListDecoder
from model.decoding.offline import Decoded, decode_all
from model.decoding.request import CategoryFilter, ListRequest
from model.decoding.topology import Budget, FixedBudget
from model.draft.draft import Draft
from model.draft.network import DraftNetwork, DraftShape
from model.item_trie import ItemTrie
from model.semantic_id import Codes, Vocabulary
from model.target import Target
from model.train.draft import draft_batches, draft_loss
from model.train.lists import write_lists
from tests.model.conftest import Tiny

SIZES = (3, 3, 2)
# (1, 1, 0) is forced after its first code, (0, 2, 0) after its second.
CODES: list[Codes] = [(0, 0, 0), (0, 0, 1), (0, 2, 0), (1, 1, 0), (2, 0, 0), (2, 0, 1), (2, 1, 1), (2, 2, 0)]
GENRES = "abababaa"
CHANCE = 1e-3  # seeds are fixed: a test that passes once passes always
DRAWS = 2000
MODES = {
    "plain": (Budget(0), False),
    "forced": (Budget(0), True),
    "chain": (Budget(4), True),
    "tree": (Budget(3, 3), True),
}
ASKED = {
    "whole": ListRequest("", (CODES[3], CODES[5]), 2, exclude_history=False, temperature=1.0),
    "hot, cut and excluded": ListRequest("", (CODES[0], CODES[6]), 2, (CODES[2],), temperature=1.6, top_p=0.85),
    "cold, three of a genre": ListRequest(
        "", (CODES[1],), 3, filters={"genre": CategoryFilter(("a",))}, temperature=0.7, top_p=0.95
    ),
}


@dataclass(frozen=True)
class World:
    """Eight items, a target with opinions, and the `transformers` model it was made from."""

    tiny: Tiny
    model: Any

    def probabilities(self, request: ListRequest) -> dict[tuple[Codes, ...], float]:
        """Every possible list and its probability."""
        banned = set(request.exclude) | (set(request.history) if request.exclude_history else set())
        wanted = request.filters.get("genre")
        genres = wanted.any_of if isinstance(wanted, CategoryFilter) else tuple(GENRES)
        items = [c for c, genre in zip(CODES, GENRES, strict=True) if c not in banned and genre in genres]
        prompt = self.tiny.target.vocabulary.list_prompt(request.history)
        found: dict[tuple[Codes, ...], float] = {}
        self._continue(request, prompt, items, (), (), 1.0, found)
        assert math.fsum(found.values()) == pytest.approx(1)
        return found

    def _continue(
        self,
        request: ListRequest,
        tokens: list[int],
        items: Sequence[Codes],
        done: tuple[Codes, ...],
        prefix: Codes,
        probability: float,
        found: dict[tuple[Codes, ...], float],
    ) -> None:
        vocabulary, level = self.tiny.target.vocabulary, len(prefix)
        if len(done) == request.k:
            found[done] = probability
        elif level == len(SIZES):
            left = [item for item in items if item != prefix]
            tokens = [*tokens, vocabulary.list_separator]
            self._continue(request, tokens, left, (*done, prefix), (), probability, found)
        else:
            legal = sorted({item[level] for item in items if item[:level] == prefix})
            with torch.no_grad():
                logits = self.model(torch.tensor([tokens])).logits[0, -1]
            offset = vocabulary.level_offsets[level]
            weights = {c: math.exp(float(logits[offset + c]) / request.temperature) for c in legal}
            for code, share in _cut(weights, request.top_p).items():
                step = (request, [*tokens, offset + code], items, done, (*prefix, code))
                self._continue(*step, probability * share, found)

    def decode(self, requests: list[ListRequest], draft: Draft | None, mode: str, num_rows: int = 250) -> Decoded:
        budget, forced = MODES[mode]
        tiny = self.tiny
        decoder = ListDecoder(
            tiny.target,
            draft if budget.steps else None,
            tiny.trie,
            tiny.catalog,
            num_rows=num_rows,
            max_history_items=6,
            max_k=3,
            budget=FixedBudget(budget),
            forced=forced,
        )
        return decode_all(decoder, requests)


def _cut(weights: dict[int, float], top_p: float) -> dict[int, float]:
    """Shares of the most likely until they reach `top_p`, renormalised."""
    total, kept = math.fsum(weights.values()), dict[int, float]()
    for code in sorted(weights, key=lambda c: -weights[c]):
        if not kept or math.fsum(kept.values()) / total < top_p:
            kept[code] = weights[code]
    return {code: weight / math.fsum(kept.values()) for code, weight in kept.items()}


@pytest.fixture(scope="module")
def world() -> World:
    torch.manual_seed(3)
    vocabulary = Vocabulary.compact(SIZES)
    shape = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        initializer_range=0.25,
    )
    model = AutoModelForCausalLM.from_config(shape).eval()
    items = [CatalogItem(str(i), c, 1, {"genre": [GENRES[i]], "year": 1990}) for i, c in enumerate(CODES)]
    trie = ItemTrie(np.array(CODES), vocabulary)
    return World(Tiny(Catalog(SIZES, tuple(items)), trie, Target(model, vocabulary), CODES), model)


@pytest.fixture(scope="module")
def drafts(world: World) -> dict[str, Draft]:
    """A random draft, the same trained for a moment, and the trained one turned against itself."""
    target, vocabulary = world.tiny.target, world.tiny.target.vocabulary
    torch.manual_seed(0)
    network = DraftNetwork(DraftShape(32, 4, 48, vocabulary.num_slots, 4, (0, 1), True, "gated"))
    drafts = {"random": Draft(network, target.embedding, vocabulary)}
    histories = [tuple(CODES[i] for i in range(8) if bits >> i & 1) for bits in range(1, 64)]
    requests = [ListRequest(str(i), history, 2) for i, history in enumerate(histories)]
    lists = write_lists(target, world.tiny.trie, world.tiny.catalog, requests, ListsConfig(1, 2, 32), 6)
    config = DraftConfig(steps=4)
    batches = draft_batches(lists, world.model, vocabulary, network.shape.feature_layers, 64)
    trained = DraftNetwork(network.shape)
    optimiser = torch.optim.Adam(trained.parameters(), 1e-2)
    head = world.model.lm_head.weight[vocabulary.level_offsets[0] :][: sum(SIZES)].detach()
    for _ in range(80):
        for batch in batches:
            optimiser.zero_grad()
            draft_loss(trained, target.embedding, head, target.head_columns, batch, config).backward()
            optimiser.step()
    drafts["trained"] = Draft(trained, target.embedding, vocabulary)
    opposed = DraftNetwork(network.shape)
    opposed.load_state_dict(trained.state_dict())
    opposed.norms[2].data.neg_()
    drafts["adversarial"] = Draft(opposed, target.embedding, vocabulary)
    return drafts


def draws(asked: ListRequest, first_seed: int, count: int = DRAWS) -> list[ListRequest]:
    return [replace(asked, request_id=str(n), seed=first_seed + n) for n in range(count)]


def lists_of(decoded: Decoded) -> list[tuple[Codes, ...]]:
    return [tuple(item.codes for item in result.items) for result in decoded.results.values()]


def likelihood(lists: Sequence[tuple[Codes, ...]], probabilities: dict[tuple[Codes, ...], float]) -> float:
    """p-value of the chi-square test. Lists expected fewer than five times are counted as one kind."""
    counts = Counter(lists)
    assert set(counts) <= set(probabilities), "a list that cannot be"
    often = [each for each, p in probabilities.items() if p * len(lists) >= 5]
    observed, expected = [counts[each] for each in often], [probabilities[each] * len(lists) for each in often]
    if len(often) < len(probabilities):
        observed, expected = [*observed, len(lists) - sum(observed)], [*expected, len(lists) - math.fsum(expected)]
    return float(chisquare(observed, expected).pvalue)


DECODERS = [("plain", "random"), ("forced", "random")]
DECODERS += [(mode, draft) for mode in ("chain", "tree") for draft in ("trained", "random", "adversarial")]


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize(("mode", "draft"), DECODERS)
def test_lists_have_the_targets_distribution(
    world: World, drafts: dict[str, Draft], mode: str, draft: str, asked: str
) -> None:
    first_seed = 100_000 * (DECODERS.index((mode, draft)) + 1)
    decoded = world.decode(draws(ASKED[asked], first_seed), drafts[draft], mode)
    assert likelihood(lists_of(decoded), world.probabilities(ASKED[asked])) > CHANCE


@pytest.mark.parametrize("asked", ASKED)
def test_the_slow_twins_lists_have_it_too(world: World, asked: str) -> None:
    requests = draws(ASKED[asked], 7_000_000, 400)
    lists = [tuple(item.codes for item in world.tiny.twin(request).items) for request in requests]
    assert likelihood(lists, world.probabilities(ASKED[asked])) > CHANCE


@pytest.mark.parametrize(
    "change", [{"temperature": 1.3}, {"top_p": 0.9}, {"history": (CODES[5], CODES[3])}, {"exclude": (CODES[2],)}]
)
def test_another_distribution_would_be_noticed(world: World, drafts: dict[str, Draft], change: dict[str, Any]) -> None:
    lists = lists_of(world.decode(draws(ASKED["whole"], 0), drafts["trained"], "tree"))
    other = world.probabilities(replace(ASKED["whole"], **change))
    assert not set(lists) <= set(other) or likelihood(lists, other) < 1e-6


def test_a_draft_that_knows_the_target_is_accepted_more_often(world: World, drafts: dict[str, Draft]) -> None:
    requests = draws(ASKED["whole"], 0, 500)
    length = {name: world.decode(requests, draft, "chain").acceptance_length for name, draft in drafts.items()}
    assert max(length["adversarial"], length["random"]) < length["trained"]


def test_the_score_is_the_log_probability_without_temperature_and_cut(world: World, drafts: dict[str, Draft]) -> None:
    asked = ASKED["hot, cut and excluded"]
    plain = world.probabilities(replace(asked, temperature=1.0, top_p=1.0))
    for result in world.decode(draws(asked, 0, 50), drafts["trained"], "chain").results.values():
        codes, score = tuple(i.codes for i in result.items), sum(i.score for i in result.items)
        assert score == pytest.approx(math.log(plain[codes]), abs=1e-4)
