"""The public routes, a few lines each. Knows the order of things at the door, and nothing of how items are found."""

import asyncio
import time
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from service.api.recommender import Recommender
from service.errors import PROBLEM_JSON, DeadlinePassed, Overloaded, PadrecError
from service.middleware import Admission, Ticket, header_deadline_ms, read_json_body, while_connected
from service.schemas import (
    BATCH_EXAMPLES,
    RECOMMEND_EXAMPLES,
    BatchResult,
    Problem,
    RecommendBatch,
    RecommendBatchResponse,
    RecommendRequest,
    RecommendResponse,
    RecommendTimings,
    parse_recommend,
    validate,
)
from service.settings import Settings
from service.strict_json import parse

MAX_NAMED_VALUES = 1000  # categories of an attribute that the documentation names

# A batch has the outcome of its worst part.
_WORST_FIRST = ("error", "deadline", "rejected", "cancelled", "fallback", "degraded", "ok")

_PROBLEMS = {
    400: "The body is not strict UTF-8 JSON",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is not application/json",
    422: "A field is wrong; `errors` says which and why",
    503: "Overloaded, draining, or nothing to answer from; see Retry-After",
    504: "The deadline passed and the fallback is `none`",
}


def recommend_routes(recommender: Recommender, admission: Admission, settings: Settings) -> APIRouter:
    """POST /v1/recommend, its alias, and /v1/recommend/batch."""
    router = APIRouter(tags=["recommend"])

    def answer(
        wanted: RecommendRequest, ticket: Ticket, limits: Iterable[int | None], part: str = ""
    ) -> Coroutine[Any, Any, RecommendResponse]:
        """One request's answer, to be awaited; what is refused at sight is refused here. `part` tells requests of one
        ticket apart."""
        allowed = (wanted.deadline_ms or settings.deadline_ms, *limits)
        deadline = ticket.started + min(ms for ms in allowed if ms is not None) / 1000
        if wanted.fallback == "none":
            if time.monotonic() >= deadline:
                raise DeadlinePassed("The deadline passed before the work began.")
            if wanted.history:
                refuse_if_full(ticket, deadline)
        return recommender.recommend(
            wanted,
            request_id=ticket.request_id + part,
            internal_id=ticket.internal_id + part,
            started=ticket.started,
            deadline=deadline,
        )

    def refuse_if_full(ticket: Ticket, deadline: float) -> None:
        try:
            recommender.workers.refuse_if_full(deadline)
        except Overloaded as full:
            if not ticket.refused:  # of a batch once: requests are counted like that
                ticket.refused = True
                admission.refused(full, "worker")
            raise

    async def read(request: Request) -> Any:
        return parse(await read_json_body(request, max_bytes=settings.max_body_bytes, seconds=settings.body_seconds))

    async def recommend(request: Request) -> Response:
        """Top-K items for a history. Read-only: safe to send again.

        An empty or unknown history is answered with popular items. When the model cannot answer before the
        deadline (`deadline_ms` or the header X-Request-Timeout-Ms, the smaller wins), popular items are returned
        and `degraded` says why, unless `fallback` is `none`: such a request is refused at once where the workers are
        known to be full, whatever else it holds.
        """
        ticket: Ticket = request.state.ticket
        with admission.admit():
            wanted = parse_recommend(await read(request), settings)
            work = answer(wanted, ticket, (header_deadline_ms(request),))
            response: RecommendResponse = await while_connected(request.receive, work)
        note_outcome(ticket, response)
        timings = {"server-timing": server_timing(response.timings_ms)}
        return Response(response.model_dump_json(exclude_unset=True), headers=timings, media_type="application/json")

    async def recommend_batch(request: Request) -> Response:
        """Up to 32 requests at once, each with a status of its own. Read-only: safe to send again.

        A request that is wrong or cannot be answered fails alone: its result has the `status` and the `problem` that it
        would have got by itself. The whole is refused where there is no room for all of them.
        """
        ticket: Ticket = request.state.ticket
        with admission.admit():
            batch = validate(RecommendBatch, await read(request))
            limits = (batch.deadline_ms, header_deadline_ms(request))

            outcomes: list[str] = []

            async def result(index: int, document: Any) -> BatchResult:
                part = f".{index}"
                try:
                    response = await answer(parse_recommend(document, settings), ticket, limits, part)
                except PadrecError as error:
                    outcomes.append(error.outcome)
                    problem = Problem.model_validate(error.problem(ticket.request_id + part))
                    return BatchResult(status=error.status, problem=problem)
                outcomes.append(outcome_of(response))
                return BatchResult(status=200, answer=response)

            # The first of them came in with the request itself.
            with admission.admit(len(batch.requests) - 1):
                work = asyncio.gather(*(result(i, document) for i, document in enumerate(batch.requests)))
                results = await while_connected(request.receive, work)
        ticket.outcome = min(outcomes, key=_WORST_FIRST.index)
        ticket.fields["statuses"] = [r.status for r in results]
        body = RecommendBatchResponse(request_id=ticket.request_id, results=results)
        return Response(body.model_dump_json(exclude_unset=True), media_type="application/json")

    one = _documented(RecommendResponse, "RecommendRequest", RECOMMEND_EXAMPLES)
    router.post("/v1/recommend", summary="Recommend items", **one)(recommend)
    router.post("/recommend", summary="Recommend items", operation_id="recommend_alias", **one)(recommend)
    many = _documented(RecommendBatchResponse, "RecommendBatch", BATCH_EXAMPLES)
    router.post("/v1/recommend/batch", summary="Recommend items to several users", **many)(recommend_batch)
    return router


