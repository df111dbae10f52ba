"""The job's side of Slurm: where the ranks meet, and going back into the queue.

submitit's own handler would requeue from rank 0 at once, before the others have saved; here the loop
decides together, and only then is Slurm told.
"""

from __future__ import annotations

import logging
import os
import subprocess

from jobs.runtime.job import Ranks
from orchestrator.run import Run

log = logging.getLogger(__name__)

COMMAND_S = 60
PORTS = range(12_000, 32_000)  # below the ephemeral ones (32768 on Linux), above most services


def job_of(run: Run) -> str:
    """The Slurm job this process belongs to, if it was started for the newest submission of ``run``; or nothing.

    A local run inside an allocation has a job around it that is not its own.
    """
    job_id = os.environ.get("SLURM_JOB_ID", "")
    last = run.submissions[-1] if run.submissions else None
    return job_id if last and last.launcher == "slurm" and last.job_id == job_id else ""


def set_rendezvous(ranks: Ranks) -> None:
    """Let the ranks meet on the first node of the job, at a port that no other job or earlier start of it has."""
    if ranks.world == 1 or "MASTER_ADDR" in os.environ:
        return
    from submitit.slurm.slurm import SlurmJobEnvironment

    job_id, restarts = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    os.environ["MASTER_ADDR"] = SlurmJobEnvironment().hostnames[0]
    os.environ["MASTER_PORT"] = str(PORTS[(31 * job_id + restarts) % len(PORTS)])


def requeue(job_id: str) -> bool:
    """Put the job back into the queue, which ends it here. For rank 0 alone, once all have saved."""
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job_id], capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        log.warning("job %s could not be requeued: %s", job_id, e)
        return False
    if done.returncode:  # also where the scheduler, which preempts it, has done so already
        log.warning("job %s could not be requeued: %s", job_id, done.stderr.strip())
    return done.returncode == 0
