import torch

from model.decoding.draft_tree import additive, behind, pack


def test_packing_leaves_no_gaps_and_keeps_the_order() -> None:
    packing = pack(torch.tensor([[2, 0, 3], [1, 1, 0]]), 4)
    assert packing.index[0].tolist() == [0, 1, 8, 9, 10]
    assert packing.index[1, :2].tolist() == [0, 4]
    assert packing.valid.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert packing.total.tolist() == [5, 2]
    assert packing.end[0, [0, 2]].tolist() == [1, 4]


def test_everything_committed_is_seen_and_then_only_what_is_allowed() -> None:
    own = torch.tensor([[[True, False], [True, True]]]).expand(2, -1, -1)
    visible = behind(torch.tensor([3, 1]), own, 5)
    assert visible[0].tolist() == [[True, True, True, True, False], [True] * 5]
    assert visible[1].tolist() == [[True, True, False, False, False], [True, True, True, False, False]]


def test_padding_sees_something_so_that_no_softmax_is_over_nothing() -> None:
    visible = behind(torch.tensor([0]), torch.zeros(1, 1, 0, dtype=torch.bool), 4)
    assert bool(torch.softmax(additive(visible), -1).isfinite().all())
