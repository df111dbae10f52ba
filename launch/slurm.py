"""Run on a Slurm cluster, one task per GPU, through submitit's SlurmExecutor.

`submit` hands each run to `sbatch`, held until every Submission is on disk, and returns; from then on the
scheduler is asked with `squeue` and told with `scancel`. A later stage waits for the one before it with
`afterok`, which is met by exit status 0 only, and a run leaves with that only when it is done: what is
cancelled or cannot be requeued takes the stages behind it along (`--kill-on-invalid-dep`).

Nothing of the submitting environment reaches the job but what the script names (`--export=NIL`), so no
secret of the login session is stored with the scheduler. Which run is done, its folder says; submitit's
result files and its own handling of signals are not used.
"""

import io
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import open_box
from orchestrator.errors import ConfigError, LaunchError
from orchestrator.plan import estimate, signal_lead_s
from orchestrator.registry import find
from orchestrator.run import Run, Submission
from orchestrator.spec import Experiment
from orchestrator.strict import Origin, convert, flatten

COMMAND_S = 60  # for one Slurm command; a controller that restarts answers within this
ASK_EVERY_S = 5.0  # one `squeue` serves all that is asked within it: a controller serves many users
SETTLE_S = 3.0  # from the first rank's begin until all have their signal handlers
# What a job needs of the submitting shell; SLURM_* comes by itself. None of it is a secret.
CARRIED = ("PATH", "HOME", "USER", "LANG", "LD_LIBRARY_PATH")
SECRET = re.compile(r"token|secret|passw|credential|api_?key", re.IGNORECASE)
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")
# Job states that do not change any more (man squeue).
OVER = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
    | {"REVOKED", "TIMEOUT"}
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `cluster.slurm` may say. None leaves it to the cluster's own default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclude: str | None = None  # nodes, as in `node[3,7-9]`
    time: str | None = None  # limit of one start, as `sbatch --time` reads it: "24:00:00", "2-0", "90"
    mem: str | None = None  # per node, such as `64G`; "0": all of it
    cpus_per_task: int | None = None  # per GPU; a stage of one task gets those of all GPUs of a node
    gres: str | None = None  # in place of `--gpus-per-node`, such as `gpu:a100:8`
    setup: list[str] = field(default_factory=list)  # lines of bash before the job, such as `module load cuda`
    environment: dict[str, str] = field(default_factory=dict)  # variables of the job; no secrets


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


def submit(runs: Sequence[Run]) -> None:
    """Queue ``runs``, each behind the one before it. Nothing starts before every Submission is on disk.

    Raises:
        LaunchError: Slurm refused one of them; what was queued before it is taken back.
    """
    queued: list[Run] = []
    try:
        for run in runs:
            number = open_box(run)
            behind = queued[-1].submissions[-1].job_id if queued else None
            job_id = _sbatch(run, number, behind)
            run.submissions.append(Submission(number=number, launcher="slurm", job_id=job_id, submitted_at=time.time()))
            queued.append(run)
            run.save()
        _run("scontrol", "release", ",".join(r.submissions[-1].job_id for r in queued))
    except BaseException:
        if queued:
            with suppress(LaunchError):
                _run("scancel", *(r.submissions[-1].job_id for r in queued))
        for run in queued:
            run.submissions.pop()
            run.save()
        raise
    _queue.asked_at = -math.inf


def preview(run: Run) -> str:
    """The text `sbatch` would be given for ``run``."""
    folder = run.folder / "submitit" / str(len(run.submissions) + 1)
    return sbatch_text(run, run.spec(), folder=folder, base=os.environ, python=sys.executable)


def alive(run: Run) -> bool:
    """Whether Slurm holds, runs or will requeue the job of the newest submission."""
    return _state(run) not in {"", *OVER}


def cancel(run: Run, *, now: bool = False) -> None:
    """Ask every task of ``run`` to save and leave; a job that has not begun, or with ``now``, is ended.

    Raises:
        LaunchError: the run is not alive.
    """
    if not alive(run):
        raise LaunchError(f"run `{run.name}` is not running", hint=f"`orch status {run.name}` says how it ended")
    job_id, number = run.submissions[-1].job_id, str(run.submissions[-1].number)
    begun = [a for a in run.attempts() if a.name.partition("r")[0] == number]
    if _state(run) == "RUNNING" and begun and not now:
        time.sleep(max(0.0, begun[-1].started_at + SETTLE_S - time.time()))
        _run("scancel", "--signal=TERM", job_id)  # to all tasks; srun and the script stay
    else:
        _run("scancel", job_id)
    if not begun:  # as if it had not been submitted
        with run.lock("run"):
            on_disk = Run.load(run.folder)
            if on_disk.submissions and on_disk.submissions[-1] == run.submissions[-1]:
                on_disk.submissions.pop()
                on_disk.save()
    _queue.asked_at = -math.inf


# The script


def options(experiment: Experiment) -> Options:
    """`cluster.slurm`, strictly. Raises ConfigError for a key or a value that cannot be."""
    prefix = ("cluster", "slurm")
    origins = {(*prefix, *key): [Origin(value, "")] for key, value in flatten(experiment.cluster.slurm)}
    chosen: Options = convert(Options, origins, prefix)
    for name, value in chosen.environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or SECRET.search(name) or "\n" in value:
            raise ConfigError(
                f"`cluster.slurm.environment.{name}` cannot go into a script",
                hint="a variable has a plain name and one line; keep secrets in a file of yours that `setup` reads",
            )
    limit_s(chosen)
    return chosen


