"""Lists the target writes for training users under the serving constraints: the draft's training data.

Each list keeps its decisions (choices between at least two children of the trie) with the target's distribution over
the legal codes. Forced tokens carry nothing to learn. Knows the decoder; nothing of the draft.

Shapes: X lists, H history items, K list items, D decisions at most, C the largest codebook.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from model.catalog import Catalog
from model.config import ListsConfig
from model.data.batches import shuffled_within_ties
from model.data.histories import History
from model.decoding.list_decoder import ListDecoder
from model.decoding.offline import decode_all
from model.decoding.request import ListRequest
from model.decoding.topology import Budget, FixedBudget
from model.item_trie import Children, ItemTrie
from model.semantic_id import Codes
from model.target import Target

Tensor = torch.Tensor


@dataclass(frozen=True)
class WrittenLists:
    """`history` [X, H, L] and `items` [X, K, L] codes (-1 pads a short history, at its end), `level` [X, D] of each
    decision (-1: none), `item` [X, D] the list item it belongs to, `log_probs` [X, D, C] over codes, -inf illegal."""

    history: Tensor
    items: Tensor
    level: Tensor
    item: Tensor
    log_probs: Tensor

    def save(self, path: Path) -> None:
        save_file({k: v.contiguous() for k, v in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path) -> "WrittenLists":
        return cls(**load_file(path))


def training_requests(
    users: Sequence[History], codes: dict[str, Codes], config: ListsConfig, max_history_items: int, seed: int
) -> list[ListRequest]:
    """Requests at random points of the users' histories, behind what is known of them."""
    rng = random.Random(seed)
    requests = []
    for user in users:
        for number in range(config.lists_per_user):
            items = shuffled_within_ties(user, rng)
            cut = rng.randrange(max(1, user.known), len(items) + 1)
            history = tuple(codes[i] for i in items[max(0, cut - max_history_items) : cut])
            requests.append(ListRequest(f"{user.user_id}/{number}", history, config.list_items))
    return requests


def write_lists(
    target: Target,
    trie: ItemTrie,
    catalog: Catalog,
    requests: Sequence[ListRequest],
    config: ListsConfig,
    max_history_items: int,
    tick: Callable[[], None] | None = None,
) -> WrittenLists:
    """Let the target write the list of every request."""
    decisions: dict[str, list[tuple[int, Tensor]]] = {r.request_id: [] for r in requests}
    size = target.vocabulary.max_codebook_size

    def record(rows: Sequence[int], nodes: Tensor, log_probs: Tensor, children: Children) -> None:
        dense = log_probs.new_full((len(nodes), size), float("-inf"))
        dense.scatter_reduce_(1, trie.code[children.nodes[:, 0]].long(), log_probs[:, 0], "amax")
        depth, halved = trie.depth[nodes].tolist(), dense.half().cpu()
        for place, index in enumerate(rows):
            row = decoder.rows.held[index]
            if row is not None:
                decisions[row.request.request_id].append((depth[place], halved[place]))

    decoder = ListDecoder(
        target,
        None,
        trie,
        catalog,
        num_rows=config.batch_size,
        max_history_items=max_history_items,
        max_k=config.list_items,
        budget=FixedBudget(Budget(0)),
        record=record,
    )
    results = decode_all(decoder, requests, tick).results
    lists = {name: tuple(item.codes for item in result.items) for name, result in results.items()}
    complete = [r for r in requests if len(lists[r.request_id]) == config.list_items]
    return _tensors(complete, lists, decisions, max_history_items, size)


def _tensors(
    requests: Sequence[ListRequest],
    lists: dict[str, tuple[Codes, ...]],
    decisions: dict[str, list[tuple[int, Tensor]]],
    max_history_items: int,
    size: int,
) -> WrittenLists:
    levels = len(requests[0].history[0])
    longest = max(len(decisions[r.request_id]) for r in requests)
    history = torch.full((len(requests), max_history_items, levels), -1)
    items = torch.tensor([lists[r.request_id] for r in requests])
    level, item = torch.full((2, len(requests), longest), -1).unbind()
    log_probs = torch.full((len(requests), longest, size), float("-inf"), dtype=torch.float16)
    for x, request in enumerate(requests):
        history[x, : len(request.history)] = torch.tensor(request.history)
        started = -1
        for d, (depth, row) in enumerate(decisions[request.request_id]):
            started += depth == 0
            if started >= items.shape[1]:
                break
            level[x, d], item[x, d], log_probs[x, d] = depth, started, row
    return WrittenLists(history, items, level, item, log_probs)
