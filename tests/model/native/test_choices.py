"""The kernel's choices and chains are those of the torch functions they stand in for."""

import random

import pytest
import torch

from model.decoding.draft_tree import DraftTree, Root, grow, grow_chain, legal_logits
from model.decoding.filters import FilterTable
from model.decoding.request import CategoryFilter, RangeFilter
from model.draft.draft import Draft
from model.item_trie import Availability
from model.kv_cache import KVCache, Sight, Write
from model.native import kernel
from tests.model.conftest import Tiny, tiny

__all__ = ["tiny"]
pytestmark = pytest.mark.skipif(kernel.load() is None, reason="the kernel is not compiled for this processor")
Tensor = torch.Tensor
FILTERS = ({}, {"genre": CategoryFilter(("a",))}, {"year": RangeFilter(1993, 1997)})


def allowed(tiny: Tiny, rows: int, rng: random.Random) -> Availability:
    """Every row with a filter and exclusions of its own."""
    table = FilterTable(tiny.catalog, tiny.trie, rows)
    slots = [table.acquire(FILTERS[row % len(FILTERS)]) for row in range(rows)]
    excluded = torch.full((rows, 64), tiny.trie.num_items)
    for row, slot in enumerate(slots):
        leaves = torch.tensor(sorted(rng.sample(range(tiny.trie.num_items), rng.randrange(40))), dtype=torch.int64)
        passing = table.passing[slot]
        first = tiny.trie.first_leaf
        kept = leaves[passing[first + leaves + 1] > passing[first + leaves]]
        excluded[row, : len(kept)] = kept
    return Availability(table.passing, torch.tensor(slots), excluded)


def choices_of(tiny: Tiny) -> kernel.NativeChoices:
    assert isinstance(tiny.target.head, kernel.NativeLinear)
    return kernel.NativeChoices(tiny.trie, tiny.target.head)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_best_legal_child_is_the_one_torch_finds(tiny: Tiny, rows: int) -> None:
    rng = random.Random(rows)
    torch.manual_seed(rows)
    may, groups = allowed(tiny, rows, rng), 4
    nodes = torch.randint(0, tiny.trie.first_leaf, (rows, groups))
    leaf = torch.randint(0, tiny.trie.num_items + 1, (rows, groups - 1))
    # An emitted item is one that could be emitted: it passes the filter, is not excluded and appears once.
    first = tiny.trie.first_leaf
    for row in range(rows):
        gone = set(may.excluded[row].tolist())
        for place, item in enumerate(leaf[row].tolist()):
            slot = int(may.filter_slot[row])
            inside = item < tiny.trie.num_items
            if item in gone or not inside or not may.passing[slot, first + item :][:2].diff():
                leaf[row, place] = tiny.trie.num_items
            gone.add(item)
    length = torch.randint(0, 3, (rows, groups - 1))
    hidden = torch.randn(rows, groups, tiny.target.hidden_size)
    best, child, score = choices_of(tiny).best(hidden, nodes, may, leaf, length)
    compared = 0
    for group in range(groups):
        path = leaf[:, :group].unsqueeze(1)
        children = tiny.trie.children(nodes[:, group : group + 1], may, path)
        logits = legal_logits(tiny.target, tiny.trie, hidden[:, group : group + 1], children)
        log_probs = torch.log_softmax(logits, -1)[:, 0]
        for row in range(rows):
            there = group == 0 or int(length[row, group - 1]) > 0
            if there and bool((children.available[row] > 0).any()):
                right = int(log_probs[row].argmax())
                assert int(best[row, group]) == right
                assert int(child[row, group]) == int(children.nodes[row, 0, right])
                assert float(score[row, group]) == pytest.approx(float(log_probs[row, right]), abs=1e-5)
                compared += 1
            else:
                assert float(score[row, group]) == 0.0
    assert compared > rows


def same(one: DraftTree, other: DraftTree) -> bool:
    there = other.length > 0
    names = ("length", "leaf", "parent", "start")
    inside = ("node", "choice", "slot")
    pairs = [(getattr(one, n), getattr(other, n)) for n in names]
    pairs += [(getattr(one, n)[there], getattr(other, n)[there]) for n in inside]
    tokens = torch.arange(other.tokens.shape[-1]) < other.length.unsqueeze(-1)
    return all(torch.equal(a, b) for a, b in [*pairs, (one.tokens[tokens], other.tokens[tokens])])


def read(draft: Draft, cache: KVCache, tokens: Tensor, length: Tensor, features: Tensor, position: Tensor) -> Tensor:
    """Fresh runs read one row at a time: the draft's output [B, d] at the last token of each."""
    outputs = []
    for row in range(len(tokens)):
        runs = [(tokens[row, g, : int(length[row, g])], features[row, g]) for g in range(2)]
        flat = torch.cat([run for run, _ in runs])[None]
        of_each = torch.cat([feature.expand(len(run), -1) for run, feature in runs])[None]
        places = (position[row] - flat.shape[1] + torch.arange(flat.shape[1]))[None]
        at, sight = Write(torch.tensor([[row]]), places), Sight(position[row : row + 1], None, int(position[row]))
        last = torch.tensor([[flat.shape[1] - 1]])
        outputs.append(draft.ask(flat, of_each, places, 0, cache, at, last, sight)[0])
    return torch.cat(outputs)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("padrec", [True, False])
def test_a_chain_is_the_tree_of_width_one(tiny: Tiny, rows: int, padrec: bool) -> None:
    rng = random.Random(7)
    for seed in range(6):
        torch.manual_seed(seed)
        draft, may = tiny.draft(seed, item=padrec), allowed(tiny, rows, rng)
        assert draft.native is not None
        caches = [draft.new_cache(rows, 80) for _ in range(2)]
        before = torch.randn(1, 2, rows, 2, 9, 16)
        for cache in caches:
            cache.data[:, :, :, :, :9] = before
        # Two fresh runs (the second may be missing) end where the chain begins.
        fresh = torch.randint(0, tiny.target.vocabulary.size, (rows, 2, 5))
        length = torch.stack([torch.randint(1, 6, (rows,)), torch.randint(0, 6, (rows,))], dim=1)
        features = torch.randn(rows, 2, 32)
        position = torch.randint(1, 10, (rows,)) + length.sum(1)
        remaining = torch.tensor([rng.randrange(4) for _ in range(rows)])
        node = torch.zeros(rows, dtype=torch.int64)
        root = Root(read(draft, caches[0], fresh, length, features, position), node, position, remaining)
        tree = grow(draft, tiny.target, tiny.trie, may, caches[0], root, 5, 1)
        start = kernel.ChainRoot(node, position, remaining, fresh, length, features)
        chain = grow_chain(choices_of(tiny), draft, may, caches[1], start, 5)
        assert same(chain, tree), seed
        # What was guessed lies where it stays once it is accepted.
        for row in range(rows):
            end = int(position[row] + chain.length[row, :-1].sum())
            assert bool(caches[1].data[0, 0, row, 0, int(position[row]) : end].any(-1).all())


def test_nodes_outside_the_trie_are_refused(tiny: Tiny) -> None:
    may, none = allowed(tiny, 1, random.Random(0)), torch.empty(1, 0, dtype=torch.int64)
    for node in (-1, tiny.trie.num_nodes):
        with pytest.raises(IndexError, match="node"):
            choices_of(tiny).best(torch.randn(1, 1, 32), torch.tensor([[node]]), may, none, none)
