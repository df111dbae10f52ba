"""How a stage that trains begins: its engine, and how many steps it will take."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING

from jobs.runtime import dist
from jobs.runtime.job import Job
from orchestrator import registry

if TYPE_CHECKING:
    import torch

    from jobs.engines import Engine, LossFn
    from jobs.nn.gpt import GPT
    from jobs.nn.parallel import TensorGroup

log = logging.getLogger(__name__)


def limited_to(job: Job, samples_per_epoch: int, epochs: float | None) -> Job:
    """``job`` with no more steps than ``epochs`` over the data take."""
    if epochs is None:
        return job
    steps = min(job.stage.steps, math.ceil(epochs * samples_per_epoch / job.stage.global_batch))
    log.info("%g epochs of %d samples: %d steps", epochs, samples_per_epoch, steps)
    return dataclasses.replace(job, stage=dataclasses.replace(job.stage, steps=steps))


def build(job: Job, model: type[GPT], loss_fn: LossFn) -> Engine:
    """The engine of ``job`` around a ``model``. Collective."""
    stage, spec = job.stage, job.experiment.model

    def make(tensor: TensorGroup | None = None) -> torch.nn.Module:
        return model(spec, recompute=stage.parallel.recompute, tensor=tensor)

    job.reached("imports")
    dist.start(job.ranks, job.rendezvous)
    job.reached("ranks")
    dist.seed(stage.seed, job.ranks, stage.parallel)
    engine: Engine = registry.find("jobs.engines", stage.engine).build(make, stage, job.ranks, loss_fn)
    job.reached("engine")
    return engine
