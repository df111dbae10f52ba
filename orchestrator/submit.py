"""From an experiment to queued runs: order the stages, write their folders, call the launcher.

Everything that can be refused is refused before the first byte is written. ``run.json`` is written last,
so a folder without one is the rest of a submission that was killed, and is written again.
"""

import logging
import secrets
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from launch import Launcher
from orchestrator import inputs
from orchestrator.compose import Composed, compose
from orchestrator.errors import ConfigError, LaunchError, TrackingError
from orchestrator.plan import Estimate, plan, room_gb
from orchestrator.preflight import REHEARSALS
from orchestrator.registry import did_you_mean, find
from orchestrator.relayout import continues, moved, what_counts
from orchestrator.run import Run, State, list_runs, nearest, write_atomic, write_json
from orchestrator.spec import Experiment, in_order, waits_for

log = logging.getLogger(__name__)

PACKAGES = ("orchestrator", "jobs", "launch")  # what a run's `code/` holds


def submit(
    composed: Composed,
    *,
    root: Path,
    stages: Sequence[str] = (),
    launcher: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    preflight: bool = False,
    rehearse: bool = False,
) -> list[Run]:
    """Queue ``stages`` of an experiment, or all of them, below the runs folder ``root``; return what was queued.

    Submitting again goes on where the experiment stands: a stage that is done is passed over, one that stopped
    or failed is resumed, in another layout if ``composed`` has another. With ``dry_run`` the folders are written
    and nothing is queued; with ``preflight`` a job before them looks at the nodes; with ``rehearse`` nothing
    trains, and the folders lie apart.

    Raises:
        PlanError: a stage cannot run or does not fit; ``force`` lets pass what does not fit.
        DataError: what a stage reads is not there.
        LaunchError: a stage is running already, or its run began with another config.
    """
    root = root.expanduser().absolute()
    experiment = inputs.with_absolute_paths(composed.experiment)
    chain = in_order(experiment)
    names = [n for n in chain if n in select(experiment, stages)]
    estimates = {e.to_json()["stage"]: e for e in plan(experiment, stages=names, force=force, root=root)}
    through = launcher_of(launcher or experiment.cluster.launcher)
    extras = {name: True for name, asked in (("preflight", preflight), ("rehearse", rehearse)) if asked}
    if extras and not getattr(through, "LOOKS_AHEAD", False):
        asked = " and ".join(f"`--{name}`" for name in extras)
        raise LaunchError(f"{asked}: this launcher starts no job ahead", hint="on a cluster: `--launcher slurm`")
    if rehearse:
        root = root / REHEARSALS
        _clear([run for run in list_runs(root) if run.experiment == experiment.name])
    runs = [_run(root, experiment, name, chain.index(name) + 1) for name in names]
    pending = _unfinished(runs, experiment)
    for run in pending:
        through.check(experiment, run.stage)
    _check_needs(pending, experiment, trains=not (dry_run or rehearse))
    for line in advice(experiment, launcher) if pending else ():
        log.warning("%s", line)
    new = [run.stage for run in pending if run.stage in estimates and not _begun(run)]
    if not rehearse and (said := _room(experiment, new, root)):
        log.warning("%s", said)
    with ExitStack() as held:
        for run in pending:
            _make_folder(run)
            held.enter_context(run.lock("run"))
        runs = [_run(root, experiment, r.stage, r.index) for r in pending]
        pending = _unfinished(runs, experiment, say=False)  # as it stands now that nobody else can change it
        for run in pending:
            if not _begun(run):
                _write(run, experiment, estimates.get(run.stage))
            elif moved(run, experiment):
                _write_spec(run, experiment, estimates.get(run.stage))
            if said := continues(run, experiment):
                log.info("%s", said)
        if rehearse and not dry_run:
            through.submit(pending, **extras)
        elif pending and not dry_run:
            _launch(pending, through, experiment.tracking.uri, **extras)
    return pending


