"""Item embeddings from training co-occurrence and attributes.

Positive pointwise mutual information of items seen near each other in training histories, factorised by a truncated
singular value decomposition, beside normalised attribute columns. Knows nothing of codes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, diags_array
from scipy.sparse.linalg import svds

from model.config import TokenizerConfig
from model.data.histories import History

Array = npt.NDArray[np.float64]


def item_embeddings(
    item_ids: Sequence[str],
    users: Sequence[History],
    attributes: Mapping[str, Mapping[str, list[str] | float]],
    config: TokenizerConfig,
) -> Array:
    """[num_items, embedding_size + num_attribute_columns]; an item without training events has attributes only."""
    behaviour = _cooccurrence_factors(item_ids, users, config)
    content = _attribute_columns(item_ids, attributes) * config.attribute_weight
    return np.concatenate([behaviour, content], axis=1)


def _cooccurrence_factors(item_ids: Sequence[str], users: Sequence[History], config: TokenizerConfig) -> Array:
    index = {item: i for i, item in enumerate(item_ids)}
    pairs: list[tuple[int, int]] = []
    for user in users:
        row = [index[i] for i in user.item_ids]
        for distance in range(1, config.context_items + 1):
            pairs += zip(row, row[distance:], strict=False)
    left, right = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    size = len(item_ids)
    counts = coo_array((np.ones(len(left)), (left, right)), shape=(size, size)).tocsr()
    counts = (counts + counts.T).tocoo()
    total, margin = counts.sum(), np.asarray(counts.sum(axis=1)).ravel()
    mutual = np.log(counts.data * total / (margin[counts.row] * margin[counts.col]))
    positive = coo_array((np.maximum(mutual, 0.0), (counts.row, counts.col)), shape=(size, size)).tocsr()
    rank = min(config.embedding_size, size - 2)
    start = np.random.default_rng(config.seed).standard_normal(size)
    vectors, values, _ = svds(positive, k=rank, v0=start)
    return _unit_rows((diags_array(np.ones(size)) @ vectors) * np.sqrt(values))


def _attribute_columns(item_ids: Sequence[str], attributes: Mapping[str, Mapping[str, list[str] | float]]) -> Array:
    names = sorted({n for i in item_ids for n in attributes.get(i, {})})
    columns: list[Array] = []
    for name in names:
        values = [attributes.get(i, {}).get(name) for i in item_ids]
        if any(isinstance(v, list) for v in values):
            lists = [v if isinstance(v, list) else [] for v in values]
            categories = sorted({c for v in lists for c in v})
            columns.append(_unit_rows(np.array([[float(c in v) for c in categories] for v in lists])))
        else:
            numbers = np.array([float(v) if isinstance(v, int | float) else np.nan for v in values])
            spread = np.nanstd(numbers) or 1.0
            columns.append(np.nan_to_num((numbers - np.nanmean(numbers)) / spread)[:, None] * 0.5)
    return np.concatenate(columns, axis=1) if columns else np.zeros((len(item_ids), 0))


def _unit_rows(rows: Array) -> Array:
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Array = np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)
    return unit
