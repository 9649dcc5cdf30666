"""A bundle to measure where neither data set nor checkpoint is at hand: synthetic sessions, a target trained on them.

Items lie in clusters that share their first two codes; a session walks a latent Markov chain over the clusters and
takes an item from each, popular ones more often. So there is something to learn, at every level, and something that
stays uncertain; how often drafts are accepted is found out, not assumed. Target and drafts are trained with
`model.train`, on the device the model lies on, and saved as a bundle like any other. Needs torch, transformers,
safetensors and numpy.

Shapes: X sessions, I items a session, T tokens.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from model.bundle import save_manifest
from model.catalog import Catalog, CatalogItem
from model.config import DraftConfig, ListsConfig
from model.decoding.list_decoder import ListDecoder
from model.decoding.offline import decode_all
from model.decoding.profile import PROFILE_RANKS, measured_profile
from model.decoding.request import ListRequest
from model.decoding.topology import Budget, FixedBudget
from model.draft.draft import Draft
from model.item_trie import ItemTrie
from model.semantic_id import Vocabulary
from model.target import Target
from model.train.draft import DraftBatch, draft_batches, draft_loss, train_draft
from model.train.fit import fit
from model.train.lists import WrittenLists, write_lists
from model.train.variants import SERVED, VARIANTS, new_draft

Integers = npt.NDArray[np.int64]
LIST_ITEMS = 10
MAX_HISTORY_ITEMS = 20
NEXT = np.array([0.6, 0.3, 0.1])  # how likely a cluster's successors are, best first


@dataclass(frozen=True)
class Size:
    """How large everything is. `seconds`: for the target's training, at most."""

    codebook_sizes: tuple[int, ...]
    num_items: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    batch_size: int
    max_steps: int
    seconds: float
    num_lists: int
    draft_epochs: int
    held_out: int
    epsilon: float = 1e-6


# The shape of Qwen3-0.6B but for its vocabulary: 28 layers, 0.44 billion weights in them.
QWEN3 = Size((256, 128, 64, 8), 10_000, 1024, 3072, 28, 16, 8, 128, 128, 1500, 210, 1024, 12, 128)
TINY = Size((12, 8, 6, 4), 200, 32, 48, 3, 2, 1, 16, 16, 30, 20, 32, 2, 12)


