"""`padrec serve`: Valkey, worker and API on this machine, from one bundle.

Decides which processes there are and what each is told; `supervisor` keeps them running. Knows no requests.
"""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import httpx

from service import child
from service.api.publish import PublishError, publish
from service.embedded_valkey import answers, start_valkey
from service.settings import Settings, SettingsError
from service.supervisor import Child, Supervisor, free_port, stop_on_signals

logger = logging.getLogger("padrec.serve")

LOOPBACK = "127.0.0.1"
NEXT_FREE = range(8000, 8100)
WORKER_NICENESS = 10  # who answers goes before who computes: on shared cores refusals would wait for lists


class Service(NamedTuple):
    """A running service: where it answers, and the process of `padrec serve`."""

    url: str
    process: subprocess.Popen[bytes]


class ServiceFailed(Exception):
    """The service did not become ready; its own log says why."""


def serve(settings: Settings, *, external_redis: bool) -> int:
    """Run everything until SIGTERM or Ctrl-C. Returns the exit status.

    With `external_redis` the Redis of the settings is used, else a Valkey of our own. Port 0 takes the next free one
    from 8000 on. Raises SettingsError, PortTaken, CatalogFileError or ValkeyUnavailable when it cannot start.
    """
    if settings.bundle is None:
        raise SettingsError("setting 'bundle' (PADREC_BUNDLE, --bundle): say which bundle to serve")
    if not (settings.bundle / "catalog.jsonl").is_file():
        raise SettingsError(f"setting 'bundle': {settings.bundle} holds no catalog.jsonl")
    if settings.port:
        port = free_port(settings.host, settings.port)
    else:
        port = free_port(settings.host, NEXT_FREE.start, tries=len(NEXT_FREE))
    with tempfile.TemporaryDirectory(prefix="padrec-") as private:
        plan = _Plan(settings, settings.bundle, Path(private), port, free_port(LOOPBACK), external_redis)
        supervisor = Supervisor(plan.children(), on_round=plan.announce)
        with stop_on_signals(supervisor):
            return supervisor.run()


class _Plan:
    """Which processes there are, and what each is told."""

    def __init__(
        self, settings: Settings, bundle: Path, private: Path, port: int, worker_port: int, external_redis: bool
    ) -> None:
        self.settings, self.catalog_file, self.private = settings, bundle / "catalog.jsonl", private
        self.port, self.worker_port, self.external_redis = port, worker_port, external_redis
        self.redis_url = settings.redis_url.get_secret_value()
        self._announced, self._next_look = False, 0.0

    def children(self) -> list[Child]:
        drain, finish = self.settings.drain_seconds, self.settings.finish_seconds
        api = Child("api", self.start_api, drain + finish + 5, lambda: is_alive(self.settings.host, self.port))
        worker = Child(
            "worker",
            self.start_worker,
            finish + 5,
            healthy=lambda: is_alive(LOOPBACK, self.worker_port),
            spare=self.start_spare,
            settled=lambda: answers_ok(LOOPBACK, self.worker_port, "readyz"),
        )
        if self.external_redis:
            self.publish()
            return [worker, api]
        valkey = Child("valkey", self.start_valkey, healthy=lambda: answers(self.private / "valkey.sock"))
        return [valkey, worker, api]

    def start_valkey(self) -> subprocess.Popen[bytes]:
        server = start_valkey(self.private)
        self.redis_url = server.url
        self.publish()
        return server.process

    def publish(self) -> None:
        try:
            asyncio.run(publish(self.catalog_file, self.redis_url))
        except PublishError as error:
            # Not the end: the API reads the same catalog from the bundle.
            logger.warning("the catalog was not published", extra={"reason": str(error)})

    def start_worker(self, given: int = subprocess.DEVNULL, *flags: str) -> subprocess.Popen[bytes]:
        # Nobody but our API asks this worker, and that has stopped before: it need not wait to be noticed.
        flags = ("--drain-seconds", "0", "--metrics-port", "0", *flags)
        process = self._start("worker", LOOPBACK, self.worker_port, given, *flags)
        if self.settings.worker_yields and sys.platform == "linux":
            # To a process that wakes up, a core where only this runs is free; with niceness it queues for a busy one.
            os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
        else:
            os.setpriority(os.PRIO_PROCESS, process.pid, os.getpriority(os.PRIO_PROCESS, 0) + WORKER_NICENESS)
        return process

    def start_spare(self) -> subprocess.Popen[bytes]:
        return self.start_worker(subprocess.PIPE, "--spare")

    def start_api(self) -> subprocess.Popen[bytes]:
        return self._start("api", self.settings.host, self.port, subprocess.DEVNULL)

    def _start(self, name: str, host: str, port: int, given: int, *flags: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "service.cli", name, "--host", host, "--port", str(port), *flags]
        environ = {**os.environ, **environment(self.settings), **self._wiring()}
        return child.spawn(command, environ=environ, given=given)

    def _wiring(self) -> dict[str, str]:
        # By environment, not by flags: a Redis URL may hold a password, and flags are for everyone to see.
        key = self.settings.worker_key
        return {
            **({"PADREC_WORKER_KEY": key.get_secret_value()} if key else {}),
            "PADREC_REDIS_URL": self.redis_url,
            "PADREC_WORKER_URLS": f"http://{LOOPBACK}:{self.worker_port}",
            "PADREC_CATALOG_FILE": str(self.catalog_file),
            "PADREC_MEASUREMENTS": str(self.settings.measurements or self.private / "measurements.json"),
        }

    def announce(self) -> None:
        """Say once that the first request can come. Called every supervisor round; looks a few times a second."""
        if self._announced or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + 0.25
        url = f"http://{_reachable(self.settings.host)}:{self.port}"
        if is_ready(url):
            self._announced = True
            print(f"padrec serves on {url} (try {url}/docs)", flush=True)  # noqa: T201 - a command's answer


