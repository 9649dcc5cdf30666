import torch

from model.kv_cache import KVCache, Sight, TreeSight, Write, attention_mask


def test_accepted_tokens_move_into_place_and_others_are_dead() -> None:
    cache = KVCache(2, 3, 10, 1, 2)
    positions = torch.arange(10).expand(3, -1)
    values = torch.arange(10.0).view(1, 10, 1, 1).expand(3, 10, 1, 2)
    for layer in range(2):
        cache.write(layer, values.flatten(0, 1), values.flatten(0, 1) + 100, Write(torch.arange(3)[:, None], positions))
    cache.keep(torch.tensor([2, 3]), torch.tensor([[0, 3, 5], [1, 2, 2]]))
    keys, kept = cache.read(1, 3, 6)
    assert keys[0, 0, :5, 0].tolist() == [0, 1, 2, 5, 7]
    assert keys[1, 0, :5, 0].tolist() == [0, 1, 2, 4, 5]
    assert kept[0, 0, 4, 0] == 107
    assert keys[2, 0, :6, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_contiguous_write_equals_an_indexed_one() -> None:
    keys, values = torch.randn(2, 4, 2, 3).unbind()
    indexed, contiguous = KVCache(1, 2, 9, 2, 3), KVCache(1, 2, 9, 2, 3)
    rows, positions = torch.tensor([[1]]), torch.tensor([[3, 4, 5, 6]])
    indexed.write(0, keys, values, Write(rows, positions))
    contiguous.write(0, keys, values, Write(rows, positions, 1, 3))
    assert torch.equal(indexed.data, contiguous.data)


def test_padding_is_left_out_and_comes_back_as_zero() -> None:
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]])
    at = Write(torch.tensor([[0], [1]]), positions).without(torch.tensor([[False, False, True], [False, True, True]]))
    tokens = at.compact(torch.arange(6.0).view(2, 3, 1))
    assert tokens.flatten().tolist() == [0, 1, 3]
    assert at.padded(tokens).flatten().tolist() == [0, 1, 0, 3, 0, 0]
    cache = KVCache(1, 2, 9, 1, 1)
    cache.write(0, tokens.view(3, 1, 1) + 1, tokens.view(3, 1, 1), at)
    assert cache.data[0, 0, :, 0, :, 0].nonzero().tolist() == [[0, 0], [0, 1], [1, 5]]


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


def test_without_own_a_token_sees_those_before_it_and_itself() -> None:
    positions = torch.tensor([[3, 4, 5], [1, 2, 3]])
    at = Write(torch.tensor([[0], [1]]), positions)
    mask = Sight(torch.tensor([3, 1]), None, 6).mask(at)
    assert mask is not None
    for row in range(2):
        for token in range(3):
            visible = (mask[row, 0, token] == 0).nonzero().flatten().tolist()
            assert visible == list(range(int(positions[row, token]) + 1))
    assert Sight(None, None, 6).mask(at) is None


def test_a_tree_is_seen_along_paths_and_a_prompt_up_to_each_token() -> None:
    committed = torch.tensor([[1, 2, 2, 2], [1, 0, 1, 1]])
    paths = torch.tensor([[[-1, -1], [-1, -1], [0, -1], [0, 2]], [[-1, -1], [-1, -1], [3, -1], [-1, -1]]])
    sight = TreeSight(committed, paths, 5)
    visible = sight.mask(Write(torch.arange(2)[:, None], torch.zeros(2, 4)))[:, 0] == 0
    assert visible[0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 1]]
    assert visible[1].int().tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 1], [1, 0, 0, 0, 0]]
