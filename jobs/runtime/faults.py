"""Being told to stop, and failing: signals become a flag, exceptions become a file.

A signal handler only sets the flag (as in facebookresearch/lingua); the loop asks for it at the end of a
step, where all ranks agree to save and leave together.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import time
import traceback
from types import FrameType

from orchestrator import recover
from orchestrator.errors import OrchError
from orchestrator.run import Cause, Run, order, read_json, write_json

log = logging.getLogger(__name__)

LINGER_S = 5.0
# What a signal says about the end: the user cancels, or the scheduler takes the node back.
CAUSES: dict[int, Cause] = {
    signal.SIGTERM: "cancelled",
    signal.SIGINT: "cancelled",
    signal.SIGUSR1: "preempted",
    signal.SIGUSR2: "preempted",
}


class Stopped(Exception):
    """The run saved and leaves before its last step, because it was told to."""

    def __init__(self, cause: Cause, step: int) -> None:
        super().__init__(f"{cause} at step {step}")
        self.cause = cause
        self.step = step


class StopFlag:
    """Set by the first signal that asks this process to stop."""

    def __init__(self) -> None:
        self.cause: Cause = ""

    def install(self) -> StopFlag:
        """Take the place of every handler there is, submitit's too: it would requeue at once, alone."""
        for number in CAUSES:
            signal.signal(number, self._set)
        return self

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.cause = self.cause or CAUSES[number]


def attempt_name(run: Run) -> str:
    """Name of this start of ``run``: the submission's number, with ``r<n>`` for the n-th requeue."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    number = run.submissions[-1].number if run.submissions else 1
    return f"{number}r{restarts}" if restarts else str(number)


def is_current(run: Run, attempt: str) -> bool:
    """Whether neither a later submission of ``run`` nor a later requeue has begun, nor its warden closed this one.

    Only then may it commit. Read from disk: after a network partition the one that was replaced may be alive still.
    """
    closed = {file.stem for file in (run.folder / "ends").glob("*.json")}  # listed: NFS remembers what was not there
    if attempt in closed:
        return False
    on_disk = Run.load(run.folder)
    submitted = [(s.number, 0) for s in on_disk.submissions[-1:]]
    return order(attempt) >= max([*submitted, *(order(a.name) for a in on_disk.attempts())], default=(0, 0))


def record_failure(run: Run, attempt: str, rank: int, error: BaseException) -> None:
    """Leave what this rank raised in ``failures/``, for `orch status` to find the first of."""
    log.error("rank %d failed", rank, exc_info=error)
    failure = {
        "rank": rank,
        "time": time.time(),
        "type": type(error).__name__,
        "bases": _bases(error),
        "message": str(error),
        "hint": error.hint if isinstance(error, OrchError) else "",
        "peak_memory_gb": _peak_memory_gb(),
        "traceback": "".join(traceback.format_exception(error)),
    }
    planned = (read_json(run.folder / "plan.json") or {}).get("memory_gb", {}).get("total")
    failure["hint"] = failure["hint"] or recover.memory_hint(failure, planned)
    write_json(run.folder / "failures" / f"{attempt}-{rank}.json", failure)


def let_the_first_go(error: BaseException, *, told: bool) -> None:
    """Wait, where ``error`` is another rank's and `srun` ends all at the first exit: the warden looks who that is."""
    if told and recover.kind({"type": type(error).__name__, "bases": _bases(error), "message": str(error)}) == "peer":
        time.sleep(LINGER_S)


def _bases(error: BaseException) -> list[str]:
    return [base.__name__ for base in type(error).__mro__[1:]]


def _peak_memory_gb() -> float:
    """The most this process has used: of its GPU, or without one, of the machine."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated()) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
