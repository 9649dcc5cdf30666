"""Strict UTF-8 JSON: what `json.loads` lets through and would crash or confuse us later is refused here.

Refused: NaN, Infinity, numbers that overflow, duplicate keys, lone surrogates, NUL, nesting past `MAX_DEPTH`.
Knows no schema.
"""

import json
import math
from typing import Any

from service.errors import BadBody, FieldError, pointer

MAX_DEPTH = 32
MAX_EXACT = 2**53 - 1  # past it neighbouring integers are one and the same float


class _RepeatedKeys(dict[str, Any]):
    """An object in which a key came twice."""


def parse(body: bytes) -> Any:
    """The document in `body`. Raises BadBody, with a pointer where the place is known."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise BadBody("The body is not UTF-8.") from None
    # Strings can hide a surrogate or a NUL only behind an escape; the walk is skipped without one.
    suspicious = "\\u" in text

    def suspect(value: Any) -> Any:
        nonlocal suspicious
        suspicious = True
        return value

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        plain = dict(items)
        return plain if len(plain) == len(items) else suspect(_RepeatedKeys(plain))

    def number(digits: str) -> float:
        value = float(digits)
        if value.is_integer() and abs(value) <= MAX_EXACT:
            return int(value)  # JSON has one kind of number: 10.0 is an integer
        return value if math.isfinite(value) else suspect(value)

    try:
        document = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_float=number,
            parse_constant=lambda name: suspect(float(name)),
        )
    except json.JSONDecodeError as exc:
        raise BadBody(f"The body is not JSON: line {exc.lineno} column {exc.colno}.") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # an integer of thousands of digits
        raise BadBody("The body holds a number with too many digits.") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _refuse_depth(document)
    if suspicious:
        _refuse_defects(document)
    return document


def _too_deep() -> BadBody:
    return BadBody(f"The body is nested deeper than {MAX_DEPTH} levels.")


def _refuse_depth(document: Any) -> None:
    level = [document]
    for _ in range(MAX_DEPTH):
        children = (v.values() if isinstance(v, dict) else v for v in level)
        level = [c for group in children for c in group if isinstance(c, dict | list)]
        if not level:
            return
    raise _too_deep()


def _refuse_defects(document: Any) -> None:
    pending: list[tuple[tuple[str | int, ...], Any]] = [((), document)]
    while pending:
        path, value = pending.pop()
        if reason := _defect(value):
            raise BadBody("The body is not strict JSON.", errors=[FieldError(pointer(*path), reason)])
        if isinstance(value, dict):
            pending.extend(((*path, key), child) for key, child in value.items())
        elif isinstance(value, list):
            pending.extend(((*path, i), child) for i, child in enumerate(value))


def _defect(value: Any) -> str | None:
    if isinstance(value, str):
        return _text_defect(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, _RepeatedKeys):
        return "has a key twice"
    if isinstance(value, dict) and any(_text_defect(key) for key in value):
        return "has a key with characters that are not allowed"
    return None


def _text_defect(text: str) -> str | None:
    if "\0" in text:
        return "must not contain NUL"
    if any("\ud800" <= c <= "\udfff" for c in text):
        return "must not contain a lone surrogate"
    return None
