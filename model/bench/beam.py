"""`padrec bench beam`: the K most likely next items by every plan, timed, and compared with the slow twin.

Plans run interleaved in one process on the same requests: plain (a cache row a beam, a pass a level), tree-attention
(beams share their prompt, forced levels are free), draft-free (whole sub-trees ride along), atspeed-s and atspeed-r
(the draft guesses every level; strict and relaxed), planner (the cheapest by measured costs). The prompt's pass is part
of every time. What relaxed verification costs in recall, NDCG and overlap stands beside its speed. Knows a target, its
trie, a catalog, a draft and held-out cases, wherever they come from; no sockets.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from model.bench.beam_plain import PlainBeams
from model.bench.beam_plot import plot
from model.bench.decode import NEAR_TIES, held_out_items, machine
from model.bench.peers.item_prefixes import ItemPrefixes
from model.bundle import Bundle, BundleError, load_bundle
from model.catalog import Catalog
from model.config import RecipeError, load_recipe, with_data
from model.data.histories import last_cases
from model.data.movielens import DataError
from model.decoding.beam_decoder import BeamDecoder
from model.decoding.beam_measure import measured_plan
from model.decoding.beam_plan import ATSPEED, DRAFT_FREE, TREE_ATTENTION, Plan
from model.decoding.beam_request import BeamRequest, BeamResult
from model.decoding.beam_twin import BeamTwin
from model.draft.draft import Draft
from model.draft.network import DraftNetwork
from model.item_trie import ItemTrie
from model.semantic_id import Codes
from model.target import Target
from model.train.run import Run

Record = dict[str, Any]
ML_100K = Path(".data/ml-100k")
PLANS = ("plain", "tree-attention", "draft-free", "atspeed-s", "atspeed-r", "planner")


@dataclass(frozen=True)
class Case:
    """A held-out question: the `history` of a user, and the item that came `next`."""

    user_id: str
    history: tuple[Codes, ...]
    next: Codes


@dataclass(frozen=True)
class Subject:
    """What is measured. `checkpoint`: the target as `transformers` reads it, to compare with its beam search.
    `replacement`: how relaxed requests draw."""

    data: str
    target: Target
    trie: ItemTrie
    catalog: Catalog
    draft: Draft | Target | None
    max_history_items: int
    cases: tuple[Case, ...]
    checkpoint: Path
    replacement: bool = False

    def first(self, users: int) -> "Subject":
        """The same with the first cases alone (0: all)."""
        return replace(self, cases=self.cases[:users] if users else self.cases)

    def requests(self, k: int, relaxed: bool = False) -> list[BeamRequest]:
        strict = [BeamRequest(str(n), case.history, k) for n, case in enumerate(self.cases)]
        if not relaxed:
            return strict
        drawn = replace(strict[0], verification="relaxed", replacement=self.replacement)
        return [replace(drawn, request_id=r.request_id, history=r.history, seed=n) for n, r in enumerate(strict)]

    def decoder(self, plan: Plan, batch: int, k: int, draft: Draft | Target | None = None) -> BeamDecoder:
        return BeamDecoder(
            self.target,
            self.trie,
            self.catalog,
            num_rows=batch,
            max_history_items=self.max_history_items,
            max_k=k,
            plan=plan,
            draft=draft,
        )


def of_bundle(bundle: Bundle, folder: Path, data: Path) -> Subject:
    """A bundle and its held-out MovieLens users: everything but the last ten items, and then the next one. Raises
    DataError."""
    cases = tuple(Case(name, tuple(found[:-10]), found[-10]) for name, found in held_out_items(bundle, data).items())
    return Subject(
        bundle.info.name,
        bundle.target,
        bundle.trie,
        bundle.catalog,
        bundle.draft,
        bundle.info.max_history_items,
        cases,
        folder / "target",
    )


def of_run(run: Run) -> Subject:
    """A training run whose stages are done, and the last case of each of its held-out users."""
    codes = run.codes
    asked = last_cases(run.split.test, run.recipe.data)
    found = [Case(c.user_id, tuple(codes[i] for i in c.history), codes[c.future[0]]) for c in asked]
    network = DraftNetwork.load(run.folder / "draft" / "network")
    return Subject(
        run.recipe.name,
        run.target,
        run.trie,
        run.catalog,
        Draft(network, run.target.embedding, run.vocabulary),
        run.recipe.target.max_history_items,
        tuple(found),
        run.folder / "finetune" / "checkpoint",
    )


def aligned_draft(target: Target, folder: Path) -> Draft | Target:
    """What `padrec align` left in a folder: a PAD-Rec head, or a small language model."""
    if (folder / "network").exists():
        return Draft(DraftNetwork.load(folder / "network"), target.embedding, target.vocabulary)
    return Target.load(folder / "checkpoint", target.vocabulary)


def twins_of(subject: Subject, k: int) -> dict[str, tuple[BeamResult, float]]:
    """The slow twin's answer to every request, and how near its nearest decision was to another one (nats)."""
    twin = BeamTwin(subject.target, [item.codes for item in subject.catalog.items], subject.max_history_items)
    return {request.request_id: (twin.decode(request), twin.margin) for request in subject.requests(k)}


