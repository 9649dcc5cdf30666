"""PAD-Rec's position-aware module (arXiv 2604.27747): what a draft knows of slot and draft step.

    e'  = e + alpha * E_item[slot]                 alpha: learnable coefficient
    g_j = sigmoid(w_g . [z ; E_step[j]] + b_g)     context-driven gate
    z'  = z + g_j * E_step[j]

The slot of a token is its depth in the item trie. Wraps any draft that embeds tokens and fuses features; knows
nothing of the rest of it. The parts can be left out one by one for ablations.
"""

from typing import Literal

import torch
from torch import nn

from model.native.kernel import StepTerm

Tensor = torch.Tensor
StepMode = Literal["none", "ungated", "gated"]


class PositionAware(nn.Module):
    """Item-slot embeddings with a learnable coefficient, draft-step embeddings with a context-driven gate."""

    def __init__(self, hidden_size: int, num_slots: int, num_steps: int, *, item: bool, step: StepMode) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.item = nn.Embedding(num_slots, hidden_size) if item else None
        self.alpha = nn.Parameter(torch.tensor(1.0)) if item else None
        self.step = nn.Embedding(num_steps, hidden_size) if step != "none" else None
        self.gate = nn.Linear(2 * hidden_size, 1) if step == "gated" else None
        for embedding in (self.item, self.step):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)

    def with_slot(self, embedded: Tensor, slots: Tensor) -> Tensor:
        """e' from token embeddings [..., d] and slots [...]."""
        if self.item is None or self.alpha is None:
            return embedded
        shifted: Tensor = embedded + self.alpha * self.item(slots)
        return shifted

    def term(self, step: int) -> StepTerm | None:
        """What `with_step` adds at a step, with the step's part of the gate worked out."""
        if self.step is None:
            return None
        embedding = self.step.weight.detach()[step].contiguous()
        if self.gate is None:
            return StepTerm(embedding, None, 0.0)
        context, own = self.gate.weight.detach()[0].chunk(2)
        return StepTerm(embedding, context.contiguous(), float(embedding @ own + self.gate.bias.detach()))

    def with_step(self, fused: Tensor, step: int | Tensor) -> Tensor:
        """z' from fused inputs [..., d], all of one draft step or each of its own [...]; steps past the last trained
        one use the last one's embedding."""
        if self.step is None:
            return fused
        last = self.num_steps - 1
        embedding = self.step.weight[min(step, last) if isinstance(step, int) else step.clamp(max=last)]
        if self.gate is None:
            out: Tensor = fused + embedding
            return out
        # The gate's product splits into the context's half and the step's: no concatenation per token.
        context, own = self.gate.weight[0].chunk(2)
        gate = torch.sigmoid(fused @ context + (embedding @ own + self.gate.bias))
        return fused + gate.unsqueeze(-1) * embedding
