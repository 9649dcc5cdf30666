"""Residual quantisation: item embeddings -> codes, one k-means codebook per level on what the levels before left over.

The last level separates items whose codes collide: it counts them, the most popular first. Knows nothing of item IDs.
"""

import warnings

import numpy as np
import numpy.typing as npt
from scipy.cluster.vq import kmeans2

from model.config import TokenizerConfig
from model.semantic_id import Codes

Array = npt.NDArray[np.float64]


def semantic_ids(
    embeddings: Array, popularity: npt.NDArray[np.int64], config: TokenizerConfig
) -> tuple[list[Codes], tuple[int, ...]]:
    """Distinct codes per row of `embeddings`, and the codebook sizes with the last, collision-separating level."""
    residual = embeddings.copy()
    levels = []
    for level, size in enumerate(config.codebook_sizes):
        labels, centroids = _codebook(residual, size, config, level)
        levels.append(labels)
        residual -= centroids[labels]
    prefixes = list(zip(*(level.tolist() for level in levels), strict=True))
    order = np.lexsort((np.arange(len(popularity)), -popularity))
    seen: dict[tuple[int, ...], int] = {}
    last = [0] * len(prefixes)
    for item in order:
        last[item] = seen.get(prefixes[item], 0)
        seen[prefixes[item]] = last[item] + 1
    codes = [(*prefix, extra) for prefix, extra in zip(prefixes, last, strict=True)]
    return codes, (*config.codebook_sizes, max(seen.values()))


def _codebook(rows: Array, size: int, config: TokenizerConfig, level: int) -> tuple[npt.NDArray[np.int64], Array]:
    """Lloyd's algorithm from k-means++ seeds; identical rows leave codes unused, which the trie never offers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="One of the clusters is empty", category=UserWarning)
        distinct = len(np.unique(rows, axis=0))
        centroids, labels = kmeans2(
            rows, min(size, distinct), iter=config.iterations, minit="++", seed=config.seed + level
        )
    return labels.astype(np.int64), centroids
