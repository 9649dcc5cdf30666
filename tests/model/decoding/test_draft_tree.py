import torch

from model.decoding.draft_tree import pack


def test_packing_leaves_no_gaps_and_keeps_the_order() -> None:
    packing = pack(torch.tensor([[2, 0, 3], [1, 1, 0]]), 4)
    assert packing.source[0].tolist() == [0, 1, 8, 9, 10]
    assert packing.source[1, :2].tolist() == [0, 4]
    assert packing.valid.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert packing.total.tolist() == [5, 2]
    assert packing.end[0, [0, 2]].tolist() == [1, 4]
