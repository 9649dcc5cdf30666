"""API keys: who may ask for what. Only SHA-256 sums of keys are kept, compared in constant time.

A keys file has a line per key, `name scope[,scope] sha256`, as `padrec key` prints it; two keys of one name may be
valid at once, and the file is read again when it changes: keys are rotated without a restart. Knows paths and headers;
nothing of requests.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from service.errors import Forbidden, Unauthorized

SCOPES = ("recommend", "metrics", "generate")
OPEN = frozenset({"/healthz", "/readyz"})
LOOK_SECONDS = 1.0  # how often a keys file is looked at
_SCOPE_OF = {"/metrics": "metrics", "/generate": "generate", "/info": "generate"}
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST_CHARACTERS = 512

logger = logging.getLogger("padrec.keys")


class KeysError(ValueError):
    """A keys file that cannot be used; the message names the file and the line, never a key."""


class Key(NamedTuple):
    """One key: whose it is, what it is good for, and the SHA-256 of the key itself."""

    name: str
    scopes: frozenset[str]
    digest: bytes


class Keys:
    """The keys that are valid now."""

    def __init__(self, keys: Iterable[Key], file: Path | None = None) -> None:
        self._keys, self._file = tuple(keys), file
        self._seen = _state(file) if file else None
        self._next_look = time.monotonic() + LOOK_SECONDS

    @classmethod
    def of_file(cls, path: Path) -> "Keys":
        """Raises KeysError."""
        return cls(read_keys(path), path)

    @classmethod
    def of_secret(cls, secret: str) -> "Keys":
        """Keys given as they are, separated by commas, good for everything."""
        parts = [part for each in secret.split(",") if (part := each.strip())]
        return cls(Key("worker", frozenset(SCOPES), digest(part)) for part in parts)

    def admit(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """The name of the key shown, "" where none is needed. Raises Unauthorized or Forbidden."""
        if path in OPEN:
            return ""
        shown = _shown(headers)
        if shown is None:
            raise Unauthorized("This needs an API key: Authorization: Bearer KEY, or X-Api-Key: KEY.")
        self._look()
        sum_of_shown, found = digest(shown), None
        for key in self._keys:  # all of them, always: time must not tell how far the comparison went
            if hmac.compare_digest(key.digest, sum_of_shown):
                found = key
        if found is None:
            raise Unauthorized("The API key is not valid.")
        scope = _SCOPE_OF.get(path, "recommend")
        if scope not in found.scopes:
            raise Forbidden(f"This API key does not have the scope {scope}.")
        return found.name

    def _look(self) -> None:
        """Read the file again if it has changed. One that cannot be read changes nothing."""
        if self._file is None or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_SECONDS
        state = _state(self._file)
        if state == self._seen:
            return
        self._seen = state
        try:
            self._keys = read_keys(self._file)
            logger.info("API keys read again", extra={"keys": len(self._keys)})
        except KeysError as exc:
            logger.error("API keys cannot be read; those read before stay valid", extra={"reason": str(exc)})


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file. Raises KeysError, also where there are none: closed to all is not meant."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise KeysError(f"{path}: cannot be read ({type(exc).__name__})") from exc
    keys = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 3 or not _NAME.fullmatch(words[0]) or not _DIGEST.fullmatch(words[2]):
            raise KeysError(f"{path} line {number}: should be: name scope[,scope] sha256")
        scopes = frozenset(words[1].split(","))
        if not scopes <= set(SCOPES):
            raise KeysError(f"{path} line {number}: scopes are {', '.join(SCOPES)}")
        keys.append(Key(words[0], scopes, bytes.fromhex(words[2])))
    if not keys:
        raise KeysError(f"{path}: holds no keys")
    return tuple(keys)


def new_key(name: str, scopes: str) -> tuple[str, str]:
    """A fresh key and its line for a keys file. Raises KeysError."""
    if not _NAME.fullmatch(name) or not set(scopes.split(",")) <= set(SCOPES):
        raise KeysError(f"a key needs a plain name and scopes out of {', '.join(SCOPES)}")
    key = secrets.token_urlsafe(32)
    return key, f"{name} {scopes} {digest(key).hex()}"


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _shown(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    for name, value in headers:
        text = value.decode("latin-1").strip()
        if len(text) > _MOST_CHARACTERS:
            continue
        if name == b"x-api-key":
            return text
        if name == b"authorization" and text[:7].lower() == "bearer ":
            return text[7:].strip()
    return None


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
