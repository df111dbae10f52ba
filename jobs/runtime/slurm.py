"""The job's side of Slurm: where the ranks meet, and going back into the queue.

submitit's own handler would requeue from rank 0 at once, before the others have saved; here the loop
decides together, and only then is Slurm told.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Mapping

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
    host, port = rendezvous(os.environ)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)


def rendezvous(environ: Mapping[str, str]) -> tuple[str, int]:
    """Host and port at which the ranks of the Slurm job in ``environ`` meet."""
    job_id, restarts = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_RESTART_COUNT", "0"))
    return first_host(environ["SLURM_JOB_NODELIST"]), PORTS[(31 * job_id + restarts) % len(PORTS)]


def first_host(nodelist: str) -> str:
    """The first name of a list as Slurm writes it: `rack[1-2]node[007,9]` begins with `rack1node007`."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", nodelist)
    assert first, "an empty pattern matches too"
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first[0])


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
