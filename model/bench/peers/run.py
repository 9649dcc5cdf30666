"""`padrec bench peers`: other engines and ours, in one run, on the same target, the same requests and threads.

Every engine is a process of its own environment (`make peers`) that loads the bundle's target once and then takes
turns with the others, so that a slow minute of the machine falls on all. A list of k items is k times (codes and
separator) tokens for everybody; prefill is part of every list's time. An engine that is not installed is skipped and
named. Outputs are compared token for token: constrained ones with the slow twin's lists, the others with a plain
greedy loop over the open vocabulary. Knows the engines' names and limits; how to drive one is in its own file here.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from model.bench.decode import NEAR_TIES, Record, Variant, held_out_requests, machine, twin_lists, variants
from model.bench.peers.install import ENVIRONMENTS, installed
from model.bench.peers.turns import (
    ASSISTED,
    ASSISTED_CONSTRAINED,
    CONSTRAINED,
    PLAIN,
    PeerRequest,
    Task,
)
from model.bundle import Bundle, BundleError, load_bundle
from model.data.movielens import DataError
from model.decoding.offline import decode_all
from model.decoding.request import ListRequest
from model.semantic_id import Vocabulary

ITEMS_ONLY = "items+history+no-repeat"
OPEN = "none"
TURN_SECONDS = 1800.0  # an engine that answers no sooner is ended

Tokens = list[list[int]]


@dataclass(frozen=True)
class Peer:
    """An engine. `package` names what it imports and its file here; `variants` maps each to whether it batches."""

    package: str
    variants: Mapping[str, bool]
    limits: str


PEERS = (
    Peer(
        "transformers",
        {CONSTRAINED: True, PLAIN: True, ASSISTED_CONSTRAINED: False, ASSISTED: False},
        "a Python function of each row's tokens: items, history and no-repeat, at any batch; assisted: batch 1 only, "
        "draft here: prompt lookup",
    ),
    Peer(
        "onnxruntime_genai",
        {CONSTRAINED: True, PLAIN: True, ASSISTED: False},
        "logits go through Python at every step: items, history and no-repeat, at any batch; grammars are of text and "
        "know no history; its n-gram draft: batch 1, no constraint",
    ),
    Peer(
        "openvino_genai",
        {PLAIN: True, ASSISTED: True},
        "grammars of text only: neither items nor history nor no-repeat; its prompt-lookup draft: any batch",
    ),
    Peer(
        "vllm",
        {CONSTRAINED: True, PLAIN: True, ASSISTED: True},
        "a logits processor per row in Python: items, history and no-repeat, at any batch, never with speculation; its "
        "n-gram draft: any batch",
    ),
)


class PeerFailed(RuntimeError):
    """A peer that ended or did not answer; the message is the last it said."""


class PeerProcess:
    """One engine in one variant at one batch size, loaded and waiting for its turns."""

    def __init__(self, python: Path, package: str, task: Task) -> None:
        """Start it and wait until it is ready. Raises PeerFailed."""
        threads = str(task.threads)
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[3]),  # for turns and item_prefixes, beside the engine's file
            "HF_HUB_OFFLINE": "1",
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads),
        }
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self.process = subprocess.Popen(
            [str(python), "-m", f"model.bench.peers.{package}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            env=environment,
        )
        try:
            self.versions: dict[str, str] = self._ask(task.line())["versions"]
        except PeerFailed:
            self.close()
            raise

    def turn(self, lists: int) -> tuple[float, Tokens]:
        """Write the first `lists` lists: seconds, tokens of each. Raises PeerFailed."""
        answer = self._ask(json.dumps({"lists": lists}))
        return float(answer["seconds"]), answer["tokens"]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.said.close()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        late = threading.Timer(TURN_SECONDS, self.process.kill)
        late.start()
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            late.cancel()
        if not answer:
            self.process.wait()
            self.said.seek(0)
            lines = self.said.read().decode(errors="replace").strip().splitlines()
            raise PeerFailed(lines[-1] if lines else f"ended with status {self.process.returncode}")
        found: dict[str, Any] = json.loads(answer)
        return found


def python_for(package: str, environments: Path) -> Path | None:
    """The interpreter of the peer's own environment; else this one, where it has the package; else None."""
    if installed(package, environments):
        return (environments / package / "bin" / "python").absolute()
    return Path(sys.executable) if importlib.util.find_spec(package) else None


