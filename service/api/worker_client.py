"""The workers, as seen from the API: one question, one answer, errors in our words.

Chooses the worker with the fewest requests in flight, keeps the deadline, retries once where that can help. A poll
notices workers that hang, die and come back. Knows no item IDs and no fallbacks.
"""

import asyncio
import logging
import time
from dataclasses import dataclass

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
_JSON = {"content-type": "application/json"}

logger = logging.getLogger("padrec.worker_client")


@dataclass
class Worker:
    """What we know of one worker. `up` is None until it has been heard of; while `avoid`, asking it would only cost
    time: it hangs, warms up or drains."""

    url: httpx.URL
    in_flight: int = 0
    up: bool | None = None
    avoid: bool = False
    info: WorkerInfo | None = None


class WorkerClient:
    """Sends Generate requests. Call `poll` in the background.

    It speaks to the transport itself: what `httpx.AsyncClient` does around it (redirects, cookies, authentication)
    is not wanted here and costs as much as the exchange.
    """

    def __init__(self, transport: httpx.AsyncBaseTransport, settings: Settings, metrics: ApiMetrics) -> None:
        self.workers = [Worker(httpx.URL(url)) for url in settings.worker_urls]
        self._transport = transport
        self._metrics = metrics
        self._poll_seconds = settings.poll_seconds

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
        worker = self._choose(request.catalog_version, None)
        try:
            return await self._ask(worker, request, deadline)
        except (WorkerUnavailable, Overloaded) as exc:
            other = self._second_choice(worker, exc, request.catalog_version)
            if other is None or time.monotonic() >= deadline:
                raise
            self._metrics.worker_retries.labels(exc.slug).inc()
            return await self._ask(other, request, deadline)

    async def poll(self) -> None:
        """Ask every worker how it is, for ever."""
        while True:
            await asyncio.gather(*(self.look_at(worker) for worker in self.workers))
            await asyncio.sleep(self._poll_seconds)

    async def look_at(self, worker: Worker) -> None:
        """Refresh what we know of one worker."""
        try:
            ready, info = await asyncio.gather(
                *(self._exchange("GET", worker, path, POLL_TIMEOUT_SECONDS) for path in ("/readyz", "/info"))
            )
            info.raise_for_status()
            worker.info = WorkerInfo.model_validate_json(info.content)
            self._mark(worker, up=ready.status_code == 200, avoid=ready.status_code != 200)
        except httpx.TimeoutException:
            self._mark(worker, up=False, avoid=True)
        except (httpx.HTTPError, ValidationError):
            self._mark(worker, up=False)

    def _choose(self, catalog_version: str, but: Worker | None) -> Worker:
        # One that refuses connections may be asked: that costs nothing and finds it again at once.
        able = [w for w in self.workers if w is not but and not w.avoid]
        if not able:
            raise WorkerUnavailable("No worker answers.")

        def cost(worker: Worker) -> tuple[bool, bool, int]:
            other = worker.info is not None and worker.info.catalog_version != catalog_version
            return worker.up is False, other, worker.in_flight

        return min(able, key=cost)

    def _second_choice(self, first: Worker, exc: WorkerUnavailable | Overloaded, catalog_version: str) -> Worker | None:
        if len(self.workers) > 1:
            try:
                return self._choose(catalog_version, first)
            except WorkerUnavailable:
                return None
        # Asking a full worker again at once would only add to its load.
        return None if isinstance(exc, Overloaded) or first.avoid else first

    async def _ask(self, worker: Worker, request: GenerateRequest, deadline: float) -> GenerateResponse:
        remaining = deadline - time.monotonic()
        if remaining <= 0.001:
            raise DeadlinePassed("The deadline passed before a worker could be asked.")
        body = request.model_copy(update={"deadline_ms": max(1, int(remaining * 1000))})
        worker.in_flight += 1
        try:
            async with asyncio.timeout(remaining):
                content = body.model_dump_json(exclude_unset=True, warnings=False)  # tuples for lists
                reply = await self._exchange("POST", worker, "/generate", remaining, content)
            return self._read(worker, reply, request)
        except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
            self._mark(worker, up=False, avoid=isinstance(exc, httpx.ConnectTimeout))
            raise WorkerUnavailable("The worker cannot be reached.") from exc
        except (TimeoutError, httpx.TimeoutException) as exc:
            raise DeadlinePassed("The worker did not answer in time.") from exc
        except httpx.HTTPError as exc:
            raise WorkerUnavailable("The worker broke off its answer.") from exc
        finally:
            worker.in_flight -= 1

    async def _exchange(
        self, method: str, worker: Worker, path: str, seconds: float, content: str | None = None
    ) -> httpx.Response:
        """One request and its whole reply. Raises httpx.HTTPError."""
        request = httpx.Request(
            method,
            worker.url.copy_with(raw_path=path.encode()),
            headers=_JSON | tracing.current_headers() if content is not None else None,
            content=content,
            extensions={"timeout": httpx.Timeout(seconds, connect=CONNECT_TIMEOUT_SECONDS).as_dict()},
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
        if worker.up is not up:
            logger.log(
                logging.INFO if up else logging.WARNING,
                "worker up" if up else "worker down",
                extra={"worker": str(worker.url)},
            )
        worker.up, worker.avoid = up, avoid
        self._metrics.worker_up.labels(str(worker.url)).set(up)


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
        return Overloaded(
            "Every worker is busy.",
            retry_after=float(retry_after) if retry_after.isdecimal() else 1.0,
        )
    if reply.status_code == 504:
        return DeadlinePassed("The worker ran out of time.")
    return WorkerUnavailable("The worker failed.")
