"""Every refusal has the same shape, and pointers are safe to print whatever keys a caller invents."""

import json
from collections.abc import Iterator

import pytest

from service.errors import (
    Busy,
    CatalogUnavailable,
    Draining,
    FieldError,
    Invalid,
    Overloaded,
    PadrecError,
    Unavailable,
    WorkerUnavailable,
    pointer,
    problem_bytes,
)


def kinds(of: type[PadrecError] = PadrecError) -> Iterator[type[PadrecError]]:
    for kind in of.__subclasses__():
        yield kind
        yield from kinds(kind)


def test_every_refusal_has_its_own_type_and_an_error_status() -> None:
    raised = [kind for kind in kinds() if kind.__name__ not in ("HttpError", "Busy", "InternalError")]
    slugs = [kind.slug for kind in raised]
    assert len(set(slugs)) == len(slugs)
    assert all(400 <= kind.status < 600 for kind in kinds())


def test_unavailable_is_always_retryable_and_says_when() -> None:
    refusals: list[type[Unavailable]] = [Unavailable, CatalogUnavailable, WorkerUnavailable, Busy, Overloaded, Draining]
    assert {*refusals} == {Unavailable, *kinds(Unavailable)}
    for kind in refusals:
        error = kind("Not now.", retry_after=0.2)
        assert (error.status, error.retryable, error.headers()) == (503, True, {"Retry-After": "1"})
    assert Overloaded("Busy.", retry_after=7.4).headers() == {"Retry-After": "8"}


def test_a_problem_has_the_fields_of_rfc_9457_and_ours() -> None:
    error = Invalid("Wrong.", errors=[FieldError("/k", "should be less")])
    assert json.loads(problem_bytes(error, "r1")) == {
        "type": "urn:padrec:problem:invalid-request",
        "title": "Invalid request",
        "status": 422,
        "detail": "Wrong.",
        "retryable": False,
        "errors": [{"pointer": "/k", "reason": "should be less"}],
        "request_id": "r1",
    }


@pytest.mark.parametrize(
    ("segments", "text"),
    [
        ((), ""),
        (("history", 3), "/history/3"),
        (("a/b", "c~d"), "/a~1b/c~0d"),
        (("\x00\n\ud800é",), "/????"),
        (("x" * 100,), "/" + "x" * 64),
    ],
)
def test_a_pointer_is_escaped_bounded_and_printable(segments: tuple[str | int, ...], text: str) -> None:
    assert pointer(*segments) == text
