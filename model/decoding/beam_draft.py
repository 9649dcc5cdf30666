"""Drafts of beams: a small network searches ahead with beams of its own, level by level, and the target verifies.

`HeadDraft` is the PAD-Rec draft: it needs the target's features of the prompt, so it guesses after the prompt's pass,
from the first codes the target has chosen. `ModelDraft` is an independent small language model: it needs nothing of the
target and guesses before, so that its nodes ride in the prompt's own pass. Neither decides anything. A draft searches
once a request, at admission: its cache holds nothing between two searches.

Shapes: B rows, P prompt tokens at most, W draft beams a level, C children, N beams drafted a level, d hidden size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from model.decoding.beam_choice import Beams, ascending, best, joint_scores
from model.decoding.beam_relaxed import Luck, draw
from model.decoding.beam_tree import BeamTree
from model.draft.draft import Draft
from model.item_trie import Availability, Children
from model.kv_cache import KVCache, Sight, TreeSight, Write
from model.linear import PackedLinear
from model.native.beams import Drafted, Guess
from model.native.kernel import NativeLinear
from model.native.search import Searching
from model.native.tables import NativeCache
from model.target import Target

Tensor = torch.Tensor


class LevelHeads:
    """The head of each level alone: [..., codes of the level] logits, the same to the last bit as the whole head's."""

    def __init__(self, target: Target) -> None:
        self.dtype = target.head.weight.dtype
        ends = [*target.head_columns.tolist()[1:], target.num_item_tokens]
        kind = NativeLinear if isinstance(target.head, NativeLinear) else PackedLinear
        bounds = zip(target.head_columns.tolist(), ends, strict=True)
        self.heads = [kind(target.head.weight[low:high].contiguous()) for low, high in bounds]

    def __call__(self, level: int, hidden: Tensor, children: Children, code: Tensor) -> Tensor:
        """Logits [B, M, C] of `children` at `level` from `hidden` [B, M, d]; `code` is the trie's table."""
        logits = self.heads[level](hidden.flatten(0, 1).to(self.dtype)).float()
        return logits.view(*hidden.shape[:2], -1).gather(-1, code.take(children.nodes).long())


class Lot(NamedTuple):
    """How a relaxed request draws its draft beams."""

    seed: int
    replacement: bool


class Search(NamedTuple):
    """Where a search starts: the prompts' `tokens` [B, P] of `length` [B], what the rows `may` emit, the `beams` to
    start from at `level` (the root at level 0), how many beams each row keeps at a level (`widths` [B]), and a lot for
    each row that is relaxed."""

    tokens: Tensor
    length: Tensor
    may: Availability
    beams: Beams
    level: int
    widths: Sequence[int]
    lots: Sequence[Lot | None]


class HeadDraft:
    """Beams by the PAD-Rec draft."""

    rides_with_prompt = False

    def __init__(self, draft: Draft, target: Target, tree: BeamTree, num_rows: int, positions: int, width: int) -> None:
        """`positions`: the longest prompt; `width`: the most beams a search may start from or keep."""
        self.draft, self.tree = draft, tree
        self.heads = LevelHeads(target)
        self.cache = draft.new_cache(num_rows, positions + tree.trie.num_levels * width)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.draft.feature_layers

    def native(self, target: Target) -> Searching | None:
        """This draft as compiled code takes it, where that can run it."""
        draft, head = self.draft, target.head
        if draft.native is None or not isinstance(head, NativeLinear):
            return None
        return Searching(draft.native, NativeCache(self.cache, draft.rotations), head, draft.terms, draft.packed_fuse)

    def search(self, search: Search, levels: int, features: Sequence[Sequence[Tensor]]) -> list[Guess]:
        """Draft `levels` levels below the beams, which are first codes: a guess for each row. `features`: of each row,
        the target's layers [its tokens, d] over the prompt."""
        rows, device = len(search.tokens), search.tokens.device
        layers = (torch.nn.utils.rnn.pad_sequence(list(of), batch_first=True) for of in zip(*features, strict=True))
        fused = self.draft.fuse_features(tuple(layers))
        before = torch.cat([torch.zeros_like(fused[:, :1]), fused[:, :-1]], dim=1)
        row = torch.arange(rows, device=device)[:, None]
        positions = torch.arange(search.tokens.shape[1], device=device).expand(rows, -1)
        single = 0 if rows == 1 else None
        self.draft.read(search.tokens, before, positions, 0, self.cache, Write(row, positions, 0, single))
        last = fused[row[:, 0], search.length - 1]
        feature = last.unsqueeze(1).expand(-1, search.beams.nodes.shape[1], -1)
        start = search.length
        sees = torch.zeros(rows, 1, 0, dtype=torch.bool, device=device)
        parent = torch.zeros_like(search.beams.nodes)
        beams, found = search.beams, []
        for step in range(levels):
            width = beams.nodes.shape[1]
            if step:
                feature = feature.gather(1, parent.unsqueeze(-1).expand(-1, -1, feature.shape[-1]))
            own = torch.eye(width, dtype=torch.bool, device=device).expand(rows, -1, -1)
            above = sees.gather(1, parent.unsqueeze(-1).expand(-1, -1, sees.shape[-1]))
            stored = start[:, None] + sees.shape[-1] + torch.arange(width, device=device)
            sees = torch.cat([above, own], dim=-1)
            asked = torch.arange(width, device=device).expand(rows, -1)
            rotary = (start[:, None] + search.level - 1 + step).expand(-1, width)
            at = Write(row, stored, 0, int(stored[0, 0]) if rows == 1 and not stored.is_cuda else None)
            sight = Sight(start, sees, int(start.max()) + sees.shape[-1])
            tokens = self.tree.token.take(beams.nodes)
            feature = self.draft.ask(tokens, feature, rotary, step, self.cache, at, asked, sight)
            level = search.level + step
            drafted, beams, parent = _next_level(self.tree, self.heads, feature, search, beams, level)
            found.append(drafted)
        return _guesses(found, search.lots)


