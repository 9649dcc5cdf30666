import itertools

import pytest
import torch

from model.decoding.topology import Budget, best_trees, gains, table_of

CPU = torch.device("cpu")
SURE_THEN_OPEN = [[0.95, 0.03], [0.5, 0.4, 0.05]]  # step 0 nearly certain, step 1 between two


def test_a_chain_is_the_first_guess_of_every_step() -> None:
    table = table_of(Budget(3), 2, CPU)
    assert table is not None
    assert table.rank.tolist() == [[[0], [0], [0]]] * 2
    assert not table.parent.any()


def test_a_dynamic_tree_has_no_table() -> None:
    assert table_of(Budget(3, 2), 2, CPU) is None


def test_rows_of_different_slots_share_one_shape_padded() -> None:
    budget = Budget.static([(((0, 0), (0, 1)), ((1, 0),)), (((0, 0),),)])
    assert (budget.steps, budget.width, budget.nodes(0), budget.nodes(1)) == (2, 2, 3, 1)
    table = table_of(budget, 2, CPU)
    assert table is not None
    assert table.rank.tolist() == [[[0, 1], [0, -1]], [[0, -1], [-1, -1]]]
    assert table.parent.tolist() == [[[0, 0], [1, 0]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize("tree", [(((1, 0),),), (((0, 0),), ((1, 0),)), (((0, 8),),), (((0, -1),),)])
def test_a_node_without_a_parent_or_of_no_rank_is_refused(tree: tuple[tuple[tuple[int, int], ...], ...]) -> None:
    with pytest.raises(ValueError, match="slot 0"):
        Budget.static([tree])


def test_trees_are_wide_where_it_is_open_and_a_chain_where_it_is_not() -> None:
    assert best_trees([SURE_THEN_OPEN], 3) == ((((0, 0),), ((0, 0), (0, 1))),)


def test_what_a_tree_gains_is_the_sum_of_its_paths() -> None:
    tree = best_trees([SURE_THEN_OPEN], 3)[0]
    assert gains(tree, SURE_THEN_OPEN) == pytest.approx([0.95, 0.95 * 0.9])


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5])
def test_no_tree_of_as_many_nodes_gains_more(nodes: int) -> None:
    acceptance = [[0.5, 0.3, 0.1], [0.6, 0.25, 0.1], [0.7, 0.2, 0.05]]
    best = sum(gains(best_trees([acceptance], nodes)[0], acceptance))
    paths = [path for steps in (1, 2, 3) for path in itertools.product(range(3), repeat=steps)]

    def chance(path: tuple[int, ...]) -> float:
        share = 1.0
        for step, rank in enumerate(path):
            share *= acceptance[step][rank]
        return share

    trees = (
        chosen
        for chosen in itertools.combinations(paths, nodes)
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
    )
    assert best == pytest.approx(max(sum(map(chance, chosen)) for chosen in trees))


def test_nodes_that_are_never_right_are_not_planted() -> None:
    assert best_trees([[[1.0, 0.0], [0.0, 0.0]]], 8) == ((((0, 0),),),)
