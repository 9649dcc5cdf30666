"""`padrec bench tune`: which draft trees pay on this device, from measured acceptance and measured cost.

Decodes validation users (not those the other benchmarks hold out) to learn how often the draft's r-th guess is right at
each slot and step, times rounds of none, chains and the best trees of each size, and prints what each load would use.
`--save` writes the profile into the bundle's report (and its manifest anew): workers draw their trees from it.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from model.bench.decode import machine
from model.bundle import Bundle, BundleError, load_bundle, save_manifest
from model.config import DataConfig
from model.data.histories import cases, histories, split_users
from model.data.movielens import DataError, read_movielens
from model.decoding.budget import LoadBudget, measured_budget
from model.decoding.profile import PROFILE_RANKS, Profile, measured_profile
from model.decoding.request import ListRequest

Record = dict[str, Any]


def validation_requests(bundle: Bundle, data: Path, k: int) -> list[ListRequest]:
    """Cases of the users that the bundle's recipe kept for validation. Raises DataError."""
    recipe = bundle.info.report.get("recipe", {}).get("data")
    if recipe is None:
        raise DataError("the bundle's report holds no recipe: who was trained on is not known")
    config = DataConfig(**recipe)
    codes = {item.item_id: item.codes for item in bundle.catalog.items}
    asked = cases(split_users(histories(read_movielens(data)), config).validation, config)
    try:
        return [ListRequest(str(n), tuple(codes[i] for i in case.history), k) for n, case in enumerate(asked)]
    except KeyError as exc:
        raise DataError(f"{data} is not what the bundle was trained on: {exc} is unknown") from exc


def tune(
    bundle: Bundle, requests: Sequence[ListRequest], batch: int, steps: int, say: Callable[[str], None]
) -> tuple[Profile, list[Record]]:
    """The draft's profile, and one record per load and candidate: what a round costs and gains."""
    decoder = bundle.list_decoder(num_rows=batch, max_k=requests[0].k)
    profile = measured_profile(decoder, requests, steps, PROFILE_RANKS)
    for slot, (share, ranks) in enumerate(zip(profile.begins, profile.acceptance, strict=True)):
        say(f"slot {slot}: {share:.0%} of rounds begin here; right at rank 0..{PROFILE_RANKS - 1}, step by step: ")
        say("  " + "   ".join(" / ".join(f"{rate:.2f}" for rate in step) for step in ranks))
    budget = measured_budget(decoder, requests[: 2 * batch], profile)
    records = [record for load in budget.seconds for record in _records(budget, load, bundle.trie.num_levels)]
    for record in records:
        say(line(record))
    return profile, records


def _records(budget: LoadBudget, load: int, slots: int) -> list[Record]:
    return [
        {
            "batch": load,
            "chosen": budget.by_load[load] == candidate,
            "steps": candidate.steps,
            "width": candidate.width,
            "nodes": [candidate.nodes(slot) for slot in range(slots)],
            "trees": candidate.trees,
            "ms_per_round": round(1e3 * seconds, 4),
            "decisions_per_round": round(budget.decisions(candidate), 3),
            "us_per_decision": round(1e6 * seconds / budget.decisions(candidate) / load, 2),
            **machine(),
        }
        for candidate, seconds in budget.seconds[load].items()
    ]


def line(record: Record) -> str:
    """One record for people."""
    shape = "tree" if record["trees"] else "chain" if record["steps"] else "none"
    mark = "  <- used" if record["chosen"] else ""
    return (
        f"batch {record['batch']:3}  {shape:5} of {max(record['nodes']):2} nodes, {record['steps']} steps  "
        f"{record['ms_per_round']:8.3f} ms a round  {record['decisions_per_round']:.2f} decisions  "
        f"{record['us_per_decision']:8.1f} us a decision{mark}"
    )


def save(folder: Path, bundle: Bundle, profiles: Mapping[str, Profile]) -> str:
    """Put the drafts' profiles into the bundle's report; returns the bundle's new version."""
    report = json.loads((folder / "report.json").read_text())
    for name, profile in profiles.items():
        report.setdefault(name, {})["profile"] = profile.as_dict()
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    info = bundle.info
    return str(save_manifest(folder, info.name, bundle.target.vocabulary, info.max_history_items)["version"])


def main(argv: Sequence[str] | None = None) -> int:
    """`padrec bench tune`. Exit code 2: bad input."""
    parser = argparse.ArgumentParser(prog="padrec bench tune", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("model/bundles/movielens-100k"))
    parser.add_argument("--data", type=Path, default=Path(".data/ml-100k"))
    parser.add_argument("--batch", type=int, default=32, help="loads up to this many rows are measured")
    parser.add_argument("--steps", type=int, default=5, help="draft steps at most")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", action="store_true", help="write the profile into the bundle")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    try:
        bundle = load_bundle(options.bundle, device=options.device)
        requests = validation_requests(bundle, options.data, options.k)
    except (BundleError, DataError) as exc:
        print(f"padrec bench tune: {exc}", file=sys.stderr)  # noqa: T201 - a command's answer
        return 2
    profile, records = tune(bundle, requests, options.batch, options.steps, _say)
    if options.json:
        options.json.write_text(json.dumps({"profile": profile.as_dict(), "rounds": records}, indent=1) + "\n")
    if options.save:
        profiles = {"draft": profile}
        if bundle.plain_draft is not None:
            plain = bundle.list_decoder(num_rows=8, max_k=options.k, draft=bundle.plain_draft)
            profiles["draft-plain"] = measured_profile(plain, requests, options.steps, PROFILE_RANKS)
        _say(f"bundle version {save(options.bundle, bundle, profiles)}")
    return 0


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a command's answer
