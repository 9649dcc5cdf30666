"""`POST /generate` and `GET /info`: the internal wire in front of the engine. Semantic IDs in and out.

Knows the wire and the engine's `submit` / `cancel` / `status`; nothing of items, Redis or tensors.
"""

import asyncio
import time
import uuid
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import APIRouter, Request, Response

from model.decoding.beam_request import BeamRequest, BeamResult
from model.decoding.request import CategoryFilter, InvalidRequest, ListRequest, ListResult, RangeFilter
from model.decoding.strategies import Asked
from service import strict_json
from service.errors import (
    CatalogMismatch,
    ClientGone,
    DeadlinePassed,
    Draining,
    Invalid,
    Overloaded,
    PadrecError,
    WorkerUnavailable,
)
from service.middleware import Admission, Ticket, read_json_body, while_connected
from service.schemas import (
    Degraded,
    Filter,
    GeneratedItem,
    GenerateRequest,
    GenerateResponse,
    GenerateTimings,
    ModelInfo,
    SpeculationInfo,
    WorkerInfo,
    WorkerLimits,
    WorkerModel,
    validate,
)
from service.settings import Settings
from service.worker.engine import (
    DeadlineExceeded,
    EngineDraining,
    EngineFailed,
    EngineOverloaded,
    EngineStatus,
    OtherEdition,
    RequestCancelled,
)
from service.worker.shadow import Shadow

_INSTANCE = uuid.uuid4().hex  # tells a worker from the one that took its place

_REFUSALS = {
    "queue": "Too many requests wait.",
    "work": "Too much work waits.",
    "deadline": "The wait would pass the deadline.",
}

# How long past the deadline an engine may take to say so before we answer for it.
GRACE_SECONDS = 0.05


class Engine(Protocol):
    """What the routes need of `service.worker.engine.Engine`."""

    @property
    def catalog_version(self) -> str: ...

    def submit(self, request: Asked, catalog_version: str) -> Future[ListResult]: ...

    def cancel(self, request_id: str) -> None: ...

    def status(self) -> EngineStatus: ...


@dataclass(frozen=True)
class Served:
    """What this worker serves: names and bounds of its bundle. The catalog version is the engine's to say."""

    name: str
    version: str
    max_k: int
    max_history_items: int


