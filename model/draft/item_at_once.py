"""ItemDraft: a draft that guesses all slots of the next item in one parallel pass.

After the last token read, one query per slot (the token's input plus an embedding of the slot asked for, and the draft
step's embedding through PAD-Rec's gate) looks at the draft's keys and values; the trie is walked with each slot's own
output. A step of this draft is an item, not a choice: whoever calls asks again where an item ends. Tokens of the n-th
item guessed in a round are read at step n. Plain torch over the network itself; nothing of it is compiled.

Shapes: B rows, n tokens, W tokens asked, L slots of an item that hold codes, d hidden size.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from model.draft.draft import Draft
from model.draft.network import DraftNetwork
from model.kv_cache import KVCache, Sight, Write, attention_mask
from model.layer import rotate
from model.semantic_id import Vocabulary

Tensor = torch.Tensor


class ItemDraft(Draft):
    """The same layer, asked for an item's slots side by side."""

    whole_items = True

    def __init__(self, network: DraftNetwork, embedding: Tensor, vocabulary: Vocabulary) -> None:
        super().__init__(network, embedding, vocabulary, native=False)
        self._embedding = network.tokens(embedding).detach().float()
        self._slots = torch.tensor([vocabulary.slot(token) for token in range(vocabulary.size)], device=self.device)

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
        """As `Draft.ask`, with the outputs of all slots side by side, [B, W, L d]. `step` counts items, and may be one
        per token [B, n]: that of the item a token belongs to."""
        network = self.network
        z = network.inputs(self._embedding[tokens], self._slots[tokens], features, step)
        keys, values = network.keys_values(z)
        rotation = self.rotations[positions]
        cache.write(0, at.compact(rotate(keys, rotation)), at.compact(values), at)
        if not asked.shape[1]:
            return features.new_empty(len(tokens), 0, features.shape[-1])
        assert sight.committed is not None
        own = sight.own if sight.own is not None else asked.new_zeros(*asked.shape, 0, dtype=torch.bool)
        mask = attention_mask(sight.committed, own, sight.reach, static=sight.static)
        own_z = z.gather(1, asked.unsqueeze(-1).expand(-1, -1, z.shape[-1]))
        wanting = network.asking(own_z, step if isinstance(step, int) else step.gather(1, asked))
        slots = wanting.shape[2]
        turn = rotation.flatten(2).gather(1, asked.unsqueeze(-1).expand(-1, -1, rotation[0, 0].numel()))
        query = rotate(network.queries(wanting), turn.view(*asked.shape, 1, 1, -1))
        seen_keys, seen_values = cache.read(0, len(tokens), sight.reach)
        attended = scaled_dot_product_attention(
            query.flatten(1, 2).transpose(1, 2), seen_keys, seen_values, attn_mask=mask.repeat_interleave(slots, dim=2)
        )
        return network.finish(wanting, attended.transpose(1, 2).reshape(query.shape)).flatten(2)

    def wanted(self, outputs: Tensor, slots: Tensor) -> Tensor:
        per_slot = outputs.view(*outputs.shape[:2], -1, self.network.shape.hidden_size)
        index = slots.long().clamp(max=per_slot.shape[2] - 1)[..., None, None]
        return per_slot.gather(2, index.expand(-1, -1, 1, per_slot.shape[-1])).squeeze(2)
