"""The use case: translate the history, ask a worker, translate the list back, and fall back when something fails.

Reads like the story of a request. Knows no HTTP: it takes a validated request and returns the answer or raises
one of `service.errors`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from service.api.catalog import Catalog, CatalogVersion, Mapped
from service.api.popular import check_filters, most_popular
from service.api.worker_client import WorkerClient
from service.catalog_codec import Codes
from service.errors import (
    CatalogMismatch,
    CatalogUnavailable,
    DeadlinePassed,
    Overloaded,
    PadrecError,
    WorkerUnavailable,
)
from service.metrics import ApiMetrics
from service.schemas import (
    Degraded,
    GenerateRequest,
    GenerateResponse,
    ModelInfo,
    RecommendedItem,
    RecommendRequest,
    RecommendResponse,
    RecommendTimings,
    SpeculationInfo,
)
from service.settings import Settings

MAX_NAMED_UNKNOWN = 20
# Kept back from the worker's share of the deadline, to translate its answer or fall back.
_RESERVE_SECONDS = 0.03
_RESERVE_SHARE = 0.1

_DETAILS = {
    "cold_start": "No item of the history is known: these are popular items.",
    "worker_unavailable": "No worker answered: these are popular items.",
    "worker_overloaded": "Every worker is busy: these are popular items.",
    "deadline": "The model did not answer in time: these are popular items.",
    "catalog_mismatch": "The workers serve a catalog that is not at hand: these are popular items.",
    "redis_unavailable": "Redis does not answer: item mappings come from local copies.",
    "history_unread": "Part of the history could not be looked up.",
    "items_unread": "The list, or part of it, could not be looked up.",
    "attributes_unread": "Attributes of some items could not be looked up.",
    "fewer_items": "Fewer items than asked for pass the filters and exclusions.",
}


@dataclass
class _Work:
    """One request on its way. `started` and `deadline` are `time.monotonic()` seconds."""

    request: RecommendRequest
    request_id: str
    internal_id: str
    k: int
    started: float
    deadline: float
    catalog: CatalogVersion
    history: Mapped[str, Codes] = field(default_factory=Mapped)
    excluded: Mapped[str, Codes] = field(default_factory=Mapped)
    degraded: dict[str, str] = field(default_factory=dict)
    milliseconds: dict[str, float] = field(default_factory=dict)

    def degrade(self, code: str, detail: str | None = None) -> None:
        self.degraded.setdefault(code, detail or _DETAILS[code])


class Recommender:
    """Answers Recommend requests."""

    def __init__(self, catalog: Catalog, workers: WorkerClient, settings: Settings, metrics: ApiMetrics) -> None:
        self.catalog = catalog
        self.workers = workers
        self.settings = settings
        self.metrics = metrics

    async def recommend(
        self,
        request: RecommendRequest,
        *,
        request_id: str,
        internal_id: str,
        started: float,
        deadline: float,
    ) -> RecommendResponse:
        """The answer. Raises PadrecError where there is none."""
        k = request.k or self.settings.default_k
        catalog = await self._pinned()
        work = _Work(request, request_id, internal_id, k, started, deadline, catalog)
        check_filters(request.filters, catalog.header.attributes)
        try:
            return await self._from_model(work)
        except (WorkerUnavailable, Overloaded, DeadlinePassed, CatalogMismatch) as exc:
            if request.fallback == "none":
                raise _refusal(exc) from exc
            work.degrade(_code(exc))
        return self._popular(work)

    async def _from_model(self, work: _Work) -> RecommendResponse:
        try:
            return await self._ask(work)
        except CatalogMismatch as exc:
            # A swap is under way: start again, once, on the version the worker has.
            await self.catalog.refresh()
            catalog = await self.catalog.version(exc.catalog_version)
            if catalog is None:
                raise
            work.catalog = catalog
            check_filters(work.request.filters, catalog.header.attributes)
            return await self._ask(work)

    async def _ask(self, work: _Work) -> RecommendResponse:
        async with self._looking_up(work, "map_history"):
            await self._map_history(work)
        if not work.history.found:
            if work.history.unread and work.request.fallback == "none":
                raise CatalogUnavailable("The history cannot be looked up.")
            if not work.history.unread:
                work.degrade("cold_start")
            return self._popular(work)
        reserve = min(_RESERVE_SECONDS, (work.deadline - time.monotonic()) * _RESERVE_SHARE)
        answer = await self.workers.generate(_generate_request(work), work.deadline - reserve)
        async with self._looking_up(work, "map_items"):
            items = await self._map_items(work, answer)
        if not items and answer.items:
            return self._popular(work)
        for note in answer.degraded:
            work.degrade(note.code, note.detail)
        work.milliseconds |= {
            "queue": answer.timings_ms.queue,
            "prefill": answer.timings_ms.prefill,
            "decode": answer.timings_ms.decode,
            "worker": answer.timings_ms.total,
        }
        return self._response(work, items, answer.model, answer.speculation, history_used=answer.history_used)

    async def _map_history(self, work: _Work) -> None:
        # One look-up for both, so that a cold cache costs one round trip.
        wanted = dict.fromkeys((*work.request.history, *work.request.exclude))
        mapped = await work.catalog.codes_of(wanted)
        work.history = _restricted(mapped, work.request.history)
        work.excluded = _restricted(mapped, work.request.exclude)
        self.metrics.unknown_items.inc(len(work.history.unknown))
        if work.history.unread or work.excluded.unread:
            work.degrade("history_unread")

    async def _map_items(self, work: _Work, answer: GenerateResponse) -> list[RecommendedItem]:
        header = work.catalog.header
        scores = {tuple(i.codes): i.score for i in answer.items if header.fits(i.codes)}
        mapped = await work.catalog.items_of(scores)
        invalid = len(answer.items) - len(scores) + len(mapped.unknown)
        if invalid:
            self.metrics.invalid_semantic_ids.inc(invalid)
        if invalid or mapped.unread:
            work.degrade("items_unread")
        wanted = set(work.request.include)
        attributes = await self._attributes(work, mapped.found.values(), "attributes" in wanted)
        # The worker left out what it was told of; an exclusion that could not be looked up is left out here.
        hidden = _hidden(work.request)
        found = [(c, mapped.found[c]) for c in scores if c in mapped.found and mapped.found[c] not in hidden]
        items = []
        for rank, (codes, item_id) in enumerate(found[: work.k], start=1):
            extras = _extras(wanted, codes, attributes.get(item_id))
            items.append(RecommendedItem(item_id=item_id, rank=rank, score=scores[codes], source="model", **extras))
        return items

    async def _attributes(self, work: _Work, item_ids: Iterable[str], wanted: bool) -> dict[str, dict[str, object]]:
        if not wanted:
            return {}
        mapped = await work.catalog.attributes_of(item_ids)
        if mapped.unknown or mapped.unread:
            work.degrade("attributes_unread")
        return {item_id: dict(values) for item_id, values in mapped.found.items()}

    def _popular(self, work: _Work) -> RecommendResponse:
        request = work.request
        catalog = work.catalog
        chosen = most_popular(catalog.popular, work.k, request.filters, _hidden(request), catalog.out_of_stock)
        if not chosen and not work.catalog.popular:
            raise CatalogUnavailable("The popular items are not at hand.")
        if len(chosen) < work.k:
            work.degrade("fewer_items")
        wanted = set(request.include)
        items = []
        for rank, item in enumerate(chosen, start=1):
            extras = _extras(wanted, item.codes, item.attributes)
            items.append(RecommendedItem(item_id=item.item_id, rank=rank, score=None, source="popular", **extras))
        model = ModelInfo(
            name="popular",
            version=work.catalog.version,
            catalog_version=work.catalog.version,
            strategy=request.strategy,
        )
        return self._response(work, items, model, None, history_used=0)

    def _response(
        self,
        work: _Work,
        items: list[RecommendedItem],
        model: ModelInfo,
        speculation: SpeculationInfo | None,
        *,
        history_used: int,
    ) -> RecommendResponse:
        if not self.catalog.redis_up:
            work.degrade("redis_unavailable")
        unknown = work.history.unknown
        timings = dict.fromkeys(RecommendTimings.model_fields, 0.0) | work.milliseconds
        timings["total"] = (time.monotonic() - work.started) * 1000
        return RecommendResponse(
            request_id=work.request_id,
            items=items,
            model=model,
            speculation=speculation,
            timings_ms=RecommendTimings(**{k: round(v, 3) for k, v in timings.items()}),
            unknown_items=unknown[:MAX_NAMED_UNKNOWN],
            unknown_items_count=len(unknown),
            history_used=history_used,
            degraded=[Degraded(code=c, detail=d) for c, d in work.degraded.items()],
        )

    async def _pinned(self) -> CatalogVersion:
        """The version this request is answered with: the active one, unless the workers have another."""
        current = self.catalog.current
        if current is None:
            raise CatalogUnavailable("No catalog is at hand yet.")
        served = self.workers.catalog_version
        if served is None or served == current.version:
            return current
        return await self.catalog.version(served) or current

    @asynccontextmanager
    async def _looking_up(self, work: _Work, stage: str) -> AsyncIterator[None]:
        """Timed, and broken off at the request's deadline. Raises DeadlinePassed."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(work.deadline - started):
                yield
        except TimeoutError as exc:
            raise DeadlinePassed("The deadline passed while items were looked up.") from exc
        seconds = time.monotonic() - started
        work.milliseconds[stage] = work.milliseconds.get(stage, 0.0) + seconds * 1000
        self.metrics.stage.labels(stage).observe(seconds)


