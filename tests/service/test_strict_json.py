"""What strict JSON lets through equals what `json` reads; what it refuses is refused with a place."""

import contextlib
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import BadBody
from service.strict_json import MAX_DEPTH, parse

PLAIN = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(PLAIN),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(PLAIN), children, max_size=4),
    max_leaves=20,
)


@given(DOCUMENTS, st.booleans())
def test_a_sound_document_is_read_as_it_is(document: Any, ascii_only: bool) -> None:
    assert parse(json.dumps(document, ensure_ascii=ascii_only).encode()) == document


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    with contextlib.suppress(BadBody):
        parse(body)


def test_depth_is_allowed_up_to_the_limit_and_not_beyond() -> None:
    assert parse(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    assert parse(b"[" + b"[]," * 100 + b"[]]")
    with pytest.raises(BadBody, match="nested deeper"):
        parse(b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1))


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b'{"a": [1, {"b/c": NaN}]}', "/a/1/b~1c"),
        (b"[1e999]", "/0"),
        (b'[["x"], ["\\udc00"]]', "/1/0"),
        (b'[{"a": 1, "a": 2}]', "/0"),
        (b'{"\\u0000": 1}', ""),
    ],
)
def test_the_place_of_a_defect_is_given(body: bytes, where: str) -> None:
    with pytest.raises(BadBody) as caught:
        parse(body)
    assert [error.pointer for error in caught.value.errors] == [where]


@pytest.mark.parametrize(("text", "value"), [(b"10.0", 10), (b"1e3", 1000), (b"-0.0", 0), (b"2.5", 2.5)])
def test_an_integer_is_one_however_it_is_written(text: bytes, value: float) -> None:
    assert (parse(text), type(parse(text))) == (value, type(value))


def test_a_float_past_the_exact_ones_stays_a_float() -> None:
    assert type(parse(b"9007199254740993.0")) is float


def test_an_escaped_pair_of_surrogates_is_one_sound_character() -> None:
    assert parse(b'["\\ud83d\\ude00", 1.5]') == ["\U0001f600", 1.5]
    assert math.isfinite(parse(b"1e300"))
