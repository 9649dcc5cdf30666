"""`padrec bench trie`: what the item trie costs to build, to hold and to ask, from ten thousand items to ten million.

A mask step asks which codes may follow at one node a row, under a filter that half of the items pass, 100 exclusions
and 5 items emitted on the path. `DictionaryTrie` is the usual answer, nested dictionaries; it is asked the same, and a
search through all items checks both. Knows made-up catalogs; no models, data sets or sockets.

Shapes: B rows, N items, L levels, C codes a level, E exclusions, P emitted, S steps, R repeats.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model.bench.decode import machine
from model.item_trie import Availability, Children, ItemTrie
from model.semantic_id import Vocabulary

Tensor = torch.Tensor
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Record = dict[str, Any]
Step = Callable[[], Any]

LEVELS, CODEBOOK = 4, 256
EXCLUDED, EMITTED = 100, 5
STEPS = 32  # different questions in a timing, so that a row's nodes are as cold as in serving
SEARCHED = 8  # answers checked by looking at every item
FEWEST_ITEMS = 1000  # fewer leave too little to exclude
DICTIONARY_LIMIT = 1_000_000  # at ten million items nested dictionaries take several gigabytes
PLACES = ("mixed", "depth 0", "depth 1", "depth 2", "depth 3")


def made_up_codes(count: int, seed: int = 0) -> Integers:
    """Semantic IDs [N, L] as residual quantisation leaves them: codebooks used unevenly (log-normal shares), and a last
    level that only tells equal ones apart. Raises ValueError when there are too many items for that."""
    rng = np.random.default_rng(seed)
    cell = np.zeros(count, dtype=np.int64)
    for _ in range(LEVELS - 1):
        share = np.exp(rng.normal(0.0, 0.5, CODEBOOK))
        cell = cell * CODEBOOK + rng.choice(CODEBOOK, count, p=share / share.sum())
    cell.sort()
    first = np.flatnonzero(np.diff(cell, prepend=-1))
    rank = np.arange(count) - np.repeat(first, np.diff(first, append=count))
    if rank.max() >= CODEBOOK:
        raise ValueError(f"{count} items are too many for {LEVELS} levels of {CODEBOOK} codes")
    levels = [cell // CODEBOOK ** (LEVELS - 2 - level) % CODEBOOK for level in range(LEVELS - 1)]
    codes = np.stack([*levels, rank], axis=1)
    rng.shuffle(codes)
    return codes


class Questions(NamedTuple):
    """What every row may not emit, and where it stands: `excluded` [B, E] and `emitted` [B, P] leaves, all distinct
    and passing the filter, and for each of S steps a leaf `below` the node asked about and its `depth`, [S, B]."""

    excluded: Integers
    emitted: Integers
    below: Integers
    depth: Integers


def made_up_questions(passing: Mask, batch: int, place: str, rng: np.random.Generator) -> Questions:
    """Half of the nodes lie above something the row may not emit, so that this decides answers."""
    leaves = np.flatnonzero(passing)
    gone = np.stack([rng.choice(leaves, EXCLUDED + EMITTED, replace=False) for _ in range(batch)])
    shape = (STEPS, batch)
    below = np.where(
        rng.random(shape) < 0.5,
        gone[np.arange(batch), rng.integers(0, gone.shape[1], shape)],
        rng.integers(0, len(passing), shape),
    )
    mixed = np.add.outer(np.arange(STEPS), np.arange(batch)) % LEVELS
    depth = mixed if place == "mixed" else np.full(shape, int(place.removeprefix("depth ")))
    return Questions(np.sort(gone[:, :EXCLUDED], axis=1), gone[:, EXCLUDED:], below, depth)


class Arrays:
    """`ItemTrie` with one filter in use, counted next to "every item"."""

    def __init__(self, trie: ItemTrie, passing: Mask) -> None:
        self.trie = trie
        self.counts = torch.stack([trie.passing(), trie.passing(passing)])

    def steps(self, questions: Questions) -> list[Step]:
        """The S mask steps, ready to be taken."""
        may = Availability(
            self.counts, torch.ones(len(questions.excluded), dtype=torch.int64), torch.from_numpy(questions.excluded)
        )
        path = torch.from_numpy(questions.emitted).unsqueeze(1)
        nodes = torch.from_numpy(self._nodes(questions)).unsqueeze(-1)
        return [partial(self.trie.children, asked, may, path) for asked in nodes]

    def _nodes(self, questions: Questions) -> Integers:
        """The nodes [S, B] above leaves at given depths."""
        nodes = np.empty_like(questions.below)
        leaf_start, depths = self.trie.leaf_start.numpy(), self.trie.depth.numpy()
        for depth in range(LEVELS):
            first, sentinel = np.searchsorted(depths, np.array([depth, depth + 1], dtype=depths.dtype)) - (0, 1)
            here = questions.depth == depth
            after = np.searchsorted(leaf_start[first:sentinel], questions.below[here], "right")
            nodes[here] = first + after - 1
        return nodes

    def mask(self, children: Children) -> Tensor:
        """Legal codes as a mask [B, C], the form in which answers are compared."""
        nodes, legal = children.nodes[:, 0], children.available[:, 0] > 0
        mask = torch.zeros(len(nodes), CODEBOOK, dtype=torch.bool)
        row, child = legal.nonzero(as_tuple=True)
        mask[row, self.trie.code[nodes[row, child]].long()] = True
        return mask

    @property
    def num_bytes(self) -> int:
        return sum(table.nbytes for table in vars(self.trie).values() if isinstance(table, Tensor | np.ndarray))


class DictionaryNode:
    """`children` by code, and how many items below pass the filter."""

    __slots__ = ("children", "passing")

    def __init__(self) -> None:
        self.children: dict[int, DictionaryNode] = {}
        self.passing = 0


class DictionaryTrie:
    """Nested dictionaries. Every node keeps the count of one filter; what a row may not emit is counted once along the
    paths to it, in a dictionary of the row's own, so that a step only compares two numbers a child."""

    def __init__(self, codes: npt.NDArray[np.integer]) -> None:
        self.root = DictionaryNode()
        for item in codes.tolist():
            node = self.root
            for code in item:
                child = node.children.get(code)
                if child is None:
                    child = node.children[code] = DictionaryNode()
                node = child

    def count(self, codes: npt.NDArray[np.integer], passing: Mask) -> None:
        """Count a filter, given which of the items [N, L] pass; once, on a new trie."""
        for item in codes[passing].tolist():
            for node in self.path(item):
                node.passing += 1

    def path(self, codes: Sequence[int]) -> list[DictionaryNode]:
        """The nodes from the root to the end of `codes`."""
        nodes = [self.root]
        for code in codes:
            nodes.append(nodes[-1].children[code])
        return nodes

    def gone(self, items: Sequence[Sequence[int]]) -> dict[DictionaryNode, int]:
        """How many of `items` lie below each node on their paths."""
        counts: dict[DictionaryNode, int] = {}
        for item in items:
            for node in self.path(item):
                counts[node] = counts.get(node, 0) + 1
        return counts

    def legal(self, nodes: Sequence[DictionaryNode], gone: Sequence[dict[DictionaryNode, int]]) -> Tensor:
        """Legal codes of each row's node as a mask [B, C]."""
        places = [
            row * CODEBOOK + code
            for row, (node, without) in enumerate(zip(nodes, gone, strict=True))
            for code, child in node.children.items()
            if child.passing > without.get(child, 0)
        ]
        mask = torch.zeros(len(nodes) * CODEBOOK, dtype=torch.bool)
        mask[torch.tensor(places, dtype=torch.int64)] = True
        return mask.view(len(nodes), CODEBOOK)

    def steps(self, questions: Questions, codes: npt.NDArray[np.integer]) -> list[Step]:
        leaves = np.concatenate([questions.excluded, questions.emitted], axis=1)
        gone = [self.gone(codes[row].tolist()) for row in leaves]
        nodes = [
            [self.path(codes[leaf, :depth].tolist())[-1] for leaf, depth in zip(below, depths, strict=True)]
            for below, depths in zip(questions.below, questions.depth, strict=True)
        ]
        return [partial(self.legal, asked, gone) for asked in nodes]

    @property
    def num_bytes(self) -> int:
        total, waiting = 0, [self.root]
        while waiting:
            node = waiting.pop()
            total += sys.getsizeof(node) + sys.getsizeof(node.children)
            waiting += node.children.values()
        return total


