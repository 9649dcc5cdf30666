"""JSON logs, one object a line on standard error, with the request ID of the request being worked on.

Knows no bodies: callers pass numbers and names, never histories or user IDs.
"""

import json
import logging
import sys
import time
import traceback
from contextvars import ContextVar
from typing import Any

request_id: ContextVar[str] = ContextVar("request_id", default="")
trace_id: ContextVar[str] = ContextVar("trace_id", default="")

_PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class JsonFormatter(logging.Formatter):
    """Extra fields of a record become fields of the object; `process` names who writes."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "process": self.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if current := request_id.get():
            entry["request_id"] = current
        if current := trace_id.get():
            entry["trace_id"] = current
        entry |= {k: v for k, v in vars(record).items() if k not in _PLAIN}
        if record.exc_info and record.exc_info[1] is not None:
            entry["exception"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(entry, default=str)


def configure_logging(level: str, process: str) -> None:
    """Send everything, uvicorn included, to standard error as JSON naming `process`."""
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(JsonFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [stream]
    root.setLevel(level.upper())
    # Their INFO lines name URLs and connections for every request.
    for chatty in ("httpx", "httpcore", "uvicorn.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def crash_fields(exc: BaseException) -> dict[str, Any]:
    """Where `exc` came from, without its message, which may quote a request."""
    frames = traceback.extract_tb(exc.__traceback__)
    return {
        "error": type(exc).__name__,
        "frames": [f"{f.filename}:{f.lineno} {f.name}" for f in frames[-12:]],
    }


def _timestamp(created: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created))
    return f"{whole}.{int(created * 1000) % 1000:03d}Z"