def limit_s(chosen: Options) -> int | None:
    """`time` in seconds, read as `sbatch --time` does. Raises ConfigError for what is no time."""
    if chosen.time is None:
        return None
    match = TIME.fullmatch(chosen.time)
    if not match or (match["days"] and "" in match.groupdict().values()):
        raise ConfigError(
            f"`cluster.slurm.time` is `{chosen.time}`, which is no time",
            hint='minutes, "minutes:seconds", "hours:minutes:seconds", "days-hours" or "days-hours:minutes:seconds"',
        )
    a, b, c = (int(match[name] or 0) for name in ("a", "b", "c"))
    if match["days"] or match["c"]:
        return int(match["days"] or 0) * 86400 + a * 3600 + b * 60 + c
    return a * 60 + b


def lead_s(experiment: Experiment, stage: str) -> int:
    """Seconds before its end at which the job is told."""
    per_gpu = find("jobs", experiment.stages[stage].kind).PER_GPU
    return signal_lead_s(estimate(experiment, stage) if per_gpu else None)


def sbatch_text(run: Run, experiment: Experiment, *, folder: Path, base: Mapping[str, str], python: str) -> str:
    """The script of ``run``: a pure function of what it is given.

    Args:
        folder: submitit's, of this submission.
        base: the submitting environment, of which only CARRIED is read.
        python: path of the interpreter.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{shlex.quote(python)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return _make_sbatch_string(command=command, folder=folder, **parameters(run, experiment, base))


def parameters(run: Run, experiment: Experiment, base: Mapping[str, str]) -> dict[str, Any]:
    """What submitit is asked for: its own keywords, and `additional_parameters` for sbatch's others."""
    chosen, cluster, stage = options(experiment), experiment.cluster, experiment.stages[run.stage]
    per_gpu = find("jobs", stage.kind).PER_GPU
    tasks = cluster.gpus_per_node if per_gpu else 1
    cpus = chosen.cpus_per_task and chosen.cpus_per_task * cluster.gpus_per_node // tasks
    on_gpu = per_gpu and cluster.gpu != "cpu"
    limit = limit_s(chosen)
    asked = {
        key: getattr(chosen, key)
        for key in ("partition", "account", "qos", "constraint", "reservation", "exclude", "time", "mem")
    } | {"gres": chosen.gres if on_gpu else None}
    return {
        "job_name": run.name,
        "nodes": stage.parallel.nodes if per_gpu else 1,
        "ntasks_per_node": tasks,
        "cpus_per_task": cpus,
        "gpus_per_node": cluster.gpus_per_node if on_gpu and not chosen.gres else None,
        "time": None if limit is None else math.ceil(limit / 60),
        "signal_delay_s": lead_s(experiment, run.stage),
        "wckey": None,
        "stderr_to_stdout": True,
        # From Slurm 22.05 on srun does not take over --cpus-per-task, nor, after --export=NIL, the script's variables.
        "srun_args": ["--kill-on-bad-exit=1", "--export=ALL", "--open-mode=append"],
        "setup": _setup(run, chosen, cpus, base),
        "additional_parameters": {
            "requeue": True,
            "export": "NIL",
            "chdir": str(run.folder),
            **{key: value for key, value in asked.items() if value is not None},
        },
    }


def _setup(run: Run, chosen: Options, cpus: int | None, base: Mapping[str, str]) -> list[str]:
    """Lines of bash before srun; the run's own copy of the code comes before any other, `setup`'s included."""
    variables = {name: base[name] for name in CARRIED if name in base} | {"PYTHONUNBUFFERED": "1"}
    if cpus:
        variables |= {"SRUN_CPUS_PER_TASK": str(cpus), "OMP_NUM_THREADS": str(cpus)}
    return [
        *(f"export {name}={shlex.quote(value)}" for name, value in (variables | chosen.environment).items()),
        *chosen.setup,
        f"export PYTHONPATH={shlex.quote(str(run.folder / 'code'))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
    ]


# Slurm


def _sbatch(run: Run, number: int, behind: str | None) -> str:
    """Queue ``run``, held; return its job id."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    from jobs.__main__ import main as job_main

    class Executor(SlurmExecutor):
        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            after = [f"--dependency=afterok:{behind}", "--kill-on-invalid-dep=yes"] if behind else []
            return ["timeout", str(COMMAND_S), "sbatch", "--hold", *after, str(submission_file_path)]

    executor = Executor(run.folder / "submitit" / str(number))
    executor.update_parameters(**parameters(run, run.spec(), os.environ))
    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what it raises
            return str(executor.submit(job_main, str(run.folder)).job_id)
    except (FailedJobError, FailedSubmissionError) as e:
        said = str(e).strip() or f"no answer within {COMMAND_S} s"
        raise LaunchError(
            f"run `{run.name}`: sbatch: {said}", hint="`sinfo` lists partitions; see `cluster.slurm` in the config"
        ) from e


@dataclass
class _Queue:
    """The user's jobs, as `squeue` last told them."""

    states: dict[tuple[str, str], str] = field(default_factory=dict)  # by id and name: a new cluster counts from 1
    asked_at: float = -math.inf


_queue = _Queue()


def _state(run: Run) -> str:
    """Slurm's word for the job of the newest submission; empty where it knows none any more."""
    if not run.submissions:
        return ""
    if time.monotonic() > _queue.asked_at + ASK_EVERY_S:
        said = _run("squeue", "--me", "--noheader", "--states=all", "--format=%i|%j|%T")
        lines = (line.split("|") for line in said.splitlines())
        _queue.states = {(job_id, name): state for job_id, name, state in lines}
        _queue.asked_at = time.monotonic()
    return _queue.states.get((run.submissions[-1].job_id, run.name), "")


def _run(*command: str) -> str:
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
