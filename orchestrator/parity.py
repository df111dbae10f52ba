"""`orch parity`: the same config through several engines and layouts, and how far apart they come out.

Every case is a real run of its own through the local launcher, from the same seed over the same samples; the first
that can run is what the others are held against. Dropout is set to 0, since each layout draws other random numbers.
"""

import dataclasses
import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator import store
from orchestrator.compose import Composed, compose
from orchestrator.errors import ConfigError, LaunchError, PlanError, TrackingError
from orchestrator.plan import plan
from orchestrator.run import Run, write_json
from orchestrator.schedule import total_tokens
from orchestrator.spec import Experiment, StageSpec
from orchestrator.submit import alive, cancel, select, state, submit

log = logging.getLogger(__name__)

# How far losses may be apart, in nats, and gradient norms, relatively: in bf16, which rounds to 8 bits, what
# tests/jobs/engines/test_parallel.py holds over 20 steps; in fp32 a hundred times what was measured (docs/engines.md).
TOLERANCE = {"fp32": (1e-4, 1e-3), "bf16": (3e-2, 1e-1)}
WARMUP = 2  # steps whose speed does not count
POLL_S = 0.3


@dataclasses.dataclass(kw_only=True)
class Case:
    """One engine in one layout; its fields are the keys of `orch parity --json`."""

    engine: str
    layout: str
    result: str = ""  # equal, differs, reference, refused, failed
    why: str = ""  # of what is refused or failed
    loss_difference: float | None = None  # nats, the largest of any step
    grad_norm_difference: float | None = None  # relative, the largest of any step
    tokens_per_s: float | None = None  # median
    peak_memory_gb: float | None = None  # of rank 0
    folder: str = ""

    @property
    def name(self) -> str:
        """As the name of a stage."""
        cut = self.layout.replace("=", "").replace(",", "-")
        return f"{self.engine}-{cut}" if cut else self.engine


def parity(
    config: str,
    overrides: Sequence[str] = (),
    *,
    root: Path,
    folder: Path | None,
    stage: str | None,
    engines: Sequence[str],
    layouts: Sequence[str],
    steps: int,
    tolerance: float | None = None,
) -> tuple[list[Case], Path]:
    """Run every engine in every layout; return the cases, and the folder of their runs, report and curves.

    Args:
        root: the runs folder, whose MLflow gets the curves, and below which ``folder`` lies unless it is given.
        layouts: each `key=value` of `parallel`, several with commas; empty: as the config has it.
        tolerance: of the loss, in nats; None: by precision.

    Raises:
        ConfigError: no such stage, a key that is not of `parallel`.
        LaunchError: ``folder`` is not empty, or fewer than two cases can run.
    """
    composed = compose(config, overrides)
    experiment = composed.experiment
    name = select(experiment, [stage])[0] if stage else _training_stage(experiment)
    folder = folder or root / "parity" / f"{experiment.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = folder.expanduser().absolute()
    if folder.exists() and any(folder.iterdir()):
        raise LaunchError(f"`{folder}` is not empty", hint="name a new folder with `--to`")
    chosen = [(engine, layout) for layout in layouts or [""] for engine in engines]
    cases = [Case(engine=engine, layout=layout) for engine, layout in chosen]
    stages = {case.name: _stage(config, overrides, name, case, steps) for case in cases}
    experiment = dataclasses.replace(
        experiment,
        name=f"{experiment.name}-parity",
        model=dataclasses.replace(experiment.model, dropout=0.0),
        tracking=dataclasses.replace(
            experiment.tracking, uri=store.tracking_uri(root.expanduser().absolute(), experiment.tracking.uri)
        ),
        stages=stages,
    )
    runs = _runnable(experiment, cases)
    for case in runs:
        _run(dataclasses.replace(composed, experiment=experiment), folder, case)
    compare(runs, stages[runs[0].name].precision, tolerance)
    write_json(folder / "report.json", [dataclasses.asdict(case) for case in cases])
    draw(runs, folder / "curves.png")
    _tell_mlflow(runs, folder / "curves.png")
    return cases, folder


def compare(cases: Sequence[Case], precision: str, tolerance: float | None) -> None:
    """Fill in what was measured, and how far each case is from the first that did not fail."""
    allowed, allowed_norm = TOLERANCE[precision]
    if tolerance is not None:
        allowed, allowed_norm = tolerance, 10 * tolerance
    reference: dict[int, dict[str, Any]] = {}
    for case in cases:
        if case.result == "failed":
            continue
        lines = Run.load(Path(case.folder)).metrics()
        timed = list(lines.values())[WARMUP:] or list(lines.values())
        case.tokens_per_s = statistics.median(line["perf/tokens_per_s"] for line in timed)
        case.peak_memory_gb = max(line["perf/peak_memory_gb"] for line in lines.values())
        if not reference:
            case.result, reference = "reference", lines
            continue
        pairs = [(lines[step], wanted) for step, wanted in reference.items()]
        case.loss_difference = max(abs(a["train/loss"] - b["train/loss"]) for a, b in pairs)
        case.grad_norm_difference = max(
            abs(a["train/grad_norm"] - b["train/grad_norm"]) / max(b["train/grad_norm"], 1e-12) for a, b in pairs
        )
        near = case.loss_difference <= allowed and case.grad_norm_difference <= allowed_norm
        case.result = "equal" if near else "differs"