@contextlib.contextmanager
def running_service(bundle: Path, host: str = LOOPBACK, *, first_port: int = NEXT_FREE.start) -> Iterator[Service]:
    """`padrec serve` in a process of its own, ready to answer while the block runs; stopped in order afterwards, also
    when this process is killed. Raises PortTaken or ServiceFailed."""
    port = free_port(host, first_port, tries=len(NEXT_FREE))
    command = [sys.executable, "-m", "service.cli", "serve", "--bundle", str(bundle), "--host", host]
    command += ["--port", str(port), "--drain-seconds", "0", "--log-level", "error"]
    process = child.spawn(command, output=subprocess.DEVNULL, parent_death_signal=signal.SIGTERM)
    try:
        url = f"http://{host}:{port}"
        wait_until_ready(url, process)
        yield Service(url, process)
    finally:
        child.stop(process, 30.0)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], timeout: float = 120.0) -> None:
    """Wait for API and worker. Raises ServiceFailed when `process` ends first or after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not is_ready(url):
        if process.poll() is not None:
            raise ServiceFailed(f"the service ended with status {process.returncode} before it was ready")
        if time.monotonic() > deadline:
            raise ServiceFailed(f"the service is not ready after {timeout:g} s")
        time.sleep(0.1)


def is_ready(url: str) -> bool:
    """Whether the API at `url` is ready and sees a worker that is."""
    try:
        reply = httpx.get(f"{url}/readyz", timeout=1.0, trust_env=False)
        return reply.status_code == 200 and reply.json()["checks"]["worker"] == "ok"
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return False


def is_alive(host: str, port: int) -> bool:
    """Whether a process of ours answers, and says that it is alive."""
    return answers_ok(host, port, "healthz")


def answers_ok(host: str, port: int, path: str) -> bool:
    """Whether a process of ours answers a probe with 200."""
    try:
        return httpx.get(f"http://{_reachable(host)}:{port}/{path}", timeout=1.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _reachable(host: str) -> str:
    """Where a process that listens on `host` answers: "every address" is none to connect to."""
    here = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)
    return f"[{here}]" if ":" in here else here


def environment(settings: Settings) -> Mapping[str, str]:
    """The settings that were given, as PADREC_* variables for a process that is to have the same."""
    values = settings.model_dump(mode="json", include=settings.model_fields_set - {"redis_url", "worker_key"})
    return {
        f"PADREC_{name.upper()}": ",".join(value) if isinstance(value, list) else str(value)
        for name, value in values.items()
        if value is not None
    }
