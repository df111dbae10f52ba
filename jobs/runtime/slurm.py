"""The ranks' side of Slurm: whose job they are, and where they meet. What comes after them is the warden's."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from jobs.runtime.job import Ranks
from orchestrator.run import Run

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
