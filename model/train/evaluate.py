"""Quality on held-out users: recall and NDCG of ranked lists against what the user went on to watch.

Knows lists of item IDs; nothing of how they were made.
"""

import math
from collections.abc import Sequence

from model.data.histories import Case


def quality(cases: Sequence[Case], lists: Sequence[Sequence[str]], k: int) -> dict[str, float]:
    """Means over cases of Recall@k and NDCG@k, for the next item alone and for the whole future."""
    if len(cases) != len(lists) or not cases:
        raise ValueError("one list per case, and at least one case")
    sums = {"next_recall": 0.0, "next_ndcg": 0.0, "future_recall": 0.0, "future_ndcg": 0.0}
    for case, ranked in zip(cases, lists, strict=True):
        for name, wanted in (("next", case.future[:1]), ("future", case.future)):
            gains = [1 / math.log2(rank + 2) for rank, item in enumerate(ranked[:k]) if item in wanted]
            ideal = sum(1 / math.log2(rank + 2) for rank in range(min(len(wanted), k)))
            sums[f"{name}_recall"] += len(gains) / min(len(wanted), k)
            sums[f"{name}_ndcg"] += sum(gains) / ideal
    return {f"{name}@{k}": round(total / len(cases), 4) for name, total in sums.items()}
