"""What the commands print: tables and JSON on stdout, how a run ended on stderr."""

import dataclasses
import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from orchestrator import logbook, status
from orchestrator.errors import LaunchError, TrackingError
from orchestrator.logbook import duration
from orchestrator.run import Attempt, Run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

STYLES = {"running": "cyan", "queued": "yellow", "done": "green", "stopped": "yellow", "failed": "bold red"}
NOTHING = "-"
COLUMNS = ("run", "state", "step", "loss", "tokens/s", "saved", "attempts", "note")


def out() -> "Console":
    """Where data goes: stdout, as wide as it needs to be where that is no terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 1000
    return console


def err() -> "Console":
    """Where all but data goes: stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def whole(table: "Table") -> None:
    """Print ``table`` on stdout, no cell cut: where the terminal is narrower its lines go on below."""
    from rich.measure import Measurement

    console = out()
    needed = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    console.width = max(console.width, needed)
    console.print(table, crop=False)


@contextmanager
def bytes_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal, that moves on by the bytes it is told of."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    console = err()
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda size: bar.advance(task, size)


def pasteable(text: str) -> str:
    """``text``, where the commands that need the `--runs` of this one have it too."""
    import click
    from click.core import ParameterSource

    context = click.get_current_context(silent=True)
    root = context and context.find_root()
    if not root or root.get_parameter_source("runs") is not ParameterSource.COMMANDLINE:
        return text
    runs = f"`orch --runs {shlex.quote(str(root.params['runs']))} "
    return re.sub(r"`orch (?=[a-z])(?!(?:init|show|doctor|completion)\b)", lambda _: runs, text)


def as_json(value: Any) -> None:
    """Print ``value`` as JSON, which has no NaN and no infinity: they are null."""
    finite = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
    print(json.dumps(finite, indent=2))  # noqa: T201


# Plans


def plans(estimates: Sequence[Mapping[str, Any]]) -> None:
    """One column per stage of `orch plan --json`: a row for each would be wider than a terminal."""
    table = _table("stage", *(e["stage"] for e in estimates))
    columns = [_plan(e) for e in estimates]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    whole(table)
    err().print("layout: ranks = data x pipeline x tensor")


def _plan(e: Mapping[str, Any]) -> dict[str, str]:
    memory = f"{e['memory_gb']['total']:.1f} of {e['gpu_memory_gb']:g} GB"
    return {
        "engine": e["engine"],
        "params": _count(e["params"]),
        "layout": f"{e['world']} = {e['data']} x {e['pipeline']} x {e['tensor']}"
        + (f" x ulysses {e['ulysses']}" if e["ulysses"] > 1 else ""),
        "memory": memory if e["fits"] else f"[bold red]{memory}: too much[/]",
        "step": duration(e["step_s"]),
        "tokens/s": f"{e['tokens_per_s']:,.0f}",
        "MFU": f"{e['mfu']:.1%}",
        "time": duration(e["days"] * 86400),
        "GPU-hours": f"{e['gpu_hours']:,.1f}",
        "cost": f"${e['usd']:,.0f}" if e["usd"] else NOTHING,
    }


# Runs


def reconcile(standings: Sequence[status.Standing]) -> str:
    """Give the MLflow runs their statuses; return why that failed, or nothing."""
    from orchestrator import track

    problem = ""
    for standing in (s for s in standings if s.sure):
        try:
            track.reconcile(standing.run, standing.alive)
        except (TrackingError, LaunchError) as e:  # the others may be tracked elsewhere
            problem = problem or str(e)
    return problem


def table(rows: Sequence[Mapping[str, Any]]) -> "Text":
    """One line per run. Not a table of rich, which takes 0.7 s for a thousand rows (measured, two busy cores)."""
    from rich.text import Text

    now = time.time()
    cells = [COLUMNS, *(_cells(row, now=now) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS) - 1)] + [0]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells]
    text = Text("\n".join(line.rstrip() for line in lines), no_wrap=True, overflow="ellipsis")
    text.stylize("bold", 0, len(lines[0].rstrip()))
    at, left = 0, sum(widths[:1]) + 2
    for line, row in zip(lines, [{}, *rows], strict=True):
        if row:
            text.stylize(STYLES.get(row["state"], "default"), at + left, at + left + len(row["state"]))
        at += len(line.rstrip()) + 1
    return text


def _cells(row: Mapping[str, Any], *, now: float) -> tuple[str, ...]:
    return (
        row["run"],
        row["state"] + ("" if row["sure"] else "?"),
        f"{row['step']}/{row['steps']}" if row["steps"] else NOTHING,
        NOTHING if row["loss"] is None else f"{row['loss']:.4f}",
        NOTHING if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f}",
        str(row["checkpoint_step"] or NOTHING),
        status.attempts_note(row["causes"], row["state"]) if row["attempts"] else NOTHING,
        status.note(row, now).partition("\n")[0][:100] or NOTHING,
    )


