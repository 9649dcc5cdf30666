import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.item_trie import ROOT, Availability, ItemTrie, legal_codes_by_search
from model.semantic_id import Codes, Vocabulary

SIZES = (4, 3, 3, 2)
Drawn = tuple[list[Codes], list[int]]


@st.composite
def catalogs(draw: st.DrawFn) -> Drawn:
    item = st.tuples(*(st.integers(0, n - 1) for n in SIZES))
    codes = draw(st.lists(item, min_size=1, max_size=30, unique=True))
    return codes, draw(st.lists(st.integers(0, len(codes) - 1), max_size=len(codes)))


def build(codes: list[Codes]) -> ItemTrie:
    return ItemTrie(np.array(codes), Vocabulary.compact(SIZES))


def availability(trie: ItemTrie, banned: list[int], failing: list[int], padding: int = 3) -> Availability:
    """One row: `failing` leaves do not pass its filter, `banned` ones are excluded."""
    mask = np.ones(trie.num_items, dtype=bool)
    mask[failing] = False
    excluded = sorted({leaf for leaf in banned if mask[leaf]})
    padded = torch.tensor([[*excluded, *[trie.num_items] * padding]])
    passing = torch.stack([trie.passing(), trie.passing(mask)])
    return Availability(passing, torch.tensor([1]), padded)


def node_of(trie: ItemTrie, prefix: Codes) -> int:
    node = ROOT
    for code in prefix:
        first, last = int(trie.first_child[node]), int(trie.first_child[node + 1])
        node = next(n for n in range(first, last) if int(trie.code[n]) == code)
    return node


@settings(max_examples=150, deadline=None)
@given(catalogs(), st.randoms(use_true_random=False))
def test_legal_children_are_what_a_search_through_all_items_finds(drawn: Drawn, rng: random.Random) -> None:
    codes, picked = drawn
    trie = build(codes)
    banned, failing, path = picked[::3], picked[1::3], picked[2::3][:2]
    path = [leaf for leaf in dict.fromkeys(path) if leaf not in banned and leaf not in failing]
    # More exclusions than a node can have children, padding included, are looked up the other way round.
    may = availability(trie, banned, failing, rng.choice((3, 3 + trie.vocabulary.max_codebook_size)))
    gone = {tuple(trie.sorted_codes[leaf].tolist()) for leaf in (*banned, *failing, *path)}
    prefix = rng.choice(codes)[: rng.randrange(len(SIZES))]
    on_path = torch.tensor([[[*path, *[trie.num_items] * (3 - len(path))]]])
    children = trie.children(torch.tensor([[node_of(trie, prefix)]]), may, on_path)
    legal = children.available[0, 0] > 0
    codes_of_children = trie.code[children.nodes[0, 0][legal]]
    assert codes_of_children.tolist() == legal_codes_by_search(codes, prefix, gone)
    assert int(children.available.sum()) == sum(c[: len(prefix)] == prefix and c not in gone for c in codes)
    for code, node in zip(codes_of_children, children.nodes[0, 0][legal], strict=True):
        assert int(node) == node_of(trie, (*prefix, int(code)))


@settings(max_examples=100, deadline=None)
@given(catalogs(), st.randoms(use_true_random=False))
def test_a_run_goes_on_exactly_as_long_as_there_is_no_choice(drawn: Drawn, rng: random.Random) -> None:
    codes, _ = drawn
    trie = build(codes)
    item = rng.choice(codes)
    depth = rng.randrange(1, len(SIZES) + 1)
    prefix = item[:depth]
    expected = [item[depth - 1]]
    while len(prefix) < len(SIZES) and len(legal := legal_codes_by_search(codes, prefix, ())) == 1:
        prefix = (*prefix, legal[0])
        expected.append(legal[0])
    offsets = trie.vocabulary.level_offsets
    tokens = [offsets[depth - 1 + i] + code for i, code in enumerate(expected)]
    complete = len(prefix) == len(SIZES)
    run = trie.run(torch.tensor([[node_of(trie, item[:depth])]]))
    assert run.tokens[0, 0, : int(run.length)].tolist() == [*tokens, *[trie.vocabulary.list_separator] * complete]
    assert int(run.node) == (ROOT if complete else node_of(trie, prefix))
    assert int(run.leaf) == (trie.leaf(prefix) if complete else trie.num_items)


def test_how_many_of_an_items_codes_are_a_choice() -> None:
    codes = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    trie = ItemTrie(np.array(codes), Vocabulary.compact((2, 2, 2)))
    choices = [sum(len(legal_codes_by_search(codes, code[:depth], ())) > 1 for depth in range(3)) for code in codes]
    assert trie.decisions_per_item == pytest.approx(sum(choices) / len(codes))


def test_without_forced_runs_a_step_is_one_token() -> None:
    trie = build([(0, 0, 0, 0), (1, 1, 1, 1)])
    run = trie.run(torch.tensor([[node_of(trie, (1,))]]), forced=False)
    assert int(run.length) == 1
    assert int(run.node) == node_of(trie, (1,))


def test_every_item_has_a_leaf_and_nothing_else_does() -> None:
    codes: list[Codes] = [(3, 2, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0)]
    trie = build(codes)
    assert sorted(trie.leaf(c) or 0 for c in codes) == [0, 1, 2]
    assert [tuple(c) for c in trie.sorted_codes.tolist()] == [codes[i] for i in trie.item_of_leaf] == sorted(codes)
    assert trie.leaf((1, 0, 0, 0)) is None
    assert trie.leaf((0, 0, 0)) is None
    assert trie.leaf((0, 0, 0, 0, 0)) is None
    assert trie.leaf((256, 0, 0, 0)) is None
    assert trie.leaf((-256, 0, 0, 0)) is None


def test_equal_semantic_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="distinct"):
        build([(0, 0, 0, 0), (0, 0, 0, 0)])


@pytest.mark.parametrize("code", [-1, 4])
def test_codes_outside_their_codebook_are_refused(code: int) -> None:
    with pytest.raises(ValueError, match="codebooks"):
        build([(0, 0, 0, 0), (code, 0, 0, 0)])


def test_wide_codebooks_sort_and_search_like_narrow_ones() -> None:
    rng = random.Random(0)
    codes = [(rng.randrange(70_000), rng.randrange(300), rng.randrange(2)) for _ in range(500)]
    trie = ItemTrie(np.array(codes), Vocabulary.compact((70_000, 300, 2)))
    assert trie.sorted_codes.tolist() == [list(c) for c in sorted(codes)]
    assert [trie.leaf(c) for c in sorted(codes)] == list(range(500))
    leaf = trie.run(torch.tensor([[trie.first_leaf + 7]])).leaf
    assert int(leaf) == 7


@settings(max_examples=50, deadline=None)
@given(catalogs())
def test_what_passes_before_a_node_is_counted_leaf_by_leaf(drawn: Drawn) -> None:
    codes, failing = drawn
    trie = build(codes)
    mask = np.ones(len(codes), dtype=bool)
    mask[failing] = False
    assert trie.passing(mask).tolist() == [int(mask[:start].sum()) for start in trie.leaf_start.tolist()]
    assert trie.passing().tolist() == trie.leaf_start.tolist()
