import random

import pytest
import torch

from model.decoding.beam_tree import BeamTree
from model.item_trie import Availability
from tests.model.conftest import Tiny


def nodes_of(tiny: Tiny) -> dict[tuple[int, ...], int]:
    """Every prefix and its node, found by walking through the children."""
    trie, found = tiny.trie, {(): 0}
    may = Availability(trie.passing()[None], torch.tensor([0]), torch.full((1, 1), trie.num_items))
    todo = [()]
    while todo:
        prefix = todo.pop()
        if len(prefix) == trie.num_levels:
            continue
        children = trie.children(torch.tensor([[found[prefix]]]), may)
        for node, available in zip(children.nodes[0, 0].tolist(), children.available[0, 0].tolist(), strict=True):
            if available > 0:
                child = (*prefix, int(trie.code[node]))
                found[child] = node
                todo.append(child)
    return found


def test_parents_tokens_and_decisions_are_what_a_search_through_the_items_finds(tiny: Tiny) -> None:
    tree, nodes, vocabulary = BeamTree(tiny.trie), nodes_of(tiny), tiny.target.vocabulary
    below = {prefix: sum(codes[: len(prefix)] == prefix for codes in tiny.codes) for prefix in nodes}
    for prefix, node in nodes.items():
        decisions = [n for p, n in nodes.items() if p[: len(prefix)] == prefix and below[p] > 1 and p]
        if prefix:
            assert int(tree.parent[node]) == nodes[prefix[:-1]]
            assert int(tree.token[node]) == vocabulary.level_offsets[len(prefix) - 1] + prefix[-1]
            found = tree.decisions_below(torch.tensor([[node]]))[0].tolist()
            assert sorted(found) == sorted(decisions), prefix
            assert int(tree.below[node]) == len(decisions)
            children = [n for p, n in nodes.items() if p[:-1] == prefix and len(p) == len(prefix) + 1]
            chained = len(children) == 1 and below[prefix] > 1
            assert int(tree.only_child[node]) == (children[0] if chained else tree.nowhere)
    assert sorted(tree.first_codes.tolist()) == sorted(n for p, n in nodes.items() if len(p) == 1 and below[p] > 1)
    depths = [[p for p in nodes if len(p) == depth] for depth in range(tiny.trie.num_levels)]
    assert tree.widest == tuple(max(sum(q[:-1] == p for q in nodes if q) for p in at) for at in depths)
    shares = [sum(below[p] for p in at if below[p] > 1) / len(tiny.codes) for at in depths]
    assert tree.deciding == pytest.approx(shares)
    counts = [sum(below[p] * int(tree.below[nodes[p]]) for p in at) / len(tiny.codes) for at in depths]
    assert tree.whole == pytest.approx(counts)


def test_sub_trees_of_many_nodes_lie_side_by_side(tiny: Tiny) -> None:
    tree, nodes = BeamTree(tiny.trie), list(nodes_of(tiny).values())[1:]
    rng = random.Random(0)
    rows = [sorted(rng.sample(nodes, 6)) for _ in range(20)]
    found = tree.decisions_below(torch.tensor([[*row, tree.nowhere] for row in rows]))
    for row, together in zip(rows, found.tolist(), strict=True):
        apart = [n for node in row for n in tree.decisions_below(torch.tensor([[node]]))[0].tolist()]
        assert [n for n in together if n != tree.nowhere] == apart


def test_what_is_available_below_a_node_is_what_its_children_say(tiny: Tiny) -> None:
    trie, tree, nodes = tiny.trie, BeamTree(tiny.trie), nodes_of(tiny)
    inner = torch.tensor([[n for p, n in nodes.items() if len(p) < trie.num_levels]]).expand(2, -1).contiguous()
    passing = torch.stack([trie.passing(), trie.passing(torch.arange(trie.num_items).numpy() % 3 == 0)])
    excluded = torch.tensor([[1, 5, 6, 7, trie.num_items], [0, 3, 9, trie.num_items, trie.num_items]])
    may = Availability(passing, torch.tensor([0, 1]), excluded)
    assert torch.equal(tree.available(inner, may), trie.children(inner, may).available.clamp(min=0).sum(-1))


def test_padding_has_nothing_below_it_and_comes_after_every_node(tiny: Tiny) -> None:
    tree = BeamTree(tiny.trie)
    may = Availability(tiny.trie.passing()[None], torch.tensor([0]), torch.full((1, 1), tiny.trie.num_items))
    nowhere = torch.tensor([[tree.nowhere]])
    assert int(tree.available(nowhere, may)) == 0
    assert not bool((tiny.trie.children(nowhere, may, widest=3).available > 0).any())
    assert max(nodes_of(tiny).values()) < tree.nowhere
    assert int(tiny.trie.run_end[tree.nowhere]) >= tiny.trie.first_leaf
