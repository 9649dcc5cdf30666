"""`padrec align RECIPE`: trains a draft to propose the beams the target keeps (AtSpeed, arXiv 2410.05165).

The teacher is the target's own beam search over training histories: its items, and its distribution after every prefix
of them. The loss is (1 - a) CE + a align, a = 0.7, where CE is that of the beams' own codes and align one of

    atspeed-s   reverse KL over the draft's K most likely codes, sum q (log q - log p), plus the density term p_K H(q),
                p_K the target's probability of the K-th of them: a level is accepted when all K beams were proposed
    atspeed-r   total variation, 1/2 sum |q - p|: a draw is kept with probability 1 - that
    word-kd     sum p (log p - log q)
    tvd-kd      total variation
    seq-kd      nothing: CE alone

The first two look at legal codes only (the children in the item trie); the three baselines of the paper at the whole
item vocabulary. Drafts: the PAD-Rec head, unrolled over the steps of one item as `model.decoding.beam_draft.HeadDraft`
takes them, and an independent small language model. Knows target, trie and histories; nothing of decoding beyond that.

Shapes: X histories, H history items, W beams, L levels, N beams of a batch, T tokens, S item tokens, D decisions of a
beam, d hidden size.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from model.config import AlignmentConfig, RecipeError, load_recipe, with_data
from model.data.batches import padded_items, padded_tokens
from model.data.movielens import DataError
from model.decoding.beam_tree import BeamTree
from model.draft.network import DraftNetwork
from model.item_trie import Availability, ItemTrie
from model.layer import rotate
from model.semantic_id import Codes, Vocabulary
from model.target import Target
from model.train.fit import FitResult, fit
from model.train.ranking import most_likely_items, sampled_histories
from model.train.run import Run, ticking

Tensor = torch.Tensor
Loss = Literal["atspeed-s", "atspeed-r", "word-kd", "tvd-kd", "seq-kd"]
Kind = Literal["padrec", "model"]
NOTHING = -1e30  # a log-probability that takes no part, and whose gradient is no NaN


@dataclass(frozen=True)
class TargetBeams:
    """`history` [X, H, L] codes (-1 pads a short one, at its end) and the target's best next `items` [X, W, L]."""

    history: Tensor
    items: Tensor

    def save(self, path: Path) -> None:
        save_file(vars(self), path)

    @classmethod
    def load(cls, path: Path) -> "TargetBeams":
        return cls(**load_file(path))


def write_target_beams(
    target: Target,
    trie: ItemTrie,
    histories: Sequence[Sequence[Codes]],
    width: int,
    tick: Callable[[], None] | None = None,
) -> TargetBeams:
    """The target's own beams of every history; histories with fewer than `width` are left out."""
    kept, items = [], []
    for begin in range(0, len(histories), 32):
        chunk = histories[begin : begin + 32]
        for history, found in zip(chunk, most_likely_items(target, trie, chunk, width, width), strict=True):
            if len(found) == width:
                kept.append(history)
                items.append([codes for codes, _ in found])
            if tick:
                tick()
    return TargetBeams(padded_items(kept), torch.tensor(items))


class AlignmentBatch(NamedTuple):
    """`tokens` [N, T]: prompts of `length` [N] and behind each all codes of a beam but the last; `codes` [N, L];
    `legal` [N, L, S] which item tokens may come at each level; the target's `logits` [N, L, S] there, and its
    `features` [N, T, F]."""

    tokens: Tensor
    length: Tensor
    codes: Tensor
    legal: Tensor
    logits: Tensor
    features: Tensor


