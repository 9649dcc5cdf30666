"""Child processes that do not outlive their parent, not even one killed with SIGKILL.

Knows the operating system; nothing of what the children do.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# A shim that asks for the signal and then becomes the program: `preexec_fn` is unsafe once threads run. The parent may
# have died before the request took effect; then the shim's parent is another process, and it leaves.
_SHIM = """
import ctypes, os, sys
number, parent = int(sys.argv[1]), int(sys.argv[2])
if ctypes.CDLL(None, use_errno=True).prctl(1, number, 0, 0, 0) or os.getppid() != parent:
    os._exit(1)
os.execvp(sys.argv[3], sys.argv[3:])
"""
_PR_SET_PDEATHSIG = 1


def spawn(
    command: Sequence[str],
    *,
    environ: Mapping[str, str] | None = None,
    parent_death_signal: signal.Signals = signal.SIGKILL,
    output: int | None = None,
    errors: int | None = None,
    given: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start `command`; it gets `parent_death_signal` when the calling thread's process ends (Linux). `given` is its
    standard input.

    Call it from the main thread: Linux sends the signal when the *thread* that started the child ends. The child has a
    process group of its own: a Ctrl-C in the terminal reaches the parent alone, which then stops it in order.
    """
    if sys.platform == "linux":
        shim = [sys.executable, "-I", "-S", "-c", _SHIM, str(int(parent_death_signal)), str(os.getpid())]
        command = [*shim, *command]
    return subprocess.Popen(
        command,
        stdin=given,
        stdout=output,
        stderr=errors,
        env=None if environ is None else dict(environ),
        process_group=0,
    )


def stop(process: subprocess.Popen[bytes], timeout: float) -> int:
    """Ask with SIGTERM, wait `timeout` seconds, insist with SIGKILL. Returns the exit status."""
    if process.poll() is None:
        process.terminate()
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have this process get signal `number` when the process that started it ends (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def cpu_seconds(pid: int) -> float:
    """Processor time a process has taken, all threads (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wanted_seconds(pid: int) -> float:
    """Processor time a process has taken or waited for, all threads that live (Linux). Waiting counts where the kernel
    keeps account of it (proc(5), schedstat)."""
    waited = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended, or nobody counts
            waited += int((thread / "schedstat").read_text(encoding="utf-8").split()[1])
    return cpu_seconds(pid) + waited / 1e9