@dataclass(frozen=True)
class Catalog:
    """One made-up catalog: `codes` [N, L] in the order of leaves, which of them pass the filter, the tries over it and
    what each of them cost."""

    codes: npt.NDArray[np.integer]
    passing: Mask
    arrays: Arrays
    dictionary: DictionaryTrie | None
    costs: dict[str, Record]

    def steps(self, questions: Questions) -> dict[str, list[Step]]:
        """S mask steps of every trie."""
        steps = {"arrays": self.arrays.steps(questions)}
        if self.dictionary:
            steps["dictionary"] = self.dictionary.steps(questions, self.codes)
        return steps

    def disagreements(self, questions: Questions, steps: dict[str, list[Step]]) -> int:
        """Answers that are not the dictionary's, and for the first few, not those of a search through all items."""
        wrong = 0
        for number, step in enumerate(steps["arrays"]):
            mask = self.arrays.mask(step())
            if "dictionary" in steps:
                wrong += int((mask != steps["dictionary"][number]()).any(1).sum())
            if number < SEARCHED:
                row = number % len(mask)
                wrong += mask[row].nonzero()[:, 0].tolist() != self._search(questions, number, row)
        return wrong

    def _search(self, questions: Questions, number: int, row: int) -> list[int]:
        """The slow twin: legal codes of one answer by looking at every item."""
        depth = int(questions.depth[number, row])
        alive = self.passing.copy()
        alive[questions.excluded[row]] = False
        alive[questions.emitted[row]] = False
        for level, code in enumerate(self.codes[questions.below[number, row], :depth]):
            alive &= self.codes[:, level] == code
        found: list[int] = np.unique(self.codes[alive, depth]).tolist()
        return found


