"""Draft: the draft network run over rows of its own KV cache.

Committed positions hold keys and values made from the target's features; the guesses of a round are written behind
them and overwritten by the next round. What depends on a token alone (its embedding, its slot's embedding, their half
of the fuse layer) is a table, norms are folded into weights: a draft step is a dozen calls. The slow twin is the
network itself. Knows nothing of tries: whoever calls says which tokens, and who sees whom.

Shapes: B rows, n tokens, W tokens asked for their output, d hidden size.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from model.draft.network import DraftNetwork
from model.kv_cache import KVCache, Sight, Write, attention_mask
from model.layer import UnitNorm, rotate
from model.linear import PackedLinear
from model.native import kernel
from model.semantic_id import Vocabulary

Tensor = torch.Tensor


class Draft:
    """The small network that guesses."""

    # Set by the drafts it is compared with: whether one pass guesses a whole item, and logits [V] of the trie's nodes
    # for a draft that looks at nothing else.
    whole_items = False
    by_node: Tensor | None = None

    def __init__(
        self, network: DraftNetwork, embedding: Tensor, vocabulary: Vocabulary, *, native: bool = True
    ) -> None:
        """`embedding` [vocabulary, d] is the target's: the draft embeds tokens with it. With `native` the compiled
        kernel runs the layer where it can, its matrices in the target's precision; torch runs it in fp32."""
        network = network.to(embedding.device).eval().requires_grad_(False)
        self.network, self.device = network, embedding.device
        d = network.shape.hidden_size
        self.norm = UnitNorm(d, network.shape.epsilon, self.device)
        scales = [norm.detach() * self.norm.scale for norm in network.norms]
        slots = torch.tensor([vocabulary.slot(token) for token in range(vocabulary.size)], device=self.device)
        own = network.positions.with_slot(network.tokens(embedding)[: vocabulary.size].float(), slots)
        of_token = network.fuse.weight[:, :d]
        of_feature = network.fuse.weight[:, d:] if network.features is not None else torch.zeros_like(of_token)
        weights = kernel.DraftWeights(
            token_part=own @ of_token.t() + network.fuse.bias,
            feature_part=of_feature,
            qkv=torch.cat([network.query.weight, network.key_value.weight]) * scales[0],
            output=network.output.weight,
            gate_up=network.gate_up.weight * scales[1],
            down=network.down.weight,
            last_scale=scales[2],
        )
        self.native: kernel.NativeDraft | None = None
        if native and kernel.fits(d, network.head_size, torch.float32, self.device):
            heads, floor = network.shape.num_heads, float(self.norm.floor)
            self.native = kernel.NativeDraft(weights, heads, network.head_size, floor, embedding.dtype)
            self.terms = [network.positions.term(step) for step in range(network.positions.num_steps)]
            # A draft without features is handed the target's last layer, and does not look at it.
            fuse = torch.eye(d) if network.features is None else network.features.weight
            self.packed_fuse = kernel.pack(fuse.to(embedding.dtype))
        else:
            self.token_part, self.last_scale = weights.token_part, weights.last_scale
            self.feature_part, self.qkv = PackedLinear(of_feature), PackedLinear(weights.qkv)
            self.output, self.gate_up = PackedLinear(weights.output), PackedLinear(weights.gate_up)
            self.down = PackedLinear(weights.down)
        self.rotations = network.rotations(1024)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.network.shape.feature_layers

    def new_cache(self, num_rows: int, num_positions: int) -> KVCache:
        if num_positions > len(self.rotations):
            self.rotations = self.network.rotations(num_positions)
        heads = self.network.shape.num_heads
        return KVCache(1, num_rows, num_positions, heads, self.network.head_size, self.device)

    def fuse_features(self, features: tuple[Tensor, ...]) -> Tensor:
        """[..., d] from the target's layers [..., d] each."""
        return self.network.fused(torch.cat(features, dim=-1).float())

    def wanted(self, outputs: Tensor, slots: Tensor) -> Tensor:
        """The feature [B, W, d] that chooses at `slots` [B, W], out of what `ask` said [B, W, ...]."""
        del slots
        return outputs

    def read(self, tokens: Tensor, features: Tensor, positions: Tensor, step: int, cache: KVCache, at: Write) -> None:
        """Store keys and values of `tokens` [B, n], read with `features` [B, n, d] at draft step `step`."""
        self.ask(tokens, features, positions, step, cache, at, tokens[:, :0], Sight(None, None, 1))

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
        """Read as `read` does; output features [B, W, d] of the tokens `asked` [B, W] (places among the n), each
        seeing what `sight` says of it (`own` [B, W, m], or None: what is committed alone)."""
        rows, new = tokens.shape
        assert isinstance(step, int), "this draft reads all tokens of a pass at one step"
        if self.native is not None:
            places = kernel.Places.asked(at, positions, asked.shape, sight)
            flat = asked + new * torch.arange(rows)[:, None]
            term = self.terms[min(step, len(self.terms) - 1)]
            read = (tokens.flatten(), features.flatten(0, 1), places, flat.flatten(), term)
            return self.native(*read, cache.data, self.rotations).view(*asked.shape, self.native.size)
        size = features.shape[-1]
        z = self.feature_part.add_to(self.token_part[tokens.flatten()], features.flatten(0, 1))
        z = self.network.positions.with_step(z, step)
        qkv = self.qkv(self.norm(z)).view(rows, new, 3, self.network.shape.num_heads, -1)
        turned = rotate(qkv[:, :, :2], self.rotations[positions].unsqueeze(2))
        cache.write(0, turned[:, :, 1].flatten(0, 1), qkv[:, :, 2].flatten(0, 1), at)
        if not asked.shape[1]:
            return features.new_empty(rows, 0, size)
        assert sight.committed is not None
        own = sight.own if sight.own is not None else asked.new_zeros(rows, asked.shape[1], 0, dtype=torch.bool)
        mask = attention_mask(sight.committed, own, sight.reach, static=sight.static)
        index = asked.unsqueeze(-1)
        x = z.view(rows, new, size).gather(1, index.expand(-1, -1, size)).flatten(0, 1)
        query = turned[:, :, 0].gather(1, index.unsqueeze(-1).expand(-1, -1, *turned.shape[3:]))
        keys, values = cache.read(0, rows, sight.reach)
        attended = scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask)
        x = self.output.add_to(x, attended.transpose(1, 2).reshape(-1, size))
        gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
        x = self.down.add_to(x, silu(gate) * up)
        out: Tensor = self.norm(x) * self.last_scale
        return out.view(*asked.shape, size)
