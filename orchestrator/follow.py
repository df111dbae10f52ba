"""Watch runs and logs while they grow. All state is in the run folders and the scheduler, so any shell can."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from orchestrator.errors import LaunchError
from orchestrator.logbook import duration
from orchestrator.run import Run
from orchestrator.show import err, out, pasteable, table
from orchestrator.status import Standing, left_s, look, row

if TYPE_CHECKING:
    from rich.console import Console

POLL_S = 1.0  # the ranks of a local run need the cores more
LINE_S = 10.0  # between two lines of one run, where nothing can be redrawn
REDRAW_S = 2.0
SHARE = 4  # of the time between two looks, the part that looking may take
ALL = "all"
BLOCK = 1 << 20


def follow(runs: Sequence[Run]) -> bool:
    """Show how ``runs`` advance until none is alive. Ctrl-C asks them to save and stop; twice, leaves them.

    Returns whether it stayed to the end.
    """
    from orchestrator.submit import cancel

    asked, said = False, ""
    with Bars(runs) if sys.stderr.isatty() else Lines(err()) as shown:
        while True:
            try:
                standings, problem = look([Run.load(run.folder) for run in runs])
                if problem != said:
                    shown.say(problem or "the scheduler answers again")
                    said = problem
                for standing in standings:
                    shown.update(standing)
                if not any(s.alive for s in standings):
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
                    cancel([Run.load(run.folder) for run in runs])
                except LaunchError as e:  # such as: the last one has ended meanwhile
                    shown.say(str(e))


def watch(list_them: Callable[[], Sequence[Run]]) -> None:
    """Show the runs until none is alive or Ctrl-C: a table that is redrawn, or lines where stdout is no terminal."""
    console = out()
    if not console.is_terminal:
        lines = Lines(console)
        while _each(look(list_them())[0], lines):
            time.sleep(REDRAW_S)
        return
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        while True:
            started = time.monotonic()
            standings, problem = look(list_them())
            took_s = time.monotonic() - started
            first = sorted(standings, key=lambda s: not s.alive)[: console.height - 3]  # what lives, before all else
            shown, left = table([row(s) for s in first]), len(standings) - len(first)
            shown.append("".join(f"\n{said}" for said in (problem, f"and {left} more" if left else "") if said))
            live.update(shown, refresh=True)
            if not any(s.alive for s in standings):
                return
            time.sleep(max(REDRAW_S, SHARE * took_s))


def _each(standings: Sequence[Standing], lines: "Lines") -> bool:
    for standing in standings:
        lines.update(standing)
    return any(s.alive for s in standings)


# Logs


class Tail:
    """The logs of ``runs``, copied to ``target`` as far as they have grown: whole lines, until the end.

    Of the runs that live, those of the newest attempt and of each that follows; where none lives, of the newest
    attempt of the run that began last. Where several ranks or attempts are asked for, a line says whose it is; else
    a heading on stderr does.
    """

    def __init__(
        self, runs: Sequence[Run], target: IO[str], *, rank: int | None = 0, attempt: str | None = None
    ) -> None:
        """``rank`` None: all of them. ``attempt``: this one alone, of the run that began last; "all": every one."""
        self._runs, self._target, self._rank, self._attempt = list(runs), target, rank, attempt
        self._prefixed = rank is None or attempt == ALL
        self._read: dict[Path, int] = {}
        self._first: dict[Path, tuple[int, int]] = {}  # by run, the first attempt that is shown
        self._last: Path | None = None

    def print(self) -> bool:
        """Copy what there is; return whether there was a log."""
        self._copy_all(look(self._runs)[0], to_the_end=True)
        return bool(self._read)

    def follow(self) -> bool:
        """Copy until no run is alive; return whether there was a log. A scheduler that is away is waited for."""
        said = ""
        while True:
            self._runs = [Run.load(run.folder) for run in self._runs]
            standings, problem = look(self._runs)  # asked before the logs are read, so that no line is lost
            if problem and problem != said:
                err().print(f"{problem}; reading on", markup=False)
            said, living = problem, any(s.alive for s in standings)
            self._copy_all(standings, to_the_end=not living)
            if not living:
                return bool(self._read)
            time.sleep(POLL_S)

    def _copy_all(self, standings: Sequence[Standing], *, to_the_end: bool) -> None:
        for standing in self._shown(standings):
            for key, log in sorted(logs_of(standing.run).items()):
                if self._wants(standing.run, log, *key):
                    self._copy(standing.run, log, to_the_end=to_the_end)
        self._target.flush()

    def _shown(self, standings: Sequence[Standing]) -> list[Standing]:
        """The runs whose logs are shown, and since which attempt."""
        for s in standings:
            newest = max((key[:2] for key in logs_of(s.run)), default=(0, 0))
            begun = newest[0] == s.run.submissions[-1].number if s.run.submissions else False
            if s.alive and begun and not self._attempt:
                self._first.setdefault(s.run.folder, newest)
        shown = [s for s in standings if s.run.folder in self._first]
        if not shown and (self._attempt or not any(s.alive for s in standings)):
            last = max(standings, key=lambda s: s.attempts[-1].started_at if s.attempts else 0.0)
            newest = max((key[:2] for key in logs_of(last.run)), default=(0, 0))
            self._first[last.run.folder] = (0, 0) if self._attempt else newest
            shown = [last]
        return shown

    def _wants(self, run: Run, log: Path, number: int, restarts: int, rank: int) -> bool:
        attempt = self._attempt in (None, ALL, log.stem.rpartition("-")[0])
        return attempt and self._rank in (None, rank) and (number, restarts) >= self._first[run.folder]

    def _copy(self, run: Run, log: Path, *, to_the_end: bool) -> None:
        at = self._read.setdefault(log, 0)
        if log.stat().st_size <= at:
            return
        with log.open("rb") as f:
            f.seek(at)
            while block := f.read(BLOCK):
                whole = block.rfind(b"\n") + 1
                if whole and not (to_the_end and len(block) < BLOCK):
                    block = block[:whole]
                elif not to_the_end and len(block) < BLOCK:
                    return  # half a line
                self._read[log] += len(block)
                f.seek(self._read[log])
                self._write(run, log, block.decode(errors="replace"))

    def _write(self, run: Run, log: Path, text: str) -> None:
        if self._prefixed:
            whose = f"{run.stage} {log.stem}" if len(self._runs) > 1 else log.stem
            text = "".join(f"{whose}| {line}\n" for line in text.removesuffix("\n").split("\n"))
        elif log != self._last:
            err().print(f"==> {log}", markup=False)
        self._last = log
        self._target.write(text)


def logs_of(run: Run) -> dict[tuple[int, int, int], Path]:
    """The logs of ranks by (submission, requeue, rank)."""
    found = {}
    for log in (run.folder / "logs").glob("[0-9]*-*.log"):
        attempt, _, rank = log.stem.rpartition("-")
        number, _, restarts = attempt.partition("r")
        found[(int(number), int(restarts or 0), int(rank))] = log
    return found


def no_log(runs: Sequence[Run], *, rank: int | None, attempt: str | None) -> LaunchError:
    """What to say where ``Tail`` found nothing; the hint names what there is."""
    run = max(runs, key=lambda r: max((a.started_at for a in r.attempts()), default=0.0))
    ranks: dict[str, list[int]] = {}
    for (_, _, n), log in sorted(logs_of(run).items()):
        ranks.setdefault(log.stem.rpartition("-")[0], []).append(n)
    if not ranks:
        hint = f"`orch status {run.name}` says whether it has begun"
        return LaunchError(f"run `{run.name}` has no log yet", hint=hint)
    there = "; ".join(f"{name}: {_ranges(numbers)}" for name, numbers in ranks.items())
    which = "" if rank is None else f" of rank {rank}"
    return LaunchError(
        f"run `{run.name}` has no log{which} in attempt {attempt or [*ranks][-1]}",
        hint=f"there are (attempt: ranks) {there}",
    )


def _ranges(numbers: Sequence[int]) -> str:
    """`0-7, 9`."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][-1] == n - 1:
            parts[-1] = [parts[-1][0], n]
        else:
            parts.append([n])
    return ", ".join("-".join(map(str, part)) for part in parts)


