"""How long tests wait: longer where the machine is slow, and not at all once ``ORCH_TESTS_MINUTES`` are over.

A guard against a hang is written for a machine of usual speed. Here it is as much longer as the import of torch, for a
machine may be ten times slower than another, and all of a test with it.
"""

import os
import subprocess
import sys
import time
from functools import cache

import pytest

BEGAN, TIME_IS_UP = time.monotonic(), "the time for tests is up"
IMPORT_S = 2.0  # of torch, where the bounds of the tests were found


def seconds_left():
    """Until ``ORCH_TESTS_MINUTES`` are over."""
    return 60 * float(os.environ.get("ORCH_TESTS_MINUTES", "inf")) - (time.monotonic() - BEGAN)


def skip_when_time_is_up():
    """Leave the test undone once ``ORCH_TESTS_MINUTES`` are over."""
    if seconds_left() <= 0:
        pytest.skip(TIME_IS_UP)


@cache
def slowness():
    """How many times longer than usual this machine takes; at least 1."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return max(1.0, (time.monotonic() - began) / IMPORT_S)


def wait(condition, what="what was waited for", seconds=300, every=0.05):
    """The first true value of ``condition()``; fails where a machine of usual speed would have waited ``seconds``."""
    began = time.monotonic()
    while not (value := condition()):
        skip_when_time_is_up()
        waited = time.monotonic() - began
        assert waited < seconds or waited < seconds * slowness(), f"{what} did not happen in {waited:.0f} s"
        time.sleep(every)
    return value
