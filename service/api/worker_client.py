"""The workers, as seen from the API: one question, one answer, errors in our words.

A URL may name many workers (a headless service): every address of its name is one. Chooses the least loaded one, by our
own requests in flight and what it reports of others', keeps the deadline, retries once elsewhere where that can help.
A poll notices workers that come, hang, die and come back; one that answers the poll but fails its requests is left
alone for a while. Knows no item IDs and no fallbacks.
"""

import asyncio
import contextlib
import ipaddress
import logging
import random
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from pydantic import ValidationError

from service import tracing
from service.errors import (
    CatalogMismatch,
    DeadlinePassed,
    FieldError,
    Invalid,
    Overloaded,
    WorkerUnavailable,
)
from service.metrics import ApiMetrics
from service.schemas import GenerateRequest, GenerateResponse, WorkerInfo
from service.settings import Settings

POLL_TIMEOUT_SECONDS = 1.0
CONNECT_TIMEOUT_SECONDS = 0.25
AWAY_POLL_SECONDS = 0.1
EJECT_AFTER_FAILURES = 3  # in a row
EJECT_SECONDS = 1.0  # the first time; twice as long every further time, up to the most
EJECT_MOST_SECONDS = 30.0
FULL_SECONDS = 0.1  # longer than a refusal takes to arrive, or more would be sent into it
FULL_STEP_MOST = 8
FULL_FORGOTTEN_SECONDS = 1.0
FULL_SHARE = 1.1  # of the time the refused request had left: others have had a little less of theirs spent
_JSON = {"content-type": "application/json"}

Resolve = Callable[[str, int], Awaitable[list[str]]]

logger = logging.getLogger("padrec.worker_client")


