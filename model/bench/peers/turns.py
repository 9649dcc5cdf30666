"""What the benchmark and a peer's process say to each other: one JSON line in, one JSON line out.

The first line is the Task, answered by the versions used; every further line names how many lists to write, answered
by the seconds taken and the tokens. Between its turns a peer waits, so all can stay loaded and be measured in turn.
Runs inside every peer's own environment: standard library only, nothing else of this project but its neighbours here.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

CONSTRAINED, PLAIN, ASSISTED, ASSISTED_CONSTRAINED = "constrained", "plain", "assisted", "assisted-constrained"
# An n-gram draft looks the last tokens up in its own row and guesses what followed: the same for every peer that can.
LOOKUP_NGRAM, LOOKUP_TOKENS = 2, 4


@dataclass(frozen=True)
class PeerRequest:
    """`prompt`: token IDs. `banned`: the tokens (no separator) of items that must not be listed."""

    prompt: tuple[int, ...]
    banned: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Task:
    """What one peer process does, in one variant, at one batch size.

    `checkpoint` is a Hugging Face folder, `folder` an empty-or-own one for exports; exactly `new_tokens` are written
    per list. `items`: the tokens of every item without its separator.
    """

    checkpoint: str
    folder: str
    variant: str
    batch: int
    threads: int
    new_tokens: int
    separator: int
    items: tuple[tuple[int, ...], ...]
    requests: tuple[PeerRequest, ...]

    def line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> "Task":
        values = json.loads(line)
        values["items"] = tuple(map(tuple, values["items"]))
        values["requests"] = tuple(
            PeerRequest(tuple(r["prompt"]), tuple(map(tuple, r["banned"]))) for r in values["requests"]
        )
        return cls(**values)

    @property
    def longest(self) -> int:
        """Positions of the longest list, prompt included."""
        return max(len(r.prompt) for r in self.requests) + self.new_tokens

    @property
    def constrained(self) -> bool:
        return self.variant in (CONSTRAINED, ASSISTED_CONSTRAINED)

    @property
    def assisted(self) -> bool:
        return self.variant in (ASSISTED, ASSISTED_CONSTRAINED)


Decode = Callable[[Sequence[PeerRequest]], list[list[int]]]


def groups(requests: Sequence[PeerRequest], size: int) -> Iterator[Sequence[PeerRequest]]:
    """For peers whose batches are formed once: `requests` in order, `size` at a time."""
    return (requests[i : i + size] for i in range(0, len(requests), size))


def equal_groups(requests: Sequence[PeerRequest], size: int) -> Iterator[list[int]]:
    """For peers that cannot batch prompts of different lengths: indices of requests, at most `size` at a time."""
    by_length: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        by_length.setdefault(len(request.prompt), []).append(index)
    for indices in by_length.values():
        yield from (indices[i : i + size] for i in range(0, len(indices), size))


def take_turns(prepare: Callable[[Task], Decode], *packages: str) -> None:
    """A peer's whole program: prepare once, decode at every turn, until the input ends. `packages` are reported."""
    # Engines write to standard output as they please, from C too: the answers keep the real one for themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    task = Task.from_line(sys.stdin.readline())
    decode = prepare(task)
    versions = {"python": ".".join(map(str, sys.version_info[:3])), **{name: version(name) for name in packages}}
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for turn in sys.stdin:
        requests = task.requests[: json.loads(turn)["lists"]]
        started = time.perf_counter()
        tokens = decode(requests)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)
    # Some engines hang while their threads are taken apart; everything is said.
    os._exit(0)


def export_once(folder: Path, export: Callable[[Path], None]) -> Path:
    """`folder` as `export` filled it, in this run or an earlier one; a half-made export is never used."""
    if not folder.exists():
        making = folder.with_name(folder.name + f".{os.getpid()}")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        export(making)
        making.rename(folder)
    return folder
