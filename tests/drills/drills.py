"""The fourteen fault drills: each starts the real service, does the harm, and measures what it promised.

A drill returns its criteria with what was measured. `timed` criteria mean something on a quiet machine only; the others
(nothing lost, nothing wrong) hold on any. Every answer of every load is judged: a 5xx that is not a refusal, a lost
connection, a duplicate, an item the catalog does not hold or an answer of two versions fails the drill.
"""

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import redis
import uvloop

from service import child
from service.api.catalog_file import CatalogFile
from service.api.publish import write
from service.bench_api import exchange, resident_mib
from service.bench_serve import load_histories
from service.catalog_codec import ACTIVE_KEY
from service.movielens import DATA
from service.redis_client import close, connect
from tests.drills import stack
from tests.drills.poisoned_worker import POISON_K
from tests.drills.redis_between import Mode, RedisBetween
from tests.load.open_loop import Answer, Answers, Body, Crowd, client_of, depart, even, one, quantile, read, send

MIB_PER_10_MINUTES = 1.0
MOST_RATE = 50.0  # requests/s
REFUSALS = (503, 504)
SLOW_DEADLINE_MS = 2000  # of lists that take long
LEAVE_SECONDS = 0.02
LEAVERS_RATE = 200.0  # requests/s
SWAPS = "padrec_catalog_swaps_total"


@dataclass(frozen=True)
class Criterion:
    """One promise and what was seen of it; where nothing is `wanted`, information."""

    what: str
    wanted: str
    measured: str
    ok: bool
    timed: bool = False


@dataclass
class Drill:
    """What a drill is given, and what it finds. `rate` in requests/s; `scale` shortens or lengthens every phase."""

    bundle: Path
    rate: float = MOST_RATE
    scale: float = 1.0
    soak_seconds: float = 60.0
    deadline_ms: int = 500
    data: Path = DATA
    criteria: list[Criterion] = field(default_factory=list)

    def __post_init__(self) -> None:
        lines = (self.bundle / "catalog.jsonl").read_text(encoding="utf-8").splitlines()
        self.catalog_version: str = json.loads(lines[0])["catalog_version"]
        self.items = {json.loads(line)["item_id"] for line in lines[1:]}
        self.histories = load_histories(self.bundle, self.data)

    def body(self, index: int, **fields: object) -> Body:
        return {
            "history": self.histories[index % len(self.histories)],
            "k": 10,
            "deadline_ms": self.deadline_ms,
        } | fields

    def at_least(self, what: str, measured: float, wanted: float, unit: str = "", *, timed: bool = False) -> None:
        self._add(what, f"≥ {wanted:g}{unit}", f"{measured:.4g}{unit}", measured >= wanted, timed)

    def at_most(self, what: str, measured: float, wanted: float, unit: str = "", *, timed: bool = False) -> None:
        sign = "=" if wanted == 0 else "≤"
        self._add(what, f"{sign} {wanted:g}{unit}", f"{measured:.4g}{unit}", measured <= wanted, timed)

    def equal(self, what: str, measured: object, wanted: object) -> None:
        self._add(what, str(wanted), str(measured), measured == wanted, False)

    def tell(self, what: str, measured: str) -> None:
        """Information: nothing is wanted of it."""
        self._add(what, "", measured, True, False)

    def _add(self, what: str, wanted: str, measured: str, ok: bool, timed: bool) -> None:
        self.criteria.append(Criterion(what, wanted, measured, ok, timed))

    def judge(self, answers: Answers, *, may_refuse: bool = False, items: set[str] | None = None) -> None:
        """What must hold of every answer, whatever happened."""
        known = self.items if items is None else items
        faults = [text for answer in answers.all if (text := fault(answer, known, may_refuse))]
        self.equal("answered", len(answers.all), answers.wanted)
        named = f" ({', '.join(sorted(set(faults)))})" if faults else ""
        self._add("faulty answers", "0", f"{len(faults)} of {answers.wanted}{named}", not faults, False)

    def in_time(self, answers: Answers, extra_ms: float = 100.0) -> None:
        """No answer later than the deadline and a little."""
        slowest = max(answers.seconds(), default=0.0) * 1000
        self.at_most("slowest answer", slowest, self.deadline_ms + extra_ms, " ms", timed=True)


def fault(answer: Answer, known: set[str], may_refuse: bool) -> str:
    """Why an answer is none, in a few words; "" for a good one."""
    if answer.status in REFUSALS and may_refuse:
        return "" if answer.problem.startswith("urn:") else "a refusal that says nothing"
    if answer.status != 200:
        return f"status {answer.status} {answer.problem}".strip()
    if not answer.items:
        return "no items"
    if len(set(answer.items)) != len(answer.items):
        return "an item twice"
    if not set(answer.items) <= known:
        return "an item the catalog does not hold"
    if answer.source == "popular" and not answer.degraded:
        return "a fallback that does not say so"
    return ""


class Load:
    """A load that runs while the drill does harm: on a thread, because processes are started from the main one."""

    def __init__(
        self,
        url: str | Callable[[], str],
        body_of: Callable[[int], Body],
        rate: float,
        seconds: float,
        among: Sequence[str] = (),
    ) -> None:
        """Where `url` chooses, it chooses `among` these."""
        self._pool = ThreadPoolExecutor(1)
        self.started = time.monotonic()
        self._future: Future[Answers] = self._pool.submit(
            lambda: asyncio.run(self._run(url, body_of, rate, seconds, among))
        )

    @staticmethod
    async def _run(
        url: str | Callable[[], str],
        body_of: Callable[[int], Body],
        rate: float,
        seconds: float,
        among: Sequence[str],
    ) -> Answers:
        choose = url if callable(url) else lambda: url
        async with contextlib.AsyncExitStack() as exits:
            bases = among or [choose()]
            clients = {base: await exits.enter_async_context(client_of(base)) for base in bases}
            return await send(lambda: clients[choose()], body_of, even(rate, max(1, round(rate * seconds))))

    @property
    def running(self) -> bool:
        return not self._future.done()

    def at(self, seconds: float) -> None:
        """Wait until this long after the start."""
        time.sleep(max(0.0, self.started + seconds - time.monotonic()))

    def result(self) -> Answers:
        answers = self._future.result(600)
        self._pool.shutdown()
        return answers