def resume(runs: Sequence[Run], overrides: Sequence[str] = (), *, force: bool = False) -> list[Run]:
    """Queue those of ``runs`` that are not done, in order, from their newest checkpoints; return them.

    A resumed run keeps its spec, its code and its MLflow run; ``overrides`` may change its layout.

    Raises:
        LaunchError: one of them is running, or all are done; an override changes more than the layout.
        PlanError: the new layout cannot run or does not fit; ``force`` lets pass what does not fit.
    """
    pending = [run for run in runs if state(run) != "done"]
    if not pending:
        names = ", ".join(f"`{r.name}`" for r in runs)
        raise LaunchError(
            f"nothing to resume: {names} reached the last step",
            hint="to train on, submit with more steps and a new `name=...`",
        )
    if overrides:
        _refuse_groups(overrides)
        composed = compose(pending[0].folder / "spec.yaml", overrides)
        last = pending[0].submissions[-1].launcher if pending[0].submissions else None
        return submit(composed, root=pending[0].root, stages=[r.stage for r in pending], launcher=last, force=force)
    experiment = pending[0].spec()
    with ExitStack() as held:
        for run in pending:
            held.enter_context(run.lock("run"))
        pending = [Run.load(run.folder) for run in pending]
        for run in pending:
            _refuse_alive(run)
        through = launcher_of(
            pending[0].submissions[-1].launcher if pending[0].submissions else experiment.cluster.launcher
        )
        for run in pending:
            through.check(experiment, run.stage)
        _check_needs(pending, experiment)
        _launch(pending, through, experiment.tracking.uri)
    return pending


def cancel(runs: Sequence[Run], *, now: bool = False) -> list[Run]:
    """Ask those of ``runs`` that are alive to save and leave; with ``now``, end them. Return them.

    Raises:
        LaunchError: none is alive.
    """
    living = [run for run in runs if alive(run)]
    if not living:
        names = ", ".join(f"`{r.name}` is {state(r)}" for r in runs)
        raise LaunchError(f"nothing to cancel: {names}", hint="`orch status` lists the runs")
    for run in reversed(living):  # what waits for another first, or it would start
        if alive(run):
            launcher_of(run.submissions[-1].launcher).cancel(run, now=now)
    return living


def preview(run: Run, launcher: str | None) -> str:
    """What the launcher would hand to its scheduler for ``run``; nothing where it has none."""
    show = getattr(launcher_of(launcher or run.spec().cluster.launcher), "preview", None)
    return str(show(run)) if show else ""


def advice(experiment: Experiment, launcher: str | None = None) -> list[str]:
    """What the launcher would rather be told of ``experiment``; it runs without too."""
    say = getattr(launcher_of(launcher or experiment.cluster.launcher), "advice", None)
    return list(say(experiment)) if say else []


def alive(run: Run) -> bool:
    """Whether the run's launcher still knows its newest submission."""
    return bool(run.submissions) and launcher_of(run.submissions[-1].launcher).alive(run)


def state(run: Run) -> State:
    """What the run's folder and its launcher say together."""
    return run.state(alive=alive(run))


def launcher_of(name: str) -> Launcher:
    """The module ``launch/<name>.py``."""
    return cast(Launcher, find("launch", name))


# The experiment


def select(experiment: Experiment, stages: Sequence[str]) -> list[str]:
    """``stages``, or all of them. Raises ConfigError for one that the experiment has not."""
    for name in stages:
        if name not in experiment.stages:
            hint = did_you_mean(name, [*experiment.stages])
            raise ConfigError(f"no stage `{name}` in `{experiment.name}`", hint=hint)
    return list(stages or experiment.stages)


# What a run needs before it may start


def _room(experiment: Experiment, stages: Sequence[str], root: Path) -> str:
    """What to say where the disk of ``root`` has less free than the checkpoints of ``stages`` will take."""
    needs_gb, free_gb = room_gb(experiment, stages), shutil.disk_usage(nearest(root)).free / 1e9
    if needs_gb <= free_gb:
        return ""
    return f"checkpoints will take {needs_gb:,.1f} GB, and `{root}` has {free_gb:,.1f} GB free"


def _unfinished(runs: Sequence[Run], experiment: Experiment, *, say: bool = True) -> list[Run]:
    """Those of ``runs`` that are not done. Raises LaunchError for one that is alive, or of another config."""
    begun = [run for run in runs if _begun(run)]
    for run in begun:
        _refuse_other_config(run, experiment)
        _refuse_alive(run)
    done = [run.name for run in begun if state(run) == "done"]
    for name in done if say else []:
        log.info("`%s` is done: passed over", name)
    return [run for run in runs if run.name not in done]


def _clear(runs: Sequence[Run]) -> None:
    """Remove rehearsals that are over. Raises LaunchError if one is not."""
    for run in runs:
        _refuse_alive(run)
    for run in runs:
        shutil.rmtree(run.folder)


def _begun(run: Run) -> bool:
    """Whether the run was ever handed on. If not, its folder may be rewritten: nothing depends on it."""
    return bool(run.submissions) or (run.folder / "tracking.json").exists()