class Teacher:
    """The target as it teaches: what it says after every prefix of its beams."""

    def __init__(self, model: PreTrainedModel, trie: ItemTrie, layers: Sequence[int]) -> None:
        """`layers`: whose outputs are the draft's features (none for an independent draft)."""
        self.model, self.trie, self.layers = model, trie, tuple(layers)
        self.tree, vocabulary = BeamTree(trie), trie.vocabulary
        levels = zip(vocabulary.level_offsets, vocabulary.codebook_sizes, strict=True)
        self.item_tokens = torch.cat([torch.arange(offset, offset + size) for offset, size in levels])
        self._may = Availability(
            trie.passing()[None], torch.zeros(1, dtype=torch.int64), torch.tensor([[trie.num_items]])
        )

    @torch.no_grad()
    def batch(self, beams: TargetBeams, rows: Sequence[int], places: Sequence[Sequence[int]]) -> AlignmentBatch:
        """The beams `places[i]` of each history `rows[i]`."""
        vocabulary, levels = self.trie.vocabulary, self.trie.num_levels
        prompts, items = [], []
        for row, chosen in zip(rows, places, strict=True):
            prompt = vocabulary.prompt(tuple(codes) for codes in beams.history[row].tolist() if codes[0] >= 0)
            prompts += [prompt] * len(chosen)
            items += beams.items[row, list(chosen)].tolist()
        codes = torch.tensor(items)
        offsets = torch.tensor(vocabulary.level_offsets)
        written = (codes + offsets)[:, :-1].tolist()
        tokens = padded_tokens([prompt + found for prompt, found in zip(prompts, written, strict=True)])
        length = torch.tensor([len(prompt) for prompt in prompts])
        # Padding is behind everything that is asked: causal attention never sees it.
        output = self.model(input_ids=tokens, output_hidden_states=bool(self.layers), use_cache=False)
        asked = decided_at(length, levels)
        logits = output.logits[torch.arange(len(tokens))[:, None], asked][..., self.item_tokens].float()
        features = tokens.new_empty(*tokens.shape, 0).float()
        if self.layers:
            features = torch.cat([output.hidden_states[layer + 1] for layer in self.layers], dim=-1)
        return AlignmentBatch(tokens, length, codes, self._legal(items), logits, features)

    def _legal(self, items: Sequence[Sequence[int]]) -> Tensor:
        """[N, L, S] the children of every prefix."""
        leaves = [self.trie.leaf(tuple(codes)) for codes in items]
        node = self.trie.first_leaf + torch.tensor(leaves)
        above = []
        for _ in range(self.trie.num_levels):
            node = self.tree.parent.take(node)
            above.append(node)
        children = self.trie.children(torch.stack(above[::-1], dim=1).flatten()[None], self._may)
        legal = torch.zeros(children.nodes.shape[1], len(self.item_tokens), dtype=torch.int8)
        there = (children.available[0] > 0).to(torch.int8)
        legal.scatter_reduce_(1, self.trie.column.take(children.nodes[0]), there, "amax")
        return legal.bool().view(len(items), self.trie.num_levels, -1)


def decided_at(length: Tensor, levels: int) -> Tensor:
    """[N, L] the places whose outputs decide each level, behind prompts of `length` [N]."""
    return length[:, None] - 1 + torch.arange(levels)


def head_logits(
    network: DraftNetwork, embedding: Tensor, head: Tensor, batch: AlignmentBatch, vocabulary: Vocabulary
) -> Tensor:
    """The PAD-Rec head's logits [N, L - 1, S] for the levels after the first, which the target decides itself: code j
    is read at draft step j with the output that chose it (the first with the target's feature at the prompt's end) and
    sees the prompt as step 0 left it and the codes before it."""
    rows, place = torch.arange(len(batch.tokens)), torch.arange(batch.tokens.shape[1])
    slots = torch.tensor([vocabulary.slot(token) for token in range(vocabulary.size)])[batch.tokens]
    embedded, rotations = embedding[batch.tokens], network.rotations(batch.tokens.shape[1])
    assert network.features is not None, "an independent draft has no feature of the target"
    fused = network.features(batch.features)
    partner = torch.cat([torch.zeros_like(fused[:, :1]), fused[:, :-1]], dim=1)
    keys, values = network.keys_values(network.inputs(embedded, slots, partner, 0))
    stored = [(rotate(keys, rotations[place]), values)]
    seen = [place < batch.length[:, None]]
    feature, outputs = fused[rows, batch.length - 1], []
    for step in range(batch.codes.shape[1] - 1):
        at = batch.length + step
        z = network.inputs(embedded[rows, at], slots[rows, at], feature, step).unsqueeze(1)
        keys, values = network.keys_values(z)
        turn = rotations[at].unsqueeze(1)
        stored.append((rotate(keys, turn), values))
        seen.append(torch.ones(len(rows), 1, dtype=torch.bool))
        query = rotate(network.queries(z), turn).transpose(1, 2)
        all_keys, all_values = (torch.cat(parts, dim=1).transpose(1, 2) for parts in zip(*stored, strict=True))
        mask = torch.cat(seen, dim=1)[:, None, None]
        attended = scaled_dot_product_attention(query, all_keys, all_values, attn_mask=mask).transpose(1, 2)
        feature = network.finish(z, attended)[:, 0]
        outputs.append(feature @ head.t())
    return torch.stack(outputs, dim=1)


