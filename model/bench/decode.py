"""`padrec bench decode`: wall clock and acceptance of every variant on held-out users, and proof that all agree.

Variants run interleaved in one process on the same requests: plain (a token a pass), plain-forced (forced runs), draft
(the same draft without PAD-Rec), padrec. Prefill is part of every list's time. Beside them stands what no speculation
can go below on this device: the prompt's pass, and one more over the whole list. Knows bundles and data; no sockets.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.bench.plot import Panel, figure
from model.bench.widened import widened
from model.bundle import Bundle, BundleError, load_bundle
from model.data.batches import padded_tokens
from model.data.histories import Case, histories
from model.data.movielens import DataError, read_movielens
from model.decoding.budget import LONG_LIST, measured_budget
from model.decoding.list_decoder import ListDecoder
from model.decoding.measurements import processor
from model.decoding.offline import Decoded, decode_all
from model.decoding.plain import PlainTwin
from model.decoding.request import ListRequest, ListResult
from model.decoding.topology import Budget, FixedBudget, best_trees
from model.draft.draft import Draft
from model.draft.network import DraftNetwork
from model.kv_cache import Sight, Write
from model.semantic_id import Codes
from model.train.evaluate import quality

# Nats between the two best legal tokens below which rounding may decide, by number format.
NEAR_TIES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
Record = dict[str, Any]


def held_out_items(bundle: Bundle, data: Path) -> dict[str, list[Codes]]:
    """The items of each held-out user, oldest first. Raises DataError."""
    codes = {item.item_id: item.codes for item in bundle.catalog.items}
    by_user = {h.user_id: h for h in histories(read_movielens(data))}
    names = bundle.info.report.get("held_out_users", [])
    if not names:
        raise DataError("the bundle's report names no held-out users")
    try:
        return {name: [codes[item] for item in by_user[name].item_ids] for name in names}
    except KeyError as exc:
        raise DataError(f"{data} is not what the bundle was trained on: {exc} is unknown") from exc


def held_out_requests(bundle: Bundle, data: Path, k: int, users: int = 0) -> list[ListRequest]:
    """One request per held-out user: everything but the last ten items, whatever `k`. Raises DataError."""
    found = [ListRequest(name, tuple(items[:-10]), k) for name, items in held_out_items(bundle, data).items()]
    return found[:users] if users else found


@dataclass(frozen=True)
class Variant:
    """One way to decode."""

    name: str
    decoder: ListDecoder


def variants(bundle: Bundle, batch: int, k: int, names: Sequence[str], **options: Any) -> list[Variant]:
    """Fresh decoders with `batch` rows; budgets of the speculating ones are measured first, as a worker does: on lists
    longer than `k`, which a worker has room for (static shapes would read all of that room in every round, and have
    none). `options` go to the decoders as they are."""
    made, max_k = [], k if options.get("static") else max(k, LONG_LIST)
    for name in names:
        speculating = {"draft": "draft-plain", "padrec": "draft"}.get(name)
        draft = {"draft": bundle.plain_draft, "padrec": bundle.draft}.get(name)
        decoder = ListDecoder(
            bundle.target,
            draft,
            bundle.trie,
            bundle.catalog,
            num_rows=batch,
            max_history_items=bundle.info.max_history_items,
            max_k=max_k,
            budget=FixedBudget(Budget(0)),
            forced=name != "plain",
            **options,
        )
        if speculating:
            measured_budget(decoder, bundle.golden_requests(8), bundle.profile(speculating))
        decoder.freeze()
        made.append(Variant(name, decoder))
    return made


class Bound:
    """The least any speculation could take: prompts in one pass and whole lists in another, as if a draft that costs
    nothing had guessed them all. Nothing is drafted, chosen or booked."""

    def __init__(
        self, bundle: Bundle, requests: Sequence[ListRequest], lists: Sequence[ListResult], batch: int
    ) -> None:
        """`lists`: what the target writes for each request."""
        self.target, vocabulary = bundle.target, bundle.target.vocabulary
        history = bundle.info.max_history_items
        pairs = [
            (
                vocabulary.list_prompt(request.history[-history:]),
                # The last item's last code and its separator are not read: nothing comes after them.
                [token for item in found.items for token in vocabulary.list_item_tokens(item.codes)][:-2],
            )
            for request, found in zip(requests, lists, strict=True)
        ]
        self.chunks = [pairs[begin : begin + batch] for begin in range(0, len(pairs), batch)]
        positions = max(len(prompt) + len(written) for prompt, written in pairs)
        self.target.reserve_positions(positions)
        self.cache = self.target.new_cache(batch, positions)

    @torch.inference_mode()
    def run(self) -> list[torch.Tensor]:
        """The hidden states [B, n, d] over the lists of each batch."""
        found = []
        for chunk in self.chunks:
            prompts, written = zip(*chunk, strict=True)
            self._read(prompts, [0] * len(chunk))
            found.append(self._read(written, [len(prompt) for prompt in prompts]))
        return found

    def _read(self, tokens: Sequence[list[int]], begins: list[int]) -> torch.Tensor:
        device, padded = self.target.device, padded_tokens(tokens).to(self.target.device)
        length, start = torch.tensor([len(each) for each in tokens], device=device), torch.tensor(begins, device=device)
        order, rows = torch.arange(padded.shape[1], device=device), torch.arange(len(tokens), device=device)[:, None]
        positions = start[:, None] + order
        at = Write(rows, positions, 0, begins[0] if len(tokens) == 1 else None)
        at = at if len(tokens) == 1 else at.without(order >= length[:, None])
        sight = Sight(start if any(begins) else None, None, int((start + length).max()))
        return self.target(padded, positions, self.cache, at, sight).hidden


def twin_lists(bundle: Bundle, requests: Sequence[ListRequest]) -> dict[str, tuple[ListResult, float]]:
    """The slow twin's list of every request, and the smallest distance (nats) between its two best legal tokens."""
    twin = PlainTwin(bundle.target, [item.codes for item in bundle.catalog.items], bundle.info.max_history_items)
    return {r.request_id: (twin.decode(r), min(twin.margins, default=float("inf"))) for r in requests}


