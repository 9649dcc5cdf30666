import numpy as np

from model.config import TokenizerConfig
from model.tokenizer.quantise import semantic_ids

CONFIG = TokenizerConfig(codebook_sizes=(4, 3), iterations=10)


def test_semantic_ids_are_distinct_and_fit_their_codebooks() -> None:
    rows = np.random.default_rng(0).standard_normal((100, 5))
    codes, sizes = semantic_ids(rows, np.arange(100), CONFIG)
    assert len(codes) == len(set(codes)) == 100
    assert sizes[:2] == (4, 3)
    for level, size in enumerate(sizes):
        assert all(0 <= code[level] < size for code in codes)
    assert max(code[2] for code in codes) == sizes[2] - 1


def test_colliding_items_are_counted_the_most_popular_first() -> None:
    rows = np.array([[0.0, 0], [5, 5], [0, 0], [0, 0], [5, 5], [0, 0]])
    codes, sizes = semantic_ids(rows, np.array([3, 1, 9, 3, 2, 0]), CONFIG)
    assert [code[2] for code in codes] == [1, 1, 0, 2, 0, 3]
    assert sizes == (4, 3, 4)
    assert codes[0][:2] == codes[2][:2] == codes[3][:2] == codes[5][:2]
    assert codes[1][:2] == codes[4][:2] != codes[0][:2]


def test_near_items_share_their_first_code() -> None:
    rng = np.random.default_rng(1)
    centres = np.array([[0.0, 0], [100, 0], [0, 100], [100, 100]])
    group = rng.integers(0, 4, 60)
    codes, _ = semantic_ids(centres[group] + rng.standard_normal((60, 2)), np.zeros(60, dtype=np.int64), CONFIG)
    assert len({(int(g), code[0]) for g, code in zip(group, codes, strict=True)}) == 4


def test_a_later_level_quantises_what_the_earlier_ones_left_over() -> None:
    # Four far groups, each with the same three offsets: one code for the group, one for the offset in every group.
    offsets = np.array([[-3.0, 0], [0, 0], [3, 0]])
    centres = np.array([[0.0, 0], [100, 0], [0, 100], [100, 100]])
    rows = (centres[:, None] + offsets[None]).reshape(-1, 2)
    codes, sizes = semantic_ids(rows, np.zeros(12, dtype=np.int64), TokenizerConfig(codebook_sizes=(4, 3)))
    assert sizes == (4, 3, 1)
    second = np.array([code[1] for code in codes]).reshape(4, 3)
    assert (second == second[0]).all()


def test_a_catalog_smaller_than_a_codebook_leaves_codes_unused() -> None:
    codes, sizes = semantic_ids(np.eye(2), np.array([1, 2]), TokenizerConfig(codebook_sizes=(8, 8)))
    assert len(set(codes)) == 2
    assert sizes == (8, 8, 1)


def test_all_items_alike_are_told_apart_by_the_last_level_alone() -> None:
    codes, sizes = semantic_ids(np.ones((3, 2)), np.array([1, 2, 3]), CONFIG)
    assert [code[2] for code in codes] == [2, 1, 0]
    assert sizes == (4, 3, 3)


def test_the_same_embeddings_get_the_same_codes() -> None:
    rows = np.random.default_rng(0).standard_normal((50, 5))
    first, second = (semantic_ids(rows, np.arange(50), CONFIG) for _ in range(2))
    assert first == second
