"""Trains a draft on lists the target wrote, unrolled over the draft steps it will take when serving.

At step 0 every token is read with the feature of the target it was chosen from. At step j the tokens of a run are read
with the draft's own output of step j-1, and a query sees the last j runs as the steps before left them, the rest as
step 0 did: exactly what serving does j choices deep (the idea of HASS and EAGLE-3, run by run). Labels are the
target's distributions over legal codes. Knows nothing of decoding.

Shapes: B lists, T tokens of prompt and list, U list tokens, D decisions, C largest codebook, d hidden size.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from model.config import DraftConfig
from model.draft.network import DraftNetwork
from model.layer import rotate
from model.semantic_id import Vocabulary
from model.train.fit import FitResult, fit
from model.train.lists import WrittenLists

Tensor = torch.Tensor


class DraftBatch(NamedTuple):
    """`tokens`, `slots` [B, T]; `partner` [B, T] position whose feature a token is read with (-1: none); `run` [B, T]
    decision a token follows from (-1: prompt); `asked` [B, D] position a decision is predicted from; `level` [B, D]
    (-1: none); `log_probs` [B, D, C]; `first` start of the list in every row (prompts are padded on the left with
    position -1); `positions` [B, T]; `features` [B, T, F]; `item` [B, D] of the list that a decision belongs to."""

    tokens: Tensor
    slots: Tensor
    partner: Tensor
    run: Tensor
    asked: Tensor
    level: Tensor
    log_probs: Tensor
    first: int
    positions: Tensor
    features: Tensor
    item: Tensor


def draft_batches(
    lists: WrittenLists, model: PreTrainedModel, vocabulary: Vocabulary, layers: Sequence[int], batch_size: int
) -> list[DraftBatch]:
    """All lists as batches, the target's features computed once (kept in half precision). Lists with about as many
    decisions share a batch: a third of the work would be padding."""
    batches, count = [], (lists.level >= 0).sum(1)
    for rows in count.argsort(stable=True).split(batch_size):
        most = int(count[rows].max())
        chosen = WrittenLists(
            lists.history[rows],
            lists.items[rows],
            *(values[rows, :most] for values in (lists.level, lists.item, lists.log_probs)),
        )
        batches.append(_batch(chosen, model, vocabulary, layers))
    return batches


@torch.no_grad()
def _batch(lists: WrittenLists, model: PreTrainedModel, vocabulary: Vocabulary, layers: Sequence[int]) -> DraftBatch:
    places, decisions = vocabulary.tokens_per_item, lists.level.shape[1]
    histories = [[tuple(c) for c in h if c[0] >= 0] for h in lists.history.tolist()]
    prompts = [vocabulary.list_prompt(h) for h in histories]
    first = max(map(len, prompts))
    offsets = torch.tensor([*vocabulary.level_offsets, vocabulary.list_separator])
    items = torch.cat([lists.items, torch.zeros_like(lists.items[..., :1])], dim=-1) + offsets
    rows, length = len(histories), first + items.shape[1] * places
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    tokens[:, first:] = items.flatten(1)
    pad = torch.tensor([first - len(p) for p in prompts])
    for row, prompt in enumerate(prompts):
        tokens[row, pad[row] : first] = torch.tensor(prompt)
    slots = torch.tensor([vocabulary.slot(token) for token in range(vocabulary.size)])[tokens]
    # Decision of each list token: the last one made at or before it.
    made_at = torch.where(lists.level >= 0, lists.item * places + lists.level, length)
    list_run = (made_at.unsqueeze(-1) <= torch.arange(length - first)).sum(1) - 1
    run = torch.cat([torch.full((rows, first), -1), list_run], dim=1)
    asked = (made_at + first - 1).clamp(max=length - 1)
    partner = torch.arange(-1, length - 1).repeat(rows, 1)
    partner[:, first:] = asked.gather(1, list_run)
    partner = torch.where(torch.arange(length) <= pad[:, None], -1, partner)
    positions = torch.arange(length) - pad[:, None]
    device = model.device
    output = model(
        input_ids=tokens.to(device),
        attention_mask=(positions >= 0).long().to(device),
        position_ids=positions.clamp(min=0).to(device),
        output_hidden_states=True,
        use_cache=False,
    )
    features = torch.cat([output.hidden_states[layer + 1] for layer in layers], dim=-1).nan_to_num().half()
    assert decisions == asked.shape[1], (decisions, asked.shape)
    batch = DraftBatch(
        tokens, slots, partner, run, asked, lists.level, lists.log_probs, first, positions, features, lists.item
    )
    tensors: dict[str, Any] = {n: v.to(device) for n, v in batch._asdict().items() if isinstance(v, Tensor)}
    return batch._replace(**tensors)


def unrolled_outputs(network: DraftNetwork, embedding: Tensor, batch: DraftBatch, steps: int) -> list[Tensor]:
    """Draft outputs [B, D, d] for every decision, at draft step 0, 1, ... steps-1. At step j the first j decisions of
    a list are not drafted that deep: their outputs mean nothing."""
    embedded, first, device = network.tokens(embedding)[batch.tokens], batch.first, embedding.device
    positions = batch.positions.clamp(min=0)
    rotations = network.rotations(int(positions.max()) + 1)
    z = committed_inputs(network, embedded, batch)
    stored = [_stored(network, z, rotations[positions])]
    decisions = torch.arange(batch.asked.shape[1], device=device)
    place = torch.arange(batch.tokens.shape[1], device=device)
    run = batch.run[:, first:]
    outputs: list[Tensor] = []
    for step in range(steps):
        if step:
            features = _at(outputs[-1], run)
            z_list = network.inputs(embedded[:, first:], batch.slots[:, first:], features, step)
            stored.append(_stored(network, z_list, rotations[positions[:, first:]]))
            z = torch.cat([z[:, :first], z_list], dim=1)
        reach = batch.asked.gather(1, (decisions - step).clamp(min=0).expand_as(batch.asked))
        visible = [(place <= reach.unsqueeze(-1)) & (batch.positions >= 0).unsqueeze(1)]
        for earlier in range(1, step + 1):
            visible.append(run.unsqueeze(1) == (decisions - 1 - (step - earlier))[:, None])
        query_at = rotations[positions.gather(1, batch.asked)]
        own = _at(z, batch.asked)
        query = rotate(network.queries(own), query_at).transpose(1, 2)
        keys, values = (torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(*stored, strict=True))
        mask = torch.cat(visible, dim=2).unsqueeze(1)
        attended = scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        outputs.append(network.finish(own, attended.transpose(1, 2)))
    return outputs


def committed_inputs(network: DraftNetwork, embedded: Tensor, batch: DraftBatch) -> Tensor:
    """z' [B, T, d] of all tokens as they are read once they are committed: with the target's features."""
    fused = network.fused(batch.features.float())
    partner = torch.where(batch.partner.unsqueeze(-1) >= 0, _at(fused, batch.partner.clamp(min=0)), 0.0)
    return network.inputs(embedded, batch.slots, partner, 0)


def draft_loss(
    network: DraftNetwork, embedding: Tensor, head: Tensor, columns: Tensor, batch: DraftBatch, config: DraftConfig
) -> Tensor:
    """Cross-entropy in nats of the draft against the target's legal distributions, step j weighted by decay^j."""
    total, weight, device = torch.zeros((), device=head.device), 0.0, head.device
    labels = batch.log_probs
    for step, output in enumerate(unrolled_outputs(network, embedding, batch, config.steps)):
        asked = (batch.level >= 0) & (torch.arange(labels.shape[1], device=device) >= step)
        losses = cross_entropy(output[asked], head, columns, batch.level[asked], labels[asked])
        total = total + config.step_loss_decay**step * losses.mean()
        weight += config.step_loss_decay**step
    return total / weight


