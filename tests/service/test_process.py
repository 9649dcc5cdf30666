"""A process takes SIGTERM well: unready, still serving, then gone with status 0; taken ports are named."""

import asyncio
import gc
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from service.http_head import HEAD_BYTES
from service.probes import Drain
from service.process import DrainingServer, bind
from service.settings import SettingsError, load_settings
from tests.service.wire import until, write_catalog

API = """
import sys
from service.api.app import create_app
from service.process import bind, run_app
from service.settings import load_settings
listener = bind("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
flags = dict(redis_url="unix:///nowhere", catalog_file=sys.argv[1], drain_seconds=sys.argv[2], finish_seconds=1)
run_app(create_app, load_settings(flags | {"worker_urls": sys.argv[3]}), listener)
"""

# Without TLS contexts, which cost more than everything else here.
CLIENT = httpx.Client(
    transport=httpx.HTTPTransport(verify=False, limits=httpx.Limits(max_keepalive_connections=0)), timeout=10
)


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """As it was: a server that runs in this process changes it."""
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


@contextmanager
def api_process(catalog: Path, drain_seconds: float, worker: str = "http://127.0.0.1:1") -> Iterator[tuple[int, str]]:
    arguments = [sys.executable, "-c", API, str(catalog), str(drain_seconds), worker]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        while _status(url, "/readyz") != 200:
            time.sleep(0.01)
        yield process.pid, url
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _status(url: str, path: str) -> int:
    """Status code; 0 when nobody listens any more."""
    try:
        return CLIENT.get(url + path).status_code
    except httpx.TransportError:
        return 0


def test_sigterm_makes_it_unready_while_it_still_serves_and_ends_with_status_0(tmp_path: Path) -> None:
    with api_process(write_catalog(tmp_path), 2) as (pid, url):
        subprocess.run(["kill", "-TERM", str(pid)], check=True)
        while _status(url, "/readyz") == 200:
            time.sleep(0.01)
        assert _status(url, "/readyz") == 503
        assert _status(url, "/healthz") == 200
        assert CLIENT.post(f"{url}/recommend", json={"history": []}).status_code == 200


def test_a_second_signal_skips_the_waiting(tmp_path: Path) -> None:
    with api_process(write_catalog(tmp_path), 60) as (pid, url):
        subprocess.run(["kill", "-TERM", str(pid)], check=True)
        while _status(url, "/readyz") == 200:
            time.sleep(0.01)
        subprocess.run(["kill", "-INT", str(pid)], check=True)
        started = time.monotonic()
    assert time.monotonic() - started < 30


def test_it_bounds_heads_and_waits_for_none_when_it_ends(tmp_path: Path) -> None:
    with api_process(write_catalog(tmp_path), 0) as (pid, url):
        assert CLIENT.get(f"{url}/healthz", headers={"X-Pad": "x" * HEAD_BYTES}).status_code == 431
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(address), socket.create_connection(address) as begun:
            begun.sendall(b"GET /healthz HTTP/1.1\r\n")
            subprocess.run(["kill", "-TERM", str(pid)], check=True)
            started = time.monotonic()
            while _status(url, "/healthz"):
                time.sleep(0.01)
            assert begun.recv(1) == b""
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("signals", [1, 2])
async def test_draining_goes_through_its_stages(signals: int) -> None:
    drain = Drain()
    settings = load_settings({"drain_seconds": 0.1 if signals == 1 else 60, "finish_seconds": 0.3})
    config = uvicorn.Config(FastAPI(), log_config=None, lifespan="on")
    server = DrainingServer(config, drain, settings)
    drain.in_flight = 1  # a request that does not end
    with bind("127.0.0.1", 0) as listener:
        serving = asyncio.create_task(server.serve([listener]))
        await until(lambda: server.started)
        for _ in range(signals):
            server.handle_exit(signal.SIGTERM, None)
        assert (drain.unready, drain.refusing) == (True, False)
        await asyncio.wait_for(serving, 5)
    assert drain.refusing == (signals == 1)


@asynccontextmanager
async def serving() -> AsyncIterator[None]:
    server = DrainingServer(uvicorn.Config(FastAPI(), log_config=None, lifespan="on"), Drain(), load_settings())
    with bind("127.0.0.1", 0) as listener:
        task = asyncio.create_task(server.serve([listener]))
        try:
            await until(lambda: server.started)
            yield
        finally:
            server.should_exit = True
            await asyncio.wait_for(task, 5)


async def test_what_is_there_at_the_start_is_not_walked_through_again_by_the_collector() -> None:
    """A walk through all that was imported halts every request for longer than it takes to answer one."""
    async with serving():
        assert len(gc.get_objects()) < gc.get_freeze_count() / 10


async def test_requests_that_come_and_go_do_not_make_the_collector_run() -> None:
    async with serving():
        runs = sum(generation["collections"] for generation in gc.get_stats())
        for _ in range(100):
            crowd = [[n] for n in range(10_000)]
            crowd.clear()
        assert sum(generation["collections"] for generation in gc.get_stats()) == runs


async def test_a_signal_before_it_serves_ends_it_at_once() -> None:
    drain = Drain()
    server = DrainingServer(uvicorn.Config(FastAPI(), log_config=None), drain, load_settings())
    server.handle_exit(signal.SIGTERM, None)
    assert server.should_exit
    assert not drain.unready


async def test_answers_are_not_held_back_for_acknowledgements() -> None:
    """Nagle's algorithm is off on what is accepted; with it, every answer of two writes takes 40 ms more."""
    accepted: asyncio.Queue[int] = asyncio.Queue()

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        accepted.put_nowait(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    listener = bind("127.0.0.1", 0)
    async with await asyncio.start_server(note, sock=listener):
        _, writer = await asyncio.open_connection(*listener.getsockname())
        assert await asyncio.wait_for(accepted.get(), 5) == 1
        writer.close()


def test_a_taken_port_is_named() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(SettingsError, match=f"port {port} on 127.0.0.1 is already in use"):
            bind("127.0.0.1", port)


def test_an_address_that_is_not_ours_is_named() -> None:
    with pytest.raises(SettingsError, match=r"cannot listen on 203\.0\.113\.1 port 0"):
        bind("203.0.113.1", 0)
