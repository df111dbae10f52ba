"""Run on a Slurm cluster, one task per GPU, through submitit's SlurmExecutor.

`submit` hands each run to `sbatch`, held until every Submission is on disk, and returns; from then on the
scheduler is asked with `squeue` and told with `scancel`. A later stage waits for the one before it with
`afterok`, which is met by exit status 0 only, and a run leaves with that only when it is done: what is
cancelled or cannot be requeued takes the stages behind it along (`--kill-on-invalid-dep`).

Which run is done, its folder says; submitit's result files and its own handling of signals are not used.
"""

import io
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path

from launch import Seen, open_box
from launch import _slurm_preflight as probe
from launch import _slurm_queue as queue
from launch._slurm_script import guarded, lead_s, limit_s, options, parameters, sbatch_text
from orchestrator.errors import LaunchError
from orchestrator.logbook import Ended
from orchestrator.run import Run, Submission
from orchestrator.spec import Experiment

LOOKS_AHEAD = True  # `submit` knows `preflight` and `rehearse`
SETTLE_S = 3.0  # from the first rank's begin until all have their signal handlers


def check(experiment: Experiment, stage: str) -> None:
    """Raise ConfigError for a `cluster.slurm` that is wrong, LaunchError where there is no Slurm."""
    chosen = options(experiment)
    limit, lead = limit_s(chosen), lead_s(experiment, stage)
    if limit is not None and limit <= 2 * lead:
        raise LaunchError(
            f"stage `{stage}`: `cluster.slurm.time` is {limit} s, and saving takes the last {lead} s of it",
            hint=f"ask for more than {math.ceil(2 * lead / 60)} minutes",
        )
    for command in ("sbatch", "srun", "squeue", "scancel", "scontrol"):
        if shutil.which(command) is None:
            raise LaunchError(
                f"no `{command}` on PATH",
                hint="submit from a login node of the cluster, or with `--launcher local` on this machine",
            )


def advice(experiment: Experiment) -> list[str]:
    """What `cluster.slurm` leaves to defaults that do no GPU good."""
    chosen = options(experiment)  # a wrong one is refused at `orch plan` already, on CPUs too
    if experiment.cluster.gpu == "cpu" or chosen.cpus_per_task:
        return []
    return [
        "`cluster.slurm.cpus_per_task` is not set: a rank gets one core, unless the partition has a `DefCpuPerGPU`; "
        "set it to a node's cores over its GPUs"
    ]


def submit(runs: Sequence[Run], *, preflight: bool = False, rehearse: bool = False) -> None:
    """Queue ``runs``, each behind the one before it. Nothing starts before every Submission is on disk.

    ``preflight`` puts a job before them that looks at the nodes; ``rehearse`` gives them ranks that do not train.

    Raises:
        LaunchError: Slurm refused one of them; what was queued before it is taken back.
    """
    queued: list[Run] = []
    ahead: list[str] = []
    try:
        if preflight:
            job_id, folder = probe.queue_preflight(runs)
            ahead.append(job_id)
        for run in runs:
            number = open_box(run)
            behind = queued[-1].submissions[-1].job_id if queued else next(iter(ahead), None)
            job_id = probe.queue_rehearsal(run, behind) if rehearse else _sbatch(run, number, behind)
            run.submissions.append(Submission(number=number, launcher="slurm", job_id=job_id, submitted_at=time.time()))
            queued.append(run)
            run.save()
        if preflight:
            probe.arm(folder, ahead[0], [r.submissions[-1].job_id for r in queued])
        queue.call("scontrol", "release", ",".join([*ahead, *(r.submissions[-1].job_id for r in queued)]))
    except BaseException:
        if ahead or queued:
            with suppress(LaunchError):
                queue.call("scancel", *ahead, *(r.submissions[-1].job_id for r in queued))
        for run in queued:
            run.submissions.pop()
            run.save()
        raise
    queue.forget()


def preview(run: Run) -> str:
    """The text `sbatch` would be given for ``run``."""
    folder = run.folder / "submitit" / str(len(run.submissions) + 1)
    return sbatch_text(run, run.spec(), folder=folder, base=os.environ, python=sys.executable)


def alive(run: Run) -> bool:
    """Whether Slurm holds, runs or will requeue the job of the newest submission."""
    return queue.state(run) not in {"", *queue.OVER}


def seen(run: Run) -> Seen | None:
    """What Slurm says of the job of the newest submission; None where it has forgotten it."""
    return queue.seen(run)


def ended(run: Run) -> dict[str, Ended]:
    """What accounting knows of attempts that left no word; nothing where it does not answer at once."""
    return queue.ended(run)


def cancel(run: Run, *, now: bool = False) -> None:
    """Ask every task of ``run`` to save and leave; a job that has not begun, or with ``now``, is ended.

    Raises:
        LaunchError: the run is not alive.
    """
    if not alive(run):
        raise LaunchError(f"run `{run.name}` is not running", hint=f"`orch status {run.name}` says how it ended")
    job_id, number = run.submissions[-1].job_id, str(run.submissions[-1].number)
    begun, state = [a for a in run.attempts() if a.name.partition("r")[0] == number], queue.state(run)
    if state == "RUNNING" and begun and not now:
        time.sleep(min(SETTLE_S, max(0.0, begun[-1].started_at + SETTLE_S - time.time())))  # clocks may differ
        queue.call("scancel", "--signal=TERM", job_id)  # to all tasks; srun and the script stay
    else:
        queue.call("scancel", job_id)
    if not begun and state in queue.WAITING:  # as if it had not been submitted; ranks that start would miss it
        with run.lock("run"):
            on_disk = Run.load(run.folder)
            if on_disk.submissions and on_disk.submissions[-1] == run.submissions[-1]:
                on_disk.submissions.pop()
                on_disk.save()
    queue.forget()


def _sbatch(run: Run, number: int, behind: str | None) -> str:
    """Queue ``run``, held; return its job id."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    from jobs.__main__ import main as job_main

    experiment, folder = run.spec(), run.folder / "submitit" / str(number)

    class Executor(SlurmExecutor):
        @property
        def _submitit_command_str(self) -> str:
            return guarded(run, experiment, folder=folder, python=sys.executable)

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            after = [f"--dependency=afterok:{behind}", "--kill-on-invalid-dep=yes"] if behind else []
            others = (f"--unset={name}" for name in os.environ if name.startswith(queue.HABITS))
            bounded = ["env", *others, "timeout", str(queue.COMMAND_S)]
            return [*bounded, "sbatch", "--hold", *after, str(submission_file_path)]

    executor = Executor(folder)
    executor.update_parameters(**parameters(run, experiment, os.environ))
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what it raises
            return str(executor.submit(job_main, str(run.folder)).job_id)
    except (FailedJobError, FailedSubmissionError) as e:
        said = str(e).strip() or f"no answer within {queue.COMMAND_S} s"
        raise LaunchError(
            f"run `{run.name}`: sbatch: {said}", hint="`sinfo` lists partitions; see `cluster.slurm` in the config"
        ) from e
