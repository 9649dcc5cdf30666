"""Wire bodies: public (`Recommend*`, item IDs) and internal between API and worker (`Generate*`, semantic IDs).

Every field is bounded here; settings may bound them tighter. Knows no catalog: whether an attribute exists is
checked where the catalog is.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.json_schema import WithJsonSchema

from service.errors import FieldError, Invalid, pointer
from service.settings import Settings

MAX_NAMED_ERRORS = 20

_NO_CONTROLS = r"^[^\x00-\x1f\x7f-\x9f]+$"
ItemId = Annotated[str, Field(min_length=1, max_length=128, pattern=_NO_CONTROLS)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=_NO_CONTROLS)]
Codes = Annotated[list[Annotated[int, Field(ge=0, le=65535)]], Field(min_length=1, max_length=16)]
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=2**53 - 1)]  # what every JSON reader keeps exactly
Strategy = Literal["list", "beam"]
Verification = Literal["strict", "relaxed"]
MAX_BEAMS = 200
_STRATEGIES = (
    "`list`: a list written as a whole, each item with regard to those before it. `beam`: the k most likely next items."
)
_VERIFICATIONS = (
    "For `beam`: `strict` gives exactly what the model's own beam search gives. `relaxed` may be sooner and gives "
    "other items; an answer that is one says so in `model.verification`."
)


Body = TypeVar("Body", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Filter(_Body):
    """Keeps items whose category is one of `any`, or whose number lies in [`min`, `max`]."""

    any: Annotated[list[ItemId], Field(min_length=1, max_length=100)] | None = None
    min: Annotated[float, Field(allow_inf_nan=False)] | None = None
    max: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "Filter":
        is_range = self.min is not None or self.max is not None
        if (self.any is not None) == is_range:
            raise ValueError('should be {"any": [...]} or {"min": number, "max": number}')
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min should not exceed max")
        return self


def _unwrap_items(value: object) -> object:
    """`{"item_id": "7"}` counts as `"7"`; anything else is left for the item check to refuse."""
    if not isinstance(value, list):
        return value
    return [v["item_id"] if isinstance(v, dict) and len(v) == 1 and "item_id" in v else v for v in value]


_ITEM_SCHEMA: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": 128, "pattern": _NO_CONTROLS}
_HISTORY_SCHEMA: dict[str, Any] = {
    "type": "array",
    "maxItems": 10_000,
    "description": "Items the user interacted with, oldest first.",
    "items": {
        "anyOf": [
            _ITEM_SCHEMA,
            {
                "type": "object",
                "properties": {"item_id": _ITEM_SCHEMA},
                "required": ["item_id"],
                "additionalProperties": False,
            },
        ]
    },
}

RECOMMEND_EXAMPLES: dict[str, Any] = {
    "history": {
        "summary": "Ten items for a history",
        "value": {"history": ["50", "181", "174", "210"], "k": 10},
    },
    "filtered": {
        "summary": "Five comedies of the nineties, with their attributes",
        "value": {
            "history": ["50", {"item_id": "181"}],
            "k": 5,
            "filters": {"genre": {"any": ["Comedy"]}, "year": {"min": 1990, "max": 1999}},
            "exclude": ["1"],
            "include": ["attributes", "semantic_id"],
            "deadline_ms": 500,
        },
    },
    "most likely": {
        "summary": "The ten most likely next items, by beam search",
        "value": {"history": ["50", "181", "174", "210"], "k": 10, "strategy": "beam"},
    },
    "sampled": {
        "summary": "Another ten every time, the same ten for the same seed",
        "value": {"history": ["50", "181", "174", "210"], "k": 10, "temperature": 0.8, "top_p": 0.95, "seed": 7},
    },
    "cold start": {"summary": "No history: popular items", "value": {"history": [], "k": 3}},
}

BATCH_EXAMPLES: dict[str, Any] = {
    "two users": {"value": {"requests": [{"history": ["50", "181"], "k": 5}, {"history": ["174"]}], "deadline_ms": 800}}
}


class RecommendRequest(_Body):
    """What a product backend asks. Read-only: the same request may be sent again at any time."""

    history: Annotated[
        list[ItemId],
        BeforeValidator(_unwrap_items),
        Field(max_length=10_000),
        WithJsonSchema(_HISTORY_SCHEMA),
    ]
    k: int | None = Field(
        None, ge=1, le=1000, description="How many items; 10 unless told. By beam search at most 200."
    )
    user_id: ItemId | None = Field(None, description="Accepted for symmetry; not used, not logged.")
    exclude: list[ItemId] = Field(default=[], max_length=10_000)
    exclude_history: bool = Field(True, description="Never recommend what is in the history.")
    filters: dict[Name, Filter] = Field(default={}, max_length=16)
    strategy: Strategy = Field("list", description=_STRATEGIES)
    verification: Verification = Field("strict", description=_VERIFICATIONS)
    speculation: Literal["on", "off"] = Field("on", description="Changes the time, not the items.")
    temperature: Temperature | None = Field(
        None,
        description="0, which is also the default, is greedy. Above, every code is drawn from the model's distribution "
        "over what is legal, its logits divided by this.",
    )
    top_p: TopP | None = Field(
        None,
        description="Draw among the most likely codes alone, the fewest whose probability reaches this; 1 unless told. "
        "Without a temperature it changes nothing.",
    )
    seed: Seed | None = Field(
        None,
        description="The same request with the same seed draws the same items, whatever else is served and whether or "
        "not there is speculation. A fresh one is taken unless told. Give every user another: equal seeds share luck.",
    )
    deadline_ms: int | None = Field(None, ge=1, le=60_000)
    fallback: Literal["popular", "none"] = "popular"
    include: list[Literal["semantic_id", "attributes"]] = Field(default=[], max_length=2)


class RecommendedItem(_Body):
    item_id: str
    rank: int = Field(ge=1)
    score: float | None = Field(
        description="Log-probability of the item at temperature 1 without top_p; null for popular items."
    )
    source: Literal["model", "popular"]
    semantic_id: list[int] | None = None
    attributes: dict[str, Any] | None = None


class ModelInfo(_Body):
    """`verification` is absent for lists, which are exact."""

    name: str
    version: str
    catalog_version: str
    strategy: str
    verification: Verification | None = Field(
        None, description="How beams were verified: `relaxed` where the items may differ from the model's own."
    )


class SpeculationInfo(_Body):
    """For `beam` a round is a target pass after the prompt's, a draft token a node that rode along in a pass, an
    accepted token a level that needed no pass of its own, a forced token a level without a choice."""

    rounds: int = Field(ge=0)
    draft_tokens: int = Field(ge=0)
    accepted_tokens: int = Field(ge=0)
    forced_tokens: int = Field(ge=0)
    acceptance_length: float = Field(ge=0, description="Tokens (or levels) gained per round, bonus included.")


class Degraded(_Body):
    """One way in which the answer is less than what was asked for."""

    code: str
    detail: str


class RecommendTimings(_Body):
    """Milliseconds. `worker` is the worker's own total; what is left of `total` is the API and the wire."""

    map_history: Milliseconds
    queue: Milliseconds
    prefill: Milliseconds
    decode: Milliseconds
    map_items: Milliseconds
    worker: Milliseconds
    total: Milliseconds


