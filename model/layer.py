"""One decoder layer of the Llama family over a row KV cache, and the few functions it is made of.

Queries, keys and values come from one fused linear layer, gate and up projections from another, norm scales folded
in. Knows nothing of whole models, tries or requests.

Shapes: B rows, n new tokens, T cached positions looked at, d hidden size, H query heads, s head size.
"""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from model.kv_cache import KVCache, Write
from model.linear import PackedLinear

Tensor = torch.Tensor


class Layer:
    """One decoder layer: attention and gated feed-forward, weights fused and ready to run."""

    def __init__(self, source: Any, num_heads: int, num_kv_heads: int, head_size: int, epsilon: float) -> None:
        attention, feed = source.self_attn, source.mlp
        self.heads, self.kv_heads, self.size, self.epsilon = num_heads, num_kv_heads, head_size, epsilon
        order = interleaved(head_size)
        query_key = [
            _by_head(attention.q_proj.weight, num_heads, order),
            _by_head(attention.k_proj.weight, num_kv_heads, order),
        ]
        scale_in = source.input_layernorm.weight.float()
        weight = torch.cat([*query_key, attention.v_proj.weight.float()]) * scale_in
        bias = None
        if attention.q_proj.bias is not None:
            bias = torch.cat(
                [
                    _by_head(attention.q_proj.bias[:, None], num_heads, order)[:, 0],
                    _by_head(attention.k_proj.bias[:, None], num_kv_heads, order)[:, 0],
                    attention.v_proj.bias.float(),
                ]
            )
        self.qk_norm: Tensor | None = None
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm.weight.float()[order], attention.k_norm.weight.float()[order]
            self.qk_norm = torch.stack([query] * num_heads + [key] * num_kv_heads).detach()
        dtype = attention.q_proj.weight.dtype
        self.qkv = PackedLinear(weight.to(dtype), None if bias is None else bias.detach().to(dtype))
        output_bias = attention.o_proj.bias
        self.output = PackedLinear(attention.o_proj.weight, None if output_bias is None else output_bias.detach())
        scale_mid = source.post_attention_layernorm.weight.float()
        gate_up = torch.cat([feed.gate_proj.weight, feed.up_proj.weight]).float() * scale_mid
        self.gate_up = PackedLinear(gate_up.to(dtype))
        self.down = PackedLinear(feed.down_proj.weight)

    def __call__(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: KVCache, layer: int, at: Write, length: int
    ) -> Tensor:
        """`x` [B, n, d], `rotation` [B, n, 1, s/2] complex, `mask` [B, 1, n, T] additive; without it the pass is a
        prefill: causal over its own tokens, nothing read from the cache."""
        rows, new, _ = x.shape
        qkv = self.qkv(rms_norm(x, self.epsilon))
        both = self.heads + self.kv_heads
        turned = qkv[..., : both * self.size].view(rows, new, both, self.size)
        if self.qk_norm is not None:
            turned = rms_norm(turned, self.epsilon) * self.qk_norm
        turned = rotate(turned, rotation)
        values = qkv[..., both * self.size :].view(rows, new, self.kv_heads, self.size)
        query, keys = turned[:, :, : self.heads].transpose(1, 2), turned[:, :, self.heads :]
        cache.write(layer, keys, values, at)
        if mask is None:
            mixed = scaled_dot_product_attention(
                query, keys.transpose(1, 2), values.transpose(1, 2), is_causal=True, enable_gqa=self._grouped
            ).transpose(1, 2)
        else:
            mixed = self._attend(query, *cache.read(layer, rows, length), mask)
        x = x + self.output(mixed.reshape(rows, new, self.heads * self.size))
        gate, up = self.gate_up(rms_norm(x, self.epsilon)).chunk(2, -1)
        return x + self.down(silu(gate) * up)

    @property
    def _grouped(self) -> bool:
        return self.heads != self.kv_heads

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """[B, n, H, s]. Query heads that share a key/value head become extra queries, so nothing is repeated."""
        rows, heads, new, size = query.shape
        if self._grouped:
            group = heads // self.kv_heads
            query = query.reshape(rows, self.kv_heads, group * new, size)
            mask = mask.repeat(1, 1, group, 1)
        mixed = scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return mixed.reshape(rows, heads, new, size).transpose(1, 2)


def rms_norm(x: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) without the learned scale, which is folded into the next linear layer."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary embedding of [..., heads, s] whose pairs lie side by side, as one complex product."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def interleaved(size: int) -> Tensor:
    """`transformers` pairs component i with i + s/2; we keep the two side by side."""
    return torch.arange(size).view(2, size // 2).t().reshape(-1)


def _by_head(weight: Tensor, heads: int, order: Tensor) -> Tensor:
    size = weight.shape[0] // heads
    assert size == len(order), (size, len(order))
    return weight.float().view(heads, size, -1)[:, order].reshape(weight.shape[0], -1)