class Sessions:
    """The world sessions come from: items with their codes, clusters, and which cluster follows which."""

    def __init__(self, size: Size, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.codes = _codes(size, rng)
        clusters, self._cluster = np.unique(self.codes[:, :2], axis=0, return_inverse=True)
        count = np.bincount(self._cluster)
        self._start, self._count = np.concatenate([[0], count.cumsum()[:-1]]), count
        # Half of the successors share the first code, so that it tells something of the second.
        anywhere = rng.integers(0, len(clusters), (len(clusters), len(NEXT)))
        near = np.arange(len(clusters))[:, None] + rng.integers(1, 6, anywhere.shape)
        self._next = np.where(rng.random(anywhere.shape) < 0.5, anywhere, near % len(clusters))

    def draw(self, count: int, length: int, rng: np.random.Generator) -> Integers:
        """[X, I] items of `count` sessions."""
        cluster = rng.integers(0, len(self._start), count)
        items = np.empty((count, length), dtype=np.int64)
        for step in range(length):
            for _ in range(3):  # what was seen is seldom seen again
                rank = np.minimum(rng.geometric(0.4, count) - 1, self._count[cluster] - 1)
                items[:, step] = self._start[cluster] + rank
                if not (items[:, :step] == items[:, step : step + 1]).any():
                    break
            cluster = self._next[cluster, rng.choice(len(NEXT), count, p=NEXT)]
        return items

    def catalog(self, codebook_sizes: tuple[int, ...]) -> Catalog:
        popularity = 1000 // (1 + np.arange(len(self.codes)) - self._start[self._cluster])
        made = zip(self.codes.tolist(), popularity.tolist(), strict=True)
        return Catalog(codebook_sizes, tuple(CatalogItem(str(i), tuple(c), p, {}) for i, (c, p) in enumerate(made)))


def _codes(size: Size, rng: np.random.Generator) -> Integers:
    """[N, L] distinct codes in ascending order: the first level even, those below uneven, the last a number that tells
    items apart which share the others."""
    *levels, last = size.codebook_sizes
    taken: dict[tuple[int, ...], int] = {}
    codes: list[tuple[int, ...]] = []
    while len(codes) < size.num_items:
        first = int(rng.integers(levels[0]))
        prefix = (first, *(int(min(n - 1, rng.zipf(1.5) - 1)) for n in levels[1:]))
        number = taken.get(prefix, 0)
        if number < last:
            taken[prefix] = number + 1
            codes.append((*prefix, number))
    return np.array(sorted(codes), dtype=np.int64)


def new_target(size: Size, vocabulary: Vocabulary) -> PreTrainedModel:
    """An untrained Qwen3 of this size."""
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=vocabulary.size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=size.head_size,
        rms_norm_eps=size.epsilon,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(shape)  # type: ignore[no-untyped-call]
    return model


def list_tokens(items: Integers, history: int, codes: Integers, vocabulary: Vocabulary) -> torch.Tensor:
    """[X, T] tokens of sessions [X, I]: a prompt of the first `history` items, and the rest as the list it asks for."""
    offsets = torch.tensor(vocabulary.level_offsets)
    table = torch.from_numpy(codes) + offsets
    watched = torch.nn.functional.pad(table, (0, 1), value=vocabulary.separator)
    listed = torch.nn.functional.pad(table, (0, 1), value=vocabulary.list_separator)
    session, rows = torch.from_numpy(items), len(items)
    parts = [
        torch.tensor(vocabulary.prompt_prefix).expand(rows, -1),
        watched[session[:, :history]].flatten(1),
        torch.full((rows, 1), vocabulary.list_separator),
        listed[session[:, history:]].flatten(1),
    ]
    return torch.cat(parts, dim=1)


def code_loss(model: PreTrainedModel, tokens: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """Mean cross-entropy in nats of the next token where that is a code: serving forces separators."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    following = tokens[:, 1:]
    is_code = torch.zeros(vocabulary.size, dtype=torch.bool)
    for offset, size in zip(vocabulary.level_offsets, vocabulary.codebook_sizes, strict=True):
        is_code[offset : offset + size] = True
    wanted = following.masked_fill(~is_code.to(tokens.device)[following], -100)
    return cross_entropy(logits.flatten(0, 1).float(), wanted.flatten())


@dataclass(frozen=True)
class Schedule:
    """What the training loop needs to know."""

    epochs: int = 1
    learning_rate: float = 4e-4
    weight_decay: float = 0.01
    warmup_fraction: float = 0.05


def train_target(
    model: PreTrainedModel, sessions: Sessions, size: Size, vocabulary: Vocabulary, say: Callable[[str], None]
) -> list[float]:
    """Train in place for as many steps as the time allows; validation losses in nats, before and after."""
    device = model.device
    rng, held_out = np.random.default_rng(1), np.random.default_rng(2)

    def batch(source: np.random.Generator) -> torch.Tensor:
        # One history length a batch: no padding, and every length is met.
        history = int(source.integers(1, MAX_HISTORY_ITEMS + 1))
        items = sessions.draw(size.batch_size, history + LIST_ITEMS, source)
        return list_tokens(items, history, sessions.codes, vocabulary)

    validation = [batch(held_out) for _ in range(4)]

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return code_loss(model, tokens.to(device), vocabulary)

    def validate() -> float:
        with torch.no_grad():
            return sum(loss(tokens).item() for tokens in validation) / len(validation)

    before = validate()
    longest = list_tokens(
        sessions.draw(size.batch_size, MAX_HISTORY_ITEMS + LIST_ITEMS, rng),
        MAX_HISTORY_ITEMS,
        sessions.codes,
        vocabulary,
    )
    for _ in range(3):  # the last of these is as slow as a step gets, the optimiser's part left out
        began = time.perf_counter()
        loss(longest).backward()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    steps = max(10, min(size.max_steps, int(size.seconds / (1.2 * seconds))))
    say(f"target: {steps} steps of {size.batch_size} sessions, about {1e3 * seconds:.0f} ms each")
    # Long ones in between, so that batches are made as they are needed and the loop sees how many there will be.
    batches = _Drawn(steps, lambda: batch(rng))
    result = fit(model, lambda epoch: batches, loss, validate, Schedule(), None, label="target")
    say(f"target: validation {before:.3f} -> {result.validation[-1]:.3f} nats a code")
    return [before, *result.validation]


class _Drawn(Sequence[torch.Tensor]):
    """So many batches, each made when its turn comes."""

    def __init__(self, count: int, make: Callable[[], torch.Tensor]) -> None:
        self.length, self.make = count, make

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        if index >= self.length:
            raise IndexError(index)
        return self.make()


def train_bundle(folder: Path, size: Size, device: str, say: Callable[[str], None]) -> None:
    """Train target and drafts, and write the bundle to `folder`, replacing what is there."""
    began = time.perf_counter()
    sessions, vocabulary = Sessions(size), Vocabulary.compact(size.codebook_sizes)
    building = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    catalog = sessions.catalog(size.codebook_sizes)
    catalog.save(building / "catalog.jsonl")
    model: Any = new_target(size, vocabulary)
    model = model.to(device)
    report: dict[str, Any] = {"name": "synthetic-sessions", "validation": {}}
    report["validation"]["target"] = train_target(model, sessions, size, vocabulary, say)
    # What is served is what the drafts learn from: on a GPU half precision.
    model = model.to(torch.bfloat16 if device == "cuda" else torch.float32).eval().requires_grad_(False)
    model.save_pretrained(building / "target")
    (building / "target" / "generation_config.json").unlink(missing_ok=True)
    target = Target(model, vocabulary, device)
    trie = ItemTrie(sessions.codes, vocabulary, device)
    asked = _requests(sessions, size.num_lists + size.held_out, 3)
    requests, held_out = asked[: size.num_lists], asked[size.num_lists :]
    report["held_out_histories"] = [[list(codes) for codes in request.history] for request in held_out]
    config = ListsConfig(list_items=LIST_ITEMS, batch_size=min(128, size.num_lists))
    lists = write_lists(target, trie, catalog, requests, config, MAX_HISTORY_ITEMS)
    say(f"lists: {len(lists.items)}, {time.perf_counter() - began:.0f} s so far")
    for name in SERVED:
        report["validation"][name], report[name] = _train_draft(
            building / name, target, trie, catalog, model, lists, held_out, size
        )
        say(f"{name}: {json.dumps(report[name])}, {time.perf_counter() - began:.0f} s so far")
    report["training_seconds"] = round(time.perf_counter() - began, 1)
    (building / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (building / "README.md").write_text(__doc__ or "")
    save_manifest(building, report["name"], vocabulary, MAX_HISTORY_ITEMS)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)


def _requests(sessions: Sessions, count: int, seed: int) -> list[ListRequest]:
    """Requests with histories of full length; items a session repeats are named once."""
    drawn = sessions.draw(count, MAX_HISTORY_ITEMS, np.random.default_rng(seed)).tolist()
    codes = [tuple(c) for c in sessions.codes.tolist()]
    histories = (tuple(codes[i] for i in dict.fromkeys(row)) for row in drawn)
    return [ListRequest(str(n), history, LIST_ITEMS) for n, history in enumerate(histories)]


def _train_draft(
    folder: Path,
    target: Target,
    trie: ItemTrie,
    catalog: Catalog,
    model: PreTrainedModel,
    lists: WrittenLists,
    held_out: Sequence[ListRequest],
    size: Size,
) -> tuple[tuple[float, ...], dict[str, Any]]:
    """Train and save a draft; validation losses, and what of it is accepted on the held-out sessions."""
    config = DraftConfig(
        num_heads=max(1, size.hidden_size // 128),
        intermediate_size=size.intermediate_size,
        epochs=size.draft_epochs,
        learning_rate=5e-4,
    )
    vocabulary = target.vocabulary
    variant = VARIANTS[folder.name]
    network = new_draft(config, vocabulary, target.hidden_size, target.num_layers, variant)
    network = network.to(target.device)
    batches = draft_batches(lists, model, vocabulary, network.shape.feature_layers, config.batch_size)
    # Batches come by how many decisions their lists hold: some of all kinds are kept back.
    kept, rest = batches[::16], [batch for n, batch in enumerate(batches) if n % 16] or batches
    frozen = (target.embedding.float(), target.head.weight, target.head_columns)

    def loss(batch: DraftBatch) -> torch.Tensor:
        return draft_loss(network, *frozen, batch, config)

    result = train_draft(network, loss, rest, kept, config, None, folder.name)
    network.save(folder)
    decoder = ListDecoder(
        target,
        Draft(network, target.embedding, vocabulary),
        trie,
        catalog,
        num_rows=min(32, len(held_out)),
        max_history_items=MAX_HISTORY_ITEMS,
        max_k=LIST_ITEMS,
        budget=FixedBudget(Budget(config.steps)),
    )
    decoded = decode_all(decoder, held_out)
    accepted = {
        "acceptance_length": round(decoded.acceptance_length, 3),
        "profile": measured_profile(decoder, held_out, config.steps, PROFILE_RANKS).as_dict(),
        "acceptance_by_slot": decoded.acceptance_by_slot(),
    }
    return result.validation, accepted
