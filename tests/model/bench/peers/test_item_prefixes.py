import random

import pytest

from model.bench.peers.item_prefixes import ItemPrefixes
from model.item_trie import legal_codes_by_search
from model.semantic_id import Codes, Vocabulary
from tests.model.conftest import SIZES, random_catalog

VOCABULARY = Vocabulary.compact(SIZES)


def bare(codes: Codes) -> list[int]:
    return VOCABULARY.item_tokens(codes)[:-1]


@pytest.mark.parametrize("seed", range(5))
def test_legal_tokens_are_those_found_by_looking_at_every_item(seed: int) -> None:
    rng = random.Random(seed)
    items = [item.codes for item in random_catalog(seed, 60).items]
    banned = rng.sample(items, 15)
    legal = ItemPrefixes([bare(codes) for codes in items], VOCABULARY.separator).excluding(map(bare, banned))
    gone, written = set(banned), list[int]()
    while len(gone) < len(items):
        codes: Codes = ()
        for offset in VOCABULARY.level_offsets:
            right = legal_codes_by_search(items, codes, gone)
            assert legal(written) == [offset + code for code in right]
            codes = (*codes, rng.choice(right))
            written.append(offset + codes[-1])
        assert legal(written) == [VOCABULARY.separator]
        written.append(VOCABULARY.separator)
        gone.add(codes)
    assert legal(written) == [VOCABULARY.separator], "nothing is left, and still there is an answer"


def test_it_has_an_answer_after_a_wrong_guess_too() -> None:
    legal = ItemPrefixes([[3, 9], [4, 8]], 2).excluding([])
    assert legal([3, 8]) == [2]
    assert legal([8]) == [2]
    assert legal([3, 8, 2]), "never none"


def test_the_same_items_serve_requests_with_different_bans() -> None:
    items = ItemPrefixes([[3, 9], [4, 8]], 2)
    assert items.excluding([[3, 9]])([]) == [4]
    assert items.excluding([[4, 8]])([]) == [3]
    assert items.excluding([])([]) == [3, 4]