def build(count: int, say: Callable[[str], None]) -> Catalog:
    """The tries over a made-up catalog of `count` items, timed."""
    made_up = made_up_codes(count)
    passing = np.random.default_rng(1).random(count) < 0.5
    clock = [time.perf_counter()]
    trie = ItemTrie(made_up, Vocabulary.compact((CODEBOOK,) * LEVELS))
    clock.append(time.perf_counter())
    arrays = Arrays(trie, passing)
    clock.append(time.perf_counter())
    costs = {"arrays": _costs(count, clock, arrays.num_bytes)}
    dictionary = None
    if count <= DICTIONARY_LIMIT:
        clock = [time.perf_counter()]
        dictionary = DictionaryTrie(made_up)
        clock.append(time.perf_counter())
        dictionary.count(trie.sorted_codes, passing)
        clock.append(time.perf_counter())
        costs["dictionary"] = _costs(count, clock, dictionary.num_bytes)
    for name, cost in costs.items():
        say(
            f"{name:10} {count:>10,} items  built in {cost['build_seconds']:.2f} s, a filter in "
            f"{cost['filter_seconds']:.3f} s  {cost['bytes'] / 1e6:.1f} MB, {cost['bytes_per_item']:.0f} bytes an item"
        )
    if dictionary is None:
        say(f"dictionary {count:>10,} items  left out: nested dictionaries would take gigabytes")
    return Catalog(trie.sorted_codes, passing, arrays, dictionary, costs)


def _costs(count: int, clock: Sequence[float], num_bytes: int) -> Record:
    return {
        "items": count,
        "build_seconds": round(clock[1] - clock[0], 4),
        "filter_seconds": round(clock[2] - clock[1], 4),
        "bytes": num_bytes,
        "bytes_per_item": round(num_bytes / count, 1),
    }