def details(run: Run, row: Mapping[str, Any], book: logbook.Logbook) -> None:
    """One run: its row, its logbook, and why it failed."""
    console = out()
    console.print(table([row]), soft_wrap=True)
    job = f", job {row['job_id']} {row['scheduler_state']}".rstrip() if row["job_id"].isdigit() else ""
    nodes = f", on {row['nodes']}" if row["nodes"] else ""
    console.print(_escape(f"folder: {row['folder']}{job}{nodes}"), soft_wrap=True)
    if book.entries:
        attempts = _table(*logbook.COLUMNS)
        for entry in book.entries:
            attempts.add_row(*map(_escape, logbook.cells(entry)))
        console.print(attempts)
        console.print(logbook.summary(book), soft_wrap=True)
    if row["state"] == "failed":
        message, hint = status.failure(run)
        console.print(f"[bold red]error:[/] {_escape(message)}", soft_wrap=True)
        if hint:
            console.print(f"[cyan]hint:[/] {_escape(pasteable(hint))}", soft_wrap=True)


def experiments(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The keys of `orch list --json`: an experiment each, the one submitted last first."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        new: dict[str, Any] = {"experiment": run.experiment, "stages": [], "submitted_at": None}
        entry = found.setdefault(run.experiment, new | {"folder": str(run.folder.parent)})
        entry["stages"].append(run.stage)
        if run.submissions:
            entry["submitted_at"] = max(run.submissions[-1].submitted_at, entry["submitted_at"] or 0.0)
    return sorted(found.values(), key=lambda e: -(e["submitted_at"] or 0.0))


# The end of a run


def deliver(runs: Sequence[Run]) -> None:
    """Send MLflow what the forwarders of ``runs``, which have ended, have not sent yet."""
    from orchestrator import track

    try:
        for run in runs:
            if run.attempts():
                track.sync(run)
    except (TrackingError, LaunchError) as e:
        later = pasteable(f"`orch sync {runs[0].experiment}`")
        err().print(f"MLflow lacks the end: {_escape(str(e))}; {_escape(later)} sends it")


def ends(runs: Sequence[Run]) -> bool:
    """Say on stderr how ``runs`` ended, errors first, and what to do next; return whether all are done."""
    console = err()
    runs = [Run.load(run.folder) for run in runs]
    for run in runs:
        if run.state(alive=False) == "failed":
            message, hint = status.failure(run)
            console.print(f"[bold red]error:[/] {_escape(message)}")
            console.print(f"[bold cyan]hint:[/] {_escape(pasteable(hint))}")
    for run in runs:
        row = status.row(status.look([run])[0][0])
        style = STYLES.get(row["state"], "default")
        console.print(f"`{run.name}` is [{style}]{row['state']}[/]{_took(run.attempts())}")
        for line in _reached(run):
            console.print("  " + _escape(line))
    names = {r.experiment for r in runs}
    unfinished = [r for r in runs if r.state(alive=False) != "done"]
    lines = ["next:"]
    for run in unfinished[:1]:
        lines.append(f"  `orch resume {run.experiment}` goes on with what is not done")
        if run.submissions:
            lines.append(f"  `orch logs {run.name}` prints its log")
    lines += [f"  `orch status {name}` shows its runs, `orch ui` their curves in MLflow" for name in sorted(names)]
    console.print(_escape(pasteable("\n".join(lines))))
    return not unfinished


def _reached(run: Run) -> list[str]:
    """Losses, speed and checkpoint of a training run."""
    from orchestrator.dashboard import dataset

    lines = list(run.metrics().values())
    trained = [line for line in lines if "train/loss" in line]
    if not trained:
        return []
    last = trained[-1]
    said = [f"step {last['step']}: loss {last['train/loss']:.4f} after {last['tokens']:,} tokens"]
    held_out = [line for line in trained if "val/loss" in line]
    if held_out:
        text = run.spec().stages[run.stage].kind == "pretrain"  # what n-gram models are fitted on
        baselines = sorted(dataset(run.spec().data.folder).get("baselines", {}).items()) if text else []
        found = {key.removeprefix("val/"): value for key, value in held_out[-1].items() if key.startswith("val/")}
        known = [f"{key.replace('_', ' ')} {value:.4f}" for key, value in found.items()]
        known += [f"{name} model {loss:.4f}" for name, loss in baselines]
        said.append(f"held-out {'text' if text else 'examples'}: " + ", ".join(known))
    saved = max((a.checkpoint_step for a in run.attempts()), default=0)
    if saved:
        said.append(f"checkpoint: {run.checkpoints / f'step-{saved:07d}'}")
    return said


def _took(attempts: Sequence[Attempt]) -> str:
    took = sum(a.ended_at - a.started_at for a in attempts if a.ended_at)
    return f" after {duration(took)}" if took else ""


# Words for numbers


def _count(n: float) -> str:
    """A number of parameters: `124M`, `175B`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)


def _table(*columns: str) -> Any:
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, no_wrap=column != "end", overflow="fold")
    return made


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def experiment_json(experiment: Any) -> None:
    """Print an experiment as JSON."""
    as_json(dataclasses.asdict(experiment))
