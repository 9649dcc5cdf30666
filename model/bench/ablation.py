"""`padrec bench ablation --run runs/NAME`: the drafts PAD-Rec is compared with, on one target, greedy and sampled.

Every draft of `padrec train RECIPE --ablation`, a popularity trie and no draft at all decode the same requests, one
per test user. Acceptance (in all, by slot, by step) is counted at a fixed chain; the wall clock at batch 1 with the
budget the decoder itself would measure, in interleaved repeats. Every list is compared with the slow twin's. Knows the
folder of a run; no bundles, no sockets.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.bench.decode import NEAR_TIES, machine
from model.bench.plot import Panel, figure
from model.config import RecipeError, recipe_of, with_data
from model.data.histories import Case, last_cases
from model.data.movielens import DataError
from model.decoding.budget import measured_budget
from model.decoding.list_decoder import ListDecoder
from model.decoding.offline import Decoded, decode_all
from model.decoding.plain import PlainTwin
from model.decoding.profile import PROFILE_RANKS, measured_profile
from model.decoding.request import ListRequest, ListResult
from model.decoding.topology import Budget, FixedBudget
from model.draft.draft import Draft
from model.draft.item_at_once import ItemDraft
from model.draft.network import DraftNetwork
from model.draft.popularity import PopularityDraft
from model.target import Target
from model.train.run import ABLATION, Run
from model.train.variants import VARIANTS

Record = dict[str, Any]
Twins = Mapping[str, tuple[ListResult, float]]


class NotTrained(Exception):
    """A run without the drafts that are compared; the message says what to do."""


@dataclass(frozen=True)
class Compared:
    """What is decoded with: a target, and the drafts by name (None: no speculation)."""

    run: Run
    target: Target
    drafts: dict[str, Draft | None]

    def decoder(self, draft: Draft | None, k: int, budget: Budget, num_rows: int = 1) -> ListDecoder:
        return ListDecoder(
            self.target,
            draft,
            self.run.trie,
            self.run.catalog,
            num_rows=num_rows,
            max_history_items=self.run.recipe.target.max_history_items,
            max_k=k,
            budget=FixedBudget(budget),
        )

    def requests(self, cases: Sequence[Case], k: int, temperature: float) -> list[ListRequest]:
        """One per case; those that sample have seeds, so that they have one right answer."""
        codes = self.run.codes
        return [
            ListRequest(
                f"{case.user_id}/{seed}",
                tuple(codes[item] for item in case.history),
                k,
                temperature=temperature,
                seed=seed if temperature else None,
            )
            for seed, case in enumerate(cases)
        ]


def compared(folder: Path, data: Path | None, *, native: bool) -> Compared:
    """Everything the run left that can be compared. Raises NotTrained, RecipeError or DataError."""
    missing = [name for name in VARIANTS if not (folder / ABLATION / name / "done.json").exists()]
    if missing:
        raise NotTrained(f"{folder} has no draft {missing[0]!r}: `padrec train RECIPE --ablation` trains it")
    recipe = recipe_of(folder / ABLATION / next(iter(VARIANTS)) / "recipe.json", folder.name)
    run = Run(with_data(recipe, data), folder)
    target = Target(run.checkpoint("finetune"), run.vocabulary, native=native)
    popularity = torch.tensor([item.popularity for item in run.catalog.items])
    drafts: dict[str, Draft | None] = {"none": None, "popularity": PopularityDraft(run.trie, popularity)}
    for name, variant in VARIANTS.items():
        network = DraftNetwork.load(folder / ABLATION / name / "network")
        if variant.whole_items:
            drafts[name] = ItemDraft(network, target.embedding, run.vocabulary)
        else:
            drafts[name] = Draft(network, target.embedding, run.vocabulary, native=native)
    return Compared(run, target, drafts)


def twin_lists(setting: Compared, requests: Sequence[ListRequest]) -> Twins:
    """The slow twin's list of every request, and its smallest distance (nats) to another one."""
    codes = [item.codes for item in setting.run.catalog.items]
    twin = PlainTwin(setting.target, codes, setting.run.recipe.target.max_history_items)
    return {r.request_id: (twin.decode(r), min(twin.margins, default=float("inf"))) for r in requests}


def mismatches(results: Mapping[str, ListResult], twins: Twins) -> dict[str, int]:
    """Lists that are not the twin's: near-ties, where the twin itself was that close to another list, and the rest."""
    counts = {"near_ties": 0, "mismatches": 0}
    for name, (twin, margin) in twins.items():
        if [i.codes for i in results[name].items] != [i.codes for i in twin.items]:
            counts["near_ties" if margin < NEAR_TIES[torch.float32] else "mismatches"] += 1
    return counts


