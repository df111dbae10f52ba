"""What Slurm says of the user's jobs. Every call has a time-out: a command on nodes that are away waits for ever.

One `squeue` serves all runs: a controller serves many users. `sacct` is asked for one thing only, how a start ended
that left no word, and never waited for: it may be absent, slow, or some seconds behind.
"""

import math
import os
import shlex
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field

from launch import Seen
from orchestrator.errors import LaunchError
from orchestrator.logbook import Ended
from orchestrator.run import Attempt, Run

COMMAND_S = 60  # for one Slurm command; a controller that restarts answers within this
LOOK_S = 10  # the same where somebody waits for a table; `squeue` gives up on a dead controller after 9 s (22.05)
ACCOUNTING_S = 5
ASK_EVERY_S = 5.0  # one `squeue` serves all that is asked within it
CLOCK_S = 5.0  # by which the clocks of nodes and controller may differ
NEVER_S = 360 * 86400.0  # Slurm expects a job without a time limit to end after a year
# The user's own of these would change what is asked, SBATCH_* even over what the script says.
HABITS = ("SQUEUE_", "SACCT_", "SBATCH_", "SCANCEL_", "SINFO_", "SCONTROL_")
# Job states that do not change any more (man squeue).
OVER = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
    | {"REVOKED", "TIMEOUT"}
)
WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD"})
# Why a job waits: Slurm's word (man squeue, JOB REASON CODES) and ours.
REASONS = {
    "BadConstraints": "no node is as it asks for",
    "BeginTime": "may not start yet",
    "Cleaning": "its last start is being cleaned up",
    "Dependency": "the stage before it is not done",
    "DependencyNeverSatisfied": "the stage before it failed",
    "InvalidAccount": "its account is not known",
    "InvalidQOS": "its QOS is not known",
    "JobHeldAdmin": "held by an administrator",
    "JobHeldUser": "held; `scontrol release` lets it go",
    "JobHoldMaxRequeue": "held: requeued too often",
    "Licenses": "a license is taken",
    "NodeDown": "a node it asks for is down",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition is inactive",
    "PartitionNodeLimit": "asks for more nodes than the partition allows",
    "PartitionTimeLimit": "asks for more time than the partition allows",
    "Priority": "others are before it",
    "Prolog": "its nodes are being prepared",
    "QOSGrpGRES": "its QOS has all the GPUs it may",
    "QOSMaxGRESPerUser": "you have all the GPUs your QOS allows you",
    "QOSMaxJobsPerUserLimit": "you run as many jobs as your QOS allows you",
    "AssocGrpGRES": "its account has all the GPUs it may",
    "AssocGrpGRESMinutes": "its account has used up its GPU hours",
    "launch_failed_requeued_held": "held: a node could not start it; `scontrol release` lets it go",
    "ReqNodeNotAvail": "a node it asks for is down, drained or reserved",
    "Reservation": "its reservation has not begun",
    "Resources": "its nodes are busy",
}


@dataclass
class _Queue:
    """The user's jobs, as `squeue` last told them."""

    jobs: dict[tuple[str, str], Seen] = field(default_factory=dict)  # by id and name: a new cluster counts from 1
    asked_at: float = -math.inf
    silent: LaunchError | None = None  # why it did not answer


_queue = _Queue()


def state(run: Run, *, within_s: float = COMMAND_S) -> str:
    """Slurm's word for the job of the newest submission; empty where it knows none any more."""
    found = seen(run, within_s=within_s)
    return found.state if found else ""


def seen(run: Run, *, within_s: float = LOOK_S) -> Seen | None:
    """What `squeue` says of the job of the newest submission; None where it knows none any more.

    Raises:
        LaunchError: Slurm does not answer; also for whoever asks soon after.
    """
    if not run.submissions:
        return None
    if time.monotonic() > _queue.asked_at + ASK_EVERY_S:
        try:
            _queue.jobs, _queue.silent = _listed(within_s), None
        except LaunchError as error:
            _queue.silent = error
        _queue.asked_at = time.monotonic()
    if _queue.silent:
        raise _queue.silent
    return _queue.jobs.get((run.submissions[-1].job_id, run.name))


