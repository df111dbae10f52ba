"""What Slurm says of the user's jobs. Every call has a time-out: a command on nodes that are away waits for ever."""

import math
import shlex
import subprocess
import time
from dataclasses import dataclass, field

from orchestrator.errors import LaunchError
from orchestrator.run import Run

COMMAND_S = 60  # for one Slurm command; a controller that restarts answers within this
ASK_EVERY_S = 5.0  # one `squeue` serves all that is asked within it: a controller serves many users
# Job states that do not change any more (man squeue).
OVER = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
    | {"REVOKED", "TIMEOUT"}
)


@dataclass
class _Queue:
    """The user's jobs, as `squeue` last told them."""

    states: dict[tuple[str, str], str] = field(default_factory=dict)  # by id and name: a new cluster counts from 1
    asked_at: float = -math.inf


_queue = _Queue()


def state(run: Run) -> str:
    """Slurm's word for the job of the newest submission; empty where it knows none any more."""
    if not run.submissions:
        return ""
    if time.monotonic() > _queue.asked_at + ASK_EVERY_S:
        said = call("squeue", "--me", "--noheader", "--states=all", "--format=%i|%j|%T")
        lines = (line.split("|") for line in said.splitlines())
        _queue.states = {(job_id, name): state for job_id, name, state in lines}
        _queue.asked_at = time.monotonic()
    return _queue.states.get((run.submissions[-1].job_id, run.name), "")


def forget() -> None:
    """Ask again next time: something was changed."""
    _queue.asked_at = -math.inf


def call(*command: str) -> str:
    """The output of a Slurm command. Raises LaunchError where it fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except FileNotFoundError:
        raise LaunchError(f"no `{command[0]}` on PATH", hint="this needs a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"`{command[0]}` did not answer within {COMMAND_S} s", hint="is slurmctld up?") from None
    if done.returncode:
        raise LaunchError(f"`{shlex.join(command)}`: {done.stderr.strip()}", hint="`sinfo` says whether Slurm is up")
    return done.stdout
