"""Workers are replaced one after another under load, and no request notices: real processes, real signals."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from service.api.app import create_app
from service.settings import load_settings
from service.supervisor import free_port
from tests.service.tiny_bundle import item_ids, write_bundle
from tests.service.wire import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sends signals")


@contextmanager
def worker(bundle: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "service.cli", "worker", "--bundle", str(bundle), "--port", str(port)]
    flags = ["--drain-seconds", "1", "--num-rows", "4", "--log-level", "error", "--redis-url", "unix:///nowhere.sock"]
    process = subprocess.Popen([*command, *flags])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def test_a_rolling_restart_of_the_workers_fails_no_request(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "tiny")
    ports = [free_port("127.0.0.1"), free_port("127.0.0.1")]
    settings = load_settings(
        {
            "redis_url": "unix:///nowhere.sock",
            "catalog_file": bundle / "catalog.jsonl",
            "worker_urls": ",".join(f"http://127.0.0.1:{port}" for port in ports),
            "poll_seconds": 0.1,
            "deadline_ms": 30_000,
        }
    )
    history = item_ids(bundle)[:4]
    answers: list[httpx.Response] = []
    with ExitStack() as stack:
        processes = {port: stack.enter_context(worker(bundle, port)) for port in ports}
        app = create_app(settings)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api") as client,
        ):

            async def ups() -> int:
                text = (await client.get("/metrics")).text
                return sum(line.startswith("padrec_worker_up{") and line.endswith(" 1.0") for line in text.splitlines())

            async def both_up() -> bool:
                return await ups() == 2

            async def load() -> None:
                while True:
                    answers.append(await client.post("/recommend", json={"history": history, "k": 3}))

            await until(both_up, 90)
            asking = [asyncio.create_task(load()) for _ in range(4)]
            for port in ports:
                before = len(answers)
                await until(lambda before=before: len(answers) > before + 20, 30)  # type: ignore[misc]
                processes[port].send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(processes[port].wait, 30) == 0
                processes[port] = stack.enter_context(worker(bundle, port))
                await asyncio.sleep(0.5)  # one worker alone, under load
                await until(both_up, 90)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            restarts = (await client.get("/metrics")).text
    assert len(answers) > 60
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    documents = [answer.json() for answer in answers]
    assert {note["code"] for document in documents for note in document["degraded"]} <= {"redis_unavailable"}
    assert {item["source"] for document in documents for item in document["items"]} == {"model"}
    assert len({str([i["item_id"] for i in document["items"]]) for document in documents}) == 1
    for port in ports:
        assert f'padrec_worker_restarts_total{{worker="http://127.0.0.1:{port}"}} 1.0' in restarts