def alignment_loss(
    loss: Loss, p_logits: Tensor, q_logits: Tensor, legal: Tensor, labels: Tensor, weight: float, top: int
) -> Tensor:
    """Mean over decisions, in nats: `p_logits`, `q_logits`, `legal` [N, D, S], `labels` [N, D] columns among the S.
    Decisions that are forced teach nothing and are left out."""
    constrained = loss in ("atspeed-s", "atspeed-r")
    asked = legal.sum(-1) > 1
    considered = legal[asked] if constrained else torch.ones_like(legal[asked])
    log_p, log_q = (
        torch.log_softmax(logits[asked].masked_fill(~considered, NOTHING), dim=-1) for logits in (p_logits, q_logits)
    )
    cross_entropy = -log_q.gather(-1, labels[asked].unsqueeze(-1))[:, 0]
    if loss == "seq-kd":
        return cross_entropy.mean()
    p, q = log_p.exp(), log_q.exp()
    if loss == "atspeed-s":
        align = _reverse_kl_and_density(log_p, log_q, considered, top)
    elif loss == "word-kd":
        align = (p * (log_p - log_q)).sum(-1)
    else:
        align = (q - p).abs().sum(-1) / 2
    return ((1 - weight) * cross_entropy + weight * align).mean()


def _reverse_kl_and_density(log_p: Tensor, log_q: Tensor, legal: Tensor, top: int) -> Tensor:
    """[n] over the draft's `top` most likely legal codes (all of them, where there are fewer)."""
    best, places = log_q.topk(min(top, log_q.shape[-1]), dim=-1)
    there, wanted = legal.gather(-1, places), log_p.gather(-1, places)
    best, wanted = best.masked_fill(~there, 0.0), wanted.masked_fill(~there, 0.0)
    share = best.exp() * there
    last = there.sum(-1, keepdim=True) - 1
    entropy = -(share * best).sum(-1)
    return (share * (best - wanted)).sum(-1) + wanted.gather(-1, last)[:, 0].exp() * entropy


def small_model(config: AlignmentConfig, vocabulary: Vocabulary, max_positions: int) -> PreTrainedModel:
    """An untrained independent draft."""
    torch.manual_seed(config.seed)
    shape = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=max_positions,
        pad_token_id=0,
        bos_token_id=vocabulary.prompt_prefix[0],
        eos_token_id=vocabulary.separator,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(shape)  # type: ignore[no-untyped-call]
    return model


