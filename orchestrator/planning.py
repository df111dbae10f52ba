"""What `orch plan` does, by its options: estimate, search, compare variants, compare with a run."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator import planview, show
from orchestrator.checks import check
from orchestrator.compose import compose
from orchestrator.errors import ConfigError, PlanError
from orchestrator.plan import Estimate, estimate
from orchestrator.plan import plan as estimates_of
from orchestrator.registry import find
from orchestrator.scaling import WORTH_REPEATING
from orchestrator.search import Goal
from orchestrator.search import search as layouts_of
from orchestrator.spec import Experiment
from orchestrator.submit import advice, select

WORTH_IT = 0.5  # of the time; below it more is lost than trained
NOTHING = "nothing to estimate: none of these stages trains"


def plan(
    root: Path, config: str, overrides: Sequence[str], stages: Sequence[str], *, force: bool, report: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Print the estimates, and from which checkpoints below ``root`` a submit would go on; draw where asked."""
    experiment = _composed(config, overrides, stages)
    estimates = estimates_of(experiment, stages=list(stages) or None, force=force, root=root)
    if report and not estimates:
        raise PlanError("none of these stages trains: there is nothing to draw", hint="leave `--report` out")
    if report:
        from orchestrator import report as pictures

        pictures.write(report, experiment, estimates)
        say(f"wrote `{report}`")
    rows = [e.to_json() for e in estimates]
    if as_json:
        show.as_json(rows)
    elif rows:
        show.plans(rows)
        planview.details(rows)
        _advise(experiment, estimates, config, overrides)
    else:
        say(NOTHING)
    if not as_json:
        from orchestrator.relayout import announcements

        for line in advice(experiment):
            say(f"warning: {line}")
        for line in announcements(root, experiment, [e.stage for e in estimates]):
            say(line)


def _advise(experiment: Experiment, estimates: Sequence[Estimate], config: str, overrides: Sequence[str]) -> None:
    """Say of each stage what it reads too often, and which layout of the same GPUs would be faster than the band."""
    for e in estimates:
        often = {source: times for source, times in e.epochs.items() if times > WORTH_REPEATING}
        for source, times in often.items():
            say(
                f"warning: `{e.stage}` reads source `{source}` {times:.1f} times, and beyond {WORTH_REPEATING} epochs "
                "tokens teach little (arXiv:2305.16264): fewer `steps`, or more data"
            )
        if e.goodput < WORTH_IT:
            say(
                f"warning: of `{e.stage}`, {e.goodput:.0%} of the time would train: it is interrupted "
                f"{e.interruptions:,.0f} times; a save every {e.save_every_optimal_steps:,} steps loses least"
            )
        if experiment.cluster.gpu == "cpu":
            continue
        try:
            best = layouts_of(experiment, e.stage, top=1)[0]
        except PlanError as error:  # forced, and nothing fits
            say(str(error))
            continue
        gain = e.step_s / best.estimate.step_s
        if gain > 1 + e.step_band:
            say(f"the same GPUs would be {gain:.1f} times as fast with:")
            say(f"  {shlex.join(['orch', 'plan', config, *overrides])} {best.overrides}")
        elif e.fits:
            say(f"no layout of `{e.stage}` on these GPUs is faster by more than {e.step_band:.0%}")


def search(
    config: str, overrides: Sequence[str], stages: Sequence[str], *, goal: Goal, gpus: int | None, top: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Print the best layouts of each stage that trains, and the line that asks for the first."""
    experiment = _composed(config, overrides, stages)
    rows = []
    for name in _trained(experiment, stages):
        found = layouts_of(experiment, name, goal=goal, gpus=gpus, top=top)
        if as_json:
            rows += [
                {**f.estimate.to_json(), **dataclasses.asdict(f.parallel), "overrides": f.overrides} for f in found
            ]
            continue
        current = estimate(experiment, name) if not check(experiment, name) and gpus is None else None
        planview.found(found, current, shlex.join(["orch", "plan", config, *overrides]))
    if as_json:
        show.as_json(rows)
    elif not _trained(experiment, stages):
        say(NOTHING)


def what_if(
    config: str, overrides: Sequence[str], stages: Sequence[str], variants: Sequence[str], *, as_json: bool
) -> None:
    """Print the plan beside those with other settings, whether they fit or not."""
    plans = {}
    for label in ("as it is", *variants):
        more = [] if label == "as it is" else _words(label)
        experiment = _composed(config, [*overrides, *more], stages)
        plans[label] = [e.to_json() for e in estimates_of(experiment, stages=list(stages) or None, force=True)]
    if as_json:
        show.as_json(plans)
    elif not plans["as it is"]:
        say(NOTHING)
    else:
        planview.side_by_side(plans)


def _words(variant: str) -> list[str]:
    """The overrides of one `--what-if`."""
    try:
        return shlex.split(variant)
    except ValueError as error:
        text = str(error).lower()
        raise ConfigError(f"`--what-if` {variant}: {text}", hint="overrides as a shell takes them") from None


def compare(root: Path, name: str, calibrate: Path | None, *, as_json: bool) -> None:
    """Print what was planned and what a run measured; write a cluster file of it where asked."""
    from orchestrator import calibrate as measured
    from orchestrator.run import find_runs

    runs = [r for r in find_runs(root, name) if find("jobs", r.spec().stages[r.stage].kind).PER_GPU]
    if not runs:
        raise ConfigError(f"no stage of `{name}` trains", hint="`orch status` lists the runs there are")
    run = runs[-1]
    rows = measured.compare(run)
    if as_json:
        show.as_json([{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows])
    else:
        planview.compared(run.name, rows)
    if calibrate:
        measured.write_cluster(calibrate, measured.calibrated(run.spec().cluster, rows), run)
        say(f"wrote `{calibrate}`: `cluster={calibrate.stem}` plans with it where it lies in a `cluster` folder")


def say(text: str) -> None:
    """To stderr: not data."""
    print(text, file=sys.stderr)  # noqa: T201


def _composed(config: str, overrides: Sequence[str], stages: Sequence[str]) -> Experiment:
    experiment = compose(config, overrides).experiment
    select(experiment, stages)
    return experiment


def _trained(experiment: Experiment, stages: Sequence[str]) -> list[str]:
    return [n for n in select(experiment, stages) if find("jobs", experiment.stages[n].kind).PER_GPU]