def warm(url: str, drill: Drill) -> None:
    """A few answers, so that connections, code and caches are as in service."""
    Load(url, drill.body, 10, 1.5).result()


def first_model_answer(url: str, drill: Drill, seconds: float) -> float:
    """Seconds until the model answers again; inf if it does not in time."""
    with httpx.Client(base_url=url, timeout=5, trust_env=False) as client:

        def answered() -> bool:
            with contextlib.suppress(httpx.HTTPError, KeyError, IndexError):
                return bool(client.post("/recommend", json=drill.body(0)).json()["items"][0]["source"] == "model")
            return False

        return stack.wait(answered, seconds)


# ---- 1, 2: the worker dies or hangs ------------------------------------------------------------------------------


def worker_killed(drill: Drill) -> None:
    """1. `kill -9` the worker: nothing lost, popular items meanwhile, the model back soon."""
    with stack.served(drill.bundle) as service:
        warm(service.url, drill)
        load = Load(service.url, drill.body, drill.rate, 12 * drill.scale)
        load.at(3 * drill.scale)
        os.kill(stack.pid_of(service, "service.cli worker"), signal.SIGKILL)
        drill.at_most(
            "worker seen down", stack.wait(lambda: stack.check(service.url, "worker") == "down", 5), 1, " s", timed=True
        )
        drill.at_most("model answers again", first_model_answer(service.url, drill, 60), 5, " s", timed=True)
        answers = load.result()
        drill.judge(answers)
        drill.in_time(answers)


def worker_stopped(drill: Drill) -> None:
    """2. SIGSTOP the worker: noticed, everybody answered in time, and a new one takes its place. Where nobody replaces
    it and it goes on later, its late lists reach nobody."""
    with stack.served(drill.bundle) as service:
        warm(service.url, drill)
        pid = stack.pid_of(service, "service.cli worker")
        load = Load(service.url, drill.body, drill.rate, 16 * drill.scale)
        load.at(3 * drill.scale)
        os.kill(pid, signal.SIGSTOP)
        drill.at_most(
            "worker seen down", stack.wait(lambda: stack.check(service.url, "worker") == "down", 8), 2, " s", timed=True
        )
        drill.at_most("killed by the supervisor", stack.wait(lambda: not stack.alive(pid), 40), 40, " s")
        drill.at_most("model answers again", first_model_answer(service.url, drill, 60), 60, " s")
        answers = load.result()
        drill.judge(answers)
        drill.in_time(answers)
    with (
        tempfile.TemporaryDirectory(prefix="padrec-") as folder,
        stack.parts(Path(folder), drill.bundle) as made,
    ):
        asyncio.run(_revived(drill, made))


class _Caller:
    """One request on a connection of its own that stays open: whatever comes there is seen."""

    def __init__(self, url: str, index: int, body: Body) -> None:
        self.index, self.body, self._name, self._address = index, body, f"drill-{index}", urlsplit(url)
        self.is_his = False  # the answer he got

    async def ask(self) -> Answer:
        content, sent = json.dumps(self.body).encode(), time.monotonic()
        head = f"POST /recommend HTTP/1.1\r\nhost: drill\r\nx-request-id: {self._name}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        self._reader, self._writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        status, reply = await exchange(self._reader, self._writer, head.encode() + content)
        self.is_his = json.loads(reply).get("request_id") == self._name
        return read(self.index, sent, int(status.split(b" ", 2)[1]), "", reply)

    async def more(self) -> bytes:
        """What came after the answer."""
        self._writer.write_eof()
        more = await self._reader.read()
        self._writer.close()
        return more


