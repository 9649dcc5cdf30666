import torch

from model.decoding.draft_tree import DraftTree
from model.decoding.verify import accept
from model.item_trie import Children


def tree(parent: list[int], choice: list[int], length: list[int]) -> DraftTree:
    def row(values: list[int]) -> torch.Tensor:
        return torch.tensor([values])

    none = torch.empty(0)
    return DraftTree(none, row(length), none, none, row(parent), row(choice), none, none, none, Children(none, none))


def test_a_chain_is_kept_up_to_the_first_wrong_guess() -> None:
    verdict = accept(tree([0, 1, 2], [5, 6, 7], [1, 2, 1]), torch.tensor([[5, 6, 9, 1]]), 3, 1)
    assert verdict.accepted.tolist() == [2]
    assert verdict.path.tolist() == [[0, 1, 2, 2]]


def test_nothing_is_kept_after_a_wrong_guess_even_if_it_would_be_right() -> None:
    verdict = accept(tree([0, 1, 2], [5, 6, 7], [1, 1, 1]), torch.tensor([[4, 6, 7, 1]]), 3, 1)
    assert verdict.accepted.tolist() == [0]
    assert verdict.path.tolist() == [[0, 0, 0, 0]]


def test_a_tree_follows_the_branch_the_target_takes() -> None:
    # Step 0: groups 1 (choice 3) and 2 (choice 8) under the pending run; step 1: 3 under 1, 4 under 2.
    drafted = tree([0, 0, 1, 2], [3, 8, 2, 2], [1, 1, 1, 1])
    verdict = accept(drafted, torch.tensor([[8, 0, 2, 0, 0]]), 2, 2)
    assert verdict.path.tolist() == [[0, 2, 4]]
    assert verdict.accepted.tolist() == [2]


def test_an_absent_node_is_never_kept() -> None:
    verdict = accept(tree([0], [0], [0]), torch.tensor([[0, 0]]), 1, 1)
    assert verdict.accepted.tolist() == [0]
