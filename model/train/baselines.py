"""The simple recommenders the target has to beat, on the same split: popularity, item-kNN, a first-order Markov chain.

Each scores all items from a history; none knows the target. Shapes: N items.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from model.data.histories import History

Array = npt.NDArray[np.float64]
Recommender = Callable[[Sequence[str]], list[str]]


def baselines(users: Sequence[History], item_ids: Sequence[str], k: int) -> dict[str, Recommender]:
    """Name -> recommender of `k` items that are not in the history."""
    index = {item: i for i, item in enumerate(item_ids)}
    popularity = np.zeros(len(item_ids))
    seen = np.zeros((len(users), len(item_ids)), dtype=np.float32)
    follows = np.zeros((len(item_ids), len(item_ids)))
    for row, user in enumerate(users):
        places = [index[i] for i in user.item_ids]
        popularity[places] += 1
        seen[row, places] = 1
        np.add.at(follows, (places[:-1], places[1:]), 1)
    together = (seen.T @ seen).astype(np.float64)
    norm = np.sqrt(np.maximum(popularity, 1.0))
    similar = together / norm[:, None] / norm[None, :]
    np.fill_diagonal(similar, 0.0)
    prior = popularity / popularity.sum()
    # Dirichlet smoothing towards popularity: rare items have no useful row of their own.
    chain = (follows + 20.0 * prior) / (follows.sum(axis=1, keepdims=True) + 20.0)
    scorers: Mapping[str, Callable[[list[int]], Array]] = {
        "popularity": lambda history: popularity,
        "item-knn": lambda history: np.asarray(similar[history].sum(axis=0)),
        "markov": lambda history: np.asarray(chain[history[-1]]),
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
