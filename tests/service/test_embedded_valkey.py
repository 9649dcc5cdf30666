"""The embedded server answers redis clients, keeps nothing, opens no port and outlives nobody."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from service.embedded_valkey import ValkeyUnavailable, start_valkey
from tests.service.processes import gone


def test_answers_a_redis_client_and_ends_with_the_with_block(tmp_path: Path) -> None:
    with start_valkey(tmp_path) as server:
        client = redis.Redis.from_url(server.url)
        client.hset("h", "f", b"v")
        assert client.hget("h", "f") == b"v"
        client.close()
        assert server.alive
    assert not server.alive
    assert not server.socket_path.exists()


def test_listens_on_no_tcp_port_and_keeps_nothing_on_disk(tmp_path: Path) -> None:
    with start_valkey(tmp_path) as server:
        client = redis.Redis.from_url(server.url)
        client.set("a", "1")
        assert client.config_get("port", "save", "appendonly") == {"port": "0", "save": "", "appendonly": "no"}
        client.close()
    assert list(tmp_path.iterdir()) == []


def test_starts_again_over_a_stale_socket(tmp_path: Path) -> None:
    with start_valkey(tmp_path) as first:
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
        with start_valkey(tmp_path) as second:
            assert second.alive


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_is_gone_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from service.embedded_valkey import start_valkey\n"
        "print(start_valkey(Path(sys.argv[1])).process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.stdout.close()
    parent.kill()
    parent.wait()
    assert gone(pid, 2.0)


def test_refuses_a_folder_whose_path_is_too_long_for_a_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    with pytest.raises(ValkeyUnavailable, match="too long"):
        start_valkey(folder)
