"""Draft: the draft network run over rows of its own KV cache.

Committed positions hold keys and values made from the target's features; the guesses of a round are written behind
them and overwritten by the next round. What depends on a token alone (its embedding, its slot's embedding, their half
of the fuse layer) is a table, norms are folded into weights: a draft step is a dozen calls. The slow twin is the
network itself. Knows nothing of tries: whoever calls says which tokens, and who sees whom.

Shapes: B rows, n tokens, W nodes asked a query, d hidden size, T positions looked at.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from model.draft.network import DraftNetwork
from model.kv_cache import KVCache, Write
from model.layer import UnitNorm, rotate
from model.linear import PackedLinear
from model.semantic_id import Vocabulary

Tensor = torch.Tensor


class Draft:
    """The small network that guesses."""

    def __init__(self, network: DraftNetwork, embedding: Tensor, vocabulary: Vocabulary) -> None:
        """`embedding` [vocabulary, d] is the target's: the draft embeds tokens with it."""
        network = network.to(embedding.device).eval().requires_grad_(False)
        self.network, self.device = network, embedding.device
        d = network.shape.hidden_size
        self.norm = UnitNorm(d, network.shape.epsilon, self.device)
        scales = [norm.detach() * self.norm.scale for norm in network.norms]
        slots = torch.tensor([vocabulary.slot(token) for token in range(vocabulary.size)], device=self.device)
        own = network.positions.with_slot(embedding[: vocabulary.size].float(), slots)
        of_token, of_feature = network.fuse.weight.split(d, dim=1)
        self.token_part = own @ of_token.t() + network.fuse.bias
        self.feature_part = PackedLinear(of_feature)
        self.qkv = PackedLinear(torch.cat([network.query.weight, network.key_value.weight]) * scales[0])
        self.output = PackedLinear(network.output.weight)
        self.gate_up = PackedLinear(network.gate_up.weight * scales[1])
        self.down = PackedLinear(network.down.weight)
        self.last_scale = scales[2]
        self._rotations = network.rotations(1024)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.network.shape.feature_layers

    def new_cache(self, num_rows: int, num_positions: int) -> KVCache:
        if num_positions > len(self._rotations):
            self._rotations = self.network.rotations(num_positions)
        heads = self.network.shape.num_heads
        return KVCache(1, num_rows, num_positions, heads, self.network.head_size, self.device)

    def fuse_features(self, features: tuple[Tensor, ...]) -> Tensor:
        """[..., d] from the target's layers [..., d] each."""
        fused: Tensor = self.network.features(torch.cat(features, dim=-1).float())
        return fused

    def read(
        self, tokens: Tensor, features: Tensor, positions: Tensor, step: int, cache: KVCache, at: Write
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values of `tokens` [B, n]; returns their z' [B, n, d] and queries [B, n, heads, s]."""
        rows, new = tokens.shape
        z = self.feature_part.add_to(self.token_part[tokens.flatten()], features.flatten(0, 1))
        z = self.network.positions.with_step(z, step)
        qkv = self.qkv(self.norm(z)).view(rows, new, 3, self.network.shape.num_heads, -1)
        turned = rotate(qkv[:, :, :2], self._rotations[positions].unsqueeze(2))
        cache.write(0, turned[:, :, 1].flatten(0, 1), qkv[:, :, 2].flatten(0, 1), at)
        return z.view(rows, new, -1), turned[:, :, 0]

    def predict(self, z: Tensor, query: Tensor, mask: Tensor, cache: KVCache, length: int) -> Tensor:
        """Output features [B, W, d] of the tokens with inputs `z` [B, W, d] and `query` [B, W, heads, s], each seeing
        the cached positions that `mask` [B, 1, W, T] (additive) allows."""
        rows, asking, size = z.shape
        keys, values = cache.read(0, rows, length)
        attended = scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask)
        x = self.output.add_to(z.reshape(-1, size), attended.transpose(1, 2).reshape(-1, size))
        gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
        x = self.down.add_to(x, silu(gate) * up)
        out: Tensor = self.norm(x) * self.last_scale
        return out.view(rows, asking, size)
