"""Trains the draft that guesses whole items, unrolled over the items of a round.

In pass 0 the list so far is read with the target's features, and every decision asks for itself and for those that
follow in its item. In pass p the tokens of an item are read with the outputs of pass p-1 that chose them, and the end
of the item asks for the whole next one; it sees the last p items as the passes before left them, the rest as pass 0
did. (Where a round begins inside an item, serving reads the rest of it with the outputs asked for from there; training
reads it with those asked for at the item's beginning.) Knows nothing of decoding.

Shapes: as in `model.train.draft`; I list items, L slots of an item that hold codes.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from model.config import DraftConfig
from model.draft.network import DraftNetwork
from model.layer import rotate
from model.train.draft import DraftBatch, committed_inputs, cross_entropy

Tensor = torch.Tensor


def decisions_of(batch: DraftBatch, items: int, levels: int) -> tuple[Tensor, Tensor]:
    """The decision [B, I, L] made at each slot of each list item (-1: forced), and each item's first decision
    [B, I]."""
    rows, count = batch.level.shape
    decision = torch.arange(count, device=batch.level.device).expand(rows, -1)
    made = torch.full((rows, items * levels + 1), -1, device=batch.level.device)
    place = torch.where(batch.level >= 0, batch.item * levels + batch.level, items * levels)
    made = made.scatter(1, place, decision)[:, :-1].unflatten(1, (items, levels))
    first = torch.where(made >= 0, made, count).amin(-1).clamp(max=count - 1)
    return made, first


def unrolled_slots(network: DraftNetwork, embedding: Tensor, batch: DraftBatch, passes: int) -> list[Tensor]:
    """Outputs of pass 0 [B, D, L, d], asked at every decision, and of each later pass [B, I, L, d], asked where the
    item before ends. In pass p the first p items are not reached: their outputs mean nothing."""
    first_token, levels, device = batch.first, network.shape.slots_at_once, embedding.device
    items = int(batch.item.max()) + 1
    embedded = network.tokens(embedding)[batch.tokens]
    positions = batch.positions.clamp(min=0)
    rotations = network.rotations(int(positions.max()) + 1)
    _, first = decisions_of(batch, items, levels)
    asked_first = batch.asked.gather(1, first)
    z = committed_inputs(network, embedded, batch)
    stored = [_stored(network, z, rotations[positions])]
    place = torch.arange(batch.tokens.shape[1], device=device)
    run = batch.run[:, first_token:]
    run_item, run_level = batch.item.gather(1, run), batch.level.gather(1, run)

    def ask(at: Tensor, inputs: Tensor, step: int, visible: list[Tensor]) -> Tensor:
        """[B, n, L, d] at positions `at` [B, n]."""
        wanting = network.asking(_rows(inputs, at), step)
        query = rotate(network.queries(wanting), rotations[positions.gather(1, at)].unsqueeze(2))
        keys, values = (torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(*stored, strict=True))
        mask = torch.cat(visible, dim=2).repeat_interleave(levels, dim=1).unsqueeze(1)
        attended = scaled_dot_product_attention(query.flatten(1, 2).transpose(1, 2), keys, values, attn_mask=mask)
        return network.finish(wanting, attended.transpose(1, 2).unflatten(1, (-1, levels)))

    real = (batch.positions >= 0).unsqueeze(1)
    outputs = [ask(batch.asked, z, 0, [(place <= batch.asked.unsqueeze(-1)) & real])]
    # What chose each item, slot by slot, when the round reached its beginning.
    chose = _rows(outputs[0].flatten(2), first).unflatten(2, (levels, -1))
    item = torch.arange(items, device=device)
    for step in range(1, passes):
        features = _rows(chose.flatten(1, 2), run_item.clamp(min=0) * levels + run_level.clamp(min=0))
        z_list = network.inputs(embedded[:, first_token:], batch.slots[:, first_token:], features, step)
        stored.append(_stored(network, z_list, rotations[positions[:, first_token:]]))
        begin = asked_first.gather(1, (item - step).clamp(min=0).expand_as(asked_first))
        visible = [(place <= begin.unsqueeze(-1)) & real]
        for earlier in range(1, step + 1):
            visible.append(run_item.unsqueeze(1) == (item - step + earlier - 1)[:, None])
        chose = ask(asked_first, torch.cat([z[:, :first_token], z_list], dim=1), step, visible)
        outputs.append(chose)
    return outputs


def item_loss(
    network: DraftNetwork, embedding: Tensor, head: Tensor, columns: Tensor, batch: DraftBatch, config: DraftConfig
) -> Tensor:
    """Cross-entropy in nats over all slots asked for, pass p weighted by decay^p."""
    levels, items = network.shape.slots_at_once, int(batch.item.max()) + 1
    passes = 1 + config.steps // 2  # an item takes at least two choices, or hardly more
    made, _ = decisions_of(batch, items, levels)
    device = head.device
    rows = torch.arange(len(batch.level), device=device)[:, None, None]
    total, weight = torch.zeros((), device=device), 0.0
    for step, output in enumerate(unrolled_slots(network, embedding, batch, passes)):
        if step:
            wanted = made.masked_fill(torch.arange(items, device=device)[:, None] < step, -1)
        else:
            wanted = made.gather(1, batch.item.clamp(min=0).unsqueeze(-1).expand(-1, -1, levels))
            # A decision asks for itself and what follows it in its item.
            wanted = torch.where(wanted >= torch.arange(batch.level.shape[1], device=device)[:, None], wanted, -1)
            wanted = wanted.masked_fill((batch.level < 0).unsqueeze(-1), -1)
        there = wanted >= 0
        if not bool(there.any()):
            continue
        row, decision = rows.expand_as(wanted)[there], wanted[there]
        level, log_probs = batch.level[row, decision], batch.log_probs[row, decision]
        losses = cross_entropy(output[there], head, columns, level, log_probs)
        total = total + config.step_loss_decay**step * losses.mean()
        weight += config.step_loss_decay**step
    return total / weight


def _stored(network: DraftNetwork, z: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = network.keys_values(z)
    return rotate(keys, rotation), values


def _rows(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