def _generate_request(work: _Work) -> GenerateRequest:
    """Built without validation: every part of it was validated on the way in."""
    request, found = work.request, work.history.found
    fields: dict[str, Any] = {
        "request_id": work.internal_id,
        "catalog_version": work.catalog.version,
        "history": [found[item_id] for item_id in request.history if item_id in found],
        "k": work.k,
        "exclude": list(work.excluded.found.values()),
        "exclude_history": request.exclude_history,
        "filters": request.filters,
        "strategy": request.strategy,
        "speculation": request.speculation,
    }
    if request.verification != "strict":
        relaxed = {"verification": request.verification, "seed": request.seed}
        fields |= {name: value for name, value in relaxed.items() if value is not None}
    if request.temperature:  # a greedy request does not mention them: older workers refuse fields they do not know
        drawn = {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
        fields |= {name: value for name, value in drawn.items() if value is not None}
    return GenerateRequest.model_construct(**fields)


def _hidden(request: RecommendRequest) -> set[str]:
    """Items that must not be in the answer."""
    return {*request.exclude, *(request.history if request.exclude_history else ())}


def _extras(wanted: Collection[str], codes: Codes, attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields an item has only when they were asked for."""
    extras: dict[str, Any] = {}
    if "semantic_id" in wanted:
        extras["semantic_id"] = list(codes)
    if "attributes" in wanted:
        extras["attributes"] = None if attributes is None else dict(attributes)
    return extras


def _restricted(mapped: Mapped[str, Codes], item_ids: Iterable[str]) -> Mapped[str, Codes]:
    wanted = dict.fromkeys(item_ids)
    return Mapped(
        {i: mapped.found[i] for i in wanted if i in mapped.found},
        [i for i in mapped.unknown if i in wanted],
        [i for i in mapped.unread if i in wanted],
    )


def _code(exc: PadrecError) -> str:
    if isinstance(exc, CatalogMismatch):
        return "catalog_mismatch"
    if isinstance(exc, DeadlinePassed):
        return "deadline"
    return "worker_overloaded" if isinstance(exc, Overloaded) else "worker_unavailable"


def _refusal(exc: PadrecError) -> PadrecError:
    """What a caller without fallback is told; versions inside are not his concern."""
    if isinstance(exc, CatalogMismatch):
        return WorkerUnavailable("The workers serve a catalog that is not at hand.")
    return exc