async def _revived(drill: Drill, made: stack.Parts) -> None:
    """Stop the worker while it writes, give it more to find when it goes on, and let it go on when all of that has been
    answered without it; others ask then."""
    api, worker = made.apis[0], made.workers[0]
    alone = await _each_alone(api.url, [drill.body(n, deadline_ms=30_000) for n in range(len(drill.histories))])
    before = stack.metric(worker.url, "padrec_requests_total", route="/generate", outcome="ok")
    slow = [_Caller(api.url, n, drill.body(n, k=50, deadline_ms=SLOW_DEADLINE_MS)) for n in range(32)]
    asked = [asyncio.create_task(caller.ask()) for caller in slow[:16]]
    await asyncio.to_thread(stack.wait, lambda: stack.metric(worker.url, "padrec_running_requests") >= 14, 5)
    os.kill(worker.pid, signal.SIGSTOP)
    asked += [asyncio.create_task(caller.ask()) for caller in slow[16:]]
    stopped = Answers(len(slow), list(await asyncio.gather(*asked)))
    os.kill(worker.pid, signal.SIGCONT)
    later = [
        _Caller(api.url, n, drill.body(n, deadline_ms=30_000))
        for n in range(len(slow), len(slow) + round(drill.rate * 5 * drill.scale))
    ]
    answers = await depart(lambda n: later[n].ask(), even(drill.rate, len(later)))
    back = await asyncio.to_thread(stack.wait, lambda: _rows(api.url, worker.url) == 0, 10)
    drill.judge(stopped)
    slowest = stopped.seconds()[-1] * 1000
    drill.at_most("revived: slowest answer without it", slowest, SLOW_DEADLINE_MS + 100, " ms", timed=True)
    late = ["deadline" in answer.degraded for answer in stopped.all]
    drill.at_least("revived: lists it was writing", sum(late[:16]), 10)
    drill.at_least("revived: lists asked for while it stood", sum(late[16:]), 10)
    drill.judge(answers)
    from_model = [answer for answer in answers.all if answer.from_model]
    drill.at_least("revived: lists written after", len(from_model), len(later) // 2)
    differ = sum(answer.items != alone[answer.index % len(alone)].items for answer in from_model)
    drill.equal("revived: lists unlike the solo ones", differ, 0)
    drill.at_most("revived: rows and requests back to 0 in", back, 2, " s")
    written = stack.metric(worker.url, "padrec_requests_total", route="/generate", outcome="ok") - before
    heard = sum(answer.from_model for answer in stopped.all + answers.all)
    drill.tell("revived: lists written for nobody", f"{written - heard:g} of {sum(late)}")
    drill.equal("revived: answers that are another's", sum(not caller.is_his for caller in slow + later), 0)
    more = [await caller.more() for caller in slow + later]
    drill.equal(f"revived: requests of {len(more)} answered twice", sum(map(bool, more)), 0)


# ---- 3: poison ---------------------------------------------------------------------------------------------------


def poison(drill: Drill) -> None:
    """3. One request in a hundred raises inside decoding: only it fails; the others' lists are those they get alone."""
    count = round(400 * drill.scale)

    def body(index: int) -> Body:
        poisoned = index % 100 == 50
        return drill.body(index, k=POISON_K if poisoned else 10, fallback="none", deadline_ms=30_000)

    with (
        tempfile.TemporaryDirectory(prefix="padrec-") as folder,
        stack.parts(Path(folder), drill.bundle, worker_module=("tests.drills.poisoned_worker",)) as made,
    ):
        url = made.apis[0].url
        alone = asyncio.run(_each_alone(url, [drill.body(n, deadline_ms=30_000) for n in range(len(drill.histories))]))
        # A crowd that waits for its answers: there must be batch mates, and no overload to blame.
        answers = asyncio.run(_crowd(url, [body(n) for n in range(count)], clients=8))
        sick = [answer for answer in answers if answer.index % 100 == 50]
        well = [answer for answer in answers if answer.index % 100 != 50]
        drill.equal("poison requests that failed", sum(a.status == 503 for a in sick), len(sick))
        drill.judge(Answers(len(well), well))
        differ = sum(answer.items != alone[answer.index % len(alone)].items for answer in well)
        drill.equal("lists unlike the solo ones", differ, 0)
        drill.equal("worker alive", stack.alive(made.workers[0].pid), True)


async def _crowd(url: str, bodies: Sequence[Body], clients: int) -> list[Answer]:
    """Every body once, so many at a time."""
    room = asyncio.Semaphore(clients)

    async def ask(client: httpx.AsyncClient, index: int) -> Answer:
        async with room:
            return await one(client, index, bodies[index])

    async with client_of(url, 60) as client:
        return list(await asyncio.gather(*(ask(client, index) for index in range(len(bodies)))))


async def _each_alone(url: str, bodies: Sequence[Body]) -> list[Answer]:
    async with client_of(url, 60) as client:
        return [await one(client, index, body) for index, body in enumerate(bodies)]


# ---- 4: overload -------------------------------------------------------------------------------------------------


def overload(drill: Drill) -> None:
    """4. Ten times more than can be done: as much is done as before, the rest is told so at once."""
    # The client shares the cores, as a backend beside the service would; it and the API must not queue for one of them.
    with stack.served(drill.bundle, "--worker-yields", "true") as service:
        warm(service.url, drill)
        pids = [stack.pid_of(service, f"service.cli {name}") for name in ("api", "worker")]

        def body(index: int) -> Body:
            return drill.body(index, fallback="none")

        capacity = asyncio.run(_capacity(service.url, drill, 5 * drill.scale))
        before = Load(service.url, body, capacity * 0.3, 5 * drill.scale).result()
        memory = sum(map(resident_mib, pids))
        seconds = 60 * drill.scale
        started = time.monotonic()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:  # the client shares the two cores
            answers = loop.run(_crowded(service.url, body, capacity * 10, seconds))
        drill.judge(answers, may_refuse=True)
        spent = max(a.sent + a.seconds for a in answers.all) - started
        goodput = sum(a.from_model for a in answers.all) / spent
        drill.at_least("goodput, share of capacity", goodput / capacity, 0.9, timed=True)
        refused = answers.seconds(lambda a: a.status == 503)
        drill.at_most("p99 of refusals", quantile(refused, 0.99) * 1000 if refused else 0.0, 20, " ms", timed=True)
        drill.tell("slowest of them", f"{max(refused, default=0.0) * 1000:.4g} ms")
        drill.tell("given up at the deadline (504)", str(sum(a.status == 504 for a in answers.all)))
        silent = sum(a.status == 503 and not a.retry_after for a in answers.all)
        drill.equal("refusals without Retry-After", silent, 0)
        drill.at_most("memory grown", sum(map(resident_mib, pids)) - memory, 50, " MiB")
        time.sleep(5)
        after = Load(service.url, body, capacity * 0.3, 5 * drill.scale).result()
        drill.judge(after)
        ratio = quantile(after.seconds(), 0.99) / quantile(before.seconds(), 0.99)
        drill.at_most("p99 five seconds after, times before", ratio, 2, timed=True)


async def _crowded(url: str, body_of: Callable[[int], Body], rate: float, seconds: float) -> Answers:
    async with Crowd(url) as crowd:
        return await depart(lambda index: crowd.ask(index, body_of(index)), even(rate, round(rate * seconds)))


def fitting_rate(bundle: Path, data: Path) -> float:
    """Half of what this machine can do now, at most MOST_RATE: what goes wrong in a drill should be the harm done, not
    a queue."""
    drill = Drill(bundle, data=data)
    with stack.served(bundle) as service:
        warm(service.url, drill)
        return min(MOST_RATE, asyncio.run(_capacity(service.url, drill, 5)) / 2)


async def _capacity(url: str, drill: Drill, seconds: float) -> float:
    """Model answers a second with sixteen clients that wait for each answer."""
    end = time.monotonic() + seconds
    done = 0

    async def ask(client: httpx.AsyncClient, first: int) -> None:
        nonlocal done
        index = first
        while time.monotonic() < end:
            answer = await one(client, index, drill.body(index, deadline_ms=10_000))
            done += answer.from_model  # not in one line: the sum would be read before the wait
            index += 16

    async with client_of(url) as client:
        await asyncio.gather(*(ask(client, first) for first in range(16)))
    return done / seconds


# ---- 5: restarts -------------------------------------------------------------------------------------------------


def restarts(drill: Drill) -> None:
    """5. SIGTERM with forty lists in flight: all are finished while newcomers are refused. Then a rolling restart of
    two replicas, five times each: none fails."""
    flags = ("--drain-seconds", "5")
    with (
        tempfile.TemporaryDirectory(prefix="padrec-") as folder,
        stack.parts(Path(folder), drill.bundle, apis=2, api_flags=flags) as made,
    ):
        environ = {"PADREC_REDIS_URL": made.redis_url}
        _terminated(drill, made, environ)
        ready = [api.url for api in made.apis]
        turn = iter(range(10**9))
        load = Load(
            lambda: ready[next(turn) % len(ready)],
            drill.body,
            drill.rate,
            5000 * drill.scale / drill.rate,
            tuple(ready),
        )
        restarted = 0
        while load.running:
            if restarted < 10:
                _restart(made, restarted % 2, ready, environ, flags)
                restarted += 1
            else:
                time.sleep(0.1)
        answers = load.result()
        drill.judge(answers)
        drill.at_least("restarts within the load", restarted, 10 if drill.scale >= 1 else 2)


def _terminated(drill: Drill, made: stack.Parts, environ: dict[str, str]) -> None:
    """An API process that refuses as soon as it is told to end, with lists that take seconds in flight."""
    api = stack.start_api(made, environ, ("--drain-seconds", "0"))
    try:
        stack.wait(lambda: stack.is_ready(api.url), stack.START_SECONDS, api.process)
        warm(api.url, drill)

        def in_flight() -> float:
            return stack.metric(api.url, "padrec_inflight_requests") - 1  # the scrape itself is one

        load = Load(api.url, lambda n: drill.body(n, k=50, deadline_ms=30_000), 4000, 0.01)  # forty at once
        stack.wait(lambda: in_flight() >= 38, 5)
        drill.at_least("in flight at SIGTERM", in_flight(), 38)
        api.process.terminate()
        stack.wait(lambda: not stack.is_ready(api.url), 5)
        [newcomer] = asyncio.run(_each_alone(api.url, [drill.body(0)]))
        drill.equal("a newcomer is told", newcomer.problem.rpartition(":")[2], "draining")
        answers = load.result()
        drill.judge(answers)
        drill.equal("answered by the model", sum(a.from_model for a in answers.all), answers.wanted)
        refused = newcomer.sent + newcomer.seconds
        after = sum(a.sent + a.seconds > refused for a in answers.all)
        drill.at_least("of these after newcomers were refused", after, 30)
        drill.equal("exit status", api.process.wait(60), 0)
    finally:
        child.stop(api.process, 30.0)


def _restart(made: stack.Parts, at: int, ready: list[str], environ: dict[str, str], flags: Sequence[str]) -> None:
    """As a rollout does it: the balancer sees it unready, the process drains and ends, a new one takes its place."""
    old = made.apis[at]
    old.process.terminate()
    # Noticed well before the drain is over, or requests still go where nobody listens any more.
    stack.wait(lambda: not stack.is_ready(old.url), 60)
    ready.remove(old.url)
    old.process.wait(60)
    made.apis[at] = stack.start_api(made, environ, flags, urlsplit(old.url).port or 0)
    if stack.wait(lambda: stack.is_ready(old.url), stack.START_SECONDS) < stack.START_SECONDS:
        ready.append(old.url)


# ---- 6, 7: Redis -------------------------------------------------------------------------------------------------


def redis_faults(drill: Drill) -> None:
    """6. Redis refuses, keeps silent, is slow, lets a trip's replies through one by one, fails over to an empty one:
    everybody is answered, within its budget."""
    # One entry of local cache: whatever Redis does is felt by every request.
    flags = ("--lru-items", "1")
    with (
        tempfile.TemporaryDirectory(prefix="padrec-") as folder,
        tempfile.TemporaryDirectory(prefix="padrec-") as second,
        RedisBetween() as between,
        stack.parts(Path(folder), drill.bundle, between=between, api_flags=flags) as made,
    ):
        url = made.apis[0].url
        warm(url, drill)
        seconds = 5 * drill.scale
        healthy = quantile(Load(url, drill.body, drill.rate, seconds).result().seconds(), 0.99)
        modes: tuple[Mode, ...] = ("refuse", "silent", "slow", "trickle")
        for mode in modes:
            between.become(mode)
            answers = Load(url, drill.body, drill.rate, seconds).result()
            between.become("pass")
            back = stack.wait(lambda: stack.check(url, "redis") == "ok", 10)
            _redis_criteria(drill, mode, answers, healthy, back)
        between.become("refuse")
        load = Load(url, drill.body, drill.rate, seconds + 1.5)
        load.at(1.5)
        with stack.start_valkey(Path(second)) as promoted:
            between.lead_to(promoted.url)
            between.become("pass")
            back = stack.wait(lambda: stack.check(url, "redis") == "ok", 10)
            _redis_criteria(drill, "failover", load.result(), healthy, back)


def _redis_criteria(drill: Drill, name: str, answers: Answers, healthy: float, back: float) -> None:
    drill.judge(answers)
    others = sorted({code for a in answers.all if not a.from_model for code in a.degraded})
    named = f"{name}: answered by the model" + (f" (others: {', '.join(others)})" if others else "")
    drill.equal(named, sum(a.from_model for a in answers.all), answers.wanted)
    # Two look-ups a request, each within PADREC_REDIS_TIMEOUT_MS (50 ms) and a retry of none.
    added = (quantile(answers.seconds(), 0.99) - healthy) * 1000
    drill.at_most(f"{name}: added to p99", added, 150, " ms", timed=True)
    drill.at_most(f"{name}: Redis used again", back, 5, " s", timed=True)


def corruption(drill: Drill) -> None:
    """7. One cache entry in twenty is damaged: no wrong item, no error, refilled, counted."""
    with (
        tempfile.TemporaryDirectory(prefix="padrec-") as folder,
        stack.parts(Path(folder), drill.bundle, api_flags=("--lru-items", "1")) as made,
    ):
        url = made.apis[0].url
        bodies = [drill.body(n, deadline_ms=30_000) for n in range(len(drill.histories))]
        sound = asyncio.run(_each_alone(url, bodies))
        damaged = _damage(made.redis_url, 0.05)
        answers = asyncio.run(_each_alone(url, bodies))
        drill.judge(Answers(len(bodies), answers))
        drill.equal("lists changed", sum(a.items != b.items for a, b in zip(answers, sound, strict=True)), 0)
        counted = stack.metric(url, "padrec_cache_operations_total", result="corrupt")
        drill.at_least(f"counted as corrupt, of {damaged} damaged", counted, 1)
        before = counted
        asyncio.run(_each_alone(url, bodies))
        again = stack.metric(url, "padrec_cache_operations_total", result="corrupt") - before
        drill.equal("met again after the refill", again, 0)


def _damage(redis_url: str, share: float) -> int:
    """Overwrite this share of all fields of all large hashes with noise. Returns how many."""
    dice = random.Random(7)
    client = redis.Redis.from_url(redis_url)
    damaged = 0
    with contextlib.closing(client):
        for key in client.scan_iter(count=1000):
            if client.type(key) != b"hash":
                continue
            fields = client.hkeys(key)
            for each in fields if len(fields) > 5 else ():
                if dice.random() < share:
                    client.hset(key, each, dice.randbytes(12))
                    damaged += 1
    return damaged


# ---- 8: another catalog ------------------------------------------------------------------------------------------


def catalog_swap(drill: Drill) -> None:
    """8. A new catalog is published under load: no error, every answer of one version, and it takes over."""
    from model.catalog import Catalog

    with (
        tempfile.TemporaryDirectory(prefix="padrec-") as folder,
        stack.parts(Path(folder), drill.bundle) as made,
    ):
        old = Catalog.load(drill.bundle / "catalog.jsonl")
        new = Catalog(old.codebook_sizes, tuple(item for n, item in enumerate(old.items) if n % 20))
        other = Path(folder) / "other"
        other.mkdir()
        new.save(other / "catalog.jsonl")
        url = made.apis[0].url
        warm(url, drill)
        # Half the rate: publishing and building the index take a core, of two at worst.
        load = Load(url, drill.body, drill.rate / 2, 15 * drill.scale)
        load.at(4 * drill.scale)
        stack.publish(other, made.redis_url)
        answers = load.result()
        drill.judge(answers)
        kept = {old.version: {item.item_id for item in old.items}, new.version: {item.item_id for item in new.items}}
        mixed = sum(not set(a.items) <= kept.get(a.catalog_version, set()) for a in answers.all)
        drill.equal("answers that mix versions", mixed, 0)
        why = sorted({code for a in answers.all if not a.from_model for code in a.degraded})
        drill.equal(" ".join(["fallbacks", *why]), sum(not a.from_model for a in answers.all), 0)
        swapped = stack.wait(lambda: asyncio.run(_version_now(url, drill)) == new.version, 30)
        drill.at_most("new version served", swapped, 30, " s")


async def _version_now(url: str, drill: Drill) -> str:
    async with client_of(url) as client:
        answer = await one(client, 0, drill.body(0, deadline_ms=10_000))
        return answer.catalog_version if answer.from_model else ""


# ---- 9, 10: clients ----------------------------------------------------------------------------------------------


def disconnects(drill: Drill) -> None:
    """9. Half the clients leave after 20 ms: next to no work is done for them, and of ten thousand who leave nothing is
    left behind."""

    def lists_of(k: int, deadline_ms: int = 30_000) -> Callable[[int], Body]:
        # Without drafts a list takes as many passes at any load, so that passes can be told apart.
        return lambda index: drill.body(index, speculation="off", k=k, deadline_ms=deadline_ms)

    short, long, longest = lists_of(10, drill.deadline_ms), lists_of(50), lists_of(100)
    with (
        tempfile.TemporaryDirectory(prefix="padrec-") as folder,
        stack.parts(Path(folder), drill.bundle) as made,
    ):
        api, worker = made.apis[0], made.workers[0]
        warm(api.url, drill)
        usual = {}
        for body in (short, long, longest):
            before = _work(worker.url)
            asyncio.run(_each_alone(api.url, [body(n) for n in range(20)]))
            usual[body] = _each(before, _work(worker.url))

        # What is written before a client has left is work done: of a list of a hundred, alone, a fifth in twenty
        # milliseconds. With four at a time, each takes as long as users wait, and twenty milliseconds are little of it.
        before = _work(worker.url)
        answered = asyncio.run(_beside_leavers(api.url, longest, round(60 * drill.scale), 4))
        ratio = _each(before, _settled(api.url, worker.url)) / usual[longest]
        drill.at_most("work per completed list, times usual", ratio, 1.1, timed=True)

        # At half of what can be done; of ten items there would be nothing left to write after twenty milliseconds.
        before, count = _work(worker.url), round(1000 * drill.scale)
        answered += asyncio.run(_half_leave(api.url, short, long, count, drill.rate))
        after = _settled(api.url, worker.url)
        passes, lists = (now - then for now, then in zip(after, before, strict=True))
        # Cancelled lists are not finished ones: what is left of the passes was made for them.
        share = max(0.0, passes - lists * usual[short]) / (count // 2) / usual[long]
        drill.at_most("share of a list of 50 written for who left", share, 0.4, timed=True)
        told = f"{_each(before, after) / usual[short]:.4g} times usual"
        drill.tell("work per list of 10 beside those of 50", told)

        memory = resident_mib(api.pid) + resident_mib(worker.pid)
        files, count = stack.open_files(api.pid), round(10_000 * drill.scale)
        load = Load(api.url, short, 5, count / LEAVERS_RATE)
        left = asyncio.run(_all_leave(api.url, long, count))
        answered += load.result().all
        drill.at_most("rows back to 0 in", stack.wait(lambda: _rows(api.url, worker.url) == 0, 10), 2, " s")
        drill.judge(Answers(len(answered), answered))
        drill.at_least(f"of {count} more left without an answer", left, count // 2)
        grown = resident_mib(api.pid) + resident_mib(worker.pid) - memory
        drill.at_most(f"memory grown after {count} more", grown, 20, " MiB")
        drill.at_most(f"files left open by {count} more", stack.open_files(api.pid) - files, 8)


def _each(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Passes a finished list."""
    return (after[0] - before[0]) / (after[1] - before[1])


def _work(worker: str) -> tuple[float, float]:
    """Target passes made, and lists finished."""
    finished = stack.metric(worker, "padrec_stage_duration_seconds_count", stage="prefill")
    return stack.metric(worker, "padrec_target_passes_total"), finished


def _rows(api: str, worker: str) -> float:
    # The scrape itself is one request in flight at each.
    running = stack.metric(worker, "padrec_running_requests") + stack.metric(worker, "padrec_queue_requests")
    in_flight = sum(stack.metric(url, "padrec_inflight_requests") for url in (api, worker))
    return running + in_flight - 2


def _settled(api: str, worker: str) -> tuple[float, float]:
    """The work done once nobody waits any more."""
    stack.wait(lambda: _rows(api, worker) == 0, 10)
    return _work(worker)


async def _beside_leavers(url: str, body_of: Callable[[int], Body], count: int, clients: int) -> list[Answer]:
    """So many clients that wait for their lists; beside each, every time, another one who leaves."""
    room = asyncio.Semaphore(clients)
    async with client_of(url, 60) as staying, Crowd(url, LEAVE_SECONDS) as leaving:

        async def both(index: int) -> Answer:
            async with room:
                body = body_of(index)
                answer, _ = await asyncio.gather(one(staying, index, body), leaving.ask(index, body))
                return answer

        return list(await asyncio.gather(*map(both, range(count))))


async def _half_leave(
    url: str, stays: Callable[[int], Body], leaves: Callable[[int], Body], count: int, rate: float
) -> list[Answer]:
    """Every second one leaves; the answers of the others."""
    async with client_of(url) as staying, Crowd(url, LEAVE_SECONDS) as leaving:

        def ask(index: int) -> Coroutine[Any, Any, Answer]:
            return leaving.ask(index, leaves(index)) if index % 2 else one(staying, index, stays(index))

        return (await depart(ask, even(rate, count))).all[::2]


async def _all_leave(url: str, body_of: Callable[[int], Body], count: int) -> int:
    """Clients who leave at once or a little later: while they are read, looked up, waiting, or written for. How many of
    them got no answer."""
    async with contextlib.AsyncExitStack() as exits:
        patience = (0.002, 0.005, 0.01, LEAVE_SECONDS)
        crowds = [await exits.enter_async_context(Crowd(url, seconds)) for seconds in patience]
        answers = await depart(
            lambda index: crowds[index % len(crowds)].ask(index, body_of(index)), even(LEAVERS_RATE, count)
        )
        return sum(not answer.status for answer in answers.all)


HOSTILE: dict[str, bytes] = {
    "20 MB": b'{"history": ["' + b"x" * 20_000_000 + b'"]}',
    "deep nesting": b'{"history": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "NaN": b'{"history": ["1"], "temperature": NaN}',
    "a lone surrogate": b'{"history": ["\\ud800"]}',
    "NUL": b'{"history": ["a\\u0000b"]}',
    "a million items": b'{"history": [' + b'"1",' * 999_999 + b'"1"]}',
    "not JSON": b"history=1",
    "nothing": b"",
    "invalid UTF-8": b'{"history": ["\xff\xfe"]}',
    "a huge k": b'{"history": ["1"], "k": ' + b"9" * 400 + b"}",
}


def slow_clients(drill: Drill) -> None:
    """10. Clients that send or read a byte at a time, and bodies meant to hurt: others notice nothing, all get 4xx."""
    with stack.served(drill.bundle) as service:
        warm(service.url, drill)
        parts = urlsplit(service.url)
        assert parts.hostname and parts.port
        Load(service.url, drill.body, drill.rate, 4 * drill.scale).result()  # the first seconds are the slowest
        usual, beside = Answers(0), Answers(0)
        for _ in range(3):  # in turns: of a few hundred requests one halt of the machine makes the 99th percentile
            for answers, slow in ((usual, 0), (beside, 20)):
                with _dawdlers((parts.hostname, parts.port), slow):
                    time.sleep(1.0)  # the lists that the slow readers asked for, all at once, are work like any other
                    made = Load(service.url, drill.body, drill.rate, 7 * drill.scale).result()
                answers.wanted, answers.all = answers.wanted + made.wanted, answers.all + made.all
        drill.judge(beside)
        ratio = quantile(beside.seconds(), 0.99) / quantile(usual.seconds(), 0.99)
        drill.at_most("p99 beside 60 slow ones, times usual", ratio, 1.2, timed=True)
        for name, content in HOSTILE.items():
            drill.equal(name, _status_class(parts.hostname, parts.port, content), "4xx")
        drill.equal("bad chunking", _status_class(parts.hostname, parts.port, None), "4xx")
        drill.judge(Load(service.url, drill.body, 10, 1).result())


def _status_class(host: str, port: int, content: bytes | None) -> str:
    """The class of the answer to these raw bytes as a body; None: chunks whose sizes lie."""
    head = b"POST /recommend HTTP/1.1\r\nHost: drill\r\nContent-Type: application/json\r\nConnection: close\r\n"
    with socket.create_connection((host, port), timeout=20) as client:
        with contextlib.suppress(OSError):  # refused before it was all sent
            if content is None:
                client.sendall(head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n")
            else:
                client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        try:
            answer = client.recv(64)
        except OSError:
            return "cut off"
    return f"{answer.split()[1].decode()[0]}xx" if answer.startswith(b"HTTP/1.1 ") else "cut off"


@contextlib.contextmanager
def _dawdlers(address: tuple[str, int], each: int) -> Iterator[None]:
    """So many connections each that send headers, send bodies and read answers a byte at a time."""
    stop = threading.Event()
    request = json.dumps({"history": ["1"], "k": 10}).encode()
    head = b"POST /recommend HTTP/1.1\r\nHost: drill\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(request)

    def dawdle() -> None:
        sockets = [socket.create_connection(address, timeout=5) for _ in range(3 * each)]
        for n, client in enumerate(sockets):
            client.setblocking(False)
            if n % 3:  # one sends its headers slowly; one its body; one reads slowly
                client.send(head if n % 3 == 1 else head + request)
        sent = 0
        while not stop.wait(0.25):
            for n, client in enumerate(sockets):
                with contextlib.suppress(OSError):
                    if n % 3 == 2:
                        client.recv(1)
                    else:
                        client.send((head if n % 3 == 0 else request)[sent : sent + 1])
            sent += 1
        for client in sockets:
            client.close()

    thread = threading.Thread(target=dawdle)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# ---- 11, 12: bundles ---------------------------------------------------------------------------------------------


def bad_bundles(drill: Drill) -> None:
    """11. Bundles that are truncated, altered, of wrong shape, or carry code: refused, nothing executed. Catalogs of
    other codebooks or with a damaged entry, published to a running service: the old one is served on."""
    with tempfile.TemporaryDirectory(prefix="padrec-") as name:
        folder = Path(name)
        witness = folder / "executed"
        for what, spoil in _spoilers(witness).items():
            bundle = folder / "bundle"
            shutil.copytree(drill.bundle, bundle)
            spoil(bundle)
            command = [
                sys.executable,
                "-m",
                "service.cli",
                "worker",
                "--bundle",
                str(bundle),
                "--port",
                "0",
                *stack.QUIET,
            ]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
                status: int | str = done.returncode
                said = done.stderr.strip()
            except subprocess.TimeoutExpired:
                status, said = "serves it", ""
            drill.equal(f"{what}: exit status", status, 2)
            drill.equal(f"{what}: one line that says why", said.startswith("padrec: ") and "\n" not in said, True)
            shutil.rmtree(bundle)
        drill.equal("code executed", witness.exists(), False)
    with (
        tempfile.TemporaryDirectory(prefix="padrec-") as name,
        stack.parts(Path(name), drill.bundle) as made,
    ):
        _bad_catalogs(drill, made)


def _bad_catalogs(drill: Drill, made: stack.Parts) -> None:
    from model.catalog import Catalog

    old = Catalog.load(drill.bundle / "catalog.jsonl")
    *others, last = old.codebook_sizes
    foreign, damaged = Catalog((*others, last + 1), old.items), Catalog(old.codebook_sizes, old.items[1:])
    url, worker = made.apis[0].url, made.workers[0].url
    warm(url, drill)

    def body(index: int) -> Body:
        return drill.body(index, deadline_ms=30_000)

    for what, catalog, activate, result in (
        ("other codebooks", foreign, stack.publish, "refused"),
        ("a damaged entry", damaged, _activate_damaged, "unreadable"),
    ):
        folder = made.folder / result
        folder.mkdir()
        catalog.save(folder / "catalog.jsonl")
        load = Load(url, body, drill.rate / 2, 8 * drill.scale)
        load.at(1 * drill.scale)
        activate(folder, made.redis_url)
        counted = stack.wait(lambda result=result: stack.metric(worker, SWAPS, result=result) >= 1, 60)
        drill.at_most(f"{what}: counted as {result}", counted, 60, " s")
        answers = load.result()
        after = asyncio.run(_each_alone(url, [body(n) for n in range(10)]))
        answers = Answers(answers.wanted + len(after), answers.all + after)
        drill.judge(answers)
        drill.equal(f"{what}: from the model", sum(a.from_model for a in answers.all), answers.wanted)
        new = sum(a.catalog_version != old.version for a in answers.all)
        drill.equal(f"{what}: answers not of the old one", new, 0)
    drill.equal("catalogs taken up", stack.metric(worker, SWAPS, result="ok"), 0)


def _activate_damaged(folder: Path, redis_url: str) -> None:
    """As `padrec publish` does, but an entry is damaged before the version is made the active one."""

    async def activate() -> None:
        catalog = CatalogFile.load(folder / "catalog.jsonl")
        client = connect(redis_url, 5.0)
        await write(client, catalog)
        item = next(iter(catalog.by_id)).encode()
        await client.hset(catalog.header.key("item", item), item, b"noise")
        await client.set(ACTIVE_KEY, catalog.header.version)
        await close(client)

    asyncio.run(activate())


def _spoilers(witness: Path) -> dict[str, Callable[[Path], None]]:
    from model.bundle import save_manifest, verify
    from model.semantic_id import Vocabulary

    def resealed(bundle: Path) -> None:
        """Make the sums fit again: only then does what lies behind them matter."""
        old = verify_before
        save_manifest(bundle, old["name"], Vocabulary.from_dict(old["vocabulary"]), old["max_history_items"])

    verify_before: dict[str, object] = {}

    def with_manifest(spoil: Callable[[Path], None], reseal: bool) -> Callable[[Path], None]:
        def run(bundle: Path) -> None:
            verify_before.clear()
            verify_before.update(verify(bundle))
            spoil(bundle)
            if reseal:
                resealed(bundle)

        return run

    def truncate(bundle: Path) -> None:
        path = bundle / "target" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])

    def flip(bundle: Path) -> None:
        path = bundle / "draft" / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-5] ^= 0x40
        path.write_bytes(content)

    def reshape(bundle: Path) -> None:
        path = bundle / "target" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 64, "head_dim": 16}))

    def smuggle(bundle: Path) -> None:
        # What pickle.dumps would write for an object whose loading creates the witness.
        code = f"cos\nsystem\n(S'touch {witness}'\ntR.".encode()
        (bundle / "target" / "pytorch_model.bin").write_bytes(code)
        (bundle / "target" / "model.safetensors").unlink()

    def point_outside(bundle: Path) -> None:
        path = bundle / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["files"]["../outside"] = {"sha256": "0" * 64, "bytes": 1}
        path.write_text(json.dumps(manifest))

    def not_numbers(bundle: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = bundle / "target" / "model.safetensors"
        weights = load_file(path)
        first = sorted(weights)[0]
        weights[first] = weights[first] * float("nan")
        save_file(weights, path, {"format": "pt"})

    return {
        "truncated": with_manifest(truncate, True),
        "wrong hash": with_manifest(flip, False),
        "wrong shape": with_manifest(reshape, True),
        "pickle inside": with_manifest(smuggle, True),
        "path outside": with_manifest(point_outside, False),
        "NaN weights": with_manifest(not_numbers, True),
    }


def collapse(drill: Drill) -> None:
    """12. A draft that guesses at random: speculation turns itself off, but for a try now and then, and costs next to
    nothing."""
    import torch
    from safetensors.torch import load_file, save_file

    from model.bundle import save_manifest, verify
    from model.semantic_id import Vocabulary

    with tempfile.TemporaryDirectory(prefix="padrec-") as name:
        bundle = Path(name) / "bundle"
        shutil.copytree(drill.bundle, bundle)
        manifest = verify(bundle)
        path = bundle / "draft" / "model.safetensors"
        torch.manual_seed(0)
        # Of one number there is no spread: PAD-Rec's coefficient stays what it is.
        trained = load_file(path)
        save_file({k: torch.randn_like(v) * v.std() if v.numel() > 1 else v for k, v in trained.items()}, path)
        save_manifest(
            bundle, manifest["name"], Vocabulary.from_dict(manifest["vocabulary"]), manifest["max_history_items"]
        )
        with stack.parts(Path(name), drill.bundle, worker_bundle=bundle) as made:
            url, worker = made.apis[0].url, made.workers[0].url
            both = {"on": list[Answer](), "off": list[Answer]()}
            turns: list[_Drafting] = []  # with speculation: who asks for none is drafted for in no round
            for _ in range(3):  # in turns, so that what else the machine does falls on both alike
                for speculation, answers in both.items():
                    bodies = [
                        drill.body(n, speculation=speculation, deadline_ms=30_000)
                        for n in range(round(40 * drill.scale))
                    ]
                    before = _drafting(worker)
                    answers += asyncio.run(_each_alone(url, bodies))
                    if speculation == "on":
                        now = _drafting(worker)
                        turns.append(_Drafting(*(b - a for a, b in zip(before, now, strict=True))))
            for answers in both.values():
                drill.judge(Answers(len(answers), answers))
            drill.equal("lists that differ", sum(a.items != b.items for a, b in zip(*both.values(), strict=True)), 0)
            on, off = (quantile(sorted(a.seconds for a in answers), 0.5) for answers in both.values())
            drill.at_most("median time, times plain", on / off, 1.1, timed=True)
            first, *_, last = turns
            # It may have given up at warm-up, on the golden requests; then only tries are left to be counted.
            drill.at_least("tokens drafted before it gave up, and in tries", sum(turn.tokens for turn in turns), 1)
            for which, turn in (("first", first), ("last", last)):
                drill.tell(f"tokens drafted in the {which} turn", f"{turn.tokens:g} in {turn.rounds:g} rounds")
            drill.at_least("rounds without a draft in the last turn, share", last.skipped / last.rounds, 0.9)


class _Drafting(NamedTuple):
    rounds: float
    skipped: float
    tokens: float


def _drafting(worker: str) -> _Drafting:
    """What the worker has done until now: rounds, those of them without a draft, tokens drafted."""
    return _Drafting(
        stack.metric(worker, "padrec_batch_size_count", phase="decode"),
        stack.metric(worker, "padrec_spec_skipped_rounds_total"),
        stack.metric(worker, "padrec_spec_draft_tokens_total"),
    )


# ---- 13, 14: for long, and for ever ------------------------------------------------------------------------------


def soak(drill: Drill) -> None:
    """13. Served for long: memory, files and threads stay, and lists without speculation agree."""
    with stack.served(drill.bundle, PADREC_SHADOW_PERCENT="25") as service:
        warm(service.url, drill)
        pids = {name: stack.pid_of(service, f"service.cli {name}") for name in ("api", "worker")}
        command = stack.descendants(service.pid)[pids["worker"]].split()
        worker = f"http://127.0.0.1:{command[command.index('--port') + 1]}"
        seconds = drill.soak_seconds
        rate = drill.rate / 2
        # Time for caches and pools to reach their size: an API process does so in its first twenty thousand requests.
        Load(service.url, drill.body, drill.rate, max(3.0, seconds / 2)).result()
        files = {name: stack.open_files(pid) for name, pid in pids.items()}
        threads = {name: stack.threads(pid) for name, pid in pids.items()}
        load = Load(service.url, drill.body, rate, seconds)
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in pids}
        while load.running:
            for name, pid in pids.items():
                samples[name].append((time.monotonic(), resident_mib(pid)))
            time.sleep(min(1.0, seconds / 30))
        drill.judge(load.result())
        for name, pid in pids.items():
            slope = _slope(samples[name])
            # In less than ten minutes as much is allowed as in ten: an allocator takes what it takes in steps, and how
            # steep one looks in a minute says nothing.
            most = MIB_PER_10_MINUTES * max(1, seconds / 600)
            what = f"{name}: memory more in {seconds:g} s, by its slope"
            drill.at_most(what, slope * seconds, most, " MiB", timed=seconds < 600)
            drill.tell("  the same slope for 10 minutes", f"{slope * 600:.4g} MiB")
            drill.at_most(f"{name}: files more", stack.open_files(pid) - files[name], 4)
            drill.at_most(f"{name}: threads more", stack.threads(pid) - threads[name], 2)
        drill.equal(
            "shadow lists that differ", stack.metric(worker, "padrec_shadow_lists_total", result="different"), 0
        )
        drill.at_least("shadow lists that agree", stack.metric(worker, "padrec_shadow_lists_total", result="same"), 5)


def _slope(samples: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope, MiB/s."""
    n = len(samples)
    mean_t, mean_m = sum(t for t, _ in samples) / n, sum(m for _, m in samples) / n
    below = sum((t - mean_t) ** 2 for t, _ in samples)
    return sum((t - mean_t) * (m - mean_m) for t, m in samples) / below if below else 0.0


def parent_killed(drill: Drill) -> None:
    """14. `kill -9` of `padrec serve`: nothing it started survives."""
    with stack.served(drill.bundle) as service:
        children = stack.descendants(service.pid)
        drill.at_least("processes below it", len(children), 3)
        service.process.kill()
        gone = stack.wait(lambda: not any(map(stack.alive, children)), 10)
        drill.at_most("all gone after", gone, 2, " s", timed=True)
        drill.equal("left behind", sum(map(stack.alive, children)), 0)
        child.stop(service.process, 1)


DRILLS: tuple[Callable[[Drill], None], ...] = (
    worker_killed,
    worker_stopped,
    poison,
    overload,
    restarts,
    redis_faults,
    corruption,
    catalog_swap,
    disconnects,
    slow_clients,
    bad_bundles,
    collapse,
    soak,
    parent_killed,
)
