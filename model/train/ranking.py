"""Teaches the target to write lists: its own ranking of the next items becomes the lists it is fine-tuned on.

Next-item training alone makes a poor list writer: every item it writes is read as if it had been watched, so the list
drifts away from the history, and greedy decoding takes the most likely *cluster* of items where the most likely
*items* lie in many. Beam search finds those. Fine-tuning on "history, list separator, then the items of that ranking"
with what is left of the ranking as label (distillation) makes greedy decoding write what beam search finds. The
history's own next-item labels stay in the loss, so that the ranking itself is not forgotten. The lists are written in
an order that wanders from the ranking's, another one each epoch: the target learns to go on after its own mistakes.
Knows target, trie and histories; nothing of drafts.

Shapes: X histories, H history items, B histories of a batch, W beam width, L levels, K list items.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from model.config import FinetuneConfig, TargetConfig
from model.data.batches import (
    TokenBatch,
    labels_from,
    padded_items,
    padded_tokens,
    questions,
    shuffled_within_ties,
    soon_labels,
)
from model.data.histories import History
from model.decoding.draft_tree import legal_logits
from model.item_trie import ANY_NODE, Availability, ItemTrie
from model.kv_cache import Sight, Write
from model.semantic_id import Codes, Vocabulary
from model.target import Target
from model.train.fit import FitResult, fit
from model.train.target import token_loss

Tensor = torch.Tensor


@dataclass(frozen=True)
class Rankings:
    """`history` [X, H, L] codes (-1 pads a short one, at its end), the items ranked for each, best first, `ranked`
    [X, W, L], and their `scores` [X, W], log-probabilities in nats (-inf: fewer items were found)."""

    history: Tensor
    ranked: Tensor
    scores: Tensor

    def save(self, path: Path) -> None:
        save_file(vars(self), path)

    @classmethod
    def load(cls, path: Path) -> "Rankings":
        return cls(**load_file(path))


def sampled_histories(
    users: Sequence[History], codes: Mapping[str, Codes], per_user: int, max_items: int, dropout: float, seed: int
) -> list[list[Codes]]:
    """Histories cut at random points behind what is known, a few items left out."""
    rng = random.Random(seed)
    found = []
    for user in users:
        for _ in range(per_user):
            items = shuffled_within_ties(user, rng)
            cut = rng.randrange(max(1, user.known), len(items) + 1)
            kept = [i for i in items[:cut] if rng.random() >= dropout] or items[:1]
            found.append([codes[i] for i in kept[-max_items:]])
    return found


@torch.inference_mode()
def most_likely_items(
    target: Target, trie: ItemTrie, histories: Sequence[Sequence[Codes]], k: int, width: int
) -> list[list[tuple[Codes, float]]]:
    """The k most likely next items of each history and their log-probabilities (nats), best first, none of them in
    the history, by beam search of `width`."""
    rows, levels = len(histories), trie.num_levels
    prompts = [target.vocabulary.prompt(history) for history in histories]
    longest = max(map(len, prompts))
    tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts])
    length = torch.tensor([len(p) for p in prompts])
    row = torch.arange(rows)[:, None]
    positions = torch.arange(longest).expand(rows, -1)
    target.reserve_positions(longest + levels * width)
    cache = target.new_cache(rows, longest + levels * width)
    output = target(tokens, positions, cache, Write(row, positions), Sight(None, None, longest))
    hidden = output.hidden.gather(1, (length - 1).view(-1, 1, 1).expand(-1, 1, output.hidden.shape[-1]))
    excluded = torch.full((rows, max(map(len, histories))), trie.num_items)
    for place, history in enumerate(histories):
        leaves = sorted({leaf for c in history if (leaf := trie.leaf(c)) is not None})
        excluded[place, : len(leaves)] = torch.tensor(leaves)
    may = Availability(trie.passing()[None], torch.zeros(rows, dtype=torch.int64), excluded)
    node, score = torch.zeros(rows, 1, dtype=torch.int64), torch.zeros(rows, 1)
    sees = torch.zeros(rows, 1, 0, dtype=torch.bool)
    for level in range(levels):
        children = trie.children(node, may)
        joint = torch.log_softmax(legal_logits(target, trie, hidden, children), -1) + score.unsqueeze(-1)
        joint = torch.where(joint.isfinite(), joint, float("-inf")).flatten(1)
        best = joint.topk(min(width, joint.shape[1]), dim=1)
        parent = best.indices // (joint.shape[1] // node.shape[1])
        score = best.values
        node = children.nodes.flatten(1).gather(1, best.indices).masked_fill(score == float("-inf"), ANY_NODE)
        if level == levels - 1:
            break
        own = torch.eye(node.shape[1], dtype=torch.bool).expand(rows, -1, -1)
        seen = sees.gather(1, parent.unsqueeze(-1).expand(-1, -1, sees.shape[-1]))
        stored = length[:, None] + sees.shape[-1] + torch.arange(node.shape[1])
        sees = torch.cat([seen, own], dim=-1)
        reach = longest + sees.shape[-1]
        inputs = target.vocabulary.level_offsets[level] + trie.code.take(node)
        at, position = Write(row, stored), (length + level)[:, None].expand_as(node)
        hidden = target(inputs, position, cache, at, Sight(length, sees, reach)).hidden
    best_first = zip(trie.leaf_start.take(node).tolist(), score.tolist(), strict=True)
    return [
        [
            (tuple(trie.sorted_codes[leaf].tolist()), value)
            for leaf, value in zip(found, values, strict=True)
            if value > float("-inf")
        ][:k]
        for found, values in best_first
    ]


def write_rankings(
    target: Target,
    trie: ItemTrie,
    histories: Sequence[Sequence[Codes]],
    config: FinetuneConfig,
    tick: Callable[[], None] | None = None,
) -> Rankings:
    """Rank the next items of every history; histories with fewer than `list_items` are left out."""
    width, kept, ranked, scores = config.beam_width, [], [], []
    for begin in range(0, len(histories), 32):
        chunk = histories[begin : begin + 32]
        for history, found in zip(chunk, most_likely_items(target, trie, chunk, width, width), strict=True):
            if len(found) >= config.list_items:
                missing = width - len(found)
                kept.append(history)
                ranked.append([codes for codes, _ in found] + [(0,) * trie.num_levels] * missing)
                scores.append([score for _, score in found] + [float("-inf")] * missing)
            if tick:
                tick()
    return Rankings(padded_items(kept), torch.tensor(ranked), torch.tensor(scores))


def ranking_batch(
    rankings: Rankings,
    rows: Sequence[int],
    vocabulary: Vocabulary,
    config: FinetuneConfig,
    soon: TargetConfig,
    rng: torch.Generator | None,
) -> TokenBatch:
    """The rows as list prompts and lists, written in the order of the ranking, or with `rng` in one drawn near it."""
    history, ranked, scores = (tensor[list(rows)] for tensor in vars(rankings).values())
    count, k = len(rows), config.list_items
    keys = scores
    if rng is not None:  # Gumbel noise: a draw without replacement from the softmax of score / temperature
        noise = torch.empty_like(scores).exponential_(generator=rng).log_().neg_()
        keys = scores / config.order_temperature + noise
    order = keys.argsort(dim=1, descending=True, stable=True)
    scores, ranked = scores.gather(1, order), ranked.gather(1, order.unsqueeze(-1).expand_as(ranked))
    histories = [[tuple(codes) for codes in window if codes[0] >= 0] for window in history.tolist()]
    lists = [[tuple(codes) for codes in window[:k]] for window in ranked.tolist()]
    prompts = [vocabulary.list_prompt(window) for window in histories]
    items = ([token for codes in window for token in vocabulary.list_item_tokens(codes)] for window in lists)
    tokens = padded_tokens([prompt + written for prompt, written in zip(prompts, items, strict=True)])
    asked = [
        questions(torch.full((count,), len(vocabulary.prompt_prefix)), history.shape[1], vocabulary),
        questions(torch.tensor(list(map(len, prompts))), k, vocabulary),
    ]
    # The label of a list item is the ranking less what has been written before it.
    left = torch.arange(scores.shape[1]) >= torch.arange(k)[:, None]
    shares = torch.softmax(scores / config.label_temperature, dim=1).unsqueeze(1) * left
    labels = [
        soon_labels(history, vocabulary, soon.soon_items, soon.soon_decay) * config.history_weight,
        labels_from(shares, ranked[:, :k], ranked, vocabulary),
    ]
    asked_at = torch.cat(asked, dim=1).clamp(max=tokens.shape[1] - 1)
    return TokenBatch(tokens, torch.cat(labels, dim=1).flatten(1, 2), asked_at)


def finetune(
    model: PreTrainedModel,
    folder: Path,
    rankings: Path,
    vocabulary: Vocabulary,
    config: FinetuneConfig,
    soon: TargetConfig,
) -> FitResult:
    """Fine-tune `model` in place on the rankings in `rankings`/{train,validation}.safetensors; `soon` says how the
    next-item labels of the histories were made."""
    training, validation = (Rankings.load(rankings / f"{part}.safetensors") for part in ("train", "validation"))
    size = config.batch_size

    def shuffled(epoch: int) -> list[tuple[list[int], int]]:
        """Rows of each batch, and the seed of its orders."""
        rows = random.Random(config.seed * 1000 + epoch).sample(range(len(training.scores)), len(training.scores))
        return [(rows[begin : begin + size], epoch * len(rows) + begin) for begin in range(0, len(rows), size)]

    def loss(batch: tuple[list[int], int]) -> Tensor:
        rows, seed = batch
        rng = torch.Generator().manual_seed(seed)
        return token_loss(model, ranking_batch(training, rows, vocabulary, config, soon, rng))

    def validate() -> float:
        chunks = [range(b, min(b + size, len(validation.scores))) for b in range(0, len(validation.scores), size)]
        losses = [token_loss(model, ranking_batch(validation, c, vocabulary, config, soon, None)) for c in chunks]
        return sum(value.item() for value in losses) / len(losses)

    return fit(model, shuffled, loss, validate, config, folder, label="finetune")