class ModelDraft:
    """Beams by a small language model over the same vocabulary."""

    rides_with_prompt = True
    feature_layers: tuple[int, ...] = ()

    def __init__(self, model: Target, tree: BeamTree, num_rows: int, positions: int, width: int) -> None:
        """As for `HeadDraft`."""
        self.model, self.tree = model, tree
        self.heads = LevelHeads(model)
        total = positions + tree.trie.num_levels * width
        model.reserve_positions(total)
        self.cache: KVCache = model.new_cache(num_rows, total)

    def native(self, target: Target) -> Searching | None:
        """As for `HeadDraft`."""
        del target
        model, head = self.model, self.model.head
        if model.native is None or not isinstance(head, NativeLinear):
            return None
        return Searching(model.native, NativeCache(self.cache, model.rotations), head)

    def search(self, search: Search, levels: int, features: Sequence[Sequence[Tensor]] = ()) -> list[Guess]:
        """Draft `levels` levels below the root: a guess for each row."""
        rows, device = len(search.tokens), search.tokens.device
        row = torch.arange(rows, device=device)[:, None]
        longest = search.tokens.shape[1]
        positions = torch.arange(longest, device=device).expand(rows, -1)
        at = Write(row, positions, 0, 0 if rows == 1 else None)
        hidden = self.model(search.tokens, positions, self.cache, at, Sight(None, None, longest)).hidden
        hidden = hidden[row, search.length[:, None] - 1]
        paths = torch.empty(rows, 1, 0, dtype=torch.int64, device=device)
        beams, used, found = search.beams, 0, []
        for level in range(levels):
            drafted, beams, parent = _next_level(self.tree, self.heads, hidden, search, beams, level)
            found.append(drafted)
            if level + 1 == levels:
                break
            width = beams.nodes.shape[1]
            slots = used + torch.arange(width, device=device).expand(rows, -1)
            above = paths.gather(1, parent.unsqueeze(-1).expand(-1, -1, paths.shape[-1]))
            paths = torch.cat([above, slots.unsqueeze(-1)], dim=-1)
            used += width
            stored = search.length[:, None] + slots
            rotary = (search.length[:, None] + level).expand(-1, width)
            sight = TreeSight(search.length[:, None].expand(-1, width), paths, longest + used)
            tokens = self.tree.token.take(beams.nodes)
            hidden = self.model(tokens, rotary, self.cache, Write(row, stored), sight).hidden
        return _guesses(found, search.lots)


def _guesses(levels: Sequence[tuple[Drafted, ...]], lots: Sequence[Lot | None]) -> list[Guess]:
    """What was found for each row, from what was at each level."""
    return [
        Guess(torch.cat([part.drawn for part in of]), len(of[-1].drawn), of if lot else ())
        for of, lot in zip(zip(*levels, strict=True), lots, strict=True)
    ]


def _next_level(
    tree: BeamTree, heads: LevelHeads, hidden: Tensor, search: Search, beams: Beams, level: int
) -> tuple[tuple[Drafted, ...], Beams, Tensor]:
    """What is drafted below `beams` at `level` for each row, the beams to go on from, and the place [B, W] of each
    one's parent."""
    trie = tree.trie
    children = trie.children(beams.nodes, search.may, widest=tree.widest[level])
    joint = joint_scores(heads(level, hidden, children, trie.code), children, beams.scores)
    nodes, flat = children.nodes.flatten(1), joint.flatten(1)
    chosen = best(flat, nodes, search.widths, tree)
    found = []
    kept, scores = chosen.nodes.clone(), chosen.scores.clone()
    for place, lot in enumerate(search.lots):
        legal = flat[place].isfinite()
        if lot is None or not bool(legal.any()):
            own = chosen.nodes[place]
            found.append(Drafted(nodes[:0, 0], flat[:0, 0], own[own != tree.nowhere]))
            continue
        # Among what is legal: luck must not depend on how wide the rest of the batch is.
        every, log_probs = nodes[place, legal], flat[place, legal]
        luck = Luck(lot.seed, level)
        drawn = draw(log_probs.cpu(), every.cpu(), search.widths[place], lot.replacement, luck).to(every.device)
        found.append(Drafted(every, log_probs, every[drawn]))
        distinct = drawn.unique()
        kept[place], scores[place] = tree.nowhere, float("-inf")
        kept[place, : len(distinct)], scores[place, : len(distinct)] = every[distinct], log_probs[distinct]
    chosen = ascending(kept, scores, tree)
    above = tree.parent.take(chosen.nodes)
    parent = torch.searchsorted(beams.nodes.contiguous(), above).clamp_(max=beams.nodes.shape[1] - 1)
    return tuple(found), chosen, parent
