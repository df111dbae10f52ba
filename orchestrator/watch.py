"""Is anybody frozen? Judged by the ranks' signs of life alone, on one clock: pure, as `orchestrator/recover.py`.

Collectives wait for a frozen rank for ever, so nothing fails by itself. `jobs/runtime/beat.py` writes the signs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Phase = Literal["start", "step", "evaluate", "save", "work"]  # work: a stage without steps, of no known pace

LOADED = 3  # while it loads or saves, a rank may be silent for this part of what the phase may take


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long the warden waits: `cluster.slurm.patience`. Seconds, but for ``steps`` and ``attempts``."""

    steps: float = 10  # as many median steps may pass without a step ending,
    step_s: float = 600  # and at least this long: a Lustre server that fails over waits 300 s for its clients, and more
    start_s: float = 3600  # from the ranks' start to the end of the first step: imports, loading, compiling
    save_s: float = 1800  # for a checkpoint; ten times what the plan expects, where that is more
    silent_s: float = 300  # a rank without a sign of life, while others give theirs and no step ends; see LOADED
    beat_s: float = 10  # between two signs of life
    attempts: int = 3  # in a row that bring no new checkpoint, and the run stops


@dataclass(frozen=True, kw_only=True)
class Sign:
    """What a rank says of itself every few seconds."""

    rank: int
    node: str
    phase: Phase
    step: int
    marks: int  # places it has passed, the same on all ranks between two collectives
    beats: int  # signs so far
    step_s: float = 0.0  # median of its last steps; 0: unknown


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """No progress any more. ``ranks`` and ``nodes`` are empty where nobody can be named."""

    why: str
    ranks: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()


class Watch:
    """Who is alive, judged by one clock: the ranks' own may differ."""

    def __init__(self, world: int, patience: Patience, *, now: float) -> None:
        self.patience, self._world = patience, world
        self._last: dict[int, Sign] = {}
        self._heard = dict.fromkeys(range(world), now)
        self._began = self._moved = now

    def see(self, signs: Sequence[Sign], *, now: float) -> Frozen | None:
        """Take in what the ranks say now; return who froze, if it has lasted too long."""
        for sign in signs:
            last = self._last.get(sign.rank)
            if last is None or sign.beats != last.beats:
                self._heard[sign.rank] = now
            if last is None or sign.marks != last.marks:
                self._moved = now
            self._last[sign.rank] = sign
        idle_s, p = now - self._moved, self.patience
        silent = [rank for rank, at in self._heard.items() if now - at > self._silence_s(rank)]
        if silent and len(silent) < self._world and idle_s > p.silent_s:
            return self._name(silent, f"no sign of life for {min(now - self._heard[r] for r in silent):.0f} s")
        limit_s = self._limit_s(everyone_silent=len(silent) == self._world)
        if idle_s <= limit_s:
            return None
        behind = silent if len(silent) < self._world else []
        if not behind and len(self._last) == self._world:  # all live: who has not come to where the others wait?
            least = min(sign.marks for sign in self._last.values())
            behind = [rank for rank, sign in self._last.items() if sign.marks == least]
            if len(behind) == self._world or len({self._last[r].node for r in behind}) > 1:
                behind = []
        return self._name(behind, f"no progress for {idle_s:.0f} s, where {limit_s:.0f} s are allowed")

    def _silence_s(self, rank: int) -> float:
        """How long ``rank`` may say nothing. One that was never heard of may still be loading Python.

        While all load or save, the file system that its signs go to is at its slowest, and a library being loaded
        holds Python's lock.
        """
        p, last = self.patience, self._last.get(rank)
        if last is None:
            return p.start_s
        return max(p.silent_s, {"start": p.start_s, "save": p.save_s}.get(last.phase, 0.0) / LOADED)

    def _limit_s(self, *, everyone_silent: bool) -> float:
        p, signs = self.patience, self._last.values()
        step_s = max((s.step_s for s in signs), default=0.0)
        at_pace = max(p.steps * step_s, p.step_s) if step_s else p.start_s
        limits = {"start": p.start_s, "step": at_pace, "evaluate": at_pace, "save": max(p.save_s, at_pace)}
        limits["work"] = p.start_s if everyone_silent else math.inf
        return max((limits[s.phase] for s in signs), default=p.start_s)

    def _name(self, ranks: Sequence[int], what: str) -> Frozen:
        nodes = sorted({self._last[r].node for r in ranks if r in self._last})
        step = max((s.step for s in self._last.values()), default=0)
        phases = sorted({s.phase for s in self._last.values()})
        where = f"after step {step}, in `{'`, `'.join(phases)}`" if phases else "before any rank was there"
        who = f"{named(ranks)} on {', '.join(nodes) or 'an unknown node'}" if ranks else "all ranks together"
        return Frozen(why=f"frozen {where}: {who}: {what}", ranks=tuple(ranks), nodes=tuple(nodes))


def named(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 1 and 6 more`."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
