"""A run's logbook: what each attempt did, why it ended, what was lost; and the goodput of them all.

Goodput is the time in which GPUs trained steps that count, over the time they were held:

    goodput = sum over the steps of the run of (perf/step_s x ranks) / sum over its attempts of (held x ranks)

where a step that was trained twice counts once, and an attempt holds its GPUs from the start of rank 0 to its
end. Google calls this *runtime goodput*, "productive, preserved training progress" over the elapsed time
(github.com/google/cloud_tpu_goodput); MegaScale's *effective training time rate*, steps x step time over the
total (arXiv:2402.15627, section 6.3), differs in that it has the waiting in its total. Waiting for a start is
told apart here: it costs days and no GPU-hours. A rank is a GPU, also where it is a CPU process.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.run import Attempt, Run, read_metrics

# Why an attempt ended, from its file, in a person's words.
CAUSES = {
    "done": "done",
    "cancelled": "cancelled",
    "preempted": "told to make room",
    "requeued": "requeued from outside",
    "error": "error",
    "hardware": "hardware",
    "frozen": "frozen",
    "lost": "lost",
    "fruitless": "no progress",
}
# The same from the scheduler, of one that left no word (job states of man sacct).
STATES = {
    "BOOT_FAIL": "node failed to boot",
    "CANCELLED": "ended by scancel",
    "COMPLETED": "left without a word",
    "DEADLINE": "deadline passed",
    "FAILED": "killed",
    "NODE_FAIL": "node failed",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted before it could save",
    "REQUEUED": "requeued before it could save",
    "TIMEOUT": "time limit before it could save",
}
KILLED = "killed without a word"
HEADING = "## Logbook of"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What the scheduler knows of an attempt's end."""

    state: str  # its word, such as NODE_FAIL
    at: float | None = None
    nodes: str = ""  # such as node[1-4]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One attempt. Times in seconds, of the clock and not summed over ranks."""

    attempt: str
    began_at: float
    waited_s: float  # from being submitted, or from the end of the one before, to its start
    held_s: float
    start_s: float  # to its first step: imports, engine, checkpoint
    useful_s: float  # in steps that count
    lost_s: float  # in steps that are trained again, by another attempt or this one
    world: int
    nodes: str
    from_step: int
    to_step: int
    steps_lost: int
    cause: str

    @property
    def gpu_hours(self) -> float:
        """Held by all ranks."""
        return self.held_s * self.world / 3600

    @property
    def gpu_hours_lost(self) -> float:
        """Of them, those in which no step that counts was trained."""
        return (self.held_s - self.useful_s) * self.world / 3600

    def to_json(self) -> dict[str, Any]:
        """Its fields, and what follows from them."""
        return asdict(self) | {"gpu_hours": self.gpu_hours, "gpu_hours_lost": self.gpu_hours_lost}


@dataclass(frozen=True, kw_only=True)
class Logbook:
    """All attempts, oldest first."""

    entries: list[Entry]
    trains: bool  # a stage without steps, such as `prepare`, has no goodput

    def gpu_hours(self, seconds: str) -> float:
        """GPU-hours of one of the times of Entry, over all attempts."""
        return sum(getattr(e, seconds) * e.world for e in self.entries) / 3600

    @property
    def goodput(self) -> float | None:
        """Between 0 and 1; None where nothing was held, or no step is ever trained."""
        held = self.gpu_hours("held_s")
        return self.gpu_hours("useful_s") / held if held and self.trains else None

    def to_json(self) -> dict[str, Any]:
        """The keys of `orch status RUN --json`."""
        return {
            "goodput": self.goodput,
            "gpu_hours": self.gpu_hours("held_s"),
            "gpu_hours_useful": self.gpu_hours("useful_s"),
            "steps_lost": sum(e.steps_lost for e in self.entries),
            "waited_s": sum(e.waited_s for e in self.entries),
            "logbook": [e.to_json() for e in self.entries],
        }


def logbook(
    attempts: Sequence[Attempt],
    lines: Iterable[Mapping[str, Any]],
    *,
    submitted: Mapping[str, float],
    running: bool,
    now: float,
    signs: Mapping[str, float] | None = None,
    failures: Mapping[str, str] | None = None,
    ended: Mapping[str, Ended] | None = None,
) -> Logbook:
    """Compute it.

    Args:
        attempts: oldest first.
        lines: of ``metrics.jsonl``, as written.
        submitted: when each submission was, by its number.
        running: whether the newest attempt is.
        signs: by attempt, when it was last seen alive.
        failures: by attempt, what its first rank to fail raised.
        ended: by attempt, what the scheduler knows.
    """
    signs, failures, ended = signs or {}, failures or {}, ended or {}
    steps = _steps(lines)
    saved = max((a.checkpoint_step for a in attempts), default=0)
    made: list[Entry] = []
    for i, attempt in enumerate(attempts):
        live = running and i == len(attempts) - 1
        mine, word = steps.get(attempt.name, []), ended.get(attempt.name)
        resumed = [steps[a.name][0].number - 1 for a in attempts[i + 1 :] if a.name in steps]
        last_kept = math.inf if live or attempt.cause == "done" else min(resumed, default=saved)
        newest = {s.number: s for s in mine}  # a step that is not finite takes its attempt back to a checkpoint
        lost = [s for s in mine if s.number > last_kept or s is not newest[s.number]]
        seen_at = [attempt.started_at, signs.get(attempt.name, 0.0), *(s.at for s in mine[-1:])]
        until = now if live else attempt.ended_at or max(*seen_at, (word and word.at) or 0.0)
        made.append(
            Entry(
                attempt=attempt.name,
                began_at=attempt.started_at,
                waited_s=_waited_s(attempt, made, submitted),
                held_s=max(0.0, until - attempt.started_at),
                start_s=max(0.0, (mine[0].at - mine[0].took_s if mine else until) - attempt.started_at),
                useful_s=sum(s.took_s for s in mine) - sum(s.took_s for s in lost),
                lost_s=sum(s.took_s for s in lost),
                world=attempt.world,
                nodes=getattr(attempt, "nodes", "") or (word.nodes if word else "") or attempt.host,
                from_step=attempt.from_step,
                to_step=max([attempt.to_step, *(s.number for s in mine[-1:])]),
                steps_lost=len(lost),
                cause="running" if live else _cause(attempt, word, failures.get(attempt.name, "")),
            )
        )
    return Logbook(entries=made, trains=bool(steps))


