"""What is asked of a decoder and what it answers. Knows nothing of tensors, sockets or queues."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from model.semantic_id import Codes


class InvalidRequest(ValueError):
    """A request that cannot be decoded. `pointer` is a JSON pointer to the field, `reason` says why."""

    def __init__(self, pointer: str, reason: str) -> None:
        super().__init__(f"{pointer}: {reason}")
        self.pointer, self.reason = pointer, reason


@dataclass(frozen=True)
class CategoryFilter:
    """Items with at least one of these values of a category attribute."""

    any_of: tuple[str, ...]


@dataclass(frozen=True)
class RangeFilter:
    """Items whose number attribute lies in [minimum, maximum]; None is open."""

    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True)
class ListRequest:
    """One list to write. `deadline` in seconds of `time.monotonic()`.

    `temperature` 0 is greedy. Above, every code is drawn from softmax(logits / temperature) over the legal children,
    cut to the smallest set of most likely ones whose mass reaches `top_p`. Equal seeds give equal lists, and a longer
    list starts with the shorter one; without a `seed` the decoder takes a fresh one."""

    request_id: str
    history: tuple[Codes, ...]
    k: int
    exclude: tuple[Codes, ...] = ()
    exclude_history: bool = True
    filters: Mapping[str, CategoryFilter | RangeFilter] = field(default_factory=dict)
    speculation: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    deadline: float = float("inf")


@dataclass(frozen=True)
class ScoredItem:
    """`score`: sum of the log-probabilities (nats) of the item's tokens, renormalised over legal children. Temperature
    and top-p change which items are drawn and not what an item scores."""

    codes: Codes
    score: float


@dataclass(frozen=True)
class SpeculationStats:
    """Counts over one list. Acceptance length: tokens gained per round, the bonus included, forced tokens not."""

    rounds: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    forced_tokens: int = 0

    @property
    def acceptance_length(self) -> float:
        return 1.0 + self.accepted_tokens / self.rounds if self.rounds else 0.0


@dataclass(frozen=True)
class ListResult:
    """`degraded` holds (code, detail) pairs; empty when the answer is all that was asked for."""

    request_id: str
    items: tuple[ScoredItem, ...]
    speculation: SpeculationStats
    history_used: int
    degraded: tuple[tuple[str, str], ...] = ()
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class RoundStats:
    """What a round did, for metrics; before it, the prompts of `prompts_read` rows were read together. Slots and steps
    index the per-slot and per-step counts; `tried` [slot][step] counts rows that began at a slot and came to a step of
    their tree, `passed` those that came beyond."""

    rows: int
    draft_seconds: float
    verify_seconds: float
    target_tokens: int
    draft_tokens: int
    accepted_tokens: int
    forced_tokens: int
    drafted_by_step: tuple[int, ...]
    accepted_by_step: tuple[int, ...]
    drafted_by_slot: tuple[int, ...]
    accepted_by_slot: tuple[int, ...]
    tried: tuple[tuple[int, ...], ...]
    passed: tuple[tuple[int, ...], ...]
    prompts_read: int = 0
