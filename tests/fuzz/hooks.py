"""What a JSON schema cannot say of a body: schemathesis leaves such bodies out of the valid ones."""

import json
from typing import Any

import schemathesis


@schemathesis.hook
def filter_body(context: Any, body: Any) -> bool:
    """No NUL anywhere, for strict JSON has none, and ranges are the right way up."""
    if "\\u0000" in json.dumps(body, default=str):
        return False
    filters = body.get("filters") if isinstance(body, dict) else None
    wanted = [each for each in filters.values() if isinstance(each, dict)] if isinstance(filters, dict) else []
    return not any(
        _number(each.get("min")) and _number(each.get("max")) and each["min"] > each["max"] for each in wanted
    )


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """Nothing that the strategy has no use for: one field says what another may be."""
    body = case.body
    if not isinstance(body, dict):
        return True
    if body.get("strategy", "list") == "list":
        return body.get("verification") != "relaxed"
    return not body.get("temperature") and body.get("top_p") is None


def _number(value: Any) -> bool:
    return isinstance(value, int | float)
