"""Beam search as engines without tree attention do it: what `padrec bench beam` calls plain.

Every beam has a cache row of its own, which begins as a copy of its prompt's; at every level each beam reads its last
code, and rows are put in the order of the beams kept. A level is a pass, forced or not. The item constraint is the
trie's, in batches: plain means one level a pass, not slow masks. Knows the target and the trie; no drafts, no plans.

Shapes: B requests, W beams, C children, d hidden size.
"""

from collections.abc import Sequence

import torch

from model.data.batches import padded_tokens
from model.decoding.beam_choice import best, joint_scores
from model.decoding.beam_draft import LevelHeads
from model.decoding.beam_request import BeamRequest
from model.decoding.beam_tree import BeamTree
from model.item_trie import Availability, ItemTrie
from model.kv_cache import Sight, Write
from model.semantic_id import Codes
from model.target import Target

Tensor = torch.Tensor


class PlainBeams:
    """Plain beam search of equally wide requests without filters, a batch at a time."""

    def __init__(self, target: Target, trie: ItemTrie, batch: int, k: int, max_history_items: int) -> None:
        self.target, self.trie, self.k, self.max_history_items = target, trie, k, max_history_items
        self.tree, self.heads = BeamTree(trie), LevelHeads(target)
        longest = len(target.vocabulary.prompt(())) + max_history_items * target.vocabulary.tokens_per_item
        target.reserve_positions(longest + trie.num_levels)
        self.cache = target.new_cache(batch * k, longest + trie.num_levels)

    @torch.inference_mode()
    def decode(self, requests: Sequence[BeamRequest]) -> list[list[Codes]]:
        """The `k` most likely next items of each request, best first."""
        rows, k = len(requests), self.k
        prompts = [self.target.vocabulary.prompt(r.history[-self.max_history_items :]) for r in requests]
        tokens = padded_tokens(prompts)
        longest = tokens.shape[1]
        length = torch.tensor([len(p) for p in prompts])
        positions = torch.arange(longest).expand(rows, -1)
        at = Write(torch.arange(rows)[:, None] * k, positions, 0, 0 if rows == 1 else None)
        at = at if rows == 1 else at.without(positions >= length[:, None])
        hidden = self.target(tokens, positions, self.cache, at, Sight(None, None, longest)).hidden
        hidden = hidden.gather(1, (length - 1).view(-1, 1, 1).expand(-1, 1, hidden.shape[-1]))
        may = self._may(requests)
        nodes, scores = torch.zeros(rows, 1, dtype=torch.int64), torch.zeros(rows, 1)
        data = self.cache.data.unflatten(2, (-1, k))[:, :, :rows]
        for level in range(self.trie.num_levels):
            children = self.trie.children(nodes, may, widest=self.tree.widest[level])
            logits = self.heads(level, hidden, children, self.trie.code)
            joint = joint_scores(logits, children, scores)
            beams = best(joint.flatten(1), children.nodes.flatten(1), [k] * rows, self.tree)
            above = self.tree.parent.take(beams.nodes)
            parent = torch.searchsorted(nodes.contiguous(), above).clamp_(max=nodes.shape[1] - 1)
            nodes, scores = beams
            if level + 1 == self.trie.num_levels:
                break
            width, reach = nodes.shape[1], longest + level
            # Prompts are copied once, to the rows of all beams; then only what lies behind the shortest one moves.
            since = 0 if level == 0 else int(length.min())
            old = data[..., since:reach, :]
            index = parent.view(1, 1, rows, width, 1, 1, 1).expand(*old.shape[:3], width, *old.shape[4:])
            data[:, :, :, :width, :, since:reach] = old.gather(3, index)
            if level == 0 and width < k:
                data[:, :, :, width:, :, :reach] = data[:, :, :, :1, :, :reach]
            own = torch.arange(rows)[:, None] * k + torch.arange(width)
            stored = (length[:, None] + level).expand(-1, width).reshape(-1, 1)
            committed = stored[:, 0]
            inputs = self.tree.token.take(nodes).reshape(-1, 1)
            output = self.target(
                inputs, stored, self.cache, Write(own.reshape(-1, 1), stored), Sight(committed, None, reach + 1)
            )
            hidden = output.hidden.view(rows, width, -1)
        order = scores.sort(dim=1, descending=True, stable=True)
        leaves = (nodes.gather(1, order.indices) - self.trie.first_leaf).tolist()
        found = zip(leaves, order.values.tolist(), strict=True)
        return [
            [tuple(self.trie.sorted_codes[n].tolist()) for n, score in zip(*row, strict=True) if score > float("-inf")]
            for row in found
        ]

    def _may(self, requests: Sequence[BeamRequest]) -> Availability:
        banned = [{*r.exclude, *(r.history if r.exclude_history else ())} for r in requests]
        leaves = [sorted(leaf for c in gone if (leaf := self.trie.leaf(c)) is not None) for gone in banned]
        widest = max(1, *map(len, leaves))
        excluded = torch.tensor([found + [self.trie.num_items] * (widest - len(found)) for found in leaves])
        return Availability(self.trie.passing()[None], torch.zeros(len(requests), dtype=torch.int64), excluded)
