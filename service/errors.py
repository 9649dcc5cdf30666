"""The exception tree of both processes, and the one shape they take on the wire: RFC 9457 problem+json.

    PadrecError
    ├── BadBody 400             the body is not strict UTF-8 JSON
    ├── Unauthorized 401        no API key, or one that is not valid
    ├── Forbidden 403           an API key without the scope this takes
    ├── BodyTimeout 408         the body did not arrive in time
    ├── BodyTooLarge 413
    ├── WrongContentType 415
    ├── Invalid 422             well-formed, but a field is wrong
    ├── CatalogMismatch 409     the worker serves another catalog version
    ├── ClientGone 499          nobody is left to answer
    ├── Unavailable 503         CatalogUnavailable, WorkerUnavailable
    │   └── Busy 503            Overloaded, Draining
    ├── DeadlinePassed 504
    └── InternalError 500

No message here may carry a value taken from a request: problems never echo input.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PROBLEM_JSON = "application/problem+json"


@dataclass(frozen=True)
class FieldError:
    """What is wrong (`reason`) and where: a JSON pointer (RFC 6901) into the request body."""

    pointer: str
    reason: str


class PadrecError(Exception):
    """Something a caller is told about. `retry_after` is in seconds."""

    status = 500
    slug = "internal-error"
    title = "Internal error"
    retryable = False
    outcome = "error"

    def __init__(
        self,
        detail: str,
        *,
        errors: Iterable[FieldError] = (),
        retry_after: float | None = None,
        **extensions: Any,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = tuple(errors)
        self.retry_after = retry_after
        self.extensions = extensions

    def problem(self, request_id: str) -> dict[str, Any]:
        """The RFC 9457 body."""
        return {
            "type": f"urn:padrec:problem:{self.slug}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "retryable": self.retryable,
            "errors": [{"pointer": e.pointer, "reason": e.reason} for e in self.errors],
            "request_id": request_id,
            **self.extensions,
        }

    def headers(self) -> dict[str, str]:
        """Headers beside the body: whole seconds of Retry-After where a retry may help."""
        if self.retry_after is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


class InternalError(PadrecError):
    """A bug of ours; the log has the story."""


class HttpError(PadrecError):
    """What the router refuses: unknown path, wrong method."""

    outcome = "rejected"

    def __init__(self, status: int, title: str) -> None:
        super().__init__(title)
        self.status, self.title = status, title
        self.slug = title.lower().replace(" ", "-")


class BadBody(PadrecError):
    status, slug, title, outcome = 400, "malformed-body", "Malformed body", "rejected"


class Unauthorized(PadrecError):
    status, slug, title, outcome = 401, "unauthorized", "API key needed", "rejected"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(PadrecError):
    status, slug, title, outcome = 403, "forbidden", "Not allowed", "rejected"


class BodyTimeout(PadrecError):
    status, slug, title, outcome = 408, "body-timeout", "Body did not arrive in time", "rejected"
    retryable = True


class BodyTooLarge(PadrecError):
    status, slug, title, outcome = 413, "body-too-large", "Body too large", "rejected"


class WrongContentType(PadrecError):
    status, slug, title, outcome = 415, "unsupported-media-type", "Wrong content type", "rejected"


class Invalid(PadrecError):
    status, slug, title, outcome = 422, "invalid-request", "Invalid request", "rejected"

    @classmethod
    def field(cls, pointer: str, reason: str) -> "Invalid":
        return cls("The request has an invalid field.", errors=[FieldError(pointer, reason)])


class CatalogMismatch(PadrecError):
    """`catalog_version` names the version the worker does serve."""

    status, slug, title = 409, "catalog-version-mismatch", "Catalog version mismatch"
    retryable = True

    def __init__(self, catalog_version: str) -> None:
        super().__init__("The worker serves another catalog version.", catalog_version=catalog_version)
        self.catalog_version = catalog_version


class ClientGone(PadrecError):
    status, slug, title, outcome = 499, "client-closed-request", "Client closed request", "cancelled"


class Unavailable(PadrecError):
    status, slug, title, retryable = 503, "unavailable", "Service unavailable", True

    def __init__(self, detail: str, *, retry_after: float = 1.0) -> None:
        super().__init__(detail, retry_after=retry_after)


class CatalogUnavailable(Unavailable):
    slug, title = "catalog-unavailable", "Catalog unavailable"


class WorkerUnavailable(Unavailable):
    """`refused`: it says so itself, which is no failure of its own, and it would say so again."""

    slug, title = "worker-unavailable", "Worker unavailable"

    def __init__(self, detail: str, *, retry_after: float = 1.0, refused: bool = False) -> None:
        super().__init__(detail, retry_after=retry_after)
        self.refused = refused


class Busy(Unavailable):
    """Refused at the door, before any work."""

    outcome = "rejected"


class Overloaded(Busy):
    slug, title = "overloaded", "Overloaded"


class Draining(Busy):
    slug, title = "draining", "Draining"


class DeadlinePassed(PadrecError):
    status, slug, title, outcome = 504, "deadline-exceeded", "Deadline exceeded", "deadline"
    retryable = True


def pointer(*segments: str | int) -> str:
    """JSON pointer; names are escaped, bounded and printable, for some come from the caller."""
    return "".join(f"/{_segment(s)}" for s in segments)


def problem_bytes(error: PadrecError, request_id: str) -> bytes:
    return json.dumps(error.problem(request_id)).encode()


def _segment(segment: str | int) -> str:
    if isinstance(segment, int):
        return str(segment)
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in segment[:64])
    return plain.replace("~", "~0").replace("/", "~1")
