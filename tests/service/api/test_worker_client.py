"""Which worker is asked, what is asked twice, and what becomes of every way a worker can fail."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from service.api.worker_client import (
    AWAY_POLL_SECONDS,
    EJECT_AFTER_FAILURES,
    FULL_FORGOTTEN_SECONDS,
    FULL_SECONDS,
    FULL_STEP_MOST,
    WorkerClient,
    addresses,
)
from service.errors import CatalogMismatch, DeadlinePassed, Overloaded, PadrecError, WorkerUnavailable
from service.metrics import ApiMetrics
from service.schemas import GenerateRequest, GenerateResponse
from tests.service.wire import OTHER_VERSION, VERSION, TinyWorker, Workers, api_settings, codes_of, until


@asynccontextmanager
async def client_of(network: httpx.AsyncBaseTransport, *hosts: str) -> AsyncIterator[WorkerClient]:
    settings = api_settings(worker_urls=",".join(f"http://{host}" for host in hosts))
    async with network:
        yield WorkerClient(network, settings, ApiMetrics(CollectorRegistry()))


async def generate(client: WorkerClient, seconds: float = 1.0, **others: Any) -> GenerateResponse:
    fields = {"request_id": "r", "catalog_version": VERSION, "history": [codes_of(0)], "k": 2, "deadline_ms": 1}
    fields |= {"exclude": [], "exclude_history": False}
    request = GenerateRequest.model_validate(fields | others)
    return await client.generate(request, time.monotonic() + seconds)


async def test_the_least_busy_worker_is_asked() -> None:
    first, second = TinyWorker(delay=0.05), TinyWorker(delay=0.05)
    async with client_of(Workers(a=first, b=second), "a", "b") as client:
        await asyncio.gather(*(generate(client) for _ in range(6)))
        assert (len(first.seen), len(second.seen)) == (3, 3)
        assert [w.in_flight for w in client.workers] == [0, 0]


@pytest.mark.parametrize("status", [500, 503])
async def test_what_one_worker_cannot_do_another_is_asked_for(status: int) -> None:
    bad, good = TinyWorker(status=status), TinyWorker(others=1)
    async with client_of(Workers(a=bad, b=good), "a", "b") as client:
        await client.look_at_all()  # the idle one is asked first
        assert len((await generate(client)).items) == 2
        assert (len(bad.seen), len(good.seen)) == (1, 1)


async def test_a_worker_that_refuses_connections_is_asked_last_and_again_when_it_is_back() -> None:
    network = Workers(b=TinyWorker())
    async with client_of(network, "a", "b") as client:
        for _ in range(30):  # among equals the lot decides
            await generate(client)
        assert [w.up for w in client.workers] == [False, True]
        network.apps = {"a": TinyWorker(), "b": None}
        await generate(client)
        assert [w.up for w in client.workers] == [True, False]


async def test_a_connection_that_breaks_is_tried_once_more_on_the_only_worker() -> None:
    tries: list[int] = []

    class Breaking(Workers):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            tries.append(1)
            if len(tries) == 1:
                raise httpx.RemoteProtocolError("closed", request=request)
            return await super().handle_async_request(request)

    async with client_of(Breaking(a=TinyWorker()), "a") as client:
        assert len((await generate(client)).items) == 2
    assert len(tries) == 2


async def test_a_full_worker_is_not_asked_for_more_of_the_same_before_it_has_less_to_do() -> None:
    """Ten times too much is refused here, and its time is left to the worker."""
    worker = TinyWorker(delay=0.2)
    async with client_of(Workers(a=worker), "a") as client:
        busy = [asyncio.create_task(generate(client)) for _ in range(3)]
        await asyncio.sleep(0.05)
        worker.delay, worker.status = 0.0, 503
        with pytest.raises(Overloaded):
            await generate(client)
        worker.status = 200
        asked = len(worker.seen)
        for _ in range(20):
            with pytest.raises(Overloaded) as refused:
                await generate(client)
        assert refused.value.retry_after == 1
        assert len(worker.seen) == asked == 4
        # Who has more time may be taken; and so is everybody once there is less to do, or after a while.
        assert (await asyncio.gather(generate(client, 3.0), *busy))[0].items
        assert (await generate(client)).items
        worker.status = 503
        with pytest.raises(Overloaded):
            await generate(client)
        worker.status = 200
        with pytest.raises(Overloaded):
            await generate(client)
        await asyncio.sleep(FULL_SECONDS)
        assert (await generate(client)).items


async def test_a_worker_that_was_full_is_found_free_again_step_by_step_and_no_crowd_rushes_in() -> None:
    worker = TinyWorker(status=503)
    running: list[asyncio.Task[GenerateResponse]] = []

    async def crowd(size: int) -> int:
        """How many of so many at once are sent on."""
        tasks = [asyncio.create_task(generate(client, 5.0)) for _ in range(size)]
        await asyncio.sleep(0.02)
        running.extend(task for task in tasks if not task.done())
        assert all(isinstance(task.exception(), Overloaded) for task in tasks if task.done())
        return sum(not task.done() for task in tasks)

    async with client_of(Workers(a=worker), "a") as client:
        with pytest.raises(Overloaded):
            await generate(client, 5.0)
        worker.status, worker.delay = 200, 10
        taken, start = [], time.monotonic()
        while time.monotonic() < start + 1.5 * FULL_FORGOTTEN_SECONDS:  # also when it has long refused nothing
            await asyncio.sleep(FULL_SECONDS)
            taken.append(await crowd(20))
        assert taken == [1, 2, 4, *[FULL_STEP_MOST] * (len(taken) - 3)]
        # Nobody has wanted more than that for a while: it is not held back at all.
        await asyncio.sleep(FULL_FORGOTTEN_SECONDS)
        assert await crowd(20) == 20
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@pytest.mark.parametrize("problem", ["worker-unavailable", "draining"])
async def test_what_a_worker_refuses_for_itself_makes_it_neither_full_nor_failing(problem: str) -> None:
    worker, other = TinyWorker(status=503, problem=f"urn:padrec:problem:{problem}"), TinyWorker()
    async with client_of(Workers(a=worker), "a") as client:
        for tries in range(1, EJECT_AFTER_FAILURES + 2):
            with pytest.raises(WorkerUnavailable):
                await generate(client)
            assert len(worker.seen) == tries  # it would say so again
        assert client.workers[0].failures == 0
        worker.status = 200
        assert (await generate(client)).items
    worker.status = 503
    async with client_of(Workers(a=worker, b=other), "a", "b") as client:
        for _ in range(10):
            assert (await generate(client)).items


async def test_a_worker_that_is_away_is_looked_at_more_often_than_the_others() -> None:
    polls: list[str] = []

    class Counted(Workers):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            polls.append(request.url.host)
            return await super().handle_async_request(request)

    network = Counted(b=TinyWorker())
    settings = api_settings(worker_urls="http://a,http://b", poll_seconds=60)
    client = WorkerClient(network, settings, ApiMetrics(CollectorRegistry()))
    async with network:
        polling = asyncio.create_task(client.poll())
        await until(lambda: polls.count("a") >= 6)
        assert [worker.up for worker in client.workers] == [False, True]
        network.apps["a"] = TinyWorker()
        await until(lambda: all(worker.up for worker in client.workers), 2)
        seen = len(polls)
        await asyncio.sleep(3 * AWAY_POLL_SECONDS)
        polling.cancel()
    assert polls.count("b") == 2 and len(polls) == seen


async def test_of_two_workers_the_one_that_is_not_full_is_asked() -> None:
    full, free = TinyWorker(status=503), TinyWorker(others=5)
    async with client_of(Workers(a=full, b=free), "a", "b") as client:
        await client.look_at_all()
        for _ in range(5):
            assert (await generate(client)).items
        assert (len(full.seen), len(free.seen)) == (1, 5)


async def test_a_busy_worker_alone_is_not_asked_twice() -> None:
    worker = TinyWorker(status=503)
    async with client_of(Workers(a=worker), "a") as client:
        with pytest.raises(Overloaded):
            await generate(client)
    assert len(worker.seen) == 1


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        ({"items": [{"codes": [1], "score": "high"}]}, WorkerUnavailable),
        ({"model": None}, WorkerUnavailable),
        (
            {"model": {"name": "n", "version": "v", "catalog_version": "other", "strategy": "list"}},
            CatalogMismatch,
        ),
    ],
)
async def test_an_answer_that_makes_no_sense_is_no_answer(spoil: dict[str, Any], error: type[PadrecError]) -> None:
    async with client_of(Workers(a=TinyWorker(spoil=spoil)), "a") as client:
        with pytest.raises(error):
            await generate(client)


async def test_a_refusal_that_makes_no_sense_counts_as_unavailable() -> None:
    class Garbled(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            return httpx.Response(409, content=b"[]")

    async with client_of(Garbled(), "a") as client:
        with pytest.raises(WorkerUnavailable):
            await generate(client)


async def test_a_deadline_that_has_passed_asks_nobody() -> None:
    worker = TinyWorker()
    async with client_of(Workers(a=worker), "a") as client:
        with pytest.raises(DeadlinePassed):
            await generate(client, seconds=0)
    assert worker.seen == []


async def test_a_worker_on_the_same_catalog_is_preferred() -> None:
    other, same = TinyWorker(version=OTHER_VERSION), TinyWorker()
    async with client_of(Workers(a=other, b=same), "a", "b") as client:
        for worker in client.workers:
            await client.look_at(worker)
        assert client.catalog_version in (VERSION, OTHER_VERSION)
        await generate(client)
    assert (len(other.seen), len(same.seen)) == (0, 1)


async def test_a_worker_that_hangs_is_left_alone_until_it_answers_a_look() -> None:
    class Hanging(Workers):
        hang = True

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if self.hang:
                raise httpx.ReadTimeout("silent", request=request)
            return await super().handle_async_request(request)

    network = Hanging(a=TinyWorker())
    async with client_of(network, "a") as client:
        with pytest.raises(DeadlinePassed):
            await generate(client)
        await client.look_at(client.workers[0])
        with pytest.raises(WorkerUnavailable):
            await generate(client)
        assert not client.any_up
        assert client.catalog_version is None
        network.hang = False
        await client.look_at(client.workers[0])
        assert client.any_up
        assert len((await generate(client)).items) == 2


async def test_a_worker_that_warms_up_or_drains_is_not_asked() -> None:
    leaving, staying = TinyWorker(ready=False), TinyWorker()
    async with client_of(Workers(a=leaving, b=staying), "a", "b") as client:
        for worker in client.workers:
            await client.look_at(worker)
        for _ in range(3):
            await generate(client)
        assert (len(leaving.seen), len(staying.seen)) == (0, 3)
        leaving.ready = True
        await client.look_at(client.workers[0])
        assert [w.up for w in client.workers] == [True, True]


async def test_without_a_second_worker_to_ask_the_first_refusal_stands() -> None:
    async with client_of(Workers(a=TinyWorker(status=503), b=TinyWorker(ready=False)), "a", "b") as client:
        for worker in client.workers:
            await client.look_at(worker)
        with pytest.raises(Overloaded):
            await generate(client)


async def test_an_answer_begun_before_draining_does_not_bring_new_requests() -> None:
    worker = TinyWorker(delay=0.05)
    async with client_of(Workers(a=worker), "a") as client:
        running = asyncio.create_task(generate(client))
        await asyncio.sleep(0.01)
        worker.ready = False
        await client.look_at(client.workers[0])
        await running
        with pytest.raises(WorkerUnavailable):
            await generate(client)


async def test_what_others_keep_a_worker_busy_with_counts() -> None:
    busy, idle = TinyWorker(others=5), TinyWorker()
    async with client_of(Workers(a=busy, b=idle), "a", "b") as client:
        await client.look_at_all()
        await asyncio.gather(*(generate(client) for _ in range(4)))
        assert (len(busy.seen), len(idle.seen)) == (0, 4)
        busy.others, idle.others = 0, 5
        await client.look_at_all()
        await asyncio.gather(*(generate(client) for _ in range(4)))
    assert (len(busy.seen), len(idle.seen)) == (4, 4)


async def test_a_worker_that_fails_again_and_again_is_left_alone_and_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.api.worker_client.EJECT_SECONDS", 0.2)
    bad, good = TinyWorker(status=500), TinyWorker()
    async with client_of(Workers(a=bad, b=good), "a", "b") as client:
        for _ in range(100):
            await generate(client)
        assert len(bad.seen) == EJECT_AFTER_FAILURES
        await client.look_at_all()  # it looks healthy, and stays ejected all the same
        await generate(client)
        assert len(bad.seen) == EJECT_AFTER_FAILURES
        bad.status = 200
        await asyncio.sleep(0.25)
        await asyncio.gather(*(generate(client) for _ in range(10)))
        assert len(bad.seen) > EJECT_AFTER_FAILURES
        assert client.workers[0].failures == 0


async def test_an_ejected_worker_is_better_than_none() -> None:
    worker = TinyWorker(status=500)
    async with client_of(Workers(a=worker), "a") as client:
        for _ in range(EJECT_AFTER_FAILURES):
            with pytest.raises(WorkerUnavailable):
                await generate(client)
        worker.status = 200
        assert (await generate(client)).items


class Names:
    """A name server: the addresses of each name, or none at all."""

    def __init__(self, **known: list[str]) -> None:
        self.known = known
        self.down = False

    async def __call__(self, host: str, port: int) -> list[str]:
        if self.down or host not in self.known:
            raise OSError("no such name")
        return self.known[host]


async def test_every_address_of_a_name_is_a_worker_as_they_come_and_go() -> None:
    first, second, third = TinyWorker(delay=0.05), TinyWorker(delay=0.05), TinyWorker(delay=0.05)
    network = Workers(**{"10.0.0.1": first, "10.0.0.2": second, "10.0.0.3": third})
    names, registry = Names(workers=["10.0.0.1", "10.0.0.2"]), CollectorRegistry()
    settings = api_settings(worker_urls="http://workers:9000")
    async with network:
        client = WorkerClient(network, settings, ApiMetrics(registry), names)
        await client.discover()
        await client.look_at_all()
        await asyncio.gather(*(generate(client) for _ in range(4)))
        assert (len(first.seen), len(second.seen)) == (2, 2)
        names.known = {"workers": ["10.0.0.2", "10.0.0.3"]}
        await client.discover()
        await client.look_at_all()
        await asyncio.gather(*(generate(client) for _ in range(4)))
        assert (len(first.seen), len(second.seen), len(third.seen)) == (2, 4, 2)
        names.down = True  # those that are known stay
        await client.discover()
        assert [str(w.url) for w in client.workers] == ["http://10.0.0.2:9000", "http://10.0.0.3:9000"]
    labels = {
        sample.labels["worker"] for f in registry.collect() if f.name == "padrec_worker_up" for sample in f.samples
    }
    assert labels == {"http://10.0.0.2:9000", "http://10.0.0.3:9000"}


async def test_a_worker_that_is_gone_leaves_nothing_in_the_metrics_when_its_last_answers_come() -> None:
    """The alert that nobody is left to write lists would never fire again."""
    good, bad = TinyWorker(delay=0.05), TinyWorker(delay=0.05, status=500)
    network = Workers(**{"10.0.0.1": good, "10.0.0.2": bad})
    names, registry = Names(workers=["10.0.0.1", "10.0.0.2"]), CollectorRegistry()
    async with network:
        client = WorkerClient(network, api_settings(worker_urls="http://workers:9000"), ApiMetrics(registry), names)
        await client.discover()
        running = [asyncio.create_task(generate(client)) for _ in range(4 * EJECT_AFTER_FAILURES)]
        await asyncio.sleep(0.01)
        names.known = {"workers": ["10.0.0.3"]}
        await client.discover()
        answers = await asyncio.gather(*running, return_exceptions=True)
    assert sum(isinstance(answer, GenerateResponse) for answer in answers) >= 4
    assert len(bad.seen) >= EJECT_AFTER_FAILURES
    labels = {sample.labels.get("worker") for f in registry.collect() for sample in f.samples} - {None}
    assert labels <= {"http://10.0.0.3:9000"}


async def test_a_real_name_resolves_to_addresses_of_one_family() -> None:
    assert await addresses("localhost", 80) in (["127.0.0.1"], ["::1"])


async def test_a_worker_in_place_of_another_is_counted_and_starts_with_a_clean_record() -> None:
    worker, registry = TinyWorker(status=500), CollectorRegistry()
    async with Workers(a=worker) as network:
        client = WorkerClient(network, api_settings(worker_urls="http://a"), ApiMetrics(registry))
        await client.look_at_all()
        for _ in range(EJECT_AFTER_FAILURES):
            with pytest.raises(WorkerUnavailable):
                await generate(client)
        worker.instance = "second"
        await client.look_at_all()
        assert client.workers[0].ejected_until == 0.0
    assert registry.get_sample_value("padrec_worker_restarts_total", {"worker": "http://a"}) == 1
    assert registry.get_sample_value("padrec_worker_ejections_total", {"worker": "http://a"}) == 1


async def test_the_first_of_the_worker_keys_is_shown() -> None:
    seen: list[str] = []

    class Guarded(Workers):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            seen.append(request.headers["authorization"])
            return await super().handle_async_request(request)

    settings = api_settings(worker_urls="http://a", worker_key="new-key-of-16-or-more,old-key-of-16-or-more")
    async with Guarded(a=TinyWorker()) as network:
        await generate(WorkerClient(network, settings, ApiMetrics(CollectorRegistry())))
    assert seen == ["Bearer new-key-of-16-or-more"]
