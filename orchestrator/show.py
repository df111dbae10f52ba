"""What the commands print: tables and JSON on stdout, how a run ended on stderr."""

import dataclasses
import json
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import LaunchError, TrackingError
from orchestrator.run import Attempt, Run
from orchestrator.submit import alive

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {"running": "cyan", "queued": "yellow", "done": "green", "stopped": "yellow", "failed": "bold red"}
NOTHING = "-"


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


def pasteable(text: str) -> str:
    """``text``, where the commands that need the `--runs` of this one have it too."""
    import click
    from click.core import ParameterSource

    context = click.get_current_context(silent=True)
    root = context and context.find_root()
    if not root or root.get_parameter_source("runs") is not ParameterSource.COMMANDLINE:
        return text
    runs = f"`orch --runs {shlex.quote(str(root.params['runs']))} "
    return re.sub(r"`orch (?=(?:submit|status|logs|resume|cancel|sync|ui)\b)", lambda _: runs, text)


def as_json(value: Any) -> None:
    """Print ``value`` as JSON."""
    print(json.dumps(value, indent=2, default=str))  # noqa: T201


# Plans


def plans(estimates: Sequence[Mapping[str, Any]]) -> None:
    """One column per stage of `orch plan --json`: a row for each would be wider than a terminal."""
    table = _table("stage", *(e["stage"] for e in estimates))
    columns = [_plan(e) for e in estimates]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    out().print(table)
    err().print("layout: ranks = data x pipeline x tensor")


def _plan(e: Mapping[str, Any]) -> dict[str, str]:
    memory = f"{e['memory_gb']['total']:.1f} of {e['gpu_memory_gb']:g} GB"
    return {
        "engine": e["engine"],
        "params": _count(e["params"]),
        "layout": f"{e['world']} = {e['data']} x {e['pipeline']} x {e['tensor']}",
        "memory": memory if e["fits"] else f"[bold red]{memory}: too much[/]",
        "step": duration(e["step_s"]),
        "tokens/s": f"{e['tokens_per_s']:,.0f}",
        "MFU": f"{e['mfu']:.1%}",
        "time": duration(e["days"] * 86400),
        "GPU-hours": f"{e['gpu_hours']:,.1f}",
        "cost": f"${e['usd']:,.0f}" if e["usd"] else NOTHING,
    }


# Runs


def status(run: Run, *, living: bool | None = None) -> dict[str, Any]:
    """What is known of ``run``, by the keys of `orch status --json`."""
    attempts, beat = run.attempts(), run.heartbeat()
    state = run.state(alive=alive(run) if living is None else living)
    last = attempts[-1] if attempts else None
    return {
        "run": run.name,
        "state": state,
        "step": beat.get("step", last.to_step if last else 0),
        "steps": beat["steps"] if beat else run.spec().stages[run.stage].steps,
        "tokens": beat.get("tokens", 0),
        "loss": beat.get("loss"),
        "tokens_per_s": beat.get("tokens_per_s"),
        "checkpoint_step": max((a.checkpoint_step for a in attempts), default=0),
        "attempts": len(attempts),
        "ended": _how_it_ended(run, state),
        "heartbeat_at": beat.get("time"),
        "folder": str(run.folder),
    }


def reconcile(runs: Sequence[Run], living: Sequence[bool]) -> str:
    """Give the MLflow runs their statuses; return why that failed, or nothing."""
    from orchestrator import track

    problem = ""
    for run, lives in zip(runs, living, strict=True):
        try:
            track.reconcile(run, lives)
        except (TrackingError, LaunchError) as e:  # the others may be tracked elsewhere
            problem = problem or str(e)
    return problem


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """One row per run."""
    table = _table("run", "state", "step", "loss", "tokens/s", "checkpoint", "attempts", "last end")
    for row in rows:
        table.add_row(
            row["run"],
            f"[{STYLES.get(row['state'], 'default')}]{row['state']}[/]",
            f"{row['step']}/{row['steps']}" if row["steps"] else NOTHING,
            NOTHING if row["loss"] is None else f"{row['loss']:.4f}",
            NOTHING if row["tokens_per_s"] is None else f"{row['tokens_per_s']:,.0f}",
            str(row["checkpoint_step"] or NOTHING),
            str(row["attempts"] or NOTHING),
            _escape(row["ended"].partition("\n")[0][:100] or NOTHING),
        )
    out().print(table)