def list_quality(bundle: Bundle, data: Path, results: dict[str, ListResult]) -> Record:
    """Recall and NDCG of the lists against the last ten items of each user."""
    by_user = {h.user_id: h.item_ids for h in histories(read_movielens(data))}
    item_of = {item.codes: item.item_id for item in bundle.catalog.items}
    asked = [Case(user, by_user[user][:-10], by_user[user][-10:]) for user in results]
    lists = [[item_of[item.codes] for item in result.items] for result in results.values()]
    return quality(asked, lists, max(map(len, lists)))


def disagreements(
    bundle: Bundle,
    requests: Sequence[ListRequest],
    results: dict[str, ListResult],
    twins: dict[str, tuple[ListResult, float]],
) -> Record:
    """Counts over lists: identical to the twin, near-ties, mismatches, and items that must not be there."""
    valid = {item.codes for item in bundle.catalog.items}
    near_tie = NEAR_TIES[bundle.target.dtype]
    counts = {"identical": 0, "near_ties": 0, "mismatches": 0, "invalid": 0, "repeated": 0, "excluded": 0}
    for request in requests:
        codes = [item.codes for item in results[request.request_id].items]
        twin, margin = twins[request.request_id]
        same = codes == [item.codes for item in twin.items]
        counts["identical" if same else "near_ties" if margin < near_tie else "mismatches"] += 1
        counts["invalid"] += sum(c not in valid for c in codes)
        counts["repeated"] += len(codes) - len(set(codes))
        counts["excluded"] += sum(c in set(request.history) | set(request.exclude) for c in codes)
    return {**counts, "identical": counts["identical"] / len(requests)}


