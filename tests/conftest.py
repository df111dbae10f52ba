"""Settings every test shares: one thread a process, no telemetry, no deadlines, no skipping where all must run.

With ``ORCH_TESTS_MINUTES`` no test begins after so long; those left are skipped by name. A machine of usual speed has
run them all by then, and a slow one has still said something: what is marked slow comes last.
"""

import math
import os
import signal
from contextlib import contextmanager

import pytest
from clock import TIME_IS_UP, seconds_left, skip_when_time_is_up
from hypothesis import settings

settings.register_profile("orch", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("orch")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.pop("ORCH_RUNS", None)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, which its children would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Those that are marked slow last, else in their order."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Begin nothing once ``ORCH_TESTS_MINUTES`` are over."""
    skip_when_time_is_up()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup():
    """Go no further when they are over; what is there is put away as ever."""
    with _time():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """The same of the test itself."""
    with _time():
        return (yield)


@contextmanager
def _time():
    before = signal.alarm(max(1, math.ceil(min(seconds_left(), 1e6))))
    try:
        yield
    finally:
        signal.alarm(max(1, math.ceil(seconds_left())) if before and seconds_left() < 1e6 else 0)


signal.signal(signal.SIGALRM, lambda *_: skip_when_time_is_up())  # raised in what runs now, as Ctrl-C is


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Turn a skip into a failure where ``ORCH_TESTS_REQUIRE_ALL`` is set, as in continuous integration."""
    outcome = yield
    report = outcome.get_result()
    late = TIME_IS_UP in str(report.longrepr)
    if report.skipped and os.environ.get("ORCH_TESTS_REQUIRE_ALL") and not (late or hasattr(report, "wasxfail")):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped where every test must run: {report.longrepr}"