def bench_trie(items: Sequence[int], batches: Sequence[int], repeats: int, say: Callable[[str], None]) -> list[Record]:
    """Catalogs of all sizes side by side, every repeat asking every trie once: `step_ms` is the mean over the S steps
    of each one's median over repeats (so with the fastest and the slowest repeat: `step_ms_min`, `step_ms_max`)."""
    catalogs = [build(count, say) for count in items]
    gc.collect()
    gc.freeze()  # a collection that walks millions of dictionaries would end up in somebody's step
    try:
        records = []
        for batch in batches:
            for place in PLACES:
                found = _bench(catalogs, batch, place, repeats)
                for record in found:
                    say(line(record))
                records += found
        return records
    finally:
        gc.unfreeze()


def _bench(catalogs: Sequence[Catalog], batch: int, place: str, repeats: int) -> list[Record]:
    rng = np.random.default_rng(2)
    timed: list[tuple[Record, list[Step]]] = []
    for catalog in catalogs:
        questions = made_up_questions(catalog.passing, batch, place, rng)
        steps = catalog.steps(questions)
        wrong = catalog.disagreements(questions, steps)
        timed += [
            ({**catalog.costs[name], "trie": name, "batch": batch, "place": place, "disagreements": wrong}, steps[name])
            for name in steps
        ]
    seconds = np.zeros((len(timed), repeats, STEPS))
    for repeat in range(repeats):
        for times, (_, taken) in zip(seconds, timed, strict=True):
            for number, step in enumerate(taken):
                started = time.perf_counter()
                step()
                times[repeat, number] = time.perf_counter() - started
    smallest: dict[str, float] = {}
    records = [record for record, _ in timed]
    for times, record in zip(1e3 * seconds, records, strict=True):
        median = float(np.median(times, axis=0).mean())
        record["step_ms"] = round(median, 5)
        record["step_ms_min"] = round(float(times.min(axis=0).mean()), 5)
        record["step_ms_max"] = round(float(times.max(axis=0).mean()), 5)
        record["growth"] = round(median / smallest.setdefault(record["trie"], median), 3)
        record.update(machine())
    return records


def line(record: Record) -> str:
    """One record for people."""
    return (
        f"{record['trie']:10} {record['items']:>10,} items  batch {record['batch']:3}  {record['place']:7}  "
        f"{record['step_ms']:8.4f} ms/step [{record['step_ms_min']:.4f}-{record['step_ms_max']:.4f}]  "
        f"x{record['growth']:.2f} of the smallest  disagreements {record['disagreements']}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`padrec bench trie`. Exit code 1 when two tries answer differently; 2: a catalog that cannot be made up."""
    parser = argparse.ArgumentParser(prog="padrec bench trie", description=__doc__)
    parser.add_argument("--items", type=_numbers, default=[10**4, 10**5, 10**6, 10**7], metavar="N,N,...")
    parser.add_argument("--batches", type=_numbers, default=[1, 32, 256], metavar="B,B,...")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(argv)
    if min(options.items) < FEWEST_ITEMS or min(*options.batches, options.repeats) < 1:
        return _refuse(f"--items from {FEWEST_ITEMS} on, --batches and --repeats from 1 on")
    torch.set_num_threads(options.threads)
    try:
        records = bench_trie(sorted(options.items), options.batches, options.repeats, _say)
    except ValueError as exc:
        return _refuse(str(exc))
    for record in records:
        if (record["place"], record["items"]) == ("mixed", max(options.items)):
            _say(f"batch {record['batch']:3}: a step of {record['trie']} grows x{record['growth']:.2f}")
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return 1 if any(record["disagreements"] for record in records) else 0


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _refuse(why: str) -> int:
    print(f"padrec bench trie: {why}", file=sys.stderr)  # noqa: T201 - a command's answer
    return 2


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a command's answer
