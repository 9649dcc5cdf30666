"""The draft tree: the guessed continuations of one round, and the packing of runs into one pass.

A tree node is one choice and the forced run after it; the tree grows one choice deeper per draft step. A static tree
says for each slot where a row may stand which nodes there are, by rank among their siblings; a dynamic one keeps the
`width` best nodes of each step by the draft's own joint probability. The slot of a node is its depth in the item trie.
Legality is path-dependent: an item completed on the way to a node is illegal below it.
Knows nothing of verification or requests.

Shapes: B rows, W nodes a step, J steps, M = J W nodes, G = 1 + M groups (group 0 is the pending run, group 1 + m is
node m), Q = L + 1 tokens a run at most, C the largest codebook, d hidden size, n packed tokens.
"""

from typing import NamedTuple

import torch

from model.decoding.sampling import Sampling, noise, perturbed
from model.draft.draft import Draft
from model.item_trie import ANY_NODE, Availability, Children, ItemTrie
from model.kv_cache import KVCache, Sight, Write
from model.native.round import TreeTable
from model.target import Target

Tensor = torch.Tensor


class Root(NamedTuple):
    """Where a tree grows: `feature` [B, d] the draft's output at the last pending token, `node` [B] in the trie,
    `position` [B] of the next token, `remaining` [B] items the draft may still guess at (0: none), `sampling` how the
    rows draw (None: all greedy)."""

    feature: Tensor
    node: Tensor
    position: Tensor
    remaining: Tensor
    sampling: Sampling | None = None


class DraftTree(NamedTuple):
    """Nodes in order of steps: `tokens` [B, M, Q], `length` [B, M] (0: no node), `leaf` [B, M], `node` [B, M] trie
    node after the run, `parent` [B, M] group, `choice` [B, M] index among the parent's children, `slot` [B, M] of the
    choice, `start` [B, M] position of the first token, `sees` [B, G, G] group visibility (itself included), the
    `children` [B, G, C] of every group, and the `noise` [B, G, C] they are drawn with (None: all rows are greedy)."""

    tokens: Tensor
    length: Tensor
    leaf: Tensor
    node: Tensor
    parent: Tensor
    choice: Tensor
    slot: Tensor
    start: Tensor
    sees: Tensor
    children: Children
    noise: Tensor | None = None


class Unread(NamedTuple):
    """Runs that a step drafted and the draft has not read: `tokens` [B, W, Q], `length`, `start` [B, W], the `feature`
    [B, W, d] that chose each, and which `item` [B, W] of the round it belongs to, from 1."""

    tokens: Tensor
    length: Tensor
    start: Tensor
    feature: Tensor
    item: Tensor


class Packing(NamedTuple):
    """Runs side by side without gaps: `source` [B, n] places among the G*Q padded tokens, `valid` [B, n], `end` [B, G]
    packed place of each group's last token, `total` [B]."""

    source: Tensor
    valid: Tensor
    end: Tensor
    total: Tensor


def pack(length: Tensor, places: int, width: int | None = None) -> Packing:
    """Pack runs of `length` [B, G], each padded to `places` tokens, into n = `width`: the longest row's unless told."""
    rows, groups = length.shape
    stop = length.cumsum(1)
    total = stop[:, -1]
    width = int(total.max()) if width is None else width
    order = torch.arange(places, device=length.device)
    goes_to = (stop - length).unsqueeze(-1) + order
    goes_to = torch.where(order < length.unsqueeze(-1), goes_to, width).flatten(1)
    index = torch.zeros(rows, width + 1, dtype=torch.int64, device=length.device)
    index.scatter_(1, goes_to, torch.arange(groups * places, device=length.device).expand(rows, -1))
    valid = torch.arange(width, device=length.device) < total.unsqueeze(1)
    return Packing(index[:, :width], valid, (stop - 1).clamp_(min=0), total)


def write_at(positions: Tensor, *, static: bool = False) -> Write:
    """Where rows 0..B-1 store the tokens of a pass. With `static` shapes nothing is read from the positions."""
    rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
    if static:  # flattened once for all layers
        return Write(rows, positions, places=(rows.expand_as(positions).flatten(), positions.flatten()))
    return Write(rows, positions, 0, int(positions[0, 0]) if positions.shape[0] == 1 else None)