def run(decoder: BeamDecoder, requests: Sequence[BeamRequest]) -> dict[str, BeamResult]:
    """Decode in order, rows always full."""
    results: dict[str, BeamResult] = {}
    waiting = list(requests)
    while len(results) < len(requests):
        entering, waiting = waiting[: decoder.rows.num_free], waiting[decoder.rows.num_free :]
        finished = decoder.admit(entering) if entering else []
        if decoder.rows.in_use:
            finished += decoder.round()[0]
        results |= {result.request_id: result for result in finished}
    return results


def quality(subject: Subject, items: Sequence[Sequence[Codes]]) -> tuple[float, float]:
    """Recall and NDCG of the next item, means over cases."""
    ranks = [
        list(found).index(case.next) if case.next in found else None
        for case, found in zip(subject.cases, items, strict=True)
    ]
    hits = [rank for rank in ranks if rank is not None]
    return len(hits) / len(ranks), sum(1 / math.log2(rank + 2) for rank in hits) / len(ranks)


def compared(items: Sequence[Sequence[Codes]], twins: dict[str, tuple[BeamResult, float]], exact: bool) -> Record:
    """How the answers compare with the twin's: identical ones, near-ties, mismatches (strict plans have none)."""
    counts = {"near_ties": 0, "mismatches": 0}
    identical = 0
    for place, found in enumerate(items):
        result, margin = twins[str(place)]
        same = list(found) == [item.codes for item in result.items]
        identical += same
        if exact and not same:
            counts["near_ties" if margin < NEAR_TIES[torch.float32] else "mismatches"] += 1
    return {"identical": identical / len(items), **counts}


def judged(subject: Subject, items: Sequence[Sequence[Codes]], exact: Sequence[Sequence[Codes]]) -> Record:
    """Quality of answers, and what they lost against the `exact` ones."""
    (recall, ndcg), (exact_recall, exact_ndcg) = quality(subject, items), quality(subject, exact)
    pairs = zip(items, exact, strict=True)
    return {
        "judged": len(items),
        "overlap": round(statistics.mean(len({*found} & {*right}) / max(1, len(right)) for found, right in pairs), 4),
        "recall": round(recall, 4),
        "ndcg": round(ndcg, 4),
        "recall_lost": round(exact_recall - recall, 4),
        "ndcg_lost": round(exact_ndcg - ndcg, 4),
    }


