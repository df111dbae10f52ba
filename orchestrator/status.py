"""How runs stand: what their folders and the scheduler say together.

The scheduler is asked once for all runs. Where it does not answer, the folders are believed: an attempt that
has not ended runs, a submission that has not begun waits.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch import Seen
from orchestrator import logbook
from orchestrator.errors import LaunchError
from orchestrator.registry import find
from orchestrator.run import Attempt, Run, State

QUIET_STEPS, QUIET_S = 10, 120.0  # without a step, after which a run that is said to run is called quiet


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One run, now."""

    run: Run
    attempts: list[Attempt]
    state: State
    alive: bool
    sure: bool  # its launcher has answered, or it has ended whatever that says
    seen: Seen | None  # what its scheduler says of it, where there is one


def look(runs: Sequence[Run]) -> tuple[list[Standing], str]:
    """How ``runs`` stand, and why a launcher did not answer; it is asked once, then believed to be away."""
    silent: dict[str, str] = {}
    standings = [_stand(run, silent) for run in runs]
    return standings, next(iter(silent.values()), "")


def _stand(run: Run, silent: dict[str, str]) -> Standing:
    seen = None
    launcher = run.submissions[-1].launcher if run.submissions else ""
    alive = False
    if launcher and launcher not in silent:
        through: Any = find("launch", launcher)
        try:
            seen = through.seen(run) if hasattr(through, "seen") else None
            alive = through.alive(run)
        except LaunchError as error:
            silent[launcher] = str(error)
    attempts = run.attempts()  # after the launcher has answered: a run that ends meanwhile has ended well
    if launcher in silent:
        alive = _unended(run, attempts)
    state = run.state(alive=alive, attempts=attempts)
    if state == "running" and seen and seen.waiting:
        state = "queued"  # to begin again
    elif state == "queued" and seen and seen.state == "RUNNING" and not (attempts and attempts[-1].next):
        state = "running"  # its ranks have not begun
    sure = launcher not in silent or not alive
    return Standing(run=run, attempts=attempts, state=state, alive=alive, sure=sure, seen=seen)


def _unended(run: Run, attempts: Sequence[Attempt]) -> bool:
    """Whether the newest submission may be alive, as far as the folder says."""
    last = attempts[-1] if attempts else None
    if last is None or last.name.partition("r")[0] != str(run.submissions[-1].number):
        return True
    return not last.cause or last.next == "requeue"


def row(standing: Standing) -> dict[str, Any]:
    """What is known of a run, by the keys of `orch status --json`."""
    run, attempts, seen = standing.run, standing.attempts, standing.seen
    beat = run.heartbeat()
    last = attempts[-1] if attempts else None
    trains = bool(last and beat.get("attempt") == last.name and standing.state == "running")
    return {
        "run": run.name,
        "state": standing.state,
        "step": beat.get("step", last.to_step if last else 0),
        "steps": beat["steps"] if beat else run.steps(),
        "tokens": beat.get("tokens", 0),
        "loss": beat.get("loss"),
        "tokens_per_s": beat.get("tokens_per_s"),
        "checkpoint_step": max((a.checkpoint_step for a in attempts), default=0),
        "attempts": len(attempts),
        "causes": [a.cause for a in attempts],
        "ended": _how_it_ended(standing),
        "starting": standing.state == "running" and not trains,
        "left_s": left_s(beat) if trains else None,
        "heartbeat_at": beat.get("time"),
        "job_id": run.submissions[-1].job_id if run.submissions else "",
        "sure": standing.sure,
        "scheduler_state": seen.state if seen else "",
        "reason": seen.reason if seen else "",
        "why": seen.why if seen else "",
        "starts_at": seen.starts_at if seen else None,
        "without": last.excluded if last and last.next == "requeue" else [],
        "nodes": (seen.nodes if seen else "") or (last.nodes or last.host if last else ""),
        "folder": str(run.folder),
    }


def book(standing: Standing) -> logbook.Logbook:
    """The logbook of a run. Reads all of its metrics, and may ask the scheduler how attempts ended."""
    run = standing.run
    through: Any = find("launch", run.submissions[-1].launcher) if run.submissions else None
    ended = through.ended(run) if through and hasattr(through, "ended") else {}
    return logbook.of(run, running=standing.state == "running", ended=ended)


def note(row: Mapping[str, Any], now: float) -> str:
    """The most useful thing to know of a run in its state, in a few words."""
    if row["state"] == "queued":
        return _waits(row, now)
    if row["state"] != "running":
        return str(row["ended"])
    if row["starting"]:
        return "starting" if row["steps"] else ""  # `prepare` has no steps to wait for
    words = []
    if row["left_s"]:
        words.append(f"{logbook.duration(row['left_s'])} left")
    quiet_s = now - row["heartbeat_at"] if row["heartbeat_at"] else 0.0
    if quiet_s > max(QUIET_S, QUIET_STEPS * (_step_s(row) or 0.0)):
        words.append(f"no step for {logbook.duration(quiet_s)}")
    return ", ".join(words)


def attempts_note(causes: Sequence[str], state: str) -> str:
    """How many attempts, and how those before the newest ended: `3: 2 preempted`."""
    past = causes if state in ("stopped", "failed") else causes[:-1] if state in ("done", "running") else causes
    ends = Counter(cause or "killed" for cause in past)
    said = ", ".join(f"{n} {cause}" for cause, n in ends.items())
    return f"{len(causes)}: {said}" if said else str(len(causes))


def left_s(beat: Mapping[str, Any]) -> float | None:
    """Seconds until the last step at the pace of this one."""
    step_s = _step_s(beat)
    return (beat["steps"] - beat["step"]) * step_s if step_s else None


def _step_s(beat: Mapping[str, Any]) -> float | None:
    """Seconds a step takes, from tokens a step so far and tokens a second now."""
    if not beat.get("tokens_per_s") or not beat.get("step"):
        return None
    return float(beat["tokens"] / beat["step"] / beat["tokens_per_s"])


def _waits(row: Mapping[str, Any], now: float) -> str:
    words = [row["why"] + (f" ({row['reason']})" if row["why"] else row["reason"])] if row["reason"] else []
    if row["starts_at"]:
        in_s = row["starts_at"] - now
        words.append(f"starts in about {logbook.duration(in_s)}" if in_s > 0 else "starts soon")
    if row["without"]:
        words.append(f"stays off {', '.join(row['without'])} (until `orch resume`)")
    return ", ".join(words)


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
        how = attempt.note or "was killed: no rank left a word"
        return f"`{run.name}` {how} (step {attempt.to_step})", f"out of memory? {logs}"
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


def _how_it_ended(standing: Standing) -> str:
    if standing.state == "failed":
        return failure(standing.run)[0].removeprefix(f"`{standing.run.name}` ")
    if standing.state in ("done", "stopped"):
        last = standing.attempts[-1]
        return f"{last.cause} at step {last.to_step}" if last.to_step else str(last.cause)
    return ""
