"""The real processes, started through the commands users start them with, on loopback; and what a drill asks of them.

Two shapes: `served` is `padrec serve` (Valkey, worker and API, supervised); `parts` are a Valkey, workers and APIs
apart, for drills that need a second of something or stand between two of them.
"""

import contextlib
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from service import child
from service.embedded_valkey import start_valkey
from service.serve import wait_until_ready
from service.supervisor import free_port
from tests.drills.redis_between import RedisBetween

LOOPBACK = "127.0.0.1"
QUIET = ("--log-level", "error")
START_SECONDS = 300.0  # a warm-up beside other work


@dataclass
class Process:
    """One process of the service and where it answers."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid


@dataclass
class Parts:
    """What runs, each thing where a drill can reach it."""

    folder: Path
    bundle: Path
    redis_url: str
    workers: list[Process] = field(default_factory=list)
    apis: list[Process] = field(default_factory=list)


@contextlib.contextmanager
def served(bundle: Path, *flags: str, **environ: str) -> Iterator[Process]:
    """`padrec serve`, ready."""
    port = free_port(LOOPBACK)
    command = ["serve", "--bundle", str(bundle), "--port", str(port), "--drain-seconds", "0", *QUIET, *flags]
    process = spawn(command, environ)
    try:
        wait_until_ready(f"http://{LOOPBACK}:{port}", process, START_SECONDS)
        yield Process(f"http://{LOOPBACK}:{port}", process)
    finally:
        child.stop(process, 30.0)


@contextlib.contextmanager
def parts(
    folder: Path,
    bundle: Path,
    *,
    workers: int = 1,
    apis: int = 1,
    worker_bundle: Path | None = None,
    worker_module: Sequence[str] = ("service.cli", "worker"),
    between: RedisBetween | None = None,
    api_flags: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Iterator[Parts]:
    """A Valkey with the bundle's catalog, workers, and APIs that know them, ready. The processes reach it
    through `between`, where given."""
    with contextlib.ExitStack() as stack:
        valkey = stack.enter_context(start_valkey(folder))
        made = Parts(folder, bundle, valkey.url)
        publish(bundle, valkey.url)
        if between:
            between.lead_to(valkey.url)
        told = {**(environ or {}), "PADREC_REDIS_URL": between.url if between else valkey.url}
        for _ in range(workers):
            made.workers.append(start_worker(worker_bundle or bundle, worker_module, told))
            stack.callback(child.stop, made.workers[-1].process, 30.0)
        for worker in made.workers:
            wait(lambda worker=worker: is_ready(worker.url), START_SECONDS, worker.process)
        for _ in range(apis):
            made.apis.append(start_api(made, told, api_flags))
            stack.callback(lambda at: child.stop(made.apis[at].process, 30.0), len(made.apis) - 1)
        for api in made.apis:
            wait_until_ready(api.url, api.process, START_SECONDS)
        yield made


def start_worker(
    bundle: Path,
    module: Sequence[str] = ("service.cli", "worker"),
    environ: Mapping[str, str] | None = None,
    *flags: str,
) -> Process:
    port = free_port(LOOPBACK)
    name, *words = module
    command = [*words, "--bundle", str(bundle), "--port", str(port), "--drain-seconds", "0", *QUIET, *flags]
    return Process(f"http://{LOOPBACK}:{port}", spawn(command, environ or {}, name))


def start_api(made: Parts, environ: Mapping[str, str], flags: Sequence[str], port: int = 0) -> Process:
    port = port or free_port(LOOPBACK)
    told = {
        **environ,
        "PADREC_WORKER_URLS": ",".join(worker.url for worker in made.workers),
        "PADREC_CATALOG_FILE": str(made.bundle / "catalog.jsonl"),
    }
    return Process(f"http://{LOOPBACK}:{port}", spawn(["api", "--port", str(port), *QUIET, *flags], told))


def publish(bundle: Path, redis_url: str) -> None:
    """`padrec publish`."""
    command = [sys.executable, "-m", "service.cli", "publish", "--bundle", str(bundle)]
    subprocess.run(
        command, env={**os.environ, "PADREC_REDIS_URL": redis_url}, check=True, capture_output=True, timeout=120
    )


def spawn(words: Sequence[str], environ: Mapping[str, str], module: str = "service.cli") -> subprocess.Popen[bytes]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PADREC_")}
    # Tests import from the folder they are started in, and so do these.
    clean["PYTHONPATH"] = os.pathsep.join(filter(None, (os.getcwd(), clean.get("PYTHONPATH"))))
    return child.spawn([sys.executable, "-m", module, *words], environ={**clean, **environ}, output=subprocess.DEVNULL)


def descendants(pid: int) -> dict[int, str]:
    """Processes below `pid` with their command lines."""
    found: dict[int, str] = {}
    with contextlib.suppress(OSError):
        for each in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            with contextlib.suppress(OSError):
                found[each] = Path(f"/proc/{each}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            found |= descendants(each)
    return found


def pid_of(service: Process, word: str) -> int:
    """The one process below `padrec serve` whose command holds `word`, spares left out."""
    (pid,) = (pid for pid, command in descendants(service.pid).items() if word in command and "--spare" not in command)
    return pid


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def get(url: str, path: str, seconds: float = 1.0) -> tuple[int, bytes]:
    """Status and body; status 0 where nobody answers. Cheaper than httpx: a probe must not slow down what it sees."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or LOOPBACK, parts.port, timeout=seconds)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def is_ready(url: str) -> bool:
    return get(url, "/readyz")[0] == 200


def check(url: str, name: str) -> str:
    """What /readyz says of one part: "ok", "down", ...; "gone" where nobody answers."""
    try:
        return str(json.loads(get(url, "/readyz")[1])["checks"][name])
    except (ValueError, KeyError, TypeError):
        return "gone"


def metric(url: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    text = get(url, "/metrics", 5.0)[1].decode()
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def wait(condition: Callable[[], bool], seconds: float, process: subprocess.Popen[bytes] | None = None) -> float:
    """Seconds until `condition` held; inf where it did not in time or `process` ended."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds or (process and process.poll() is not None):
            return float("inf")
        time.sleep(0.02)
    return time.monotonic() - start