def item_tokens(vocabulary: Vocabulary, items: Sequence[Sequence[int]]) -> list[int]:
    """Tokens of a list of items, separators included."""
    return [token for codes in items for token in vocabulary.list_item_tokens(tuple(codes))]


def peer_task(
    bundle: Bundle, checkpoint: Path, folder: Path, requests: Sequence[ListRequest], batch: int, threads: int
) -> Task:
    """The task all peers share, as the variant `plain`."""
    vocabulary = bundle.target.vocabulary

    def bare(codes: Sequence[int]) -> tuple[int, ...]:
        return tuple(vocabulary.item_tokens(tuple(codes))[:-1])

    return Task(
        checkpoint=str(checkpoint.absolute()),
        folder=str(folder.absolute()),
        variant=PLAIN,
        batch=batch,
        threads=threads,
        new_tokens=requests[0].k * vocabulary.tokens_per_item,
        separator=vocabulary.list_separator,
        items=tuple(bare(item.codes) for item in bundle.catalog.items),
        requests=tuple(
            PeerRequest(
                tuple(vocabulary.list_prompt(r.history[-bundle.info.max_history_items :])),
                tuple(bare(codes) for codes in dict.fromkeys((*r.history, *r.exclude))),
            )
            for r in requests
        ),
    )


@dataclass(frozen=True)
class Reference:
    """What the lists must be, and how close (nats) each came to being another."""

    tokens: Tokens
    margins: list[float]

    def compare(self, written: Tokens) -> Record:
        """Fraction of identical lists; how many others are near-ties, and how many differ."""
        counts = {"identical": 0, "near_ties": 0, "mismatches": 0}
        for mine, right, margin in zip(written, self.tokens, self.margins, strict=True):
            counts[
                "identical" if mine == right else "near_ties" if margin < NEAR_TIES[torch.float32] else "mismatches"
            ] += 1
        return {**counts, "identical": counts["identical"] / len(written)}


def constrained_reference(bundle: Bundle, requests: Sequence[ListRequest]) -> Reference:
    """The slow twin's lists."""
    twins, vocabulary = twin_lists(bundle, requests), bundle.target.vocabulary
    found = [twins[r.request_id] for r in requests]
    return Reference([item_tokens(vocabulary, [i.codes for i in x.items]) for x, _ in found], [m for _, m in found])


@torch.no_grad()
def open_reference(checkpoint: Path, task: Task) -> Reference:
    """Greedy decoding over the whole vocabulary, one request and one token at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    tokens, margins = [], []
    for request in task.requests:
        written: list[int] = []
        margin, new, cache = float("inf"), list(request.prompt), None
        for _ in range(task.new_tokens):
            output = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            best = output.logits[0, -1].log_softmax(-1).topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            new = [int(best.indices[0])]
            written += new
        tokens.append(written)
        margins.append(margin)
    return Reference(tokens, margins)


@dataclass
class Contender:
    """Who takes turns: `turn(lists)` gives seconds and tokens of each list."""

    record: Record
    turn: Callable[[int], tuple[float, Tokens]]
    seconds: list[float] = field(default_factory=list)
    tokens: Tokens = field(default_factory=list)
    failed: str = ""

    def take(self, lists: int, *, counts: bool = True) -> None:
        """One turn, unless it failed before."""
        if self.failed:
            return
        try:
            seconds, self.tokens = self.turn(lists)
        except PeerFailed as exc:
            self.failed = str(exc)
            return
        if counts:
            self.seconds.append(seconds / lists)


def our_contender(bundle: Bundle, variant: Variant, requests: Sequence[ListRequest]) -> Contender:
    vocabulary = bundle.target.vocabulary

    def turn(lists: int) -> tuple[float, Tokens]:
        started = time.perf_counter()
        results = decode_all(variant.decoder, requests[:lists]).results
        seconds = time.perf_counter() - started
        found = [[item.codes for item in results[r.request_id].items] for r in requests[:lists]]
        return seconds, [item_tokens(vocabulary, codes) for codes in found]

    versions = {"torch": torch.__version__}
    return Contender({"peer": "padrec", "variant": variant.name, "constrained": ITEMS_ONLY, "versions": versions}, turn)


def peer_contenders(peer: Peer, python: Path, task: Task, processes: ExitStack) -> list[Contender]:
    """One loaded process for each variant that can run at the task's batch size."""
    made = []
    for variant, batches in peer.variants.items():
        if task.batch > 1 and not batches:
            continue
        asked = replace(task, variant=variant, folder=str(Path(task.folder) / peer.package))
        record = {"peer": peer.package, "variant": variant, "constrained": ITEMS_ONLY if asked.constrained else OPEN}
        try:
            process = PeerProcess(python, peer.package, asked)
        except PeerFailed as exc:
            made.append(Contender(record, _never, failed=str(exc)))
            continue
        processes.callback(process.close)
        made.append(Contender({**record, "versions": process.versions}, process.turn))
    return made