def bench_beam(
    subject: Subject,
    ks: Sequence[int],
    batches: Sequence[int],
    repeats: int,
    say: Callable[[str], None],
    everybody: Subject | None = None,
) -> list[Record]:
    """Medians of interleaved repeats, per K, batch and plan. Quality is over `everybody` (default: those timed): it
    needs more users than times do, and no twin."""
    records = []
    plans = [p for p in PLANS if subject.draft is not None or not p.startswith("atspeed")]
    twins, judgements = {}, {}
    for k in ks:
        say(f"the slow twin's answers at K = {k}")
        twins[k] = twins_of(subject, k)
        judgements[k] = _judgements(everybody or subject, k)
    for batch in batches:
        alone = subject.decoder(TREE_ATTENTION, batch, max(ks))
        drafting = subject.decoder(ATSPEED, batch, max(ks), subject.draft)
        planner = measured_plan(drafting, subject.requests(1)[:8])
        for k in ks:
            plain = PlainBeams(subject.target, subject.trie, batch, k, subject.max_history_items)
            ways = _ways(subject, k, batch, plain, alone, drafting, planner)
            seconds: dict[str, list[float]] = {name: [] for name in plans}
            found = {}
            for turn in range(repeats + 1):
                for name in plans:
                    started = time.perf_counter()
                    found[name] = ways[name]()
                    if turn:  # the first one warms up
                        seconds[name].append((time.perf_counter() - started) / len(subject.cases))
            for name in plans:
                told = _told(subject, name, found[name])
                record = {
                    "data": subject.data,
                    "plan": name,
                    "k": k,
                    "batch": batch,
                    "requests": len(subject.cases),
                    "ms_per_request": round(1e3 * statistics.median(seconds[name]), 3),
                    "ms_min": round(1e3 * min(seconds[name]), 3),
                    "ms_max": round(1e3 * max(seconds[name]), 3),
                    "speedup": round(statistics.median(seconds["plain"]) / statistics.median(seconds[name]), 3),
                    **told[1],
                    **compared(told[0], twins[k], exact=name != "atspeed-r"),
                    **judgements[k][name == "atspeed-r"],
                    **machine(),
                }
                records.append(record)
                say(line(record))
    return records


def _judgements(subject: Subject, k: int) -> tuple[Record, Record]:
    """The quality of exact answers, by one plan for all of them, and that of relaxed ones."""
    decoder = subject.decoder(ATSPEED, 32, k, subject.draft)
    exact = _told(subject, "tree-attention", _with(decoder, TREE_ATTENTION, subject.requests(k)))[0]
    relaxed = _told(subject, "atspeed-r", _with(decoder, ATSPEED, subject.requests(k, relaxed=True)))[0]
    return judged(subject, exact, exact), judged(subject, relaxed, exact)


def _ways(
    subject: Subject, k: int, batch: int, plain: PlainBeams, alone: BeamDecoder, drafting: BeamDecoder, planner: Plan
) -> dict[str, Callable[[], dict[str, BeamResult] | list[list[Codes]]]]:
    """Every plan as something to call. What cannot draft has no features to collect either."""
    strict, relaxed = subject.requests(k), subject.requests(k, relaxed=True)
    begins = range(0, len(strict), batch)
    return {
        "plain": lambda: [items for begin in begins for items in plain.decode(strict[begin : begin + batch])],
        "tree-attention": lambda: _with(alone, TREE_ATTENTION, strict),
        "draft-free": lambda: _with(alone, DRAFT_FREE, strict),
        "atspeed-s": lambda: _with(drafting, ATSPEED, strict),
        "atspeed-r": lambda: _with(drafting, ATSPEED, relaxed),
        "planner": lambda: _with(drafting, planner, strict),
    }


def _with(decoder: BeamDecoder, plan: Plan, requests: Sequence[BeamRequest]) -> dict[str, BeamResult]:
    decoder.plan = plan
    return run(decoder, requests)


