"""Settings every test shares: one thread a process, no telemetry, no deadlines, no skipping where all must run."""

import os
import signal

import pytest
from hypothesis import settings

settings.register_profile("orch", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("orch")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.pop("ORCH_RUNS", None)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, which its children would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Turn a skip into a failure where ``ORCH_TESTS_REQUIRE_ALL`` is set, as in continuous integration."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("ORCH_TESTS_REQUIRE_ALL") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped where every test must run: {report.longrepr}"
