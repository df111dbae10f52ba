"""What a stage is handed: its run, its spec, its place among the ranks."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.runtime.faults import StopFlag
from jobs.runtime.mesh import Place, place
from orchestrator.run import Attempt, Run
from orchestrator.spec import Experiment, StageSpec

if TYPE_CHECKING:
    from jobs.runtime.beat import Beat
    from orchestrator.track import Metrics
    from orchestrator.watch import Phase


log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place in the job."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Ranks:
        """Read what submitit's local executor, Slurm or torchrun left in the environment."""
        for rank, world, local_rank, local_world in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
            ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID", "SUBMITIT_LOCAL_NTASKS"),
            ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
        ):
            if rank in environ:
                n = int(environ[world])
                return cls(
                    rank=int(environ[rank]),
                    world=n,
                    local_rank=int(environ[local_rank]),
                    local_world=int(environ.get(local_world, n)),
                )
        return cls()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One attempt of one run, seen from one rank."""

    run: Run
    experiment: Experiment
    stage: StageSpec
    options: Any  # the Options dataclass of the stage's module
    ranks: Ranks
    attempt: str  # the attempt's name, the same on every rank
    record: Attempt
    stop: StopFlag = field(default_factory=StopFlag)
    metrics: Metrics | None = None  # of rank 0
    beat: Beat | None = None  # where a warden looks

    @property
    def place(self) -> Place:
        """This rank's coordinates: ranks of the same `data` read the same samples."""
        return place(self.ranks.rank, self.ranks.world, self.stage.parallel)

    @property
    def rendezvous(self) -> Path:
        """A file that no other attempt uses, on which the ranks meet."""
        return self.run.folder / f".rendezvous-{self.attempt}"

    def note(self, **changes: Any) -> None:
        """Bring ``attempts/<attempt>.json`` up to date. Any rank may call it; rank 0 writes."""
        for key, value in changes.items():
            setattr(self.record, key, value)
        if self.ranks.rank == 0:
            self.run.save_attempt(self.record)

    def has_loaded(self, stage: str, folder: Path) -> None:
        """Note that weights of ``stage`` were read from the checkpoint in ``folder``. Any rank may call it."""
        manifest = (folder / "MANIFEST.json").read_bytes()
        step = int(folder.name.removeprefix("step-"))
        self.record.loaded[stage] = {"step": step, "manifest_sha256": hashlib.sha256(manifest).hexdigest()}
        self.note()

    def mark(self, phase: Phase | None = None, step: int | None = None) -> None:
        """Show that this rank has got on, to ``phase`` if given; ``step``: as many are done, and the next begins."""
        if self.beat:
            self.beat.mark(phase, step)

    def reached(self, phase: str) -> None:
        """Remember for the next ``note`` how long it took from the start until ``phase`` was over, the first time."""
        self.record.phases.setdefault(phase, round(time.time() - self.record.started_at, 3))

    def report(self, step: int, values: Mapping[str, float], *, tokens: int) -> None:
        """Log one step: a line, `metrics.jsonl`, the heartbeat. Any rank may call it; rank 0 writes."""
        self.mark()
        if self.metrics is None:
            return
        self.metrics.log(step, values, tokens=tokens)
        self.metrics.heartbeat(
            step=step,
            steps=self.stage.steps,
            tokens=tokens,
            loss=values.get("train/loss"),
            tokens_per_s=values.get("perf/tokens_per_s"),
        )
        shown = " ".join(
            f"{key.removeprefix('train/').removeprefix('perf/')} {value:.5g}" for key, value in values.items()
        )
        log.info("step %d/%d %s", step, self.stage.steps, shown)
