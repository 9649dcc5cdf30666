"""The draft network: one decoder layer on token embeddings fused with features, predicting through the target's head.

EAGLE family: at the first step the features are the target's (low, middle and last layer, fused by a linear map, as
EAGLE-3 does), at later steps the draft's own outputs. With one layer, keys and values depend on inputs only, so only
the last token of a run asks a query. Two more of its kind are what it is compared with: an independent language model
(token embeddings of its own and no features), and one that asks for all slots of an item at once. This module holds
parameters and maths; `draft.py` and `item_at_once.py` run it over a KV cache, `model.train` trains it.

Shapes: d hidden size, F = 3 d target features, L slots of an item that hold codes.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import silu

from model.draft.position_aware import PositionAware, StepMode

Tensor = torch.Tensor
ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class DraftShape:
    """What it takes to rebuild a draft network; saved beside its weights. `own_tokens` is the size of a token embedding
    of its own, for a draft that reads no features (0: the target's, and features), `slots_at_once` how many slots one
    pass asks for (0: the next choice alone)."""

    hidden_size: int
    num_heads: int
    intermediate_size: int
    num_slots: int
    num_steps: int
    feature_layers: tuple[int, ...]
    item: bool
    step: StepMode
    epsilon: float = 1e-6
    own_tokens: int = 0
    slots_at_once: int = 0


class DraftNetwork(nn.Module):
    """Fuse, one layer, norm."""

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        d, self.shape = shape.hidden_size, shape
        self.head_size = d // shape.num_heads
        self.embedding = nn.Embedding(shape.own_tokens, d) if shape.own_tokens else None
        self.features = nn.Linear(d * len(shape.feature_layers), d, bias=False) if not shape.own_tokens else None
        self.fuse = nn.Linear(d if shape.own_tokens else 2 * d, d)
        self.positions = PositionAware(d, shape.num_slots, shape.num_steps, item=shape.item, step=shape.step)
        self.query = nn.Linear(d, d, bias=False)
        self.key_value = nn.Linear(d, 2 * d, bias=False)
        self.output = nn.Linear(d, d, bias=False)
        self.gate_up = nn.Linear(d, 2 * shape.intermediate_size, bias=False)
        self.down = nn.Linear(shape.intermediate_size, d, bias=False)
        self.norms = nn.ParameterList([nn.Parameter(torch.ones(d)) for _ in range(3)])
        self.wanted = nn.Embedding(shape.slots_at_once, d) if shape.slots_at_once else None
        if self.wanted is not None:
            nn.init.normal_(self.wanted.weight, std=0.02)

    def tokens(self, embedding: Tensor) -> Tensor:
        """The token embedding the network reads: its own, or the target's `embedding`."""
        return embedding if self.embedding is None else self.embedding.weight

    def fused(self, features: Tensor) -> Tensor:
        """[..., d] from the target's features [..., F]; what a draft without features gets it does not look at."""
        if self.features is None:
            return features[..., : self.shape.hidden_size]
        fused: Tensor = self.features(features)
        return fused

    def inputs(self, embedded: Tensor, slots: Tensor, features: Tensor, step: int | Tensor) -> Tensor:
        """z' [..., d] from token embeddings [..., d], their slots [...] and features [..., d]."""
        embedded = self.positions.with_slot(embedded, slots)
        read = embedded if self.features is None else torch.cat([embedded, features], dim=-1)
        return self.positions.with_step(self.fuse(read), step)

    def asking(self, z: Tensor, step: int | Tensor) -> Tensor:
        """What asks for every slot of the item after an input z' [..., d]: [..., L, d], at draft step(s) [...]."""
        assert self.wanted is not None, "only a network of `slots_at_once` asks for slots"
        steps = step if isinstance(step, int) else step.unsqueeze(-1)
        return self.positions.with_step(z.unsqueeze(-2) + self.wanted.weight, steps)

    def keys_values(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (not yet rotated) and values [..., heads, s]."""
        keys, values = self.key_value(self.norm(z, 0)).unflatten(-1, (2, self.shape.num_heads, -1)).unbind(-3)
        return keys, values

    def queries(self, z: Tensor) -> Tensor:
        """[..., heads, s], not yet rotated."""
        queries: Tensor = self.query(self.norm(z, 0)).unflatten(-1, (self.shape.num_heads, -1))
        return queries

    def finish(self, z: Tensor, attended: Tensor) -> Tensor:
        """Output features [..., d] from z' and attention output [..., heads, s]."""
        x = z + self.output(attended.flatten(-2))
        gate, up = self.gate_up(self.norm(x, 1)).chunk(2, -1)
        x = x + self.down(silu(gate) * up)
        return self.norm(x, 2)

    def norm(self, x: Tensor, index: int) -> Tensor:
        scale: Tensor = self.norms[index]
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.shape.epsilon) * scale

    def rotations(self, count: int) -> Tensor:
        """[count, 1, s/2] complex rotary factors."""
        device = self.fuse.weight.device
        rate = ROPE_BASE ** (-torch.arange(0, self.head_size, 2, device=device) / self.head_size)
        angle = torch.arange(count, device=device)[:, None] * rate
        return torch.polar(torch.ones_like(angle), angle).unsqueeze(1)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(self.shape), indent=1))
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "DraftNetwork":
        """Raises ValueError when config and weights do not fit each other."""
        values: dict[str, Any] = json.loads((folder / "config.json").read_text())
        values["feature_layers"] = tuple(values["feature_layers"])
        try:
            network = cls(DraftShape(**values))
            network.load_state_dict(load_file(folder / "model.safetensors"))
        except (TypeError, RuntimeError) as exc:
            raise ValueError(f"{folder.name}: {exc}") from exc
        return network.eval()
