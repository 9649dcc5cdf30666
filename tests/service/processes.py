"""What tests ask of processes they did not start themselves."""

import time
from pathlib import Path


def gone(pid: int, seconds: float = 2.0) -> bool:
    """Whether a process we did not start ends within `seconds` (a zombie has ended)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False