def of(run: Run, *, running: bool, ended: Mapping[str, Ended] | None = None) -> Logbook:
    """The logbook of ``run``, from its folder and what the scheduler knows."""
    attempts, beat = run.attempts(), run.heartbeat()
    return logbook(
        attempts,
        (line for _, line in read_metrics(run.folder / "metrics.jsonl")),
        submitted={str(s.number): s.submitted_at for s in run.submissions},
        running=running,
        now=time.time(),
        signs={beat["attempt"]: beat["time"]} if beat else {},
        failures={a.name: f"rank {f['rank']}: {f['type']}" for a in attempts for f in run.failures(a.name)[:1]},
        ended=ended,
    )


def markdown(run: str, book: Logbook, newest: int | None = None) -> str:
    """The logbook as a page; with ``newest``, of so many attempts only."""
    entries = book.entries[-newest:] if newest else book.entries
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(cells(e) for e in entries)]
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    left = len(book.entries) - len(entries)
    more = [f"\nand {left} attempts before these"] if left else []
    return "\n".join([f"{HEADING} {run}\n", summary(book) + "\n", *table, *more]) + "\n"


COLUMNS = ["attempt", "began", "waited", "took", "nodes", "GPUs", "steps", "lost", "GPU-h", "lost", "end"]


def cells(entry: Entry) -> list[str]:
    """One row under ``COLUMNS``."""
    return [
        entry.attempt,
        time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.began_at)),
        duration(entry.waited_s) if entry.waited_s else "-",
        duration(entry.held_s) if entry.held_s else "-",
        entry.nodes,
        str(entry.world),
        f"{entry.from_step} to {entry.to_step}",
        str(entry.steps_lost or "-"),
        hours(entry.gpu_hours) if entry.held_s else "-",
        hours(entry.gpu_hours_lost) if entry.held_s else "-",
        entry.cause.partition("\n")[0][:100],
    ]


def summary(book: Logbook) -> str:
    """Goodput, and where the rest went, in one line."""
    waited = f"waited {duration(sum(e.waited_s for e in book.entries))} to start"
    held = book.gpu_hours("held_s")
    if book.goodput is None:
        return f"{hours(held)} GPU-hours; {waited}"
    useful, lost, start = (book.gpu_hours(key) for key in ("useful_s", "lost_s", "start_s"))
    steps = sum(e.steps_lost for e in book.entries)
    rest = max(0.0, held - useful - lost - start)
    return (
        f"goodput {book.goodput:.1%}: {hours(useful)} of {hours(held)} GPU-hours went into steps that count, "
        f"{hours(lost)} into {steps:,} steps that were lost, {hours(start)} into getting ready, "
        f"{hours(rest)} into saving, evaluating and standing still; {waited}"
    )


def hours(value: float) -> str:
    """GPU-hours: `1,234`, `12.3`, `0.0123`."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: `12 ms`, `3.4 s`, `5 min`, `2.1 h`, `2.6 days`, `40 days`."""
    for unit, size, limit in (("ms", 1e-3, 1.0), ("s", 1.0, 120.0), ("min", 60.0, 7200.0), ("h", 3600.0, 172800.0)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    days = seconds / 86400
    return f"{days:.2g} days" if days < 10 else f"{days:,.0f} days"


@dataclass(frozen=True, kw_only=True)
class _Step:
    number: int
    at: float  # when its line was written
    took_s: float


def _steps(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[_Step]]:
    """The steps each attempt trained, in order."""
    steps = defaultdict(list)
    for line in lines:
        if "perf/step_s" in line:
            step = _Step(number=line["step"], at=line["time"], took_s=line["perf/step_s"])
            steps[str(line["attempt"])].append(step)
    return dict(steps)


def _waited_s(attempt: Attempt, before: Sequence[Entry], submitted: Mapping[str, float]) -> float:
    """From being submitted, or requeued, to the start; what lies between two submissions was not waited for."""
    number, _, restarts = attempt.name.partition("r")
    asked_at = submitted.get(number, attempt.started_at)
    if restarts and before and before[-1].attempt.partition("r")[0] == number:
        asked_at = before[-1].began_at + before[-1].held_s
    return max(0.0, attempt.started_at - asked_at)


def _cause(attempt: Attempt, word: Ended | None, failure: str) -> str:
    """In words: what the attempt said of itself, else the scheduler of it."""
    if attempt.cause:
        why = failure if attempt.cause == "error" and failure else attempt.note
        if attempt.passed_over:
            ranges = ", ".join(f"{first} to {behind}" for first, behind in attempt.passed_over)
            why = f"{why}; " * bool(why) + f"not finite and passed over: samples {ranges}"
        return CAUSES.get(attempt.cause, attempt.cause) + (f": {why}" if why else "")
    if word is None:
        return KILLED
    return f"{STATES.get(word.state, KILLED)} ({word.state})"