def _never(lists: int) -> tuple[float, Tokens]:
    raise AssertionError("a contender that failed takes no turns")


def bench_peers(
    bundle: Bundle,
    checkpoint: Path,
    requests: Sequence[ListRequest],
    peers: Sequence[Peer],
    environments: Path,
    batches: Sequence[int],
    repeats: int,
    threads: int,
    say: Callable[[str], None],
) -> list[Record]:
    """Medians of interleaved repeats, per engine, variant and batch size."""
    pythons = {peer.package: python_for(peer.package, environments) for peer in peers}
    for package, python in pythons.items():
        if python is None:
            say(f"{package}: not installed, skipped (make peers)")
    say("decoding every request with the slow twins")
    task = peer_task(bundle, checkpoint, environments / "exports" / bundle.info.version, requests, 1, threads)
    references = {ITEMS_ONLY: constrained_reference(bundle, requests), OPEN: open_reference(checkpoint, task)}
    records = []
    for batch in batches:
        asked = replace(task, batch=batch)
        with ExitStack() as processes:
            ours = variants(bundle, batch, requests[0].k, ("plain", "plain-forced", "padrec"))
            contenders = [our_contender(bundle, variant, requests) for variant in ours]
            for peer in peers:
                python = pythons[peer.package]
                if python:
                    contenders += peer_contenders(peer, python, asked, processes)
            for contender in contenders:
                contender.take(min(max(2, batch), len(requests)), counts=False)
            for _ in range(repeats):
                for contender in contenders:
                    contender.take(len(requests))
        for contender in contenders:
            record = {**contender.record, "batch": batch, "lists": len(requests), **machine(), "threads": threads}
            if contender.failed:
                records.append({**record, "failed": contender.failed})
            else:
                milliseconds = [1e3 * s for s in contender.seconds]
                records.append(
                    {
                        **record,
                        "ms_per_list": round(statistics.median(milliseconds), 3),
                        "ms_min": round(min(milliseconds), 3),
                        "ms_max": round(max(milliseconds), 3),
                        **references[record["constrained"]].compare(contender.tokens),
                    }
                )
            say(line(records[-1]))
    for peer in peers:
        if pythons[peer.package]:
            say(f"{peer.package} can constrain: {peer.limits}")
    return records


def line(record: Record) -> str:
    """One record for people."""
    who = f"{record['peer']:18} {record['variant']:20} {record['constrained']:23} batch {record['batch']:3}"
    if "failed" in record:
        return f"{who}  failed: {record['failed']}"
    return (
        f"{who}  {record['ms_per_list']:8.2f} ms/list [{record['ms_min']:.2f}-{record['ms_max']:.2f}]  "
        f"identical {record['identical']:.3f}  mismatches {record['mismatches']} near-ties {record['near_ties']}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`padrec bench peers`. Exit code 1 when an engine failed or wrote other tokens than its twin; 2: bad input."""
    parser = argparse.ArgumentParser(prog="padrec bench peers", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("model/bundles/movielens-100k"))
    parser.add_argument("--data", type=Path, default=Path(".data/ml-100k"))
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="where `make peers` put them")
    parser.add_argument("--peers", nargs="+", choices=[p.package for p in PEERS], help="only these (default: all)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--users", type=int, default=32, help="first so many held-out users (0: all)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    try:
        bundle = load_bundle(options.bundle)
        requests = held_out_requests(bundle, options.data, options.k, options.users)
    except (BundleError, DataError) as exc:
        print(f"padrec bench peers: {exc}", file=sys.stderr)  # noqa: T201 - a command's answer
        return 2
    records = bench_peers(
        bundle,
        options.bundle / "target",
        requests,
        [p for p in PEERS if not options.peers or p.package in options.peers],
        options.environments,
        options.batch,
        options.repeats,
        options.threads,
        _say,
    )
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return 1 if any("failed" in r or r["mismatches"] for r in records) else 0


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a command's answer