def bench_decode(
    bundle: Bundle,
    requests: Sequence[ListRequest],
    batches: Sequence[int],
    repeats: int,
    say: Callable[[str], None],
    judge: Callable[[dict[str, ListResult]], Record] | None = None,
) -> list[Record]:
    """Medians of interleaved repeats, per variant and batch size. `judge` adds what it says of the lists."""
    say("decoding every request with the slow twin")
    twins = twin_lists(bundle, requests)
    records = []
    for batch in batches:
        made = variants(bundle, batch, requests[0].k, ("plain", "plain-forced", "draft", "padrec"))
        bound = Bound(bundle, requests, [twins[request.request_id][0] for request in requests], batch)
        seconds: dict[str, list[float]] = {name: [] for name in ("bound", *(v.name for v in made))}
        decoded: dict[str, Decoded] = {}
        for variant in made:
            decode_all(variant.decoder, requests[: max(2, batch)])
        for _ in range(repeats):
            started = time.perf_counter()
            bound.run()
            seconds["bound"].append((time.perf_counter() - started) / len(requests))
            for variant in made:
                started = time.perf_counter()
                decoded[variant.name] = decode_all(variant.decoder, requests)
                seconds[variant.name].append((time.perf_counter() - started) / len(requests))
        records.append({**_timed("bound", batch, len(requests), seconds), **_described(bundle)})
        say(line(records[-1]))
        for variant in made:
            run = decoded[variant.name]
            budget = variant.decoder.budget(batch) if variant.decoder.draft else Budget(0)
            records.append(
                {
                    **_timed(variant.name, batch, len(requests), seconds),
                    "prefill_ms": round(1e3 * statistics.mean(r.prefill_seconds for r in run.results.values()), 3),
                    "draft_ms": round(1e3 * sum(r.draft_seconds for r in run.rounds) / len(requests), 3),
                    "verify_ms": round(1e3 * sum(r.verify_seconds for r in run.rounds) / len(requests), 3),
                    "rounds": round(sum(r.speculation.rounds for r in run.results.values()) / len(requests), 2),
                    "acceptance_length": round(run.acceptance_length, 3),
                    "acceptance_by_slot": run.acceptance_by_slot(),
                    "acceptance_by_step": run.acceptance_by_step(),
                    "budget_steps": budget.steps,
                    "budget_width": budget.width,
                    "budget_nodes": [budget.nodes(slot) for slot in range(bundle.trie.num_levels)],
                    **disagreements(bundle, requests, run.results, twins),
                    **(judge(run.results) if judge else {}),
                    **_described(bundle),
                }
            )
            say(line(records[-1]))
    return records


def _timed(name: str, batch: int, lists: int, seconds: dict[str, list[float]]) -> Record:
    times, plain = seconds[name], statistics.median(seconds["plain"])
    return {
        "variant": name,
        "batch": batch,
        "lists": lists,
        "ms_per_list": round(1e3 * statistics.median(times), 3),
        "ms_min": round(1e3 * min(times), 3),
        "ms_max": round(1e3 * max(times), 3),
        "speedup": round(plain / statistics.median(times), 3),
    }


def _described(bundle: Bundle) -> Record:
    target = bundle.target
    return {"dtype": str(target.dtype).removeprefix("torch."), "hidden_size": target.hidden_size, **machine()}


def line(record: Record) -> str:
    """One record for people."""
    timed = (
        f"{record['variant']:13} batch {record['batch']:3}  {record['ms_per_list']:8.2f} ms/list "
        f"[{record['ms_min']:.2f}-{record['ms_max']:.2f}]  x{record['speedup']:.2f}"
    )
    if record["variant"] == "bound":
        return f"{timed}  what no draft can go below"
    return (
        f"{timed}  rounds {record['rounds']:5.1f}  acceptance {record['acceptance_length']:.2f}  "
        f"identical {record['identical']:.3f}  mismatches {record['mismatches']} near-ties {record['near_ties']}  "
        f"slot {record['acceptance_by_slot']}  step {record['acceptance_by_step']}"
    )


def plot(records: Sequence[Record]) -> str:
    """Speed-up by batch, and acceptance by slot and by step at the smallest batch, as SVG."""
    batches = list(dict.fromkeys(r["batch"] for r in records))
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(record["variant"], []).append(record)
    speed = {name: [r["speedup"] for r in found] for name, found in by_name.items()}
    panels = [Panel("list of ten, against plain", "batch", "times as fast", tuple(map(str, batches)), speed, "lines")]
    drafted = {name: found[0] for name, found in by_name.items() if found[0].get("acceptance_by_step")}
    if drafted:
        first = next(iter(drafted.values()))
        slots = tuple("abcdefgh"[: len(first["acceptance_by_slot"])])
        steps = tuple(str(n + 1) for n in range(max(len(r["acceptance_by_step"]) for r in drafted.values())))
        title = f"batch {batches[0]}"
        by_slot = {name: r["acceptance_by_slot"] for name, r in drafted.items()}
        by_step = {name: r["acceptance_by_step"] for name, r in drafted.items()}
        panels.append(Panel(title, "slot of the choice", "accepted", slots, by_slot))
        panels.append(Panel(title, "step of the choice", "accepted", steps, by_step, "lines"))
    return figure(panels, columns=3)