def _documented(answer: type[BaseModel], body: str, examples: dict[str, Any]) -> dict[str, Any]:
    """What OpenAPI says of a route: FastAPI sees neither the body nor the problems."""
    problem = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    schema = {"schema": {"$ref": f"#/components/schemas/{body}"}, "examples": examples}
    return {
        "response_model": answer,
        "responses": {status: {"description": text, "content": problem} for status, text in _PROBLEMS.items()},
        "openapi_extra": {
            "requestBody": {"required": True, "content": {"application/json": schema}},
            "parameters": [
                _parameter("X-Request-Id", {"type": "string"}),
                _parameter("X-Request-Timeout-Ms", {"type": "integer", "minimum": 1, "maximum": 999_999_999}),
            ],
        },
    }


def outcome_of(answer: RecommendResponse) -> str:
    return "fallback" if answer.speculation is None else "degraded" if answer.degraded else "ok"


def note_outcome(ticket: Ticket, answer: RecommendResponse) -> None:
    """What metrics and the access log say of an answer: counts, never contents."""
    ticket.outcome = outcome_of(answer)
    ticket.fields["items"] = len(answer.items)
    ticket.fields["degraded"] = [d.code for d in answer.degraded]


def server_timing(timings: RecommendTimings) -> str:
    """The same times as a Server-Timing header (W3C), which browsers and proxies show."""
    return ", ".join(f"{stage};dur={ms:g}" for stage, ms in timings.model_dump().items())


def add_schemas(
    document: dict[str, Any], settings: Settings, attributes: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, Any]:
    """Bodies that FastAPI does not see, for the route reads them itself, put into the OpenAPI document: as narrow as
    these settings and the `attributes` of the active catalog make them."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for model in (RecommendRequest, RecommendBatch, Problem):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    # What is no request fails alone, with a status of its own: the batch takes anything.
    request: dict[str, Any] = {"$ref": "#/components/schemas/RecommendRequest"}
    schemas["RecommendBatch"]["properties"]["requests"]["items"] = {"anyOf": [request, {}]}
    fields = schemas["RecommendRequest"]["properties"]
    fields["history"]["maxItems"], fields["exclude"]["maxItems"] = (
        settings.max_history_items,
        settings.max_exclude_items,
    )
    fields["k"]["anyOf"][0]["maximum"] = settings.max_k
    if attributes is not None:
        filters = {name: _filter_schema(schema) for name, schema in attributes.items()}
        fields["filters"] |= {"properties": filters, "additionalProperties": False}
        fields["filters"].pop("patternProperties", None)
    return document


def _filter_schema(attribute: Mapping[str, Any]) -> dict[str, Any]:
    """The filter that an attribute of the catalog takes."""
    names = ("any", "min", "max")
    fields: dict[str, dict[str, Any]] = {name: {"type": "null"} for name in names}
    closed = {"type": "object", "properties": fields, "additionalProperties": False}
    if attribute.get("type") == "categories":
        value = {"type": "string", "enum": list(attribute.get("values", ()))[:MAX_NAMED_VALUES]}
        fields["any"] = {"type": "array", "items": value, "minItems": 1, "maxItems": 100}
        return closed | {"required": ["any"]}
    fields["min"] = fields["max"] = {"type": ["number", "null"]}
    either = [{"required": [name], "properties": {name: {"type": "number"}}} for name in names[1:]]
    return closed | {"anyOf": either}


def _parameter(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": schema}
