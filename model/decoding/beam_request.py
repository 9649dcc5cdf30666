"""What is asked of a beam search and what it answers. Knows nothing of tensors, sockets or queues."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from model.decoding.request import CategoryFilter, ListResult, RangeFilter
from model.semantic_id import Codes

Verification = Literal["strict", "relaxed"]
MAX_BEAMS = 200


@dataclass(frozen=True)
class BeamRequest:
    """The `k` most likely next items, by beam search of width `k`. `deadline` in seconds of `time.monotonic()`.

    `verification` "strict" gives what the target's own beam search gives. "relaxed" keeps what the draft sampled with
    probability min(1, target / draft): sooner, other items, and labelled so; `replacement` says how the draft draws,
    and equal seeds draw equal items. Where no draft was asked, relaxed is strict."""

    request_id: str
    history: tuple[Codes, ...]
    k: int
    exclude: tuple[Codes, ...] = ()
    exclude_history: bool = True
    filters: Mapping[str, CategoryFilter | RangeFilter] = field(default_factory=dict)
    speculation: bool = True
    verification: Verification = "strict"
    replacement: bool = False
    seed: int | None = None
    deadline: float = float("inf")


@dataclass(frozen=True)
class BeamResult(ListResult):
    """Items best first, ties by lowest code. Of `speculation`, rounds are the target's passes after the prompt's,
    draft tokens the nodes that rode along unasked (guessed or exhaustive), accepted tokens the levels they saved a pass
    for, forced tokens the levels at which no beam had a choice left. `lossy`: verification was relaxed."""

    lossy: bool = False


@dataclass(frozen=True)
class BeamStats:
    """What one pass over beams did, for metrics. `draft_seconds`: what drafts took since the pass before (they search
    when a request is admitted), `verify_seconds`: the target's pass and the choices, `prompts_read`: rows whose prompts
    were read before it."""

    rows: int
    draft_seconds: float
    verify_seconds: float
    target_tokens: int
    draft_tokens: int
    accepted_levels: int
    forced_levels: int
    lossy_rows: int
    prompts_read: int