def _told(
    subject: Subject, plan: str, found: dict[str, BeamResult] | list[list[Codes]]
) -> tuple[list[list[Codes]], Record]:
    """The items of every case, and the means of what was counted."""
    if isinstance(found, list):
        passes = float(subject.trie.num_levels - 1)
        return found, {"target_passes": passes, "accepted_levels": 0.0, "forced_levels": 0.0, "nodes_along": 0.0}
    results = [found[str(n)] for n in range(len(subject.cases))]
    assert plan == "atspeed-r" or not any(result.lossy for result in results)
    counts = [result.speculation for result in results]
    means = {
        "target_passes": statistics.mean(c.rounds for c in counts),
        "accepted_levels": statistics.mean(c.accepted_tokens for c in counts),
        "forced_levels": statistics.mean(c.forced_tokens for c in counts),
        "nodes_along": statistics.mean(c.draft_tokens for c in counts),
    }
    items = [[item.codes for item in result.items] for result in results]
    return items, {name: round(value, 3) for name, value in means.items()}


def line(record: Record) -> str:
    """One record for people."""
    text = (
        f"{record['plan']:15} K {record['k']:3} batch {record['batch']:3}  {record['ms_per_request']:8.2f} ms "
        f"[{record['ms_min']:.2f}-{record['ms_max']:.2f}]  x{record['speedup']:.2f}  "
        f"passes {record['target_passes']:.2f}  accepted {record['accepted_levels']:.2f}  "
        f"forced {record['forced_levels']:.2f}  along {record['nodes_along']:6.1f}  "
        f"recall {record['recall']:.4f}  ndcg {record['ndcg']:.4f}  mismatches {record['mismatches']} "
        f"near-ties {record['near_ties']}"
    )
    if record["plan"] == "atspeed-r":
        text += (
            f"  LOSSY: overlap {record['overlap']:.3f}  recall lost {record['recall_lost']:+.4f}  "
            f"ndcg lost {record['ndcg_lost']:+.4f}  over {record['judged']} users"
        )
    return text


def bench_exact(subject: Subject, ks: Sequence[int], say: Callable[[str], None]) -> list[Record]:
    """Every case by every strict plan, alone and in batches, with a trained, a random and an adversarial draft."""
    records = []
    made: dict[str, Draft | Target | None] = {"none": None, "trained": subject.draft}
    if isinstance(subject.draft, Draft):
        torch.manual_seed(1)
        untrained, turned = (DraftNetwork(subject.draft.network.shape) for _ in range(2))
        turned.load_state_dict(subject.draft.network.state_dict())
        with torch.no_grad():
            turned.norms[2].neg_()  # it likes best what the trained one likes least
        for name, network in (("random", untrained), ("adversarial", turned)):
            made[name] = Draft(network, subject.target.embedding, subject.target.vocabulary)
    made["independent"] = subject.target  # a model of its own, which here is always right
    for k in ks:
        twins = twins_of(subject, k)
        for name, draft in made.items():
            for plan in (ATSPEED,) if draft else (TREE_ATTENTION, DRAFT_FREE):
                for batch in (1, 8, 32):
                    results = run(subject.decoder(plan, batch, k, draft), subject.requests(k))
                    told = _told(subject, plan.name, results)
                    record = {"draft": name, "plan": plan.name, "k": k, "batch": batch, **told[1]}
                    records.append(record | compared(told[0], twins, exact=True))
                    say(json.dumps(records[-1]))
    return records