class RecommendResponse(_Body):
    request_id: str
    items: list[RecommendedItem]
    model: ModelInfo
    speculation: SpeculationInfo | None
    timings_ms: RecommendTimings
    unknown_items: list[str] = Field(description="History items the catalog does not know: the first 20.")
    unknown_items_count: int = Field(ge=0)
    history_used: int = Field(ge=0)
    degraded: list[Degraded]


MAX_BATCH = 32


class RecommendBatch(_Body):
    """Several requests at once. Each is admitted, answered and refused on its own."""

    requests: list[Any] = Field(min_length=1, max_length=MAX_BATCH, description="Each a RecommendRequest.")
    deadline_ms: int | None = Field(
        None, ge=1, le=60_000, description="For all of them; a smaller one of their own wins."
    )


class ProblemError(_Body):
    pointer: str
    reason: str


class Problem(BaseModel):
    """RFC 9457 problem. Never quotes the request."""

    type: str
    title: str
    status: int
    detail: str
    retryable: bool
    errors: list[ProblemError]
    request_id: str


class BatchResult(_Body):
    """What became of one request of a batch: its `answer`, or its `problem`."""

    status: int
    answer: RecommendResponse | None = None
    problem: Problem | None = None


class RecommendBatchResponse(_Body):
    """`results` in the order of the requests."""

    request_id: str
    results: list[BatchResult]


