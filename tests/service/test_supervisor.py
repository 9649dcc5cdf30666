"""Dead children come back, crash loops end with a message, stopping is orderly, taken ports are named."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service import child
from service.supervisor import BUSY, Child, PortTaken, Supervisor, free_port, stop_on_signals
from tests.service.processes import gone

SLEEP = "import time; time.sleep(60)"


def python(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    return child.spawn([sys.executable, "-S", "-c", code, *arguments])


def test_a_killed_child_is_started_again_and_stopped_at_the_end() -> None:
    keeper = Child("worker", lambda: python(SLEEP))
    pids: list[int] = []

    def look() -> None:
        assert keeper.process is not None
        if keeper.process.pid not in pids:
            pids.append(keeper.process.pid)
            if len(pids) == 1:
                os.kill(keeper.process.pid, signal.SIGKILL)
            else:
                supervisor.request_stop()

    supervisor = Supervisor([keeper], first_backoff=0.01, on_round=look)
    assert supervisor.run() == 0
    assert len(pids) == 2
    assert keeper.process is not None
    assert keeper.process.poll() == -signal.SIGTERM


def test_a_crash_loop_ends_everything_with_a_message(caplog: pytest.LogCaptureFixture) -> None:
    steady = Child("api", lambda: python(SLEEP))
    broken = Child("worker", lambda: python("raise SystemExit(3)"))
    with caplog.at_level(logging.ERROR):
        assert Supervisor([steady, broken], max_failures=3, first_backoff=0.01).run() == 1
    assert "worker ended 3 times in a row (exit status 3)" in caplog.text
    assert steady.process is not None
    assert steady.process.poll() is not None


def test_a_child_that_refuses_its_settings_is_not_started_again() -> None:
    starts: list[int] = []

    def start() -> subprocess.Popen[bytes]:
        starts.append(1)
        return python("raise SystemExit(2)")

    assert Supervisor([Child("worker", start)], first_backoff=0.01).run() == 2
    assert len(starts) == 1


def test_children_stop_in_reverse_order_of_their_start(caplog: pytest.LogCaptureFixture) -> None:
    supervisor = Supervisor([Child(name, lambda: python(SLEEP)) for name in ("valkey", "worker", "api")])
    supervisor.on_round = supervisor.request_stop
    with caplog.at_level(logging.INFO):
        supervisor.run()
    stopped = [record.__dict__["child"] for record in caplog.records if record.message == "stopped"]
    assert stopped == ["api", "worker", "valkey"]


def test_a_child_that_ignores_sigterm_is_killed() -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('x', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    assert child.stop(process, 0.1) == -signal.SIGKILL
    process.stdout.close()


def test_sigterm_stops_the_supervisor_in_order() -> None:
    keeper = Child("worker", lambda: python(SLEEP))
    supervisor = Supervisor([keeper], on_round=lambda: os.kill(os.getpid(), signal.SIGTERM))
    with stop_on_signals(supervisor):
        assert supervisor.run() == 0
    assert keeper.process is not None
    assert keeper.process.poll() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_no_child_outlives_a_supervisor_that_is_killed() -> None:
    code = (
        "import sys, time; from service import child\n"
        f"print(child.spawn([sys.executable, '-S', '-c', {SLEEP!r}]).pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.stdout.close()
    parent.kill()
    parent.wait()
    assert gone(pid)


def test_a_taken_port_is_named_and_the_next_free_one_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTaken, match=str(port)):
            free_port("127.0.0.1", port)
        assert free_port("127.0.0.1", port, tries=20) > port
    assert free_port("127.0.0.1", 0) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_child_that_hangs_is_killed_and_started_again() -> None:
    """It answers while its process runs, and is stopped, not ended: only asking it tells."""
    pids: list[int] = []
    stopped: list[int] = []
    keeper = Child("worker", lambda: python(SLEEP), healthy=lambda: state_of(keeper) not in "T")

    def look() -> None:
        assert keeper.process is not None
        pid = keeper.process.pid
        if pid not in pids:
            pids.append(pid)
        elif keeper.was_healthy and not stopped:
            stopped.append(pid)
            os.kill(pid, signal.SIGSTOP)
        elif keeper.was_healthy and len(pids) == 2:
            supervisor.request_stop()

    supervisor = Supervisor([keeper], first_backoff=0.01, hung_seconds=0.3, on_round=look)
    assert supervisor.run() == 0
    assert len(pids) == 2
    assert pids[0] == stopped[0]
    assert gone(pids[0])
    assert keeper.failures == 1


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_child_that_is_busy_is_given_longer_than_one_that_hangs() -> None:
    """An overload must not end in a restart; work without end does."""
    begun: list[float] = []
    spinning = "while True: pass"
    keeper = Child("api", lambda: python(spinning), healthy=lambda: not begun)
    killed_after: list[float] = []

    def look() -> None:
        if keeper.was_healthy and not begun:
            begun.append(time.monotonic())
        elif keeper.failures:
            killed_after.append(time.monotonic() - begun[0])
            supervisor.request_stop()

    supervisor = Supervisor([keeper], first_backoff=0.01, hung_seconds=0.3, on_round=look)
    assert supervisor.run() == 0
    assert BUSY * 0.3 <= killed_after[0] < BUSY * 0.3 + 5


def test_a_child_that_never_becomes_healthy_is_a_crash_loop_in_the_end(caplog: pytest.LogCaptureFixture) -> None:
    stuck = Child("worker", lambda: python(SLEEP), healthy=lambda: False)
    supervisor = Supervisor([stuck], max_failures=2, first_backoff=0.01, hung_seconds=0.1, starting_seconds=0.2)
    with caplog.at_level(logging.ERROR):
        assert supervisor.run() == 1
    assert "worker hangs" in caplog.text
    assert "worker ended 2 times in a row (killed by SIGKILL)" in caplog.text


def test_a_slow_start_is_not_taken_for_a_hang() -> None:
    started = time.monotonic()
    slow = Child("worker", lambda: python(SLEEP), healthy=lambda: time.monotonic() - started > 1.0)
    supervisor = Supervisor([slow], hung_seconds=0.2, starting_seconds=60)
    supervisor.on_round = lambda: supervisor.request_stop() if slow.was_healthy else None
    assert supervisor.run() == 0
    assert slow.failures == 0


WAIT = "import sys, time; sys.stdin.readline() and print('on', flush=True); time.sleep(60)"


def waiting() -> subprocess.Popen[bytes]:
    return child.spawn([sys.executable, "-S", "-c", WAIT], given=subprocess.PIPE, output=subprocess.PIPE)


def test_a_spare_takes_the_place_of_a_dead_child_and_gets_a_spare_itself() -> None:
    keeper = Child("worker", lambda: python(SLEEP), healthy=lambda: True, spare=waiting)
    lives: list[int] = []
    spares: list[int] = []

    def look() -> None:
        assert keeper.process is not None
        if keeper.process.pid not in lives:
            lives.append(keeper.process.pid)
        if keeper.waiting is not None and keeper.waiting.pid not in spares:
            spares.append(keeper.waiting.pid)
            if len(spares) == 1:
                os.kill(keeper.process.pid, signal.SIGKILL)
            else:
                assert keeper.process.stdout is not None and keeper.waiting.stdout is not None
                with keeper.process.stdout as said, keeper.waiting.stdout:
                    assert said.readline() == b"on\n", "it was told"
                supervisor.request_stop()

    supervisor = Supervisor([keeper], first_backoff=0.01, on_round=look)
    assert supervisor.run() == 0
    assert lives[1] == spares[0]
    assert len(lives) == len(spares) == 2
    assert keeper.waiting is not None
    assert gone(keeper.waiting.pid), "a spare that was not needed is stopped too"


def test_no_spare_is_made_before_a_child_has_settled_and_a_dead_one_is_not_needed() -> None:
    settled: list[int] = []
    keeper = Child(
        "worker",
        lambda: python(SLEEP),
        healthy=lambda: True,
        spare=lambda: child.spawn([sys.executable, "-S", "-c", "raise SystemExit(3)"], given=subprocess.PIPE),
        settled=lambda: len(settled) > 0,
    )
    lives: list[int] = []
    supervisor = Supervisor([keeper], first_backoff=0.01, hung_seconds=0.1)
    rounds = iter(range(1000))

    def look() -> None:
        assert keeper.process is not None
        if keeper.process.pid not in lives:
            lives.append(keeper.process.pid)
        if next(rounds) < 10:
            assert keeper.waiting is None
            return
        settled.append(1)
        if len(lives) == 2:
            supervisor.request_stop()
        elif keeper.waiting is not None and keeper.waiting.poll() is not None and keeper.process.poll() is None:
            keeper.process.kill()

    supervisor.on_round = look
    assert supervisor.run() == 0
    assert len(lives) == 2, "started in the ordinary way"


def state_of(each: Child) -> str:
    """The one-letter state of a child's process, as /proc tells it."""
    assert each.process is not None
    return Path(f"/proc/{each.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
