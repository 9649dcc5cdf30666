"""Builds a catalog from logs: embeddings from training users only, then semantic IDs, popularity and attributes."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from model.catalog import Catalog, CatalogItem
from model.config import TokenizerConfig
from model.data.histories import History, Logs
from model.tokenizer.embeddings import item_embeddings
from model.tokenizer.quantise import semantic_ids


def build_catalog(logs: Logs, users: Sequence[History], config: TokenizerConfig) -> Catalog:
    """Catalog of every item with attributes or events. `users` are the training users: popularity counts them alone."""
    item_ids = sorted({*logs.attributes, *(i.item_id for i in logs.interactions)})
    counts = Counter(item for user in users for item in user.item_ids)
    popularity = np.array([counts[i] for i in item_ids], dtype=np.int64)
    embeddings = item_embeddings(item_ids, users, logs.attributes, config)
    codes, codebook_sizes = semantic_ids(embeddings, popularity, config)
    items = tuple(
        CatalogItem(item, code, int(count), dict(logs.attributes.get(item, {})))
        for item, code, count in zip(item_ids, codes, popularity, strict=True)
    )
    return Catalog(codebook_sizes, items)
