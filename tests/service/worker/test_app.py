"""What a worker makes of its settings."""

import os

from service.settings import load_settings
from service.worker.app import num_threads


def test_a_core_is_left_to_others_unless_told_otherwise() -> None:
    assert num_threads(load_settings()) == max(1, (os.cpu_count() or 2) - 1)
    assert num_threads(load_settings({"threads": 3})) == 3
