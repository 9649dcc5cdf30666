"""Teaches the target to write lists: its own best next items, ranked, become the lists it is fine-tuned on.

Next-item training alone makes a poor list writer: greedy decoding takes the most likely *cluster* of items first and
stays in it, while the most likely *items* lie in many. Beam search finds those. One round of fine-tuning on "history,
then its K most likely next items, best first" makes greedy decoding write what beam search finds, in one list, with
no item twice. Knows target, trie and histories; nothing of drafts.

Shapes: B histories, W beam width, L levels, K list items, C the largest codebook.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from model.config import FinetuneConfig
from model.data.batches import TokenBatch, shuffled_within_ties, token_layout
from model.data.histories import History
from model.decoding.draft_tree import attention_mask, legal_logits
from model.item_trie import ANY_NODE, Availability, ItemTrie
from model.kv_cache import Write
from model.semantic_id import Codes, Vocabulary
from model.target import Target
from model.train.fit import FitResult, fit
from model.train.target import token_loss

Tensor = torch.Tensor


def sampled_histories(
    users: Sequence[History], codes: Mapping[str, Codes], per_user: int, max_items: int, dropout: float, seed: int
) -> list[list[Codes]]:
    """Histories cut at random points, a few items left out."""
    rng = random.Random(seed)
    found = []
    for user in users:
        for _ in range(per_user):
            items = shuffled_within_ties(user, rng)
            cut = rng.randrange(1, len(items) + 1)
            kept = [i for i in items[:cut] if rng.random() >= dropout] or items[:1]
            found.append([codes[i] for i in kept[-max_items:]])
    return found


@torch.inference_mode()
def most_likely_items(
    target: Target, trie: ItemTrie, histories: Sequence[Sequence[Codes]], k: int, width: int
) -> list[list[Codes]]:
    """The k most likely next items of each history, best first, none of them in it, by beam search of `width`."""
    rows, levels = len(histories), trie.num_levels
    prompts = [target.vocabulary.prompt(history) for history in histories]
    longest = max(map(len, prompts))
    tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts])
    length = torch.tensor([len(p) for p in prompts])
    row = torch.arange(rows)[:, None]
    positions = torch.arange(longest).expand(rows, -1)
    target.reserve_positions(longest + levels * width)
    cache = target.new_cache(rows, longest + levels * width)
    output = target(tokens, positions, cache, Write(row, positions), None, longest)
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
        hidden = target(inputs, position, cache, at, attention_mask(length, sees, reach), reach).hidden
    best_first = zip(trie.leaf_start.take(node).tolist(), score.isfinite().tolist(), strict=True)
    return [
        [tuple(trie.sorted_codes[leaf].tolist()) for leaf, real in zip(found, legal, strict=True) if real][:k]
        for found, legal in best_first
    ]


def write_rankings(
    target: Target,
    trie: ItemTrie,
    histories: Sequence[Sequence[Codes]],
    config: FinetuneConfig,
    path: Path,
    tick: Callable[[], None] | None = None,
) -> int:
    """Rank for every history and save both as one tensor [X, H + K, L] (-1 pads the front). Returns X."""
    longest, k = max(map(len, histories)), config.list_items
    rows = []
    for begin in range(0, len(histories), 32):
        chunk = histories[begin : begin + 32]
        for history, ranked in zip(chunk, most_likely_items(target, trie, chunk, k, config.beam_width), strict=True):
            if len(ranked) == k:
                rows.append([(-1,) * trie.num_levels] * (longest - len(history)) + [*history, *ranked])
            if tick:
                tick()
    save_file({"items": torch.tensor(rows), "list_items": torch.tensor(k)}, path)
    return len(rows)


def ranking_batches(path: Path, vocabulary: Vocabulary, batch_size: int) -> list[TokenBatch]:
    """Batches whose labels are the ranked items alone."""
    saved = load_file(path)
    items, k = saved["items"], int(saved["list_items"])
    batches = []
    for begin in range(0, len(items), batch_size):
        chunk = items[begin : begin + batch_size].tolist()
        windows = [[tuple(codes) for codes in row if codes[0] >= 0] for row in chunk]
        tokens, padded, asked = token_layout(windows, vocabulary)
        labels = torch.zeros(*padded.shape, vocabulary.size)
        for row, window in enumerate(windows):
            place = torch.arange(len(window) - k, len(window))
            for level, offset in enumerate(vocabulary.level_offsets):
                labels[row, place, level, padded[row, place, level] + offset] = 1.0
        batches.append(TokenBatch(tokens, labels.flatten(1, 2), asked))
    return batches


def finetune(
    model: PreTrainedModel, folder: Path, rankings: Path, vocabulary: Vocabulary, config: FinetuneConfig
) -> FitResult:
    """Fine-tune `model` in place on the rankings in `rankings`/{train,validation}.safetensors."""
    training = ranking_batches(rankings / "train.safetensors", vocabulary, config.batch_size)
    validation = ranking_batches(rankings / "validation.safetensors", vocabulary, config.batch_size)

    def shuffled(epoch: int) -> list[TokenBatch]:
        return random.Random(config.seed * 1000 + epoch).sample(training, len(training))

    def validate() -> float:
        return sum(token_loss(model, batch).item() for batch in validation) / len(validation)

    return fit(model, shuffled, lambda batch: token_loss(model, batch), validate, config, folder, label="finetune")
