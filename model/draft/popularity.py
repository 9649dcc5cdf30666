"""PopularityDraft: no network at all, the child whose items were most popular in training.

The cheapest guess there is: what a learned draft has to beat. Knows counts of leaves and where nodes begin; nothing of
tokens, histories or the target.

Shapes: B rows, n tokens, W tokens asked, N items in the trie's order, V nodes.
"""

import torch

from model.draft.draft import Draft
from model.item_trie import ItemTrie
from model.kv_cache import KVCache, Sight, Write

Tensor = torch.Tensor


class PopularityDraft(Draft):
    """Guesses without reading: its logits are the logarithms of how popular a node's items are together."""

    def __init__(self, trie: ItemTrie, popularity: Tensor) -> None:
        """`popularity` [N] of the items in the catalog's order, not negative."""
        counts = popularity[torch.from_numpy(trie.item_of_leaf).long()].double()
        before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])[trie.leaf_start]
        # A node ends where the next one of its depth starts; behind the last of a depth stands a sentinel.
        within = torch.cat([before[1:] - before[:-1], before.new_zeros(1)]).clamp(min=0)
        self.by_node = torch.log(within + 0.5).float()
        self.device, self.native = trie.device, None

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return (0,)

    def new_cache(self, num_rows: int, num_positions: int) -> KVCache:
        return KVCache(1, num_rows, 1, 1, 1, self.device)

    def fuse_features(self, features: tuple[Tensor, ...]) -> Tensor:
        return features[0].float()

    def ask(
        self,
        tokens: Tensor,
        features: Tensor,
        positions: Tensor,
        step: int | Tensor,
        cache: KVCache,
        at: Write,
        asked: Tensor,
        sight: Sight,
    ) -> Tensor:
        """Nothing is read and nothing stored: the features are handed back unused."""
        del positions, step, cache, at, sight
        return features[:, :1].expand(-1, asked.shape[1], -1)
