"""Watch runs and logs while they grow. The run folder is all that is looked at, so any shell can."""

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from orchestrator.errors import LaunchError
from orchestrator.run import Run
from orchestrator.show import duration, err, pasteable
from orchestrator.submit import alive, cancel, state

POLL_S = 0.5
LINE_S = 10.0  # between two lines of one run, where stderr is no terminal


def follow(runs: Sequence[Run]) -> bool:
    """Show how ``runs`` advance until none is alive. Ctrl-C asks them to save and stop; twice, leaves them.

    Returns whether it stayed to the end.
    """
    asked = False
    with Bars(runs) if sys.stderr.isatty() else Lines() as shown:
        while True:
            try:
                runs = [Run.load(run.folder) for run in runs]
                living = [alive(run) for run in runs]
                for run, lives in zip(runs, living, strict=True):
                    shown.update(run, run.state(alive=lives))
                if not any(living):
                    return True
                time.sleep(POLL_S)
            except KeyboardInterrupt:
                if asked:
                    kill = pasteable(f"`orch cancel {runs[0].experiment} --now`")
                    shown.say(f"left; the runs save and stop on their own ({kill} kills them)")
                    return False
                asked = True
                shown.say("asking the runs to save and stop; Ctrl-C again leaves them to it")
                try:
                    cancel(runs)
                except LaunchError as e:  # such as: the last one has ended meanwhile
                    shown.say(str(e))


def until_begun(runs: Sequence[Run]) -> None:
    """Return once one of ``runs`` is running or none is queued: before that, the newest log is an old one."""
    while "queued" in (states := {state(Run.load(run.folder)) for run in runs}) and "running" not in states:
        time.sleep(POLL_S)


def print_log(path: Path, target: IO[str], run: Run | None = None) -> None:
    """Copy a log to ``target``; with ``run``, also what is added to it as long as that is alive."""
    with path.open(encoding="utf-8", errors="replace") as log:
        while True:
            grows = run is not None and alive(Run.load(run.folder))  # asked before the look, so that no line is lost
            for block in iter(lambda: log.read(1 << 16), ""):
                target.write(block)
            target.flush()
            if not grows:
                return
            time.sleep(POLL_S)


class Bars(AbstractContextManager["Bars"]):
    """One progress bar per run."""

    def __init__(self, runs: Sequence[Run]) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=err(),
        )
        self._tasks = {r.name: self._progress.add_task(r.name, total=None, start=False, note="") for r in runs}

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, run: Run, state: str) -> None:
        """Draw ``run`` as it stands."""
        task, beat = self._tasks[run.name], _beat(run)
        if state != "queued" and not self._progress.tasks[task].started:
            self._progress.start_task(task)
        steps = beat.get("steps") or (1 if state == "done" else None)
        step = beat.get("step", 0) if beat.get("steps") else int(state == "done")
        note = _numbers(beat) if state in ("running", "done") and beat.get("loss") is not None else state
        self._progress.update(task, completed=step, total=steps, note=note)

    def say(self, text: str) -> None:
        """Print ``text`` above the bars."""
        self._progress.console.print(text, markup=False)


class Lines(AbstractContextManager["Lines"]):
    """A line when a run changes its state, and now and then as it trains: for logs and CI."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}
        self._said_at: dict[str, float] = {}
        self._console = err()

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, run: Run, state: str) -> None:
        """Say how ``run`` stands, if that is news."""
        beat, now = _beat(run), time.monotonic()
        changed = self._states.get(run.name) != state
        if not changed and (state != "running" or not beat or now < self._said_at[run.name] + LINE_S):
            return
        self._states[run.name], self._said_at[run.name] = state, now
        step = f" step {beat['step']}/{beat['steps']} {_numbers(beat)}" if beat.get("steps") else ""
        left = f", {duration(_left_s(beat))} left" if state == "running" and _left_s(beat) else ""
        self.say(f"{run.name}: {state}{step}{left}")

    def say(self, text: str) -> None:
        """Print ``text``."""
        self._console.print(text, markup=False)


def _beat(run: Run) -> dict[str, Any]:
    """The heartbeat of the newest submission; empty while there is none."""
    beat = run.heartbeat()
    ours = run.submissions and str(beat.get("attempt", "")).partition("r")[0] == str(run.submissions[-1].number)
    return beat if ours else {}


def _numbers(beat: dict[str, Any]) -> str:
    loss, speed = beat.get("loss"), beat.get("tokens_per_s")
    return " ".join(
        [*([f"loss {loss:.4f}"] if loss is not None else []), *([f"{speed:,.0f} tokens/s"] if speed else [])]
    )


def _left_s(beat: dict[str, Any]) -> float:
    """Seconds until the last step at the pace of this one."""
    if not beat.get("tokens_per_s") or not beat.get("step"):
        return 0.0
    tokens_a_step = beat["tokens"] / beat["step"]
    return float((beat["steps"] - beat["step"]) * tokens_a_step / beat["tokens_per_s"])