def details(run: Run, row: Mapping[str, Any]) -> None:
    """All attempts of one run, and why the last one failed."""
    console = out()
    table([row])
    console.print(f"folder: {_escape(str(run.folder))}", soft_wrap=True)
    attempts = _table("attempt", "host", "ranks", "steps", "time", "end")
    beat, newest = run.heartbeat(), [a.name for a in run.attempts()][-1:]
    for a in run.attempts():
        running = row["state"] == "running" and [a.name] == newest
        until = a.ended_at or (time.time() if running else beat["time"] if beat.get("attempt") == a.name else None)
        took = duration(until - a.started_at) if until else NOTHING
        end = a.cause or ("running" if running else "killed")
        attempts.add_row(a.name, a.host, str(a.world), f"{a.from_step} to {a.to_step}", took, end)
    if attempts.row_count:
        console.print(attempts)
    if row["state"] == "failed":
        message, hint = failure(run)
        console.print(f"[bold red]error:[/] {_escape(message)}", soft_wrap=True)
        if hint:
            console.print(f"[cyan]hint:[/] {_escape(pasteable(hint))}", soft_wrap=True)


def failure(run: Run) -> tuple[str, str]:
    """Why the newest submission of ``run`` failed, and a hint: the error of the first rank to fail."""
    number = str(run.submissions[-1].number) if run.submissions else ""
    attempt = next((a for a in reversed(run.attempts()) if a.name.partition("r")[0] == number), None)
    logs = f"`orch logs {run.name}` has the rest"
    if attempt is None:
        return f"`{run.name}` ended before its job began{_last_words(run, number)}", logs
    failures = run.failures(attempt.name)
    silent = sorted(set(range(attempt.world)) - {f["rank"] for f in failures})
    who = ", ".join(map(str, silent))
    if not failures:
        return f"`{run.name}` was killed at step {attempt.to_step}: no rank left a word", f"out of memory? {logs}"
    first = failures[0]
    message = f"`{run.name}` failed: rank {first['rank']}: {first['type']}: {first['message']}"
    if silent:
        message += f"\n(no word from rank {who}: killed, or ended with the others)"
    return message, first["hint"] or f"{logs}, and `--rank {first['rank']}` that of this rank"


def _last_words(run: Run, number: str) -> str:
    """The last line that a rank, else the supervisor, wrote."""
    for log in (*sorted((run.folder / "logs").glob(f"{number}-*.log")), run.folder / "logs" / "supervisor.log"):
        lines = log.read_text(errors="replace").split("\n") if log.exists() else []
        words = [line for line in lines if line.strip()]
        if words:
            return f": {words[-1].strip()}"
    return ""


def _how_it_ended(run: Run, state: str) -> str:
    if state == "failed":
        return failure(run)[0].removeprefix(f"`{run.name}` ")
    if state in ("done", "stopped"):
        last = run.attempts()[-1]
        return f"{last.cause} at step {last.to_step}" if last.to_step else str(last.cause)
    return ""


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
            message, hint = failure(run)
            console.print(f"[bold red]error:[/] {_escape(message)}")
            console.print(f"[bold cyan]hint:[/] {_escape(pasteable(hint))}")
    for run in runs:
        row = status(run)
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
        known = [f"{name} model {loss:.4f}" for name, loss in sorted(dataset(run).get("baselines", {}).items())]
        said.append(", ".join([f"held-out text: loss {held_out[-1]['val/loss']:.4f}", *known]))
    saved = max((a.checkpoint_step for a in run.attempts()), default=0)
    if saved:
        said.append(f"checkpoint: {run.checkpoints / f'step-{saved:07d}'}")
    return said


def _took(attempts: Sequence[Attempt]) -> str:
    took = sum(a.ended_at - a.started_at for a in attempts if a.ended_at)
    return f" after {duration(took)}" if took else ""


# Words for numbers


def duration(seconds: float) -> str:
    """Seconds as a person says them: `12 ms`, `3.4 s`, `5 min`, `2.1 h`, `40 days`."""
    for unit, size, limit in (("ms", 1e-3, 1.0), ("s", 1.0, 120.0), ("min", 60.0, 7200.0), ("h", 3600.0, 172800.0)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:,.0f} days"


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
        made.add_column(column, no_wrap=column != "last end", overflow="fold")
    return made


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def experiment_json(experiment: Any) -> None:
    """Print an experiment as JSON."""
    as_json(dataclasses.asdict(experiment))


def log_file(runs: Sequence[Run], attempt: str | None, rank: int) -> tuple[Run, Path]:
    """The log of one rank: of the run that began last, and of its newest attempt unless told.

    Raises:
        LaunchError: there is none; the hint names those there are.
    """
    run = max(runs, key=lambda r: max((a.started_at for a in r.attempts()), default=0.0))
    there = {f.stem: f for f in (run.folder / "logs").glob("[0-9]*-*.log")}
    newest = max((stem.rpartition("-")[0] for stem in there), key=lambda n: [int(p) for p in n.split("r")], default="")
    found = there.get(f"{attempt or newest}-{rank}")
    if found is None:
        names = ", ".join(f"`{stem}`" for stem in sorted(there))
        which = f"of rank {rank} in attempt {attempt or newest}" if there else "yet"
        hint = f"there are (attempt-rank): {names}" if there else f"`orch status {run.name}` says whether it has begun"
        raise LaunchError(f"run `{run.name}` has no log {which}", hint=hint)
    return run, found
