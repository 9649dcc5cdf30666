"""`make bench-gpu` (`python3 -m model.bench.gpu`): the decode benchmark on a CUDA device, with nothing installed.

Needs torch, transformers, safetensors and numpy alone. Requests are made from the bundle's own catalog, so no data set
is needed. Without a CUDA device it says so and runs on the CPU, few and small, to show that the command works.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from model.bench.decode import bench_decode
from model.bundle import Bundle, BundleError, load_bundle
from model.decoding.request import ListRequest


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


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 when an output differs from the slow twin's beyond near-ties; 2: no usable bundle."""
    parser = argparse.ArgumentParser(prog="make bench-gpu", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("model/bundles/movielens-100k"))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(argv)
    has_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if has_gpu else "cpu (no CUDA device found: these are not GPU figures)"
    _say(f"device: {device}, torch {torch.__version__}")
    torch.backends.cuda.matmul.allow_tf32 = False  # exactness is claimed for fp32 proper
    try:
        bundle = load_bundle(options.bundle, dtype=options.dtype, device="cuda" if has_gpu else "cpu")
    except BundleError as exc:
        print(f"bench-gpu: {exc}", file=sys.stderr)  # noqa: T201 - a command's answer
        return 2
    requests = catalog_requests(bundle, 128 if has_gpu else 8, 10)
    batches = (1, 8, 32, 128) if has_gpu else (1, 8)
    records = bench_decode(bundle, requests, batches, options.repeats if has_gpu else 1, _say)
    for record in records:
        record["device"] = device
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return 1 if any(r["mismatches"] or r["invalid"] or r["repeated"] for r in records) else 0


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a command's answer


if __name__ == "__main__":
    raise SystemExit(main())
