"""The batch script of a run: `cluster.slurm`, strictly read, and the text for `sbatch` as a pure function of it.

Nothing of the submitting environment reaches the job but what the script names (`--export=NIL`), so no
secret of the login session is stored with the scheduler.
"""

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launch import _slurm_container as images
from orchestrator.errors import ConfigError
from orchestrator.plan import estimate, signal_lead_s
from orchestrator.registry import find
from orchestrator.run import Run
from orchestrator.spec import Experiment
from orchestrator.strict import Origin, convert, flatten
from orchestrator.watch import Patience

# What a job needs of the submitting shell; SLURM_* comes by itself. None of it is a secret.
CARRIED = ("PATH", "HOME", "USER", "LANG", "LD_LIBRARY_PATH")
SECRET = re.compile(r"token|secret|passw|credential|api_?key", re.IGNORECASE)
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")


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
    container: images.Container = field(default_factory=images.Container)
    patience: Patience = field(default_factory=Patience)  # with ranks that give no sign of life


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
    for name, value in vars(chosen.patience).items():
        if value <= 0:
            raise ConfigError(f"`cluster.slurm.patience.{name}` is {value:g}", hint="it must be more than 0")
    limit_s(chosen)
    images.check(chosen.container)
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

    command = guarded(run, experiment, folder=folder, python=python)
    return _make_sbatch_string(command=command, folder=folder, **parameters(run, experiment, base))


def guarded(run: Run, experiment: Experiment, *, folder: Path, python: str) -> str:
    """The script's last line: the warden, in the script's place, and behind it how it starts the ranks."""
    chosen, stage = options(experiment), experiment.stages[run.stage]
    expected = estimate(experiment, run.stage).save_s if find("jobs", stage.kind).PER_GPU else 0.0
    waits = replace(chosen.patience, save_s=max(chosen.patience.save_s, math.ceil(10 * expected)))
    other = {name: value for name, value in vars(waits).items() if value != getattr(Patience(), name)}
    patience = [f"--{name.replace('_', '-')}={value:g}" for name, value in other.items()]
    warden = [python, "-u", "-m", "jobs.runtime.warden", str(run.folder), *patience, "--"]
    srun = ["srun", "--unbuffered", f"--output={folder}/%j_%t_log.out", *srun_options(run, experiment)]
    rank = f"{interpreter(run, experiment, python)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return f"exec {shlex.join([*warden, *srun])} {rank}"


def srun_options(run: Run, experiment: Experiment) -> list[str]:
    """From Slurm 22.05 on srun does not take over --cpus-per-task, nor, after --export=NIL, the script's variables."""
    chosen = options(experiment)
    environment = carried(_cpus(experiment, run.stage, chosen), chosen)
    return [
        *("--kill-on-bad-exit=1", "--export=ALL", "--open-mode=append"),
        *images.srun_options(chosen.container, run, experiment.data, environment),
    ]


def interpreter(run: Run, experiment: Experiment, python: str) -> str:
    """The beginning of a rank's command line: ``python``, or a container's."""
    on_gpu = find("jobs", experiment.stages[run.stage].kind).PER_GPU and experiment.cluster.gpu != "cpu"
    return images.interpreter(options(experiment).container, run, experiment.data, python, on_gpu=on_gpu)


def parameters(run: Run, experiment: Experiment, base: Mapping[str, str]) -> dict[str, Any]:
    """What submitit is asked for: its own keywords, and `additional_parameters` for sbatch's others."""
    chosen, cluster, stage = options(experiment), experiment.cluster, experiment.stages[run.stage]
    per_gpu = find("jobs", stage.kind).PER_GPU
    tasks = cluster.gpus_per_node if per_gpu else 1
    cpus = _cpus(experiment, run.stage, chosen)
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
        "use_srun": False,  # the warden does
        "setup": [
            *_setup(run, chosen, cpus, base),
            *images.preparation(chosen.container, experiment.data),
        ],
        "additional_parameters": {
            "requeue": True,
            "export": "NIL",
            "chdir": str(run.folder),
            **{key: value for key, value in asked.items() if value is not None},
        },
    }


def _cpus(experiment: Experiment, stage: str, chosen: Options) -> int | None:
    """CPUs of a task: those of its GPU, or of all GPUs of a node."""
    gpus = experiment.cluster.gpus_per_node
    tasks = gpus if find("jobs", experiment.stages[stage].kind).PER_GPU else 1
    return chosen.cpus_per_task and chosen.cpus_per_task * gpus // tasks


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


def carried(cpus: int | None, chosen: Options) -> list[str]:
    """Names of the variables that must reach a container whatever its image says."""
    return ["PYTHONPATH", "PYTHONSAFEPATH", *(["OMP_NUM_THREADS"] if cpus else []), *chosen.environment]