def bench_exact(bundle: Bundle, requests: Sequence[ListRequest], say: Callable[[str], None]) -> list[Record]:
    """Every held-out user, alone and in mixed batches, with a trained, a random and an adversarial draft, in chains,
    dynamic trees and the best static trees of each slot."""
    static = Budget.static(best_trees(bundle.profile("draft").acceptance, 8))
    trees = {"chain": Budget(4), "dynamic": Budget(4, 3), "static": static}
    twins = twin_lists(bundle, requests)
    assert bundle.draft is not None
    shape = bundle.draft.network.shape
    torch.manual_seed(1)
    random_draft = Draft(DraftNetwork(shape), bundle.target.embedding, bundle.target.vocabulary)
    records = []
    for name, draft in (
        ("trained", bundle.draft),
        ("random", random_draft),
        ("adversarial", adversarial(bundle, bundle.draft)),
    ):
        for batch in (1, 8, 32):
            for tree, budget in trees.items():
                decoder = bundle.list_decoder(
                    num_rows=batch, max_k=requests[0].k, draft=draft, budget=FixedBudget(budget)
                )
                decoded = decode_all(decoder, requests)
                decoder.rows.check_integrity()
                record = {
                    "draft": name,
                    "batch": batch,
                    "tree": tree,
                    "lists": len(requests),
                    "acceptance_length": round(decoded.acceptance_length, 3),
                    **disagreements(bundle, requests, decoded.results, twins),
                }
                records.append(record)
                say(json.dumps(record))
    return records


def adversarial(bundle: Bundle, draft: Draft) -> Draft:
    """A draft that proposes what it believes least: the sign of its output is turned."""
    network = DraftNetwork(draft.network.shape)
    network.load_state_dict(draft.network.state_dict())
    with torch.no_grad():
        network.norms[2].neg_()
    return Draft(network, bundle.target.embedding, bundle.target.vocabulary)


def machine() -> Record:
    """Where a figure was measured."""
    return {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__, "cpu": processor()}


def main(argv: Sequence[str] | None = None) -> int:
    """`padrec bench decode`. Exit code 1 when an output differs from the twin's beyond near-ties; 2: bad input."""
    parser = argparse.ArgumentParser(prog="padrec bench decode", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("model/bundles/movielens-100k"))
    parser.add_argument("--data", type=Path, default=Path(".data/ml-100k"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--users", type=int, default=0, help="first so many held-out users (0: all)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    widths = (1, 2, 4, 8, 16)
    parser.add_argument(
        "--times-as-wide", type=int, default=1, choices=widths, help="a larger target's cost, same lists"
    )
    parser.add_argument("--exact", action="store_true", help="only prove exactness, for three drafts")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE.svg", help="speed-up and acceptance")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    try:
        bundle = load_bundle(options.bundle, dtype=options.dtype, device=options.device)
        requests = held_out_requests(bundle, options.data, options.k, options.users)
        if options.times_as_wide > 1:
            bundle = widened(bundle, options.bundle, options.times_as_wide, dtype=options.dtype)
    except (BundleError, DataError) as exc:
        print(f"padrec bench decode: {exc}", file=sys.stderr)  # noqa: T201 - a command's answer
        return 2
    if options.exact:
        records = bench_exact(bundle, requests, _say)
    else:
        other = options.dtype != "fp32" or options.times_as_wide > 1
        judge = _judge(bundle, options.data, requests, options.bundle if other else None)
        records = bench_decode(bundle, requests, options.batch, options.repeats, _say, judge)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    if options.plot and not options.exact:
        options.plot.write_text(plot(records))
    faults = ("mismatches", "invalid", "repeated", "excluded")
    return 1 if any(record.get(fault) for record in records for fault in faults) else 0


def _judge(
    bundle: Bundle, data: Path, requests: Sequence[ListRequest], exact: Path | None
) -> Callable[[dict[str, ListResult]], Record]:
    """Quality of lists; and where `exact` names the bundle to be read as it is, in fp32, how many lists are the same
    there."""
    full: dict[str, ListResult] = {}
    if exact is not None:
        full = decode_all(load_bundle(exact).list_decoder(num_rows=8, max_k=requests[0].k), requests).results

    def judge(results: dict[str, ListResult]) -> Record:
        same = sum([i.codes for i in results[r].items] == [i.codes for i in full[r].items] for r in full)
        return list_quality(bundle, data, results) | ({"same_as_fp32": same / len(full)} if full else {})

    return judge


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a command's answer
