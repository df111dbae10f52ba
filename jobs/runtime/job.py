"""What a stage is handed: its run, its spec, its place among the ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from orchestrator.run import Run
from orchestrator.spec import Experiment, StageSpec


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place in the job."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def from_env(cls) -> Ranks:
        """Read what submitit's local executor, Slurm or torchrun left in the environment."""
        for rank, world, local_rank, local_world in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
            ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID", "SUBMITIT_LOCAL_NTASKS"),
            ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
        ):
            if rank in os.environ:
                n = int(os.environ[world])
                return cls(
                    rank=int(os.environ[rank]),
                    world=n,
                    local_rank=int(os.environ[local_rank]),
                    local_world=int(os.environ.get(local_world, n)),
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