def draw(cases: Sequence[Case], path: Path) -> None:
    """Draw the losses, and their differences from the reference's, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = {
        case.name: {step: line["train/loss"] for step, line in Run.load(Path(case.folder)).metrics().items()}
        for case in cases
        if case.result != "failed"
    }
    reference = next(iter(curves.values()), {})
    for name, losses in curves.items():
        left.plot(list(losses), list(losses.values()), label=name, lw=1)
        if losses is not reference:
            apart = [max(abs(loss - reference[step]), 1e-9) for step, loss in losses.items()]
            right.semilogy(list(losses), apart, label=name, lw=1)
    left.set(xlabel="step", ylabel="cross-entropy (nats per token)", title="loss")
    right.set(xlabel="step", title=f"difference from {next(iter(curves), '')}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(path)


def show(cases: Sequence[Case]) -> None:
    """Print a row for each case."""
    from rich.markup import escape
    from rich.table import Table

    from orchestrator.show import out

    styles = {"equal": "green", "reference": "cyan", "differs": "bold red", "failed": "bold red", "refused": "dim"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("engine", "layout", "result", "loss", "gradient norm", "tokens/s", "peak GB", ""):
        table.add_column(column, overflow="fold")

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for case in cases:
        table.add_row(
            case.engine,
            case.layout or "-",
            f"[{styles[case.result]}]{case.result}[/]",
            number(case.loss_difference, ".1e"),
            number(case.grad_norm_difference, ".1e"),
            number(case.tokens_per_s, ",.0f"),
            number(case.peak_memory_gb, ".2f"),
            escape(case.why),
        )
    out().print(table)


def _training_stage(experiment: Experiment) -> str:
    """The first stage that trains."""
    for name, stage in experiment.stages.items():
        if stage.steps and stage.init_from is None:
            return name
    raise ConfigError(f"no stage of `{experiment.name}` trains from its own weights", hint="name one with `--stage`")


def _stage(config: str, overrides: Sequence[str], name: str, case: Case, steps: int) -> StageSpec:
    """Stage ``name`` in the engine and layout of ``case``, for a few steps from its seed."""
    words = [f"stages.{name}.parallel.{word}" for word in case.layout.split(",") if word]
    experiment = compose(config, [*overrides, *words]).experiment
    stage = dataclasses.replace(experiment.stages[name], steps=steps)
    half = total_tokens(stage, experiment.model.seq_len) / 2
    warmup = min(stage.schedule.warmup_tokens, half)  # a whole run's may be longer than these steps
    return dataclasses.replace(
        stage,
        schedule=dataclasses.replace(stage.schedule, warmup_tokens=warmup),
        engine=case.engine,
        engine_config=stage.engine_config if case.engine == stage.engine else {},
        save_every=steps,
        eval_every=0,
        init_from=None,
        after=[],
    )


def _runnable(experiment: Experiment, cases: Sequence[Case]) -> list[Case]:
    """Those of ``cases`` that the plan lets pass; the others say why not. Raises LaunchError for fewer than two."""
    for case in cases:
        try:
            plan(experiment, stages=[case.name], force=True)
        except PlanError as e:
            case.result, case.why = "refused", f"{e}" + (f"; hint: {e.hint}" if e.hint else "")
    able = [case for case in cases if not case.result]
    if len(able) < 2:
        refused = "; ".join(f"{case.name}: {case.why}" for case in cases if case.why)
        raise LaunchError(
            f"parity takes two cases that can run, and there are {len(able)} of {len(cases)}; {refused}",
            hint="name more with `--engines` and `--layout`",
        )
    return able


def _run(composed: Composed, folder: Path, case: Case) -> None:
    """Train ``case`` to its end on this machine."""
    (run,) = submit(composed, root=folder, stages=[case.name], launcher="local", force=True)
    case.folder = str(run.folder)
    log.info("%s ...", case.name)
    try:
        while alive(run):
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        cancel([run], now=True)
        raise
    if state(run) != "done":
        case.result, attempts = "failed", run.attempts()
        failures = run.failures(attempts[-1].name) if attempts else []
        case.why = failures[0]["message"].partition("\n")[0] if failures else f"look into {run.folder / 'logs'}"


def _tell_mlflow(cases: Sequence[Case], picture: Path) -> None:
    """Add what was compared to the runs that MLflow has of the cases."""
    for case in cases:
        run = Run.load(Path(case.folder))
        sent = store.Sent.load(run)
        values = {"loss_difference": case.loss_difference, "grad_norm_difference": case.grad_norm_difference}
        try:
            with store.connect(store.tracking_uri(run.root, run.spec().tracking.uri)) as client:
                for key, value in values.items():
                    if sent.run_id and value is not None:
                        client.log_metric(sent.run_id, f"parity/{key}", value)
                if sent.run_id and case.result == "reference":
                    client.log_artifact(sent.run_id, str(picture))
        except TrackingError as e:
            log.warning("%s; the report is in `%s`", e, picture.parent)
            return
