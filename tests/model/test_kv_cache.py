import torch

from model.kv_cache import KVCache, Write


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