def generate_routes(
    engine: Engine, served: Served, settings: Settings, admission: Admission, shadow: Shadow
) -> APIRouter:
    """The worker's own routes; probes come from `service.probes`."""
    router = APIRouter(tags=["internal"])

    @router.post("/generate", response_model=GenerateResponse, summary="Write one list")
    async def generate(request: Request) -> Response:
        ticket: Ticket = request.state.ticket
        with admission.admit():
            raw = await read_json_body(request, max_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
            body = validate(GenerateRequest, strict_json.parse(raw))
            asked = _asked(body, served, ticket)
            result = await while_connected(request.receive, _run(engine, asked, body.catalog_version, admission))
        shadow.look(asked, result, body.catalog_version)
        answer = _response(body, result, served, time.monotonic() - ticket.started)
        ticket.fields["rounds"] = answer.speculation.rounds
        return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")

    @router.get("/info", summary="What this worker serves and how busy it is")
    async def info() -> WorkerInfo:
        # The API takes an answer for "send requests here", so there is none before warm-up and on the way out.
        status = engine.status()
        if admission.drain.unready or not status.ready:
            raise _not_ready(status)
        return WorkerInfo(
            model=WorkerModel(name=served.name, version=served.version),
            catalog_version=engine.catalog_version,
            limits=WorkerLimits(max_k=served.max_k, max_history_items=served.max_history_items),
            in_flight=status.running,
            waiting=status.waiting,
            instance=_INSTANCE,
        )

    return router


async def _run(engine: Engine, asked: Asked, catalog_version: str, admission: Admission) -> ListResult:
    """The engine's answer by the deadline, its errors in the wire's words. Frees the engine when cancelled."""
    status = engine.status()
    if not status.ready:
        raise _not_ready(status)
    try:
        future = engine.submit(asked, catalog_version)
    except OtherEdition as error:
        raise CatalogMismatch(error.version) from error
    except EngineOverloaded as error:
        refusal = Overloaded(_REFUSALS[error.reason], retry_after=error.retry_after)
        raise admission.refused(refusal, error.reason) from error
    except EngineDraining as error:
        raise admission.refused(Draining("This process is shutting down.")) from error
    try:
        # Shielded: only the engine's thread may settle its futures.
        answer = asyncio.wrap_future(future)
        # A request that is cancelled fails after nobody waits for it any more; asyncio would call that an error.
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        async with asyncio.timeout(asked.deadline - time.monotonic() + GRACE_SECONDS):
            return await asyncio.shield(answer)
    except (TimeoutError, InvalidRequest, DeadlineExceeded, RequestCancelled, EngineFailed) as error:
        raise _translated(error) from error
    finally:
        if not future.done():
            engine.cancel(asked.request_id)


def _not_ready(status: EngineStatus) -> WorkerUnavailable:
    return WorkerUnavailable("The worker is starting or shutting down." if status.alive else "The engine has stopped.")


def _translated(error: Exception) -> PadrecError:
    if isinstance(error, InvalidRequest):
        return Invalid.field(error.pointer, error.reason)
    if isinstance(error, RequestCancelled):
        return ClientGone("The request was cancelled.")
    if isinstance(error, EngineFailed):
        return WorkerUnavailable("The engine failed on this request.")
    return DeadlinePassed("The deadline passed before the list was written.")


def _asked(body: GenerateRequest, served: Served, ticket: Ticket) -> Asked:
    """The wire's request as the engine's, under an ID of our own: a retry may meet its first try here."""
    if body.k > served.max_k:
        raise Invalid.field("/k", f"should be at most {served.max_k}")
    shared: dict[str, Any] = {
        "request_id": ticket.internal_id,
        "history": tuple(tuple(codes) for codes in body.history),
        "k": body.k,
        "exclude": tuple(tuple(codes) for codes in body.exclude),
        "exclude_history": body.exclude_history,
        "filters": {name: _filter(wanted) for name, wanted in body.filters.items()},
        "speculation": body.speculation == "on",
        "seed": body.seed,
        "deadline": ticket.started + body.deadline_ms / 1e3,
    }
    if body.strategy == "beam":
        return BeamRequest(**shared, verification=body.verification)
    return ListRequest(**shared, temperature=body.temperature, top_p=body.top_p)


def _filter(wanted: Filter) -> CategoryFilter | RangeFilter:
    if wanted.any is not None:
        return CategoryFilter(tuple(wanted.any))
    return RangeFilter(wanted.min, wanted.max)


def _response(body: GenerateRequest, result: ListResult, served: Served, seconds: float) -> GenerateResponse:
    counts = result.speculation
    strategy: dict[str, Any] = {"strategy": "list"}
    if isinstance(result, BeamResult):
        strategy = {"strategy": "beam", "verification": "relaxed" if result.lossy else "strict"}
    return GenerateResponse(
        request_id=body.request_id,
        items=[GeneratedItem(codes=list(item.codes), score=item.score) for item in result.items],
        model=ModelInfo(name=served.name, version=served.version, catalog_version=body.catalog_version, **strategy),
        speculation=SpeculationInfo(
            rounds=counts.rounds,
            draft_tokens=counts.draft_tokens,
            accepted_tokens=counts.accepted_tokens,
            forced_tokens=counts.forced_tokens,
            acceptance_length=counts.acceptance_length,
        ),
        timings_ms=GenerateTimings(
            queue=_milliseconds(result.queue_seconds),
            prefill=_milliseconds(result.prefill_seconds),
            decode=_milliseconds(result.decode_seconds),
            total=_milliseconds(seconds),
        ),
        degraded=[Degraded(code=code, detail=detail) for code, detail in result.degraded],
        history_used=result.history_used,
    )


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 3)