def job_state(job_id: str) -> str:
    """Slurm's word for a job that is no run's; empty where it knows it no more."""
    said = call("squeue", "--me", "--noheader", "--states=all", "--format=%i|%T")
    return dict(line.split("|", 1) for line in said.splitlines()).get(job_id, "")


def forget() -> None:
    """Ask again next time: something was changed."""
    _queue.asked_at = -math.inf


def ended(run: Run) -> dict[str, Ended]:
    """By attempt, what accounting knows of those that left no word; nothing where it does not answer."""
    mute = [a for a in run.attempts() if not a.cause and a.job_id.isdigit()]
    if not mute:
        return {}
    ids, fields = ",".join(sorted({a.job_id for a in mute})), "JobIDRaw,State,NodeList,Start,End,JobName"
    asked = "sacct", "--noheader", "--parsable2", "--duplicates", "--allocations", f"--jobs={ids}", f"--format={fields}"
    with suppress(LaunchError):
        rows = [line.split("|", 5) for line in call(*asked, within_s=ACCOUNTING_S).splitlines()]
        ours = [row for row in rows if len(row) == 6 and row[5] == run.name]
        return {a.name: word for a in mute if (word := _end_of(a, ours))}
    return {}


def call(*command: str, within_s: float = COMMAND_S) -> str:
    """The output of a Slurm command, times in seconds since the epoch. Raises LaunchError where there is none."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(HABITS)}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
            env=base | {"SLURM_TIME_FORMAT": "%s"},
        )
    except FileNotFoundError:
        raise LaunchError(f"no `{command[0]}` on PATH", hint="this needs a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"`{command[0]}` did not answer within {within_s:g} s", hint="is slurmctld up?") from None
    if done.returncode:
        raise LaunchError(f"`{shlex.join(command)}`: {done.stderr.strip()}", hint="`sinfo` says whether Slurm is up")
    return done.stdout


def _listed(within_s: float) -> dict[tuple[str, str], Seen]:
    """All jobs of the user. The name stands last: of a job that is not ours, it may hold anything."""
    said = call("squeue", "--me", "--noheader", "--states=all", "--format=%i|%T|%S|%N|%r|%j", within_s=within_s)
    rows = (line.split("|", 5) for line in said.splitlines())
    return {(row[0], row[5]): _seen(*row[1:5], now=time.time()) for row in rows if len(row) == 6}


def _seen(state: str, start: str, nodes: str, reason: str, *, now: float) -> Seen:
    waiting = state in WAITING
    starts_at = float(start) if waiting and start.isdigit() else None
    if not waiting or reason == "None":
        reason = ""
    if starts_at and starts_at > now + NEVER_S:
        starts_at = None
    return Seen(state=state, waiting=waiting, reason=reason, why=why(reason), starts_at=starts_at, nodes=nodes)


def why(reason: str) -> str:
    """Slurm's word for why a job waits in ours; of limits that are not listed, whose they are."""
    word = reason.partition(",")[0].strip("() ").replace(" ", "_")  # ReqNodeNotAvail, UnavailableNodes:node3
    whose = {"QOS": "a limit of its QOS", "Assoc": "a limit of its account", "Max": "a limit of its account"}
    return REASONS.get(word) or next((text for start, text in whose.items() if word.startswith(start)), "")


def _end_of(attempt: Attempt, rows: list[list[str]]) -> Ended | None:
    """The last of ``rows`` of its job during which it began: each requeue has a row of its own."""
    word = None
    for job_id, state, nodes, start, end, _ in rows:
        if job_id != attempt.job_id or not (start.isdigit() and end.isdigit()):
            continue
        during = float(start) - CLOCK_S <= attempt.started_at <= float(end) + CLOCK_S
        if during and state.split()[0] in OVER | {"REQUEUED"}:
            word = Ended(state=state.split()[0], at=float(end), nodes=nodes)
    return word