def _refuse_alive(run: Run) -> None:
    if not run.over and alive(run):
        raise LaunchError(
            f"run `{run.name}` is {state(run)} already",
            hint=f"`orch logs -f {run.name}` follows it, `orch cancel {run.name}` stops it",
        )


def _refuse_other_config(run: Run, experiment: Experiment) -> None:
    """Raise LaunchError if what ``run`` computes, or from what, is not what ``experiment`` says."""
    old, new = what_counts(run.spec(), run.stage), what_counts(experiment, run.stage)
    differ = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    if differ:
        first = "; ".join(f"`{k}` was {old.get(k)}, is {new.get(k)}" for k in differ[:3])
        more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
        old_one = "" if state(run) == "done" else f", or go on with the old: `orch resume {run.name}`"
        raise LaunchError(
            f"run `{run.name}` began with another config: {first}{more}",
            hint=f"give the new one a name of its own, `name=...`{old_one}",
        )


def _refuse_groups(overrides: Sequence[str]) -> None:
    """Raise ConfigError for `cluster=...`: a run's spec has values, no groups they came from."""
    for override in overrides:
        key = override.partition("=")[0]
        if "." not in key:
            raise ConfigError(
                f"`{override}`: only a config has groups to swap, and a run goes on with its spec",
                hint=f"set keys, such as `{key}.gpus_per_node=4`, or `orch submit` its config with `{override}`",
            )


def _check_needs(runs: Sequence[Run], experiment: Experiment, *, trains: bool = True) -> None:
    """Raise unless all that ``runs``, started in this order, wait for and read is there or made by one of them.

    Where nothing ``trains``, a preset that names no data yet gets a warning.
    """
    for i, run in enumerate(runs):
        before = [r.stage for r in runs[:i]]
        for other in waits_for(experiment, run.stage):
            folder = run.folder.parent / other
            done = (folder / "run.json").exists() and state(Run.load(folder)) == "done"
            if other not in before and not done:
                raise LaunchError(
                    f"stage `{run.stage}` waits for `{other}`, which is not done",
                    hint=f"submit both: `--stage {other} --stage {run.stage}`",
                )
        try:
            inputs.check(experiment, run.stage, before)
        except inputs.Unnamed as error:
            if trains:
                raise
            log.warning("%s; to train, %s", error, error.hint)


# The run folder


def _run(root: Path, experiment: Experiment, stage: str, index: int) -> Run:
    """The run of ``stage``, from disk or new."""
    folder = root / experiment.name / stage
    if (folder / "run.json").exists():
        return Run.load(folder)
    return Run(folder=folder, experiment=experiment.name, stage=stage, index=index, key=secrets.token_hex(8))


def _make_folder(run: Run) -> None:
    try:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        run.folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as e:
        raise LaunchError(
            f"cannot write to `{run.folder}`: {e.strerror}", hint="choose another folder with `--runs`"
        ) from e


def _write(run: Run, experiment: Experiment, estimate: Estimate | None) -> None:
    """Write all that a run folder holds before the job starts, ``run.json`` last."""
    _write_spec(run, experiment, estimate)
    _copy_code(run.folder / "code")
    (run.folder / "logs").mkdir(exist_ok=True)
    run.save()


def _write_spec(run: Run, experiment: Experiment, estimate: Estimate | None) -> None:
    """Write what is to be computed, in which layout, and what it is expected to take."""
    from omegaconf import OmegaConf

    write_atomic(run.folder / "spec.yaml", OmegaConf.to_yaml(OmegaConf.structured(experiment)))
    write_json(run.folder / "plan.json", estimate.to_json() if estimate else None)
    if estimate and experiment.cluster.gpu != "cpu":  # a second, which a run on GPUs is worth
        from orchestrator import report

        report.write(run.folder / "plan.html", experiment, [estimate])


def _copy_code(target: Path) -> None:
    """Copy the code as it is now, uncommitted changes included, so that a resume months later runs the same."""
    shutil.rmtree(target, ignore_errors=True)
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec and spec.origin  # noqa: S101
        source = Path(spec.origin).parent
        for file in source.rglob("*.py"):
            copy = target / package / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def _launch(runs: Sequence[Run], through: Launcher, uri: str | None, **extras: bool) -> None:
    """Open the MLflow runs, if MLflow is there, and hand over to the launcher."""
    from orchestrator import track

    try:
        track.open_runs(list(runs), uri)
    except TrackingError as e:
        log.warning("%s; training goes on, and `orch sync` sends its metrics later", e)
    through.submit(runs, **extras)
