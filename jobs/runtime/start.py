"""How a stage that trains begins: its engine, the frozen models beside it, and how many steps it will take."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from jobs.runtime import dist, resume
from jobs.runtime.job import Job
from orchestrator import registry
from orchestrator.schedule import batch_at

if TYPE_CHECKING:
    import torch

    from jobs.engines import Engine, LossFn
    from jobs.engines.torch import Frozen
    from jobs.nn.gpt import GPT
    from jobs.nn.parallel import TensorGroup

log = logging.getLogger(__name__)


def limited_to(job: Job, samples_per_epoch: int, epochs: float | None) -> Job:
    """``job`` with no more steps than ``epochs`` over the data take, batches that grow included."""
    if epochs is None:
        return job
    seen, steps = 0, 0
    while steps < job.stage.steps and seen < epochs * samples_per_epoch:
        seen, steps = seen + batch_at(job.stage, seen, job.experiment.model.seq_len), steps + 1
    log.info("%g epochs of %d samples: %d steps", epochs, samples_per_epoch, steps)
    return dataclasses.replace(job, stage=dataclasses.replace(job.stage, steps=steps))


def build(job: Job, model: type[GPT], loss_fn: LossFn) -> Engine:
    """The engine of ``job`` around a ``model``. Collective."""
    stage, spec = job.stage, job.experiment.model
    if stage.kind in ("ppo", "dpo"):  # log-probabilities are compared with those of another pass, or another model
        spec = dataclasses.replace(spec, dropout=0.0)

    def make(tensor: TensorGroup | None = None) -> torch.nn.Module:
        return model(spec, recompute=stage.parallel.recompute, tensor=tensor)

    meet(job)
    engine: Engine = registry.find("jobs.engines", stage.engine).build(make, stage, job.ranks, loss_fn)
    job.reached("engine")
    return engine


def meet(job: Job) -> None:
    """Join the other ranks, and seed what is random in training. Collective; a second time it changes nothing."""
    job.reached("imports")
    dist.start(job.ranks, job.rendezvous)
    job.reached("ranks")
    dist.seed(job.stage.seed, job.ranks, job.stage.parallel)


def frozen(job: Job, model: type[GPT], stage: str, tokenizer: str) -> Frozen:
    """A ``model`` with the weights that another ``stage`` of the experiment ended with, only to be asked. Collective.

    It is sharded over the data ranks under ZeRO-3, whatever the engine, and else whole on each. ``tokenizer`` is the
    SHA-256 of the one it must have been trained with.
    """
    from jobs.engines.torch import Frozen

    spec, p = job.experiment.model, job.stage.parallel
    plan = dataclasses.replace(p, zero=3 if p.zero == 3 else 0, recompute="none", offload="none")
    how = dataclasses.replace(job.stage, engine="torch", engine_config={}, parallel=plan)
    meet(job)
    made = Frozen(lambda tensor=None: model(spec, tensor=tensor), how, job.ranks)
    made.module.eval().requires_grad_(requires_grad=False)
    resume.load_weights(job, made, stage, tokenizer)
    return made