async def addresses(host: str, port: int) -> list[str]:
    """Every address of a name; of one family, or each worker would count twice. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family = min((info[0] for info in found), default=socket.AF_INET)
    return sorted({str(info[4][0]) for info in found if info[0] == family})


async def as_named(host: str, port: int) -> list[str]:
    """A name is its own only address: for transports that resolve names themselves."""
    del port
    return [host]


@dataclass(eq=False)
class Worker:
    """What we know of one worker. `up` is None until it has been heard of; while `avoid`, asking it would only cost
    time: it hangs, warms up or drains. `others` is how many requests of others it reported; `failures` of ours in a
    row; until `ejected_until` (`time.monotonic()`) it is asked only where there is nobody else. It has refused a
    request with `full_seconds` left: it is not given more than `full_at` of ours, and `full_step` more where nothing
    has changed by `full_until`; all of this until `full_forgotten`."""

    url: httpx.URL
    name: str = ""  # the URL it was found under
    in_flight: int = 0
    up: bool | None = None
    avoid: bool = False
    info: WorkerInfo | None = None
    others: int = 0
    failures: int = 0
    ejections: int = 0
    ejected_until: float = 0.0
    full_seconds: float = 0.0
    full_at: int = 0
    full_step: int = 1
    full_until: float = 0.0
    full_forgotten: float = float("-inf")
    retry_after: float = 1.0

    _paths: dict[str, httpx.URL] = field(default_factory=dict)

    @property
    def load(self) -> int:
        return self.in_flight + self.others

    def refuses(self, remaining: float) -> bool:
        """Whether it would refuse, for all we know, a request that has so many seconds left.

        In an overload refusing would take the time of what it does. So it is given no more than it had when it refused
        one like that, then one more every FULL_SECONDS, two more, four more: what it can do is found again soon, and
        no crowd rushes in, neither when we have been late ourselves nor when it has taken all of them for a while. Who
        has not had more than that for a second may have any number again."""
        return self._is_full_for(remaining) and time.monotonic() < self.full_until

    def _is_full_for(self, remaining: float) -> bool:
        known = remaining <= self.full_seconds and time.monotonic() < self.full_forgotten
        return known and self.in_flight >= self.full_at

    def begin(self, remaining: float) -> None:
        """Count a request that is sent to it with so many seconds left."""
        if self._is_full_for(remaining):
            self._hold_back(self.in_flight + self.full_step, min(2 * self.full_step, FULL_STEP_MOST))
        self.in_flight += 1

    def refused(self, remaining: float, retry_after: float) -> None:
        """Note that it is full for a request that had so many seconds left and is still counted."""
        self.full_seconds, self.retry_after = FULL_SHARE * remaining, retry_after
        self._hold_back(self.in_flight - 1, 1)

    def _hold_back(self, at: int, step: int) -> None:
        now = time.monotonic()
        self.full_at, self.full_step = at, step
        self.full_until, self.full_forgotten = now + FULL_SECONDS, now + FULL_FORGOTTEN_SECONDS

    def at(self, path: str) -> httpx.URL:
        """Its URL with `path`, made once: it costs more than the rest of a request."""
        if path not in self._paths:
            self._paths[path] = self.url.copy_with(raw_path=path.encode())
        return self._paths[path]


class WorkerClient:
    """Sends Generate requests. Call `discover` once, then `poll` in the background.

    It speaks to the transport itself: what `httpx.AsyncClient` does around it (redirects, cookies, authentication)
    is not wanted here and costs as much as the exchange.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        settings: Settings,
        metrics: ApiMetrics,
        resolve: Resolve = as_named,
    ) -> None:
        self._names = [httpx.URL(url) for url in settings.worker_urls]
        self.workers = [Worker(url, str(url)) for url in self._names]
        self._resolve = resolve
        self._transport = transport
        self._metrics = metrics
        self._poll_seconds = settings.poll_seconds
        key = settings.shown_worker_key
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    @property
    def catalog_version(self) -> str | None:
        """The catalog version most live workers serve; None if none is known to be alive."""
        versions = [w.info.catalog_version for w in self.workers if w.up and w.info]
        return max(versions, key=versions.count) if versions else None

    @property
    def any_up(self) -> bool:
        return any(w.up for w in self.workers)

    async def generate(self, request: GenerateRequest, deadline: float) -> GenerateResponse:
        """The answer of one worker, before `deadline` (`time.monotonic()` seconds).

        Raises WorkerUnavailable, Overloaded, CatalogMismatch, DeadlinePassed or Invalid.
        """
        remaining = deadline - time.monotonic()
        worker = self._choose(request.catalog_version, None, remaining)
        if worker.refuses(remaining):
            raise _full(worker)
        try:
            return await self._ask(worker, request, deadline)
        except (WorkerUnavailable, Overloaded) as exc:
            remaining = deadline - time.monotonic()
            other = self._second_choice(worker, exc, request.catalog_version, remaining)
            if other is None or other.refuses(remaining) or remaining <= 0:
                raise
            self._metrics.worker_retries.labels(exc.slug).inc()
            return await self._ask(other, request, deadline)

    def refuse_if_full(self, deadline: float) -> None:
        """Raises Overloaded where a request of this deadline would be refused for want of room: known before anything
        of it has been looked up."""
        remaining = deadline - time.monotonic()
        with contextlib.suppress(WorkerUnavailable):
            worker = self._choose(None, None, remaining)
            if worker.refuses(remaining):
                raise _full(worker)

    async def poll(self) -> None:
        """Look who there is and ask every worker how it is, for ever; one that is away or warming up is wanted back
        soon, and asked more often."""
        due = time.monotonic()
        while True:
            try:
                if time.monotonic() >= due:
                    due = time.monotonic() + self._poll_seconds
                    await self.discover()
                    await self.look_at_all()
                else:
                    await asyncio.gather(*(self.look_at(worker) for worker in self._away))
            except Exception:
                logger.exception("the workers could not be looked at")
            rest = max(0.0, due - time.monotonic())
            await asyncio.sleep(min(rest, AWAY_POLL_SECONDS) if self._away else rest)

    @property
    def _away(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.avoid or not worker.up]

    async def discover(self) -> None:
        """Bring the workers in line with the addresses of their names. A name that cannot be resolved keeps those it
        had: a name server may be down while the workers are not."""
        found = await asyncio.gather(*(self._addresses_of(url) for url in self._names))
        for name, urls in zip(self._names, found, strict=True):
            if urls is not None:
                self._update(str(name), urls)

    def _update(self, name: str, urls: list[httpx.URL]) -> None:
        of_name = [worker for worker in self.workers if worker.name == name]
        for worker in of_name:
            if worker.url not in urls:
                self.workers.remove(worker)
                self._metrics.forget_worker(str(worker.url))
                logger.info("worker gone", extra={"worker": str(worker.url)})
        for url in urls:
            if all(worker.url != url for worker in of_name):
                self.workers.append(Worker(url, name))
                logger.info("worker found", extra={"worker": str(url)})

    async def _addresses_of(self, url: httpx.URL) -> list[httpx.URL] | None:
        try:
            ipaddress.ip_address(url.host)
            return [url]
        except ValueError:
            pass
        try:
            async with asyncio.timeout(POLL_TIMEOUT_SECONDS):
                hosts = await self._resolve(url.host, url.port or (443 if url.scheme == "https" else 80))
        except (OSError, TimeoutError):
            return None
        return [url.copy_with(host=host) for host in hosts] or None

    async def look_at_all(self) -> None:
        """Refresh what we know of every worker."""
        await asyncio.gather(*(self.look_at(worker) for worker in self.workers))

    async def look_at(self, worker: Worker) -> None:
        """Refresh what we know of one worker."""
        ours = worker.in_flight
        try:
            ready, info = await asyncio.gather(
                *(self._exchange("GET", worker, path, POLL_TIMEOUT_SECONDS) for path in ("/readyz", "/info"))
            )
            if 503 in (ready.status_code, info.status_code):
                self._mark(worker, up=False, avoid=True)
                return
            ready.raise_for_status()
            info.raise_for_status()
            seen = WorkerInfo.model_validate_json(info.content)
            if worker.info is not None and worker.info.instance != seen.instance:
                self._metrics.worker_restarts.labels(str(worker.url)).inc()
                worker.failures = worker.ejections = 0
                worker.ejected_until = 0.0
            worker.info, worker.others = seen, max(0, seen.in_flight + seen.waiting - ours)
            self._mark(worker, up=True)
        except httpx.TimeoutException:
            self._mark(worker, up=False, avoid=True)
        except (httpx.HTTPError, ValidationError):
            self._mark(worker, up=False)

    def _choose(self, catalog_version: str | None, but: Worker | None, remaining: float) -> Worker:
        # One that refuses connections may be asked: that costs nothing and finds it again at once.
        able = [w for w in self.workers if w is not but and not w.avoid]
        if not able:
            raise WorkerUnavailable("No worker answers.")

        now = time.monotonic()

        def cost(worker: Worker) -> tuple[bool, bool, bool, bool, int, float]:
            served = worker.info.catalog_version if worker.info else None
            other = None not in (catalog_version, served) and served != catalog_version
            left_alone = now < worker.ejected_until
            # By lot among equals: many API processes must not all take the same one.
            return worker.up is False, left_alone, other, worker.refuses(remaining), worker.load, random.random()

        return min(able, key=cost)

    def _second_choice(
        self, first: Worker, exc: WorkerUnavailable | Overloaded, catalog_version: str, remaining: float
    ) -> Worker | None:
        if len(self.workers) > 1:
            try:
                return self._choose(catalog_version, first, remaining)
            except WorkerUnavailable:
                return None
        # Asking a full worker again at once would only add to its load.
        in_vain = first.avoid or isinstance(exc, Overloaded) or exc.refused
        return None if in_vain else first

    async def _ask(self, worker: Worker, request: GenerateRequest, deadline: float) -> GenerateResponse:
        remaining = deadline - time.monotonic()
        if remaining <= 0.001:
            raise DeadlinePassed("The deadline passed before a worker could be asked.")
        body = request.model_copy(update={"deadline_ms": max(1, int(remaining * 1000))})
        worker.begin(remaining)
        try:
            async with asyncio.timeout(remaining):
                content = body.model_dump_json(exclude_unset=True, warnings=False)  # tuples for lists
                reply = await self._exchange("POST", worker, "/generate", remaining, content)
            answer = self._read(worker, reply, request)
            worker.failures = worker.ejections = 0
            return answer
        except Overloaded as exc:
            worker.refused(remaining, exc.retry_after or 1.0)
            raise
        except WorkerUnavailable as exc:
            if not exc.refused:
                self._failed(worker)
            raise
        except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
            self._mark(worker, up=False, avoid=isinstance(exc, httpx.ConnectTimeout))
            raise WorkerUnavailable("The worker cannot be reached.") from exc
        except (TimeoutError, httpx.TimeoutException) as exc:
            raise DeadlinePassed("The worker did not answer in time.") from exc
        except httpx.HTTPError as exc:
            self._failed(worker)
            raise WorkerUnavailable("The worker broke off its answer.") from exc
        finally:
            worker.in_flight -= 1

    def _failed(self, worker: Worker) -> None:
        """Count a failed request; after some in a row the worker is ejected. Back again, one more failure ejects it for
        longer."""
        worker.failures += 1
        if worker not in self.workers:
            return
        if worker.failures < EJECT_AFTER_FAILURES or time.monotonic() < worker.ejected_until:
            return
        seconds = min(EJECT_SECONDS * 2**worker.ejections, EJECT_MOST_SECONDS)
        worker.ejections += 1
        worker.ejected_until = time.monotonic() + seconds
        self._metrics.worker_ejections.labels(str(worker.url)).inc()
        logger.warning("worker ejected", extra={"worker": str(worker.url), "seconds": seconds})

    async def _exchange(
        self, method: str, worker: Worker, path: str, seconds: float, content: str | None = None
    ) -> httpx.Response:
        """One request and its whole reply. Raises httpx.HTTPError."""
        extensions: dict[str, Any] = {"timeout": httpx.Timeout(seconds, connect=CONNECT_TIMEOUT_SECONDS).as_dict()}
        if worker.url.scheme == "https":  # certificates are for names, not for addresses
            extensions["sni_hostname"] = httpx.URL(worker.name).host
        request = httpx.Request(
            method,
            worker.at(path),
            headers=self._headers | (_JSON | tracing.current_headers() if content is not None else {}),
            content=content,
            extensions=extensions,
        )
        reply = await self._transport.handle_async_request(request)
        reply.request = request
        try:
            await reply.aread()
        finally:
            await reply.aclose()
        return reply

    def _read(self, worker: Worker, reply: httpx.Response, request: GenerateRequest) -> GenerateResponse:
        if reply.status_code != 200:
            raise _translated(reply)
        try:
            answer = GenerateResponse.model_validate_json(reply.content)
        except ValidationError:
            raise WorkerUnavailable("The worker's answer makes no sense.") from None
        if answer.model.catalog_version != request.catalog_version:
            raise CatalogMismatch(answer.model.catalog_version)
        if not worker.avoid:  # a draining worker still answers what it has begun
            self._mark(worker, up=True)
        return answer

    def _mark(self, worker: Worker, *, up: bool, avoid: bool = False) -> None:
        if worker not in self.workers:  # gone with an answer on its way: counted now, it would stay for ever
            return
        if worker.up is not up:
            logger.log(
                logging.INFO if up else logging.WARNING,
                "worker up" if up else "worker down",
                extra={"worker": str(worker.url)},
            )
        worker.up, worker.avoid = up, avoid
        self._metrics.worker_up.labels(str(worker.url)).set(up)


