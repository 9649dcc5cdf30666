import random

import numpy as np
import pytest

from model.config import TokenizerConfig
from model.data.histories import History
from model.tokenizer.embeddings import item_embeddings

CONFIG = TokenizerConfig(embedding_size=6, context_items=3, attribute_weight=0.0)
FILMS, BOOKS = [f"film-{i}" for i in range(8)], [f"book-{i}" for i in range(8)]


def users() -> list[History]:
    """Every user watches films only or reads books only."""
    rng = random.Random(0)
    groups = [rng.sample(FILMS if n % 2 else BOOKS, 7) for n in range(40)]
    return [History(str(n), tuple(items), tuple(range(7))) for n, items in enumerate(groups)]


def test_items_seen_together_are_closer_than_strangers() -> None:
    rows = item_embeddings(FILMS + BOOKS, users(), {}, CONFIG)
    cosine = rows @ rows.T
    together = [cosine[i, j] for i in range(8) for j in range(8) if i != j]
    strangers = [cosine[i, j] for i in range(8) for j in range(8, 16)]
    assert min(together) > max(strangers) + 0.2


def test_an_item_nobody_has_seen_is_known_by_its_attributes_alone() -> None:
    config = TokenizerConfig(embedding_size=6, context_items=3, attribute_weight=1.0)
    attributes: dict[str, dict[str, list[str] | float]] = {"film-0": {"genre": ["x"]}, "new": {"genre": ["x"]}}
    rows = item_embeddings([*FILMS, *BOOKS, "new"], users(), attributes, config)
    assert rows.shape == (17, 7)
    assert np.allclose(rows[16], [0, 0, 0, 0, 0, 0, 1])
    assert np.allclose(np.linalg.norm(rows[:16, :6], axis=1), 1.0)


def test_attribute_columns_are_unit_categories_and_a_centred_number() -> None:
    attributes: dict[str, dict[str, list[str] | float]] = {
        "film-0": {"genre": ["a", "b"], "year": 1990},
        "film-1": {"genre": ["b"], "year": 2000},
    }
    config = TokenizerConfig(embedding_size=6, context_items=3, attribute_weight=2.0)
    columns = item_embeddings(FILMS + BOOKS, users(), attributes, config)[:, 6:] / 2.0
    half = 2**-0.5
    assert columns[0] == pytest.approx([half, half, -0.5])
    assert columns[1] == pytest.approx([0, 1, 0.5])
    assert not columns[2:].any()


def test_the_same_histories_give_the_same_embeddings() -> None:
    first, second = (item_embeddings(FILMS + BOOKS, users(), {}, CONFIG) for _ in range(2))
    assert np.array_equal(first, second)
