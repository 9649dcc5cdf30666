"""Draft: the draft network run over rows of its own KV cache.

Committed positions hold keys and values made from the target's features; the guesses of a round are written behind
them and overwritten by the next round. Knows nothing of tries: whoever calls says which tokens, and who sees whom.

Shapes: B rows, n tokens, W nodes asked a query, d hidden size, T positions looked at.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from model.draft.network import DraftNetwork
from model.kv_cache import KVCache, Write
from model.layer import rotate

Tensor = torch.Tensor


class Draft:
    """The small network that guesses."""

    def __init__(self, network: DraftNetwork, embedding: Tensor) -> None:
        """`embedding` [vocabulary, d] is the target's: the draft embeds tokens with it."""
        self.network = network.to(embedding.device).eval().requires_grad_(False)
        self.embedding = embedding.float()
        self._rotations = network.rotations(1024)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.network.shape.feature_layers

    def new_cache(self, num_rows: int, num_positions: int) -> KVCache:
        if num_positions > len(self._rotations):
            self._rotations = self.network.rotations(num_positions)
        heads = self.network.shape.num_heads
        return KVCache(1, num_rows, num_positions, heads, self.network.head_size, self.embedding.device)

    def fuse_features(self, features: tuple[Tensor, ...]) -> Tensor:
        """[..., d] from the target's layers [..., d] each."""
        fused: Tensor = self.network.features(torch.cat(features, dim=-1).float())
        return fused

    def read(
        self, tokens: Tensor, slots: Tensor, features: Tensor, positions: Tensor, step: int, cache: KVCache, at: Write
    ) -> Tensor:
        """Store keys and values of `tokens` [B, n] and return their z' [B, n, d]."""
        z = self.network.inputs(self.embedding[tokens], slots, features, step)
        keys, values = self.network.keys_values(z)
        cache.write(0, rotate(keys, self._rotations[positions]), values, at)
        return z

    def predict(self, z: Tensor, positions: Tensor, mask: Tensor, cache: KVCache, length: int) -> Tensor:
        """Output features [B, W, d] of the tokens with inputs `z` [B, W, d] at `positions` [B, W], each seeing the
        cached positions that `mask` [B, 1, W, T] (additive) allows."""
        query = rotate(self.network.queries(z), self._rotations[positions]).transpose(1, 2)
        keys, values = cache.read(0, z.shape[0], length)
        attended = scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return self.network.finish(z, attended.transpose(1, 2))
