"""What the operating system knows of a child process."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from service import child

SPINNING = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(flush=True)\nwhile True: pass"


@contextmanager
def on_one_core(code: str) -> Iterator[subprocess.Popen[bytes]]:
    process = child.spawn([sys.executable, "-S", "-c", code], output=subprocess.PIPE)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        yield process
    finally:
        child.stop(process, 5)
        process.stdout.close()


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the kernel does not count how long one waits")
def test_time_that_a_process_waits_for_a_processor_is_time_it_wants_one() -> None:
    with on_one_core(SPINNING) as one, on_one_core(SPINNING) as other:
        started = time.monotonic()
        taken = [-child.cpu_seconds(process.pid) for process in (one, other)]
        wanted = [-child.wanted_seconds(process.pid) for process in (one, other)]
        time.sleep(1.0)
        for n, process in enumerate((one, other)):
            wanted[n] += child.wanted_seconds(process.pid)
            taken[n] += child.cpu_seconds(process.pid)
        seconds = time.monotonic() - started
    assert sum(taken) < 1.3 * seconds, "they share a core"
    assert sum(wanted) > 1.5 * seconds


def test_who_sleeps_wants_no_processor() -> None:
    with on_one_core("import time; print(flush=True); time.sleep(60)") as process:
        before = child.wanted_seconds(process.pid)
        time.sleep(0.3)
        assert child.wanted_seconds(process.pid) - before < 0.1
