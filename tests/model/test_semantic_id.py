import json

import pytest

from model.semantic_id import Vocabulary

SIZES = (4, 3, 2)


def test_levels_lie_side_by_side_after_the_special_tokens() -> None:
    vocabulary = Vocabulary.compact(SIZES)
    assert vocabulary.level_offsets == (4, 8, 11)
    assert vocabulary.size == 13
    assert (vocabulary.num_levels, vocabulary.tokens_per_item, vocabulary.num_slots) == (3, 4, 5)


def test_an_item_is_its_shifted_codes_and_a_separator() -> None:
    assert Vocabulary.compact(SIZES).item_tokens((3, 0, 1)) == [7, 8, 12, 2]


def test_no_two_codes_share_a_token() -> None:
    vocabulary = Vocabulary.compact(SIZES)
    tokens = [o + c for o, n in zip(vocabulary.level_offsets, SIZES, strict=True) for c in range(n)]
    own = (vocabulary.separator, vocabulary.list_separator, *vocabulary.prompt_prefix)
    assert len({*tokens, *own}) == sum(SIZES) + 3


def test_a_prompt_is_the_prefix_and_then_the_items_and_slots_count_levels() -> None:
    vocabulary = Vocabulary.compact(SIZES)
    tokens = vocabulary.prompt([(0, 0, 0), (3, 2, 1)])
    assert tokens == [1, 4, 8, 11, 2, 7, 10, 12, 2]
    assert [vocabulary.slot(token) for token in tokens] == [4, 0, 1, 2, 3, 0, 1, 2, 3]


def test_a_list_is_asked_for_and_its_items_end_with_a_separator_of_their_own() -> None:
    vocabulary = Vocabulary.compact(SIZES)
    assert vocabulary.list_prompt([(0, 0, 0)]) == [*vocabulary.prompt([(0, 0, 0)]), 3]
    assert vocabulary.list_item_tokens((3, 2, 1)) == [7, 10, 12, 3]
    assert vocabulary.slot(3) == vocabulary.separator_slot


def test_a_target_without_a_list_separator_writes_lists_as_histories_go_on() -> None:
    without = Vocabulary(SIZES, (500, 100, 300), 999, (7,), 999, 1000)
    assert without.list_prompt([(1, 2, 0)]) == without.prompt([(1, 2, 0)])
    assert without.list_item_tokens((1, 2, 0)) == without.item_tokens((1, 2, 0))


def test_levels_may_lie_anywhere_in_a_larger_vocabulary() -> None:
    vocabulary = Vocabulary(SIZES, (500, 100, 300), 999, (7, 8), 9, 1000)
    tokens = vocabulary.prompt([(1, 2, 0)])
    assert tokens == [7, 8, 501, 102, 300, 999]
    assert [vocabulary.slot(token) for token in tokens] == [4, 4, 0, 1, 2, 3]


@pytest.mark.parametrize("codes", [(4, 0, 0), (0, 3, 0), (-1, 0, 0), (0, 0), (0, 0, 0, 0)])
def test_codes_outside_the_codebooks_have_no_tokens(codes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"cod"):
        Vocabulary.compact(SIZES).item_tokens(codes)


@pytest.mark.parametrize(
    ("offsets", "separator", "prefix", "list_separator", "size"),
    [
        ((3, 7), 2, (1,), 2, 12),
        ((3, 6, 10), 2, (1,), 2, 12),
        ((3, 7, 10), 2, (1,), 2, 11),
        ((3, 7, 10), 8, (1,), 2, 12),
        ((3, 7, 10), 12, (1,), 2, 12),
        ((3, 7, 10), -1, (1,), 2, 12),
        ((-2, 7, 10), 5, (1,), 5, 12),
        ((3, 7, 10), 2, (), 2, 12),
        ((3, 7, 10), 2, (12,), 2, 12),
        ((3, 7, 10), 2, (1,), 12, 12),
        ((3, 7, 10), 2, (1,), 8, 12),
    ],
)
def test_layouts_that_would_confuse_tokens_are_refused(
    offsets: tuple[int, ...], separator: int, prefix: tuple[int, ...], list_separator: int, size: int
) -> None:
    with pytest.raises(ValueError, match=r"level|token"):
        Vocabulary(SIZES, offsets, separator, prefix, list_separator, size)


def test_an_empty_codebook_is_refused() -> None:
    with pytest.raises(ValueError, match="codebook"):
        Vocabulary.compact((4, 0))


def test_a_layout_survives_json() -> None:
    vocabulary = Vocabulary(SIZES, (500, 100, 300), 999, (7, 8), 9, 1000)
    assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.as_dict()))) == vocabulary
