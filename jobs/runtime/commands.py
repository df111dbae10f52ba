"""Slurm's commands as the warden gives them: each has a time-out, and is repeated while the controller is away."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

log = logging.getLogger("warden")

COMMAND_S = 60  # for one Slurm command
AWAY_S = 600.0  # for a controller that is being restarted or upgraded; commands give up on it after some seconds
AWAY_POLL_S = 5.0
AWAY = re.compile(r"contact|connect|timed out|transmitted|standby", re.IGNORECASE)  # what its commands say then
# JobState of a job that Slurm ends or has ended (man squeue); others, such as SIGNALING or STOPPED, say no such thing.
OVER = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "COMPLETING", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
    | {"PREEMPTED", "REVOKED", "TIMEOUT"}
)


def requeued(job: Mapping[str, str]) -> bool:
    """Whether ``job`` goes back into the queue already: Slurm counts the next start as soon as it is decided."""
    return int(job.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def slurm(*command: str, wait_s: float = 0.0) -> tuple[int, str]:
    """Exit status and words of a Slurm command; asked again while the controller is away, for ``wait_s`` seconds."""
    deadline = time.monotonic() + wait_s
    while True:
        status, said = _call(command)
        if status == 0 or not AWAY.search(said) or time.monotonic() >= deadline:
            return status, said
        time.sleep(AWAY_POLL_S)


def _call(command: Sequence[str]) -> tuple[int, str]:
    """SIGTERM, which Slurm sends to all processes here, does not end it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # inherited
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        log.warning("%s", e)
        return 1, str(e)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    said = " ".join((done.stdout if done.returncode == 0 else done.stderr or done.stdout).split())
    if done.returncode:
        log.warning("`%s`: %s", " ".join(command), said)
    return done.returncode, said


def seconds(text: str) -> int | None:
    """`1-00:30:00` as seconds; None for what is no time, such as `UNLIMITED`."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, days or "0"]):
        return None
    clock_s = 0
    for part in parts:
        clock_s = 60 * clock_s + int(part)
    return int(days or 0) * 86400 + clock_s
