"""One decoder layer of the Llama family over a row KV cache, and the few functions it is made of.

Queries, keys and values come from one fused linear layer, gate and up projections from another, norm scales folded
in: at the sizes served here a call costs as much as its arithmetic. Knows nothing of whole models, tries or requests.

Shapes: B rows, n new tokens, N of the B n that are no padding, T cached positions looked at, d hidden size, H query
heads, G key/value heads, s head size, f feed-forward size.
"""

import math
from typing import Any, NamedTuple

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from model.kv_cache import KVCache, Write
from model.linear import PackedLinear

Tensor = torch.Tensor


class UnitNorm:
    """x / |x|, with RMSNorm's epsilon: RMSNorm without the factor sqrt(size), which `scale` folds into the weights
    that read the result. Three small operations instead of RMSNorm's seven. On a GPU, where RMSNorm is a single
    kernel, it is that, and the factor is 1."""

    def __init__(self, size: int, epsilon: float, device: torch.device | str) -> None:
        self.size, self.epsilon, self.fused = size, epsilon, torch.device(device).type == "cuda"
        self.scale = self.scale_on(device, size)
        self.floor = torch.tensor(math.sqrt(size * epsilon), device=device)

    @staticmethod
    def scale_on(device: torch.device | str, size: int) -> float:
        """What the norm leaves to the weights behind it."""
        return 1.0 if torch.device(device).type == "cuda" else math.sqrt(size)

    def __call__(self, x: Tensor) -> Tensor:
        if self.fused:
            return rms_norm(x, (self.size,), eps=self.epsilon)
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        return (wide / torch.hypot(norm, self.floor)).to(x.dtype)


class LayerWeights(NamedTuple):
    """One decoder layer, projections fused, norm scales folded in, the halves that a rotary pair turns side by side:
    `qkv` [(H + 2 G) s, d], `qk_scale` [H + G, s] where queries and keys are normalised, `output` [d, H s], `gate_up`
    [2 f, d], `down` [d, f]."""

    qkv: Tensor
    qkv_bias: Tensor | None
    qk_scale: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    gate_up: Tensor
    down: Tensor


def fused_weights(source: Any, num_heads: int, num_kv_heads: int, head_size: int) -> LayerWeights:
    """The weights of a `transformers` decoder layer of the Llama family."""
    attention, feed = source.self_attn, source.mlp
    dtype, device = attention.q_proj.weight.dtype, attention.q_proj.weight.device
    root, order = UnitNorm.scale_on(device, attention.q_proj.weight.shape[1]), interleaved(head_size).to(device)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    heads = (num_heads, num_kv_heads, None)
    scale_in = source.input_layernorm.weight.float() * root
    qkv = torch.cat([_by_head(p.weight, h, order) for p, h in zip(projections, heads, strict=True)]) * scale_in
    bias, qk_scale = None, None
    if attention.q_proj.bias is not None:
        columns = [_by_head(p.bias[:, None], h, order)[:, 0] for p, h in zip(projections, heads, strict=True)]
        bias = torch.cat(columns).to(dtype)
    if hasattr(attention, "q_norm"):
        query, key = (n.weight.detach().float()[order] for n in (attention.q_norm, attention.k_norm))
        scales = torch.stack([query] * num_heads + [key] * num_kv_heads)
        qk_scale = (scales * UnitNorm.scale_on(device, head_size)).to(dtype)
    scale_mid = source.post_attention_layernorm.weight.float() * root
    gate_up = torch.cat([feed.gate_proj.weight, feed.up_proj.weight]).float() * scale_mid
    output_bias = attention.o_proj.bias
    return LayerWeights(
        qkv.to(dtype),
        bias,
        qk_scale,
        attention.o_proj.weight.detach(),
        None if output_bias is None else output_bias.detach(),
        gate_up.to(dtype),
        feed.down_proj.weight.detach(),
    )


class Layer:
    """One decoder layer: attention and gated feed-forward, weights fused and ready to run."""

    def __init__(
        self, weights: LayerWeights, num_heads: int, num_kv_heads: int, head_size: int, epsilon: float
    ) -> None:
        self.heads, self.kv_heads, self.size = num_heads, num_kv_heads, head_size
        device = weights.qkv.device
        self.norm = UnitNorm(weights.qkv.shape[1], epsilon, device)
        self.head_norm, self.qk_scale = UnitNorm(head_size, epsilon, device), weights.qk_scale
        self.qkv = PackedLinear(weights.qkv, weights.qkv_bias)
        self.output = PackedLinear(weights.output, weights.output_bias)
        self.gate_up, self.down = PackedLinear(weights.gate_up), PackedLinear(weights.down)

    def __call__(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: KVCache, layer: int, at: Write, length: int
    ) -> Tensor:
        """`x` [N, d], `rotation` [N, 1, s/2] complex, `mask` [B, 1, n H/G, T] additive (see `grouped`); without it the
        pass is a prefill: causal over its own tokens, nothing read from the cache."""
        rows, new = at.positions.shape
        qkv = self.qkv(self.norm(x))
        both = (self.heads + self.kv_heads) * self.size
        turned = qkv[:, :both].unflatten(1, (-1, self.size))
        if self.qk_scale is not None:
            turned = self.head_norm(turned) * self.qk_scale
        turned = rotate(turned, rotation)
        keys, values = turned[:, self.heads :], qkv[:, both:].unflatten(1, (-1, self.size))
        query = at.padded(turned[:, : self.heads]).transpose(1, 2)
        cache.write(layer, keys, values, at)
        if mask is None:
            keys, values = at.padded(keys).transpose(1, 2), at.padded(values).transpose(1, 2)
            shared = self.heads != self.kv_heads
            mixed = scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=shared)
        else:
            mixed = self._attend(query, *cache.read(layer, rows, length), mask)
        x = self.output.add_to(x, at.compact(mixed.transpose(1, 2).reshape(rows, new, -1)))
        gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
        return self.down.add_to(x, silu(gate) * up)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """[B, H, n, s]. Query heads that share a key/value head become extra queries, so nothing is repeated."""
        if self.heads == self.kv_heads:
            return scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        rows, heads, new, size = query.shape
        query = query.reshape(rows, self.kv_heads, -1, size)
        mixed = scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return mixed.reshape(rows, heads, new, size)


def grouped(mask: Tensor | None, heads: int, kv_heads: int) -> Tensor | None:
    """A mask [B, 1, n, T] for queries whose heads share key/value heads: once for every head that shares one, and once
    for all layers."""
    return mask if mask is None or heads == kv_heads else mask.repeat(1, 1, heads // kv_heads, 1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary embedding of [..., heads, s] whose pairs lie side by side, as one complex product."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def interleaved(size: int) -> Tensor:
    """`transformers` pairs component i with i + s/2; we keep the two side by side."""
    return torch.arange(size).view(2, size // 2).t().reshape(-1)


def _by_head(weight: Tensor, heads: int | None, order: Tensor) -> Tensor:
    """The rows of a query or key projection, each head's put into `order`; values stay as they are."""
    weight = weight.detach().float()
    if heads is None:
        return weight
    assert weight.shape[0] == heads * len(order), (weight.shape, heads, len(order))
    return weight.view(heads, len(order), -1)[:, order].reshape(weight.shape)
