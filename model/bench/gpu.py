"""`make bench-gpu` (`python3 -m model.bench.gpu`): decoding on a CUDA device, with nothing installed.

Needs torch, transformers, safetensors and numpy alone. The first run trains a target of the shape of Qwen3-0.6B and its
drafts on synthetic sessions (`sessions`, some minutes by the clock) and keeps them as a bundle under `--folder`;
later runs only measure. Per batch size: milliseconds a list, lists a second, ratio to plain decoding with and without
CUDA graphs, how near a pass comes to the time its weights take to be read, and how many lists differ from the slow
twin's. Without a CUDA device everything runs tiny on the CPU, says that these are no GPU figures, and shows that the
command works.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from model.bench.decode import Variant, variants
from model.bench.sessions import QWEN3, TINY, train_bundle
from model.bundle import DTYPES, Bundle, BundleError, load_bundle
from model.decoding.list_decoder import ListDecoder
from model.decoding.offline import Decoded, decode_all
from model.decoding.plain import PlainTwin
from model.decoding.request import ListRequest, ListResult
from model.decoding.topology import Budget

Record = dict[str, Any]
# Two tokens nearer than this, in nats, may change places between a pass of one token and one of many. Half precision
# keeps 8 bits of a hidden state, over as many layers as there are.
NEAR_TIE = {"fp32": 1e-4, "bf16": 0.1}
GRAPHED = ("plain", "plain-forced", "draft", "padrec")
EAGER = ("plain", "padrec")  # without graphs: what the ratio is made of


def catalog_requests(bundle: Bundle, count: int, k: int, seed: int = 0) -> list[ListRequest]:
    """Histories drawn from the catalog by popularity: plausible, reproducible, nobody's."""
    rng = random.Random(seed)
    items = [item.codes for item in bundle.catalog.items]
    weights = [item.popularity + 1 for item in bundle.catalog.items]
    length = min(bundle.info.max_history_items, len(items) // 2)
    requests = []
    for i in range(count):
        history = tuple(dict.fromkeys(rng.choices(items, weights, k=2 * length)))[:length]
        requests.append(ListRequest(f"gpu-{i}", history, k))
    return requests


def held_out_requests(bundle: Bundle, count: int, k: int) -> list[ListRequest]:
    """What the bundle's report kept from training, as often as needed; of a bundle that kept nothing, its catalog's."""
    kept = bundle.info.report.get("held_out_histories")
    if not kept:
        return catalog_requests(bundle, count, k)
    histories = [tuple(tuple(codes) for codes in history) for history in kept]
    return [ListRequest(f"gpu-{i}", histories[i % len(histories)], k) for i in range(count)]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy on the device, read and written ones both counted: the best of ten."""
    size = 2**31 if device.type == "cuda" else 2**26
    source, goal = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = []
    for _ in range(12):
        _wait(device)
        began = time.perf_counter()
        goal.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size / min(seconds[2:])


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of weights that a pass of the target reads, whatever its batch: all but the embeddings it looks up."""
    numbers = 0
    for path in sorted((folder / "target").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                numbers += 0 if "embed_tokens" in name else math.prod(file.get_slice(name).get_shape())
    return numbers * dtype.itemsize


def twin_lists(bundle: Bundle, requests: Sequence[ListRequest]) -> dict[str, tuple[ListResult, list[float]]]:
    """The slow twin's lists, and at every code how far apart its two best tokens were (nats)."""
    twin = PlainTwin(bundle.target, [item.codes for item in bundle.catalog.items], bundle.info.max_history_items)
    return {r.request_id: (twin.decode(r), twin.margins) for r in requests}


def compared(
    bundle: Bundle,
    requests: Sequence[ListRequest],
    results: dict[str, ListResult],
    twins: dict[str, tuple[ListResult, list[float]]],
    near_tie: float,
) -> Record:
    """Lists that are the twin's; those that part from it at a near-tie, and at more than one (`mismatches`), with the
    widest margin at which one did; and, of all lists, items that must not be there."""
    valid = {item.codes for item in bundle.catalog.items}
    counts = {"compared": len(twins), "identical": 0, "near_ties": 0, "mismatches": 0}
    wrong = {"invalid": 0, "repeated": 0, "excluded": 0}
    widest = 0.0
    for request in requests:
        codes = [item.codes for item in results[request.request_id].items]
        wrong["invalid"] += sum(c not in valid for c in codes)
        wrong["repeated"] += len(codes) - len(set(codes))
        wrong["excluded"] += sum(c in set(request.history) | set(request.exclude) for c in codes)
        if request.request_id not in twins:
            continue
        twin, margins = twins[request.request_id]
        mine, right = ([code for item in found for code in item] for found in (codes, [i.codes for i in twin.items]))
        parted = next((i for i, (a, b) in enumerate(zip(mine, right, strict=False)) if a != b), None)
        if parted is None:
            counts["identical" if len(mine) == len(right) else "mismatches"] += 1
            continue
        widest = max(widest, margins[parted])
        counts["near_ties" if margins[parted] < near_tie else "mismatches"] += 1
    return {**counts, **wrong, "widest_margin": round(widest, 4)}


def lists_of(batch: int, requests: Sequence[ListRequest]) -> Sequence[ListRequest]:
    """As many requests as a batch size is measured with: enough to be steady, few enough to be done in time."""
    return requests[: max(16, min(4 * batch, len(requests)))]


def measure(
    bundle: Bundle,
    requests: Sequence[ListRequest],
    batch: int,
    repeats: int,
    twins: dict[str, tuple[ListResult, list[float]]],
    *,
    dtype: str,
    floor_seconds: float,
    say: Callable[[str], None],
) -> list[Record]:
    """A record per variant, with graphs and without: medians of interleaved repeats, lists compared with `twins`."""
    device, asked = bundle.target.device, lists_of(batch, requests)
    mine = {r.request_id: twins[r.request_id] for r in asked if r.request_id in twins}
    records: list[Record] = []
    for graphs, names in ((True, GRAPHED), (False, EAGER)):
        began = time.perf_counter()
        made = variants(bundle, batch, asked[0].k, names, static=True, graphs=graphs)
        for variant in made:
            decode_all(variant.decoder, asked[: max(2, batch)])
        warm_up = time.perf_counter() - began
        frozen = [_programs(v.decoder) for v in made]
        seconds: dict[str, list[float]] = {v.name: [] for v in made}
        decoded: dict[str, Decoded] = {}
        memory = _allocated(device)
        for _ in range(repeats):
            for variant in made:
                _wait(device)
                started = time.perf_counter()
                decoded[variant.name] = decode_all(variant.decoder, asked)
                _wait(device)
                seconds[variant.name].append((time.perf_counter() - started) / len(asked))
        assert [_programs(v.decoder) for v in made] == frozen, "programs were made after the freeze"
        plain = statistics.median(seconds["plain"])
        for variant in made:
            record = {
                "batch": batch,
                "graphs": graphs and device.type == "cuda",
                **_timed(variant, decoded[variant.name], seconds[variant.name], plain, floor_seconds),
                "programs": len(_programs(variant.decoder)),
                "warm_up_seconds": round(warm_up, 1),
                "memory_grown_bytes": _allocated(device) - memory,
                **compared(bundle, asked, decoded[variant.name].results, mine, NEAR_TIE[dtype]),
            }
            records.append(record)
            say(line(record))
    return records


def _timed(variant: Variant, run: Decoded, seconds: list[float], plain: float, floor_seconds: float) -> Record:
    rounds = statistics.median(r.draft_seconds + r.verify_seconds for r in run.rounds)
    full = max(r.rows for r in run.rounds)
    budget = variant.decoder.budget(full) if variant.decoder.draft else Budget(0)
    median = statistics.median(seconds)
    return {
        "variant": variant.name,
        "lists": len(run.results),
        "ms_per_list": round(1e3 * median, 4),
        "ms_min": round(1e3 * min(seconds), 4),
        "ms_max": round(1e3 * max(seconds), 4),
        "lists_per_second": round(1 / median, 1),
        "ratio_to_plain": round(plain / median, 3),
        "ms_per_round": round(1e3 * rounds, 4),
        "fraction_of_floor": round(floor_seconds / rounds, 4),
        "rounds": round(sum(r.speculation.rounds for r in run.results.values()) / len(run.results), 2),
        "acceptance_length": round(run.acceptance_length, 3),
        "acceptance_by_slot": run.acceptance_by_slot(),
        "acceptance_by_step": run.acceptance_by_step(),
        "budget_steps": budget.steps,
        "budget_width": budget.width,
    }


def line(record: Record) -> str:
    """One record for people."""
    return (
        f"batch {record['batch']:3}  {record['variant']:13}{'graphs' if record['graphs'] else 'eager':7}"
        f"{record['ms_per_list']:9.3f} ms/list {record['lists_per_second']:9.1f} lists/s  "
        f"x{record['ratio_to_plain']:.2f} plain  {record['ms_per_round']:.3f} ms/round  "
        f"{100 * record['fraction_of_floor']:5.1f} % of floor  rounds {record['rounds']:5.1f}  "
        f"acceptance {record['acceptance_length']:.2f} (chain {record['budget_steps']})  "
        f"identical {record['identical']}/{record['compared']}  near-ties {record['near_ties']}  "
        f"mismatches {record['mismatches']}"
    )


def profile(bundle: Bundle, requests: Sequence[ListRequest], batch: int, path: Path) -> None:
    """Where the time of PAD-Rec rounds and of plain ones goes, on host and device, as two tables in one file."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if bundle.target.device.type == "cuda" else []
    order = "self_cuda_time_total" if bundle.target.device.type == "cuda" else "self_cpu_time_total"
    tables = []
    for variant in variants(bundle, batch, requests[0].k, ("plain", "padrec"), static=True):
        decode_all(variant.decoder, requests[:batch])
        with torch.profiler.profile(activities=activities) as found:
            decode_all(variant.decoder, requests[:batch])
        tables.append(f"{variant.name}\n{found.key_averages().table(sort_by=order, row_limit=60)}")
    path.write_text("\n".join(tables))


def _programs(decoder: ListDecoder) -> list[Any]:
    assert decoder.static is not None
    return decoder.static.programs.keys


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 when an output differs from the slow twin's beyond near-ties; 2: no usable bundle."""
    parser = argparse.ArgumentParser(prog="make bench-gpu", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"), help="where the trained bundle is kept")
    parser.add_argument("--bundle", type=Path, default=None, help="measure this one, train none")
    parser.add_argument("--train-only", action="store_true", help="train, measure in a later run")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default=None, help="bf16 on a GPU unless told")
    parser.add_argument("--batch", type=int, nargs="+", default=None)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--lists", type=int, default=None, help="most lists a batch size is measured with")
    parser.add_argument("--checked", type=int, default=None, help="so many lists are compared with the slow twin's")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--profile", type=Path, default=None, help="write where the time goes, and measure nothing")
    options = parser.parse_args(argv)
    has_gpu = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if has_gpu else "cpu (no CUDA device found: these are not GPU figures)"
    _say(f"{card}, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}")
    device, size = ("cuda", QWEN3) if has_gpu else ("cpu", TINY)
    dtype = options.dtype or ("bf16" if has_gpu else "fp32")
    # Exactness is claimed for fp32 proper; beside a bf16 target the draft may be quick.
    torch.backends.cuda.matmul.allow_tf32 = dtype == "bf16"
    folder = options.bundle or options.folder / ("bundle" if has_gpu else "bundle-cpu")
    if options.bundle is None and not (folder / "manifest.json").exists():
        train_bundle(folder, size, device, _say)
    if options.train_only:
        return 0
    try:
        bundle = load_bundle(folder, dtype=dtype, device=device)
    except BundleError as exc:
        print(f"bench-gpu: {exc}", file=sys.stderr)  # noqa: T201 - a command's answer
        return 2
    batches = options.batch or ((1, 8, 32, 128) if has_gpu else (1, 4))
    requests = held_out_requests(bundle, options.lists or (256 if has_gpu else 12), options.k)
    if options.profile:
        profile(bundle, requests, batches[0], options.profile)
        return 0
    bandwidth = copy_bandwidth(bundle.target.device)
    read = weight_bytes(folder, DTYPES[dtype])
    _say(f"a pass reads {read / 1e6:.1f} MB of weights; a copy moves {bandwidth / 1e9:.0f} GB/s")
    about = {
        "device": card,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "torch": torch.__version__,
        "dtype": dtype,
        "bundle": bundle.info.name,
        "weight_bytes": read,
        "copy_bytes_per_second": round(bandwidth),
    }
    checked = min(len(requests), options.checked or (32 if has_gpu else 6))
    _say(f"decoding {checked} requests with the slow twin")
    twins = twin_lists(bundle, requests[:checked])
    repeats, records = options.repeats or (3 if has_gpu else 1), []
    for batch in batches:
        floor = read / bandwidth
        found = measure(bundle, requests, batch, repeats, twins, dtype=dtype, floor_seconds=floor, say=_say)
        records += [about | record for record in found]
        if options.json:  # after every batch: what is measured is measured
            options.json.write_text(json.dumps(records, indent=1) + "\n")
    return 1 if any(r["mismatches"] or r["invalid"] or r["repeated"] or r["excluded"] for r in records) else 0


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a command's answer


if __name__ == "__main__":
    raise SystemExit(main())