def bench(
    setting: Compared, users: int, k: int, steps: int, repeats: int, temperature: float, say: Callable[[str], None]
) -> list[Record]:
    """A record per draft. The budget is measured on validation users, everything else on test users."""
    run = setting.run
    requests = setting.requests(run.last_cases[: users or None], k, temperature)
    warm = setting.requests(last_cases(run.split.validation, run.recipe.data)[:20], k, temperature)
    say(f"temperature {temperature:g}: decoding {len(requests)} requests with the slow twin")
    twins = twin_lists(setting, requests)
    chains: dict[str, Decoded] = {}
    decoders: dict[str, ListDecoder] = {}
    for name, draft in setting.drafts.items():
        fixed = Budget(steps if draft else 0)
        chains[name] = decode_all(setting.decoder(draft, k, fixed), requests)
        decoders[name] = setting.decoder(draft, k, Budget(0))
        if draft:
            profile = measured_profile(setting.decoder(draft, k, fixed), warm, steps, PROFILE_RANKS)
            measured_budget(decoders[name], warm, profile)
        decode_all(decoders[name], warm)
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    timed: dict[str, Decoded] = {}
    for _ in range(repeats):
        for name, decoder in decoders.items():
            started = time.perf_counter()
            timed[name] = decode_all(decoder, requests)
            seconds[name].append((time.perf_counter() - started) / len(requests))
    plain = statistics.median(seconds["none"])
    records = []
    for name, chain in chains.items():
        budget = decoders[name].budget(1)
        times, right = seconds[name], [mismatches(d.results, twins) for d in (chain, timed[name])]
        record = {
            "draft": name,
            "temperature": temperature,
            "lists": len(requests),
            "acceptance_length": round(chain.acceptance_length, 3),
            "acceptance_by_slot": chain.acceptance_by_slot(),
            "acceptance_by_step": chain.acceptance_by_step(),
            "survival": [round(s, 4) for s in chain.survival()],
            "ms_per_list": round(1e3 * statistics.median(times), 3),
            "ms_min": round(1e3 * min(times), 3),
            "ms_max": round(1e3 * max(times), 3),
            "speedup": round(plain / statistics.median(times), 3),
            "rounds": round(sum(r.rows for r in timed[name].rounds) / len(requests), 2),
            "draft_ms": round(1e3 * sum(r.draft_seconds for r in timed[name].rounds) / len(requests), 3),
            "verify_ms": round(1e3 * sum(r.verify_seconds for r in timed[name].rounds) / len(requests), 3),
            "budget_steps": budget.steps,
            "budget_nodes": max(budget.nodes(slot) for slot in range(run.trie.num_levels)),
            "mismatches": sum(r["mismatches"] for r in right),
            "near_ties": sum(r["near_ties"] for r in right),
            "compiled": decoders[name].native is not None,
            **machine(),
        }
        records.append(record)
        say(line(record))
    return records


def line(record: Record) -> str:
    """One record for people."""
    return (
        f"{record['draft']:13} T {record['temperature']:g}  acceptance {record['acceptance_length']:.2f}  "
        f"slot {_row(record['acceptance_by_slot'])}  step {_row(record['acceptance_by_step'])}  "
        f"{record['ms_per_list']:7.2f} ms/list [{record['ms_min']:.2f}-{record['ms_max']:.2f}]  "
        f"x{record['speedup']:.2f}  budget {record['budget_nodes']}/{record['budget_steps']}  "
        f"rounds {record['rounds']:.1f}  mismatches {record['mismatches']} near-ties {record['near_ties']}"
    )


def table(records: Sequence[Record]) -> str:
    """The records of one temperature as Markdown."""
    rows = [
        "| | acceptance length | by slot | by step | ms/list [min-max] | of it drafting | speed-up | nodes, steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        by_slot, by_step = (_row(r[f"acceptance_by_{what}"]).replace("/", " ") for what in ("slot", "step"))
        rows.append(
            f"| {r['draft']} | {r['acceptance_length']:.2f} | {by_slot} | {by_step} | {r['ms_per_list']:.2f} "
            f"[{r['ms_min']:.2f}-{r['ms_max']:.2f}] | {r['draft_ms']:.2f} | {r['speedup']:.2f}x "
            f"| {r['budget_nodes']}, {r['budget_steps']} |"
        )
    return "\n".join(rows)


def plot(records: Sequence[Record], name: str) -> str:
    """Acceptance by slot and by step of every draft, a row of panels per temperature, as SVG."""
    panels = []
    for temperature in dict.fromkeys(r["temperature"] for r in records):
        drafted = [r for r in records if r["temperature"] == temperature and r["acceptance_by_step"]]
        how = f"{name}, {'greedy' if not temperature else f'temperature {temperature:g}'}"
        for what, key, kind in (("slot", "acceptance_by_slot", "bars"), ("step", "acceptance_by_step", "lines")):
            places = max(len(r[key]) for r in drafted)
            labels = tuple("abcdefgh"[:places]) if what == "slot" else tuple(str(n + 1) for n in range(places))
            series = {r["draft"]: r[key] for r in drafted}
            panels.append(Panel(how, f"{what} of the choice", "accepted", labels, series, kind))  # type: ignore[arg-type]
    return figure(panels)


def main(argv: Sequence[str] | None = None) -> int:
    """`padrec bench ablation`. Exit code 1: a list differs from the twin's beyond near-ties; 2: bad input."""
    parser = argparse.ArgumentParser(prog="padrec bench ablation", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run trained with --ablation")
    parser.add_argument("--data", type=Path, default=None, help="where the data lies (default: what the recipe says)")
    parser.add_argument("--users", type=int, default=100, help="first so many test users (0: all)")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="length of the fixed chain")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--torch", action="store_true", help="without the compiled kernel, for every draft alike")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE.svg")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    try:
        setting = compared(options.run, options.data, native=not options.torch)
    except (NotTrained, RecipeError, DataError, OSError, ValueError) as exc:
        print(f"padrec bench ablation: {exc}", file=sys.stderr)  # noqa: T201 - a command's answer
        return 2
    records: list[Record] = []
    for temperature in options.temperature:
        found = bench(setting, options.users, options.k, options.steps, options.repeats, temperature, _say)
        _say(f"\ntemperature {temperature:g}:\n\n{table(found)}\n")
        records += found
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    if options.plot:
        options.plot.write_text(plot(records, options.run.name))
    return 1 if any(r["mismatches"] for r in records) else 0


def _row(values: Sequence[float]) -> str:
    return "/".join(f"{value:.2f}" for value in values)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a command's answer
