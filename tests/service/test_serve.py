"""`padrec serve` as a user runs it: real processes around a tiny bundle."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.process import bind
from service.serve import WORKER_NICENESS, environment, is_ready
from service.settings import Settings
from service.supervisor import free_port
from tests.service.tiny_bundle import item_ids, write_bundle

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    direct = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return direct + [grandchild for each in direct for grandchild in children(each)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def niceness(pid: int) -> set[int]:
    """Of every thread."""
    return {os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in Path(f"/proc/{pid}/task").iterdir()}


def policies(pid: int) -> set[int]:
    """How its threads are scheduled."""
    return {os.sched_getscheduler(int(thread.name)) for thread in Path(f"/proc/{pid}/task").iterdir()}


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


@contextmanager
def serving(bundle: Path, *flags: str, ready: bool = True) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "service.cli", "serve", "--bundle", str(bundle), "--port", str(port)]
    command += ["--drain-seconds", "0", "--log-level", "warning", "--num-rows", "2", *flags]
    process = subprocess.Popen(command)
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: process.poll() is not None or not ready or is_ready(url), 60)
        assert process.poll() is None
        yield process, url
    finally:
        process.terminate()
        process.wait(30)


def recommend(url: str, items: list[str], **body: Any) -> dict[str, Any]:
    reply = httpx.post(f"{url}/recommend", json={"history": items, "k": 5, **body}, timeout=30)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def test_a_worker_that_is_to_yield_computes_only_where_nothing_else_wants_the_core(bundle: Path) -> None:
    with serving(bundle, "--worker-yields", "true") as (process, url):
        assert recommend(url, item_ids(bundle)[:4], deadline_ms=30_000)["degraded"] == []
        for pid in children(process.pid):
            worker = "service.cli worker" in command_of(pid)
            assert policies(pid) == {os.SCHED_IDLE if worker else os.SCHED_OTHER}


def test_answers_from_the_model_survives_a_killed_worker_and_stops_without_a_trace(bundle: Path) -> None:
    history = item_ids(bundle)[:4]
    with serving(bundle) as (process, url):
        answer = recommend(url, history, deadline_ms=30_000)
        assert answer["degraded"] == []
        assert [item["source"] for item in answer["items"]] == ["model"] * 5
        plain = recommend(url, history, deadline_ms=30_000, speculation="off")
        assert [i["item_id"] for i in plain["items"]] == [i["item_id"] for i in answer["items"]]
        assert [i["score"] for i in plain["items"]] == pytest.approx([i["score"] for i in answer["items"]], abs=1e-3)

        drawn = [recommend(url, history, deadline_ms=30_000, temperature=1.5, seed=5) for _ in range(2)]
        assert [i["item_id"] for i in drawn[0]["items"]] == [i["item_id"] for i in drawn[1]["items"]]
        assert all(answer["degraded"] == [] and len(answer["items"]) == 5 for answer in drawn)

        until(lambda: len(children(process.pid)) == 4, 20)  # Valkey, the API, the worker and its spare
        workers = [pid for pid in children(process.pid) if "service.cli worker" in command_of(pid)]
        (worker,) = (pid for pid in workers if "--spare" not in command_of(pid))
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert all(niceness(pid) == {own + WORKER_NICENESS * (pid in workers)} for pid in children(process.pid))
        os.kill(worker, signal.SIGKILL)
        until(lambda: not alive(worker), 5)
        fallback = recommend(url, history)
        assert len(fallback["items"]) == 5
        until(lambda: recommend(url, history, deadline_ms=5000)["items"][0]["source"] == "model", 30)
        assert set(workers) - {worker} < set(children(process.pid)), "the spare has taken its place"

        family = children(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert not any(alive(pid) for pid in family)


def test_nothing_outlives_a_killed_parent(bundle: Path) -> None:
    with serving(bundle, ready=False) as (process, _):
        until(lambda: len(children(process.pid)) == 3, 20)
        family = children(process.pid)
        process.kill()
        process.wait()
        until(lambda: not any(alive(pid) for pid in family), 2)


def test_a_taken_port_is_one_clear_line_and_status_2(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "service.cli", "serve", "--bundle", str(bundle), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert port in done.stderr
    assert "--port" in done.stderr


def test_children_are_told_what_was_set_and_nothing_else() -> None:
    settings = Settings(max_k=50, bundle=Path("b"), worker_urls=("http://a:1", "http://b:2"))
    assert environment(settings) == {
        "PADREC_MAX_K": "50",
        "PADREC_BUNDLE": "b",
        "PADREC_WORKER_URLS": "http://a:1,http://b:2",
    }


async def test_small_answers_are_not_held_back_for_an_acknowledgement() -> None:
    accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def look(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        del reader
        connection = writer.get_extra_info("socket")
        accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async with await asyncio.start_server(look, sock=bind("127.0.0.1", 0)) as server:
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        assert await accepted
        writer.close()
        await writer.wait_closed()