def cross_entropy(output: Tensor, head: Tensor, columns: Tensor, level: Tensor, log_probs: Tensor) -> Tensor:
    """[N] nats, level by level, between `log_probs` [N, C], the target's over the codes of each one's `level` [N]
    (-inf: illegal), and what the outputs [N, d] say of them through the level's rows of `head` [S, d]."""
    found = []
    for index, (begin, end) in enumerate(pairwise([*columns.tolist(), len(head)])):
        rows = (level == index).nonzero()[:, 0]
        labels = log_probs[rows, : end - begin].float()
        legal = labels > float("-inf")
        logits = (output[rows] @ head[begin:end].t()).masked_fill(~legal, float("-inf"))
        log_q = torch.log_softmax(logits, dim=-1)
        found.append(-(labels.exp() * torch.where(legal, log_q, 0.0)).sum(-1))
    return torch.cat(found)


def train_draft(
    network: DraftNetwork,
    loss: Callable[[DraftBatch], Tensor],
    batches: list[DraftBatch],
    validation: list[DraftBatch],
    config: DraftConfig,
    folder: Path | None,
    label: str,
) -> FitResult:
    """Train in place on the mean of `loss` over a batch."""

    def shuffled(epoch: int) -> list[DraftBatch]:
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(config.seed * 1000 + epoch))
        return [batches[i] for i in order.tolist()]

    return fit(
        network,
        shuffled,
        loss,
        lambda: sum(loss(b).item() for b in validation) / len(validation),
        config,
        folder,
        label=label,
    )


def _stored(network: DraftNetwork, z: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = network.keys_values(z)
    return rotate(keys, rotation), values


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