# How a run advances


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

    def update(self, standing: Standing) -> None:
        """Draw a run as it stands."""
        run, state = standing.run, standing.state
        task, beat = self._tasks[run.name], _beat(run)
        if state != "queued" and not self._progress.tasks[task].started:
            self._progress.start_task(task)
        steps = beat.get("steps") or (1 if state == "done" else None)
        step = beat.get("step", 0) if beat.get("steps") else int(state == "done")
        told = _numbers(beat) if state in ("running", "done") and beat.get("loss") is not None else _waiting(standing)
        self._progress.update(task, completed=step, total=steps, note=told)

    def say(self, text: str) -> None:
        """Print ``text`` above the bars."""
        self._progress.console.print(text, markup=False)


class Lines(AbstractContextManager["Lines"]):
    """A line when a run changes its state, and now and then as it trains: for logs and CI."""

    def __init__(self, console: "Console") -> None:
        self._states: dict[str, str] = {}
        self._said_at: dict[str, float] = {}
        self._console = console

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, standing: Standing) -> None:
        """Say how a run stands, if that is news."""
        run, state = standing.run, standing.state
        beat, now, said = _beat(run), time.monotonic(), _waiting(standing)
        changed = self._states.get(run.name) != said
        if not changed and (state != "running" or not beat or now < self._said_at[run.name] + LINE_S):
            return
        self._states[run.name], self._said_at[run.name] = said, now
        step = f" step {beat['step']}/{beat['steps']} {_numbers(beat)}" if beat.get("steps") else ""
        left = f", {duration(left_s(beat) or 0.0)} left" if state == "running" and left_s(beat) else ""
        self.say(f"{run.name}: {said}{step}{left}")

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


def _waiting(standing: Standing) -> str:
    """The state; of a run that waits, Slurm's reason too."""
    seen = standing.seen
    if standing.state != "queued" or not seen or not seen.reason:
        return standing.state
    return f"queued: {seen.why} ({seen.reason})" if seen.why else f"queued: {seen.reason}"