def _full(worker: Worker) -> Overloaded:
    return Overloaded("Every worker is busy.", retry_after=worker.retry_after)


def _translated(
    reply: httpx.Response,
) -> WorkerUnavailable | Overloaded | CatalogMismatch | DeadlinePassed | Invalid:
    """A worker's refusal in our words."""
    try:
        problem = reply.json()
        if reply.status_code == 409:
            return CatalogMismatch(str(problem["catalog_version"])[:64])
        if reply.status_code == 422:
            errors = [FieldError(str(e["pointer"]), str(e["reason"])) for e in problem["errors"]]
            return Invalid("The request has invalid fields.", errors=errors)
    except (ValueError, KeyError, TypeError):
        return WorkerUnavailable("The worker's refusal makes no sense.")
    if reply.status_code == 503:
        retry_after = reply.headers.get("retry-after", "1")
        seconds = float(retry_after) if retry_after.isdecimal() else 1.0
        if isinstance(problem, dict) and str(problem.get("type")).endswith(f":{Overloaded.slug}"):
            return Overloaded("Every worker is busy.", retry_after=seconds)
        # It drains, or the request has failed alone.
        return WorkerUnavailable("The worker does not take the request.", retry_after=seconds, refused=True)
    if reply.status_code == 504:
        return DeadlinePassed("The worker ran out of time.")
    return WorkerUnavailable("The worker failed.")