def legal_logits(target: Target, trie: ItemTrie, hidden: Tensor, children: Children) -> Tensor:
    """Logits [B, G, C] of the `children` of G nodes, -inf where not legal, from `hidden` [B, G, d]."""
    logits = target.item_logits(hidden).gather(-1, trie.column.take(children.nodes))
    return logits.masked_fill_(children.available <= 0, float("-inf"))


def grow(
    draft: Draft | None,
    target: Target,
    trie: ItemTrie,
    may: Availability,
    cache: KVCache | None,
    root: Root,
    steps: int,
    width: int,
    table: TreeTable | None = None,
    reach: int | None = None,
) -> DraftTree:
    """Draft `steps` choices deep: the trees of `table`, by the slot of each root, or without it the `width` best nodes
    a step. With steps = 0 the tree is empty but for the pending run's children. A row that samples is drafted with the
    noise the target will draw with. `reach` bounds the positions a step may look at, so that nothing has to be read
    from the device to find out (see `Sight.static`)."""
    rows, device, places = root.node.shape[0], root.node.device, trie.num_levels + 1
    feature, node = root.feature.unsqueeze(1), root.node.unsqueeze(1)
    position, remaining = root.position.unsqueeze(1), root.remaining.unsqueeze(1)
    path = torch.empty(rows, 1, 0, dtype=torch.int64, device=device)
    score = torch.zeros(rows, 1, device=device)
    sees = torch.eye(1 + steps * width, dtype=torch.bool, device=device).repeat(rows, 1, 1)
    sees[:, :, 0] = True
    group = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    windows, grown = [], []
    order = torch.arange(places, device=device)
    present: list[Tensor] = []
    unread: list[Unread] = []
    noises: list[Tensor] = []
    for step in range(steps):
        children = trie.children(node, may, path)
        windows.append(children)
        assert draft is not None and cache is not None, "drafting needs a draft"
        logits = guessed_logits(draft, target, trie, feature, node, children)
        if root.sampling:
            noises.append(noise(root.sampling, trie, node, children, path))
            logits = perturbed(logits, noises[-1], root.sampling)
        if table is None:
            parent, choice, score, valid = _best(logits, score, remaining > 0, width)
        else:
            at = trie.depth[root.node].long(), step
            parent, choice, valid = _ranked(logits, remaining > 0, table.parent[at].long(), table.rank[at].long())
        slot = trie.depth[node].gather(1, parent)
        chosen = children.nodes.flatten(1).gather(1, parent * logits.shape[-1] + choice)
        run = trie.run(chosen.masked_fill(~valid, ANY_NODE))
        length = run.length * valid
        leaf = torch.where(valid, run.leaf, trie.num_items)
        start = position.gather(1, parent)
        above = group.gather(1, parent)
        group = torch.arange(1 + step * width, 1 + step * width + width, device=device).expand(rows, -1)
        own = sees[:, 1 + step * width : 1 + step * width + width]
        own |= sees.gather(1, above.unsqueeze(-1).expand(-1, -1, sees.shape[-1]))
        grown.append((run.tokens, length, leaf, run.node, above, choice, slot, start))
        begun = (pick(path, parent) < trie.num_items).sum(-1)
        path = torch.cat([pick(path, parent), leaf.unsqueeze(-1)], dim=-1)
        remaining = torch.where(valid, remaining.gather(1, parent) - (leaf < trie.num_items).long(), 0)
        feature, node, position = pick(feature, parent), run.node, start + length
        present.append(order < length.unsqueeze(-1))
        unread.append(Unread(run.tokens, length, start, draft.wanted(feature, slot), begun + 1))
        ended = leaf < trie.num_items
        # A draft that guesses whole items is asked again where one has ended.
        if step + 1 < steps and (not draft.whole_items or reach is not None or bool(ended.any())):
            seen = own[:, :, 1 : 1 + (step + 1) * width].unsqueeze(-1) & torch.cat(present, 1).unsqueeze(1)
            seen = seen.flatten(2)
            read = _draft_step(draft, cache, root.position, unread, seen, step, reach)
            feature = torch.where(ended.unsqueeze(-1), read, feature) if draft.whole_items else read
            unread = []
    windows.append(trie.children(node, may, path))
    if root.sampling:
        noises.append(noise(root.sampling, trie, node, windows[-1], path))
    children = Children(*(torch.cat(parts, dim=1) for parts in zip(*windows, strict=True)))
    drawn_with = torch.cat(noises, dim=1) if noises else None
    if not grown:
        none = torch.empty(rows, 0, dtype=torch.int64, device=device)
        tokens = none.unsqueeze(-1).expand(rows, 0, places)
        return DraftTree(tokens, none, none, none, none, none, none, none, sees, children, drawn_with)
    tokens, length, leaf, node, above, choice, slot, start = (
        torch.cat(parts, dim=1) for parts in zip(*grown, strict=True)
    )
    return DraftTree(tokens, length, leaf, node, above, choice, slot, start, sees, children, drawn_with)


