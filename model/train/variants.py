"""The drafts that are compared with each other: one network each, all trained on the same lists with the same budget.

| name | what |
|---|---|
| `independent` | a language model of its own: token embeddings of its own, no feature of the target |
| `one-step` | EAGLE-style: the target's features, trained for the first draft step alone |
| `draft-plain` | HASS-style: the same, unrolled over the steps it will take |
| `item` | `draft-plain` and PAD-Rec's slot embeddings |
| `step` | `draft-plain` and PAD-Rec's gated step embeddings |
| `ungated` | both, the step embeddings without their gate |
| `draft` | PAD-Rec: both, gated |
| `item-at-once` | PAD-Rec's embeddings on a draft that guesses all slots of an item in one pass |
"""

from typing import NamedTuple

import torch

from model.config import DraftConfig
from model.draft.network import DraftNetwork, DraftShape
from model.draft.position_aware import StepMode
from model.semantic_id import Vocabulary


class Variant(NamedTuple):
    """What sets a draft apart: PAD-Rec's parts, whether training unrolls the draft steps, whether it reads the
    target's features, and whether it guesses whole items."""

    item: bool = False
    step: StepMode = "none"
    unrolled: bool = True
    features: bool = True
    whole_items: bool = False


VARIANTS = {
    # Without features a token is read alike at every step: the first step is all there is to train.
    "independent": Variant(features=False, unrolled=False),
    "one-step": Variant(unrolled=False),
    "draft-plain": Variant(),
    "item": Variant(item=True),
    "step": Variant(step="gated"),
    "ungated": Variant(item=True, step="ungated"),
    "draft": Variant(item=True, step="gated"),
    "item-at-once": Variant(item=True, step="gated", whole_items=True),
}
SERVED = ("draft", "draft-plain")  # what a bundle carries: PAD-Rec, and the same draft without it


def feature_layers(num_layers: int) -> tuple[int, ...]:
    """A low, a middle and the last layer of the target."""
    return (num_layers // 4, num_layers // 2, num_layers - 1)


def new_draft(
    config: DraftConfig, vocabulary: Vocabulary, hidden_size: int, num_layers: int, variant: Variant
) -> DraftNetwork:
    """An untrained draft for a target of this size."""
    torch.manual_seed(config.seed)
    shape = DraftShape(
        hidden_size,
        config.num_heads,
        config.intermediate_size,
        vocabulary.num_slots,
        config.steps,
        feature_layers(num_layers) if variant.features else (num_layers - 1,),
        variant.item,
        variant.step,
        own_tokens=0 if variant.features else vocabulary.size,
        slots_at_once=vocabulary.num_levels if variant.whole_items else 0,
    )
    return DraftNetwork(shape)