def bench_transformers(subject: Subject, ks: Sequence[int], repeats: int, say: Callable[[str], None]) -> list[Record]:
    """`transformers` beam search over the same items, one request at a time, with a prefix function."""
    model: Any = AutoModelForCausalLM.from_pretrained(subject.checkpoint, dtype=torch.float32, local_files_only=True)
    model.eval()
    vocabulary, levels = subject.target.vocabulary, subject.trie.num_levels
    prefixes = ItemPrefixes([vocabulary.item_tokens(i.codes)[:-1] for i in subject.catalog.items], vocabulary.separator)
    records = []
    for k in ks:
        twins, times = twins_of(subject, k), []
        items: list[list[Codes]] = []
        for turn in range(repeats + 1):
            started, items = time.perf_counter(), []
            for case in subject.cases:
                prompt = vocabulary.prompt(case.history[-subject.max_history_items :])
                legal = prefixes.excluding([vocabulary.item_tokens(codes)[:-1] for codes in set(case.history)])
                written = model.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                    max_new_tokens=levels,
                    num_beams=k,
                    num_return_sequences=k,
                    do_sample=False,
                    length_penalty=0.0,
                    renormalize_logits=True,
                    eos_token_id=None,
                    pad_token_id=0,
                    prefix_allowed_tokens_fn=_after(len(prompt), legal),
                )
                offsets = torch.tensor(vocabulary.level_offsets)
                items.append([tuple(row) for row in (written[:, len(prompt) :] - offsets).tolist()])
            if turn:
                times.append((time.perf_counter() - started) / len(subject.cases))
        record = {
            "data": subject.data,
            "plan": "transformers",
            "k": k,
            "batch": 1,
            "requests": len(subject.cases),
            "ms_per_request": round(1e3 * statistics.median(times), 3),
            "ms_min": round(1e3 * min(times), 3),
            "ms_max": round(1e3 * max(times), 3),
            "target_passes": levels - 1,
            **compared(items, twins, exact=True),
            **judged(subject, items, [[i.codes for i in twins[str(n)][0].items] for n in range(len(items))]),
            **machine(),
        }
        records.append(record)
        say(json.dumps(record))
    return records


def _after(prompt: int, legal: Callable[[Sequence[int]], list[int]]) -> Callable[[int, torch.Tensor], list[int]]:
    return lambda row, tokens: legal(tokens[prompt:].tolist())


def main(argv: Sequence[str] | None = None) -> int:
    """`padrec bench beam`. Exit code 1 when a strict answer differs from the twin's beyond near-ties; 2: bad input."""
    parser = argparse.ArgumentParser(prog="padrec bench beam", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("model/bundles/movielens-100k"))
    parser.add_argument("--data", type=Path, default=None, help="default: .data/ml-100k, or what the recipe says")
    parser.add_argument("--recipe", type=Path, default=None, help="measure a training run instead of a bundle")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where `padrec train` left its stages")
    parser.add_argument("--draft", type=Path, default=None, help="another draft: a folder written by `padrec align`")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 3, 5, 10, 20, 50])
    parser.add_argument("--users", type=int, default=0, help="first so many held-out users (0: all)")
    parser.add_argument("--judged", type=int, default=1000, help="users over whom recall and NDCG are taken (0: all)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--replacement", action="store_true", help="let relaxed requests draw with replacement")
    parser.add_argument("--exact", action="store_true", help="only prove exactness, for every plan and draft")
    parser.add_argument("--transformers", action="store_true", help="only time the beam search of `transformers`")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None, help="milliseconds and speed-up by K, as SVG")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    try:
        if options.recipe:
            recipe = with_data(load_recipe(options.recipe), options.data)
            whole = of_run(Run(recipe, options.runs / recipe.name))
        else:
            whole = of_bundle(load_bundle(options.bundle), options.bundle, options.data or ML_100K)
        whole = replace(whole, replacement=options.replacement)
        if options.draft:
            whole = replace(whole, draft=aligned_draft(whole.target, options.draft))
        subject = whole.first(options.users)
    except (BundleError, DataError, RecipeError, OSError, ValueError) as exc:
        print(f"padrec bench beam: {exc}", file=sys.stderr)  # noqa: T201 - a command's answer
        return 2
    if options.exact:
        records = bench_exact(subject, options.k, _say)
    elif options.transformers:
        records = bench_transformers(subject, options.k, options.repeats, _say)
    else:
        records = bench_beam(subject, options.k, options.batch, options.repeats, _say, whole.first(options.judged))
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    if options.plot:
        options.plot.write_text(plot(records))
    return 1 if any(record["mismatches"] for record in records) else 0


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a command's answer