class GenerateRequest(_Body):
    """API to worker. `deadline_ms` is what is left of the deadline when the request is sent."""

    request_id: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")]
    catalog_version: Annotated[str, Field(min_length=1, max_length=64)]
    history: list[Codes] = Field(max_length=10_000)
    k: int = Field(ge=1, le=1000)
    exclude: list[Codes] = Field(default=[], max_length=10_000)
    exclude_history: bool = True
    filters: dict[Name, Filter] = Field(default={}, max_length=16)
    strategy: Strategy = "list"
    verification: Verification = "strict"
    speculation: Literal["on", "off"] = "on"
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: Seed | None = None
    deadline_ms: int = Field(ge=1, le=60_000)


class GeneratedItem(_Body):
    codes: Codes
    score: float = Field(allow_inf_nan=False)


class GenerateTimings(_Body):
    """Milliseconds inside the worker."""

    queue: Milliseconds
    prefill: Milliseconds
    decode: Milliseconds
    total: Milliseconds


class GenerateResponse(_Body):
    request_id: str
    items: list[GeneratedItem]
    model: ModelInfo
    speculation: SpeculationInfo
    timings_ms: GenerateTimings
    degraded: list[Degraded]
    history_used: int = Field(ge=0)


class WorkerModel(_Body):
    name: str
    version: str


class WorkerLimits(_Body):
    max_k: int = Field(ge=1)
    max_history_items: int = Field(ge=1)


class WorkerInfo(_Body):
    """What a worker serves and how busy it is."""

    model: WorkerModel
    catalog_version: str
    limits: WorkerLimits
    in_flight: int = Field(ge=0)
    waiting: int = Field(ge=0)
    instance: str = Field("", max_length=64, description="another one after every restart")


def parse_recommend(document: Any, settings: Settings) -> RecommendRequest:
    """Validate a public body. Raises Invalid naming every wrong field, at most 20."""
    if isinstance(document, dict):  # lengths first: a million items are refused before one is read
        _bound_length(document, "history", settings.max_history_items)
        _bound_length(document, "exclude", settings.max_exclude_items)
    request = validate(RecommendRequest, document)
    if request.k is not None and request.k > settings.max_k:
        raise Invalid.field("/k", f"should be at most {settings.max_k}")
    _check_strategy(request)
    return request


def _check_strategy(request: RecommendRequest) -> None:
    """Raises Invalid naming a field that the strategy has no use for: it would be ignored in silence."""
    if request.strategy == "list":
        if request.verification != "strict":
            raise Invalid.field("/verification", "should be strict unless strategy is beam")
        return
    if request.k is not None and request.k > MAX_BEAMS:
        raise Invalid.field("/k", f"should be at most {MAX_BEAMS} for strategy beam")
    if request.temperature:
        raise Invalid.field("/temperature", "should be 0 or absent for strategy beam")
    if request.top_p is not None:
        raise Invalid.field("/top_p", "should be absent for strategy beam")


def validate(schema: type[Body], document: Any) -> Body:
    """`document` as a `schema`. Raises Invalid."""
    try:
        return schema.model_validate(document)
    except ValidationError as exc:
        errors = exc.errors(include_url=False, include_context=False, include_input=False)
        raise Invalid("The request has invalid fields.", errors=_field_errors(errors[:MAX_NAMED_ERRORS])) from None


def _bound_length(document: dict[str, Any], name: str, limit: int) -> None:
    value = document.get(name)
    if isinstance(value, list) and len(value) > limit:
        raise Invalid.field(pointer(name), f"should have at most {limit} items")


def _field_errors(errors: Iterable[Any]) -> list[FieldError]:
    named: dict[str, FieldError] = {}
    for error in errors:
        where = pointer(*(s for s in error["loc"] if s != "[key]"))
        named.setdefault(where, FieldError(where, _reason(where, error)))
    return list(named.values())


def _reason(where: str, error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "is not a known field"
    if error["type"] == "string_pattern_mismatch":
        return "should have no control characters"
    if error["type"] == "missing":
        return "is required"
    if error["type"] == "model_type":
        return "should be an object"
    return re.sub(r"^(Value error, |\w+ (?=should))", "", str(error["msg"]))
