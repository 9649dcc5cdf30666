import torch

from model.decoding.draft_tree import attention_mask, pack


def test_packing_leaves_no_gaps_and_keeps_the_order() -> None:
    packing = pack(torch.tensor([[2, 0, 3], [1, 1, 0]]), 4)
    assert packing.source[0].tolist() == [0, 1, 8, 9, 10]
    assert packing.source[1, :2].tolist() == [0, 4]
    assert packing.valid.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert packing.total.tolist() == [5, 2]
    assert packing.end[0, [0, 2]].tolist() == [1, 4]


def test_everything_committed_is_seen_and_then_only_what_is_allowed() -> None:
    own = torch.tensor([[[True, False], [True, True]]]).expand(2, -1, -1)
    visible = attention_mask(torch.tensor([3, 1]), own, 5)[:, 0] == 0
    assert visible[0].tolist() == [[True, True, True, True, False], [True] * 5]
    assert visible[1].tolist() == [[True, True, False, False, False], [True, True, True, False, False]]


def test_one_row_gets_the_mask_it_would_get_in_a_batch() -> None:
    own = torch.rand(1, 3, 4) > 0.5
    batch = attention_mask(torch.tensor([6, 6]), own.expand(2, -1, -1), 10)
    assert torch.equal(attention_mask(torch.tensor([6]), own, 10), batch[:1])


def test_padding_sees_something_so_that_no_softmax_is_over_nothing() -> None:
    mask = attention_mask(torch.tensor([0, 2]), torch.zeros(2, 1, 0, dtype=torch.bool), 4)
    assert bool(torch.softmax(mask, -1).isfinite().all())
