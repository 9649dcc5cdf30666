"""The simple recommenders the target has to beat, on the same split: popularity, item-kNN, a first-order Markov chain.

Each scores all items from a history; none knows the target. Shapes: N items.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from model.data.histories import History

Array = npt.NDArray[np.float64]
Recommender = Callable[[Sequence[str]], list[str]]


def baselines(users: Sequence[History], item_ids: Sequence[str], k: int) -> dict[str, Recommender]:
    """Name -> recommender of `k` items that are not in the history."""
    index = {item: i for i, item in enumerate(item_ids)}
    count = len(item_ids)
    seen = [np.array([index[i] for i in user.item_ids], dtype=np.int64) for user in users]
    popularity = np.bincount(np.concatenate(seen), minlength=count).astype(np.float64)
    seen_by: list[list[int]] = [[] for _ in item_ids]
    next_of: list[list[int]] = [[] for _ in item_ids]
    for row, places in enumerate(seen):
        for item in places.tolist():
            seen_by[item].append(row)
        for item, following in pairwise(places.tolist()):
            next_of[item].append(following)
    norm = np.sqrt(np.maximum(popularity, 1.0))
    prior = popularity / popularity.sum()

    @lru_cache(maxsize=2000)  # a matrix of all pairs would not fit for large catalogs
    def similar(item: int) -> Array:
        """Cosine over users of every item with `item`."""
        rows = [seen[row] for row in seen_by[item]]
        together = np.bincount(np.concatenate(rows), minlength=count) if rows else np.zeros(count)
        together[item] = 0
        return np.asarray(together / norm[item] / norm)

    def chain(item: int) -> Array:
        """How often every item followed `item`, smoothed towards popularity (Dirichlet): rare items have no useful
        row of their own."""
        follows = np.bincount(np.array(next_of[item], dtype=np.int64), minlength=count)
        return np.asarray((follows + 20.0 * prior) / (follows.sum() + 20.0))

    scorers: Mapping[str, Callable[[list[int]], Array]] = {
        "popularity": lambda history: popularity,
        "item-knn": lambda history: np.asarray(sum(similar(item) for item in history)),
        "markov": lambda history: chain(history[-1]),
    }

    def recommender(score: Callable[[list[int]], Array]) -> Recommender:
        def recommend(history: Sequence[str]) -> list[str]:
            places = [index[i] for i in history]
            scores = score(places).copy()
            scores[places] = -np.inf
            ranked = np.lexsort((np.arange(len(scores)), -scores))
            return [item_ids[i] for i in ranked[: len(scores) - len(set(places))][:k]]

        return recommend

    return {name: recommender(score) for name, score in scorers.items()}
