"""A bundle whose networks are so many times as wide and say the same: what its lists would cost a larger LLM.

Speculation is worth what a pass costs, and that depends on the size of the target. Widened by zeros a target writes the
same lists and a draft makes the same guesses, so everything but the cost stays as it was measured: acceptance is that
of the networks as trained, which a larger target's own draft may exceed or miss. Knows how checkpoints and drafts are
laid out; nothing of time.
"""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from model.bundle import DTYPES, Bundle
from model.draft.draft import Draft
from model.draft.network import DraftNetwork
from model.target import Target, read_checkpoint

Tensor = torch.Tensor
# Of a draft's matrices that stand for several side by side: how many rows and how many columns of blocks.
BLOCKS = {"fuse.weight": (1, 2), "positions.gate.weight": (1, 2), "key_value.weight": (2, 1), "gate_up.weight": (2, 1)}


def widened(bundle: Bundle, folder: Path, times: int, *, dtype: str = "fp32") -> Bundle:
    """`bundle`, read from `folder`, with hidden states, heads and feed-forward layers `times` as wide."""
    target = Target(widened_model(folder / "target", times).to(DTYPES[dtype]), bundle.target.vocabulary)
    drafts = [
        draft and Draft(widened_draft(draft.network, times), target.embedding, target.vocabulary)
        for draft in (bundle.draft, bundle.plain_draft)
    ]
    return Bundle(bundle.info, bundle.catalog, bundle.trie, target, *drafts)


def widened_model(checkpoint: Path, times: int) -> Any:
    """A `transformers` model with the checkpoint's numbers in the corner of every weight and zeros elsewhere. A norm
    takes the mean over more numbers, none of them new: its scale and epsilon make up for it."""
    narrow, _ = read_checkpoint(checkpoint, torch.float32)
    shape = copy.deepcopy(narrow.config)
    shape.head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    for size in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(shape, size, times * getattr(shape, size))
    shape.rms_norm_eps /= times
    wide: Any = AutoModelForCausalLM.from_config(shape)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, into in wide.named_parameters():
            own = narrow.get_parameter(name)
            scale = 1 / math.sqrt(times) if own.dim() == 1 and own.shape != into.shape and "norm" in name else 1.0
            _spread(into, own * scale)
    return wide.eval()


def widened_draft(network: DraftNetwork, times: int) -> DraftNetwork:
    """The same of a draft."""
    shape = network.shape
    wide = DraftNetwork(
        dataclasses.replace(
            shape,
            hidden_size=times * shape.hidden_size,
            num_heads=times * shape.num_heads,
            intermediate_size=times * shape.intermediate_size,
            epsilon=shape.epsilon / times,
        )
    )
    own = dict(network.named_parameters())
    with torch.no_grad():
        for name, into in wide.named_parameters():
            scale = 1 / math.sqrt(times) if name.startswith("norms.") else 1.0
            blocks = (1, len(shape.feature_layers)) if name == "features.weight" else BLOCKS.get(name, (1, 1))
            _spread(into, own[name] * scale, blocks)
    return wide.eval()


def _spread(into: Tensor, own: Tensor, blocks: tuple[int, int] = (1, 1)) -> None:
    """Put `own` into the corner of `into`, or each of its blocks into the corner of `into`'s."""
    into.zero_()
    if own.dim() < 2:
        into[tuple(slice(size) for size in own.shape)] = own
        return
    for row, wide_row in zip(own.chunk(blocks[0]), into.chunk(blocks[0]), strict=True):
        for part, wide in zip(row.chunk(blocks[1], 1), wide_row.chunk(blocks[1], 1), strict=True):
            wide[: part.shape[0], : part.shape[1]] = part
