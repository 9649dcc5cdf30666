"""The public routes, a few lines each. Knows the order of things at the door, and nothing of how items are found."""

import time
from typing import Any

from fastapi import APIRouter, Request, Response

from service.api.recommender import Recommender
from service.errors import PROBLEM_JSON, DeadlinePassed
from service.middleware import Admission, Ticket, header_deadline_ms, read_json_body, while_connected
from service.schemas import (
    RECOMMEND_EXAMPLES,
    Problem,
    RecommendRequest,
    RecommendResponse,
    RecommendTimings,
    parse_recommend,
)
from service.settings import Settings
from service.strict_json import parse

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
    """POST /v1/recommend and its alias."""
    router = APIRouter(tags=["recommend"])

    async def recommend(request: Request) -> Response:
        """Top-K items for a history. Read-only: safe to send again.

        An empty or unknown history is answered with popular items. When the model cannot answer before the
        deadline (`deadline_ms` or the header X-Request-Timeout-Ms, the smaller wins), popular items are returned
        and `degraded` says why, unless `fallback` is `none`.
        """
        ticket: Ticket = request.state.ticket
        with admission.admit():
            body = await read_json_body(request, max_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
            wanted = parse_recommend(parse(body), settings)
            limits = (wanted.deadline_ms or settings.deadline_ms, header_deadline_ms(request))
            deadline = ticket.started + min(ms for ms in limits if ms is not None) / 1000
            if time.monotonic() >= deadline and wanted.fallback == "none":
                raise DeadlinePassed("The deadline passed before the work began.")
            answer = await while_connected(
                request.receive,
                recommender.recommend(
                    wanted,
                    request_id=ticket.request_id,
                    internal_id=ticket.internal_id,
                    started=ticket.started,
                    deadline=deadline,
                ),
            )
        note_outcome(ticket, answer)
        timings = {"server-timing": server_timing(answer.timings_ms)}
        return Response(answer.model_dump_json(exclude_unset=True), headers=timings, media_type="application/json")

    documented: dict[str, Any] = {
        "response_model": RecommendResponse,
        "responses": {
            status: {
                "description": text,
                "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}},
            }
            for status, text in _PROBLEMS.items()
        },
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {"$ref": "#/components/schemas/RecommendRequest"},
                        "examples": RECOMMEND_EXAMPLES,
                    }
                },
            },
            "parameters": [_parameter("X-Request-Id", "string"), _parameter("X-Request-Timeout-Ms")],
        },
    }
    router.post("/v1/recommend", summary="Recommend items", **documented)(recommend)
    router.post("/recommend", summary="Recommend items", operation_id="recommend_alias", **documented)(recommend)
    return router


def note_outcome(ticket: Ticket, answer: RecommendResponse) -> None:
    """What metrics and the access log say of an answer: counts, never contents."""
    from_model = answer.speculation is not None
    ticket.outcome = "fallback" if not from_model else "degraded" if answer.degraded else "ok"
    ticket.fields["items"] = len(answer.items)
    ticket.fields["degraded"] = [d.code for d in answer.degraded]


def server_timing(timings: RecommendTimings) -> str:
    """The same times as a Server-Timing header (W3C), which browsers and proxies show."""
    return ", ".join(f"{stage};dur={ms:g}" for stage, ms in timings.model_dump().items())


def add_schemas(document: dict[str, Any]) -> dict[str, Any]:
    """Bodies that FastAPI does not see, for the route reads them itself, put into the OpenAPI document."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for model in (RecommendRequest, Problem):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    return document


def _parameter(name: str, kind: str = "integer") -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": {"type": kind}}