def guessed_logits(
    draft: Draft, target: Target, trie: ItemTrie, feature: Tensor, node: Tensor, children: Children
) -> Tensor:
    """The draft's logits [B, W, C] of the `children` of `node` [B, W], -inf where not legal, from its outputs."""
    if draft.by_node is None:
        return legal_logits(target, trie, draft.wanted(feature, trie.depth.take(node)), children)
    return draft.by_node.take(children.nodes).masked_fill_(children.available <= 0, float("-inf"))


def _best(logits: Tensor, score: Tensor, wanted: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """parent, choice, joint log-probability and validity, [B, W] each, of the best continuations of all parents."""
    if width == 1:
        best, choice = logits.max(-1)
        return torch.zeros_like(choice), choice, score, wanted & (best > float("-inf"))
    joint = torch.log_softmax(logits, -1) + score.unsqueeze(-1)
    joint = torch.where(wanted.unsqueeze(-1) & joint.isfinite(), joint, float("-inf")).flatten(1)
    top = joint.topk(width, dim=1)
    parent = top.indices // logits.shape[-1]
    return parent, top.indices % logits.shape[-1], top.values, top.values > float("-inf")


def _ranked(logits: Tensor, wanted: Tensor, parent: Tensor, rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """parent, choice and validity, [B, W] each: the child of `rank` [B, W] of each `parent` [B, W], by logit, ties to
    the lowest token."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    place = (parent * logits.shape[-1] + rank.clamp(0, logits.shape[-1] - 1)).clamp(min=0)
    choice = order.flatten(1).gather(1, place)
    logit = logits.flatten(1).gather(1, parent * logits.shape[-1] + choice)
    legal = (rank >= 0) & (rank < logits.shape[-1]) & (logit > float("-inf"))
    return parent, choice, legal & wanted.gather(1, parent)


def _draft_step(
    draft: Draft,
    cache: KVCache,
    committed: Tensor,
    unread: list[Unread],
    seen: Tensor,
    step: int,
    reach: int | None,
) -> Tensor:
    """The draft's outputs [B, W, ...] after the runs of step `step`, which is the last of those it has not read. All
    tokens of a run share the feature that chose it; the last one asks. `seen` [B, W, x] says which of the x guessed
    tokens so far (this step's included) each node sees."""
    static = reach is not None
    tokens, length, start, feature, item = (torch.cat(parts, dim=1) for parts in zip(*unread, strict=True))
    _, nodes, places = tokens.shape
    width, extra = nodes // len(unread), nodes * places
    order = torch.arange(places, device=length.device)
    positions = start.unsqueeze(-1) + order
    first = (step + 1) * width * places - extra
    stored = committed[:, None] + torch.arange(first, first + extra, device=length.device)
    features = feature.unsqueeze(2).expand(-1, -1, places, -1).flatten(1, 2)
    at = write_at(stored, static=static)
    last = (length[:, -width:] - 1).clamp(min=0) + torch.arange(extra, device=length.device)[-width * places :: places]
    sight = Sight(committed, seen, int(committed.max()) + first + extra if reach is None else reach, static)
    depth = item.repeat_interleave(places, dim=1) if draft.whole_items else step + 1
    return draft.ask(tokens.flatten(1), features, positions.flatten(1), depth, cache, at, last, sight)


def pick(values: Tensor, places: Tensor) -> Tensor:
    """values [B, x, y] at places [B, z]: [B, z, y]."""
    return values.gather(1, places.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