def align(
    draft: DraftNetwork | PreTrainedModel,
    teacher: Teacher,
    target: Target,
    training: TargetBeams,
    validation: TargetBeams,
    loss: Loss,
    config: AlignmentConfig,
    folder: Path,
) -> FitResult:
    """Train `draft` in place."""
    vocabulary, columns = teacher.trie.vocabulary, target.head_columns

    def chunks(beams: TargetBeams, seed: int) -> list[tuple[list[int], list[list[int]]]]:
        rng = random.Random(seed)
        rows = rng.sample(range(len(beams.items)), len(beams.items))
        width, count = beams.items.shape[1], min(config.beams_per_history, beams.items.shape[1])
        places = [rng.sample(range(width), count) for _ in rows]
        size = config.batch_size
        return [(rows[b : b + size], places[b : b + size]) for b in range(0, len(rows), size)]

    def of(beams: TargetBeams, chunk: tuple[list[int], list[list[int]]]) -> Tensor:
        batch = teacher.batch(beams, *chunk)
        labels = batch.codes + columns
        if isinstance(draft, DraftNetwork):
            q = head_logits(draft, target.embedding, target.head.weight, batch, vocabulary)
            p, legal, labels = batch.logits[:, 1:], batch.legal[:, 1:], labels[:, 1:]
        else:
            output = draft(input_ids=batch.tokens, use_cache=False).logits
            asked = decided_at(batch.length, batch.codes.shape[1])
            q = output[torch.arange(len(asked))[:, None], asked][..., teacher.item_tokens]
            p, legal = batch.logits, batch.legal
        return alignment_loss(loss, p, q, legal, labels, config.weight, config.top)

    return fit(
        draft,
        lambda epoch: chunks(training, config.seed * 1000 + epoch),
        lambda chunk: of(training, chunk),
        lambda: sum(values := [of(validation, chunk).item() for chunk in chunks(validation, 0)]) / len(values),
        config,
        folder,
        label=f"align {loss}",
    )


def run_alignment(run: Run, kind: Kind, loss: Loss) -> dict[str, Any]:
    """The stages `beams` and `align-<draft>-<loss>` of a run whose target (and PAD-Rec draft) are trained."""
    config, limit = run.recipe.alignment, run.recipe.target.max_history_items
    beams = run.folder / "beams"
    beams.mkdir(exist_ok=True)
    for name, users in (("train", run.split.train), ("validation", run.split.validation)):
        path = beams / f"{name}.safetensors"
        if not path.exists():
            histories = sampled_histories(
                users, run.codes, config.histories_per_user, limit, config.item_dropout, config.seed
            )
            with ticking(f"beams {name}", len(histories)) as tick:
                found = write_target_beams(run.target, run.trie, histories, config.beam_width, tick)
            found.save(path)
    training, validation = (TargetBeams.load(beams / f"{name}.safetensors") for name in ("train", "validation"))
    folder = run.folder / f"align-{kind}-{loss}"
    folder.mkdir(exist_ok=True)
    network: DraftNetwork | PreTrainedModel
    if kind == "padrec":
        network = DraftNetwork.load(run.folder / "draft" / "network")
        teacher = Teacher(run.model, run.trie, network.shape.feature_layers)
    else:
        network = small_model(config, run.vocabulary, 2048)
        teacher = Teacher(run.model, run.trie, ())
    result = align(network, teacher, run.target, training, validation, loss, config, folder)
    if isinstance(network, DraftNetwork):
        network.save(folder / "network")
    else:
        network.save_pretrained(folder / "checkpoint")
    report = {"draft": kind, "loss": loss, "validation": result.validation, "best_epoch": result.best_epoch}
    (folder / "done.json").write_text(json.dumps(report, indent=1))
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """`padrec align RECIPE`. Exit code 2: bad recipe or data, or a run that is not trained yet."""
    parser = argparse.ArgumentParser(prog="padrec align", description="Align a draft with the target's beams.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where `padrec train` left its stages")
    parser.add_argument("--data", type=Path, default=None, help="where the data lies (default: what the recipe says)")
    parser.add_argument("--draft", choices=get_args(Kind), default="padrec")
    parser.add_argument("--loss", choices=get_args(Loss), default="atspeed-s")
    options = parser.parse_args(argv)
    try:
        recipe = with_data(load_recipe(options.recipe), options.data)
        report = run_alignment(Run(recipe, options.runs / recipe.name), options.draft, options.loss)
    except (RecipeError, DataError, OSError, ValueError) as exc:
        print(f"padrec align: {exc}", file=sys.stderr)  # noqa: T201 - a command's answer
        return 2
    print(json.dumps(report))  # noqa: T201
    return 0
