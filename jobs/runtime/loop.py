"""The training loop: read a batch, take a step, say so, save when due, leave when told to.

What a run is made of is (weights, optimizer, RNG, position); the position is three numbers. So a run that
was killed goes on bit for bit from its newest checkpoint, whatever has happened to the process.
"""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from jobs.runtime import dist
from jobs.runtime.faults import Stopped
from jobs.runtime.job import Job
from jobs.runtime.resume import PROBE_SAMPLES, Position, Probe, resume, save
from orchestrator.errors import TrainingError
from orchestrator.schedule import batch_at, learning_rate, total_tokens

if TYPE_CHECKING:
    from jobs.engines import Batch, Engine

log = logging.getLogger(__name__)


class Samples(Protocol):
    """A data set whose order is a pure function of the global sample index."""

    tokenizer_sha256: str

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides what the i-th sample is."""
        ...

    @property
    def samples_per_epoch(self) -> int:
        """How many samples there are before one comes again."""
        ...

    def batch(self, first: int, count: int) -> Batch:
        """Global samples ``first`` to ``first + count``."""
        ...


def train(
    job: Job,
    engine: Engine,
    data: Samples,
    held_out: Samples | None,
    *,
    final_eval_samples: int | None = None,
    judge: Callable[[Samples, int], dict[str, float]] | None = None,
) -> None:
    """Train ``job.stage`` from its newest checkpoint, or from its first step, to its last. Collective.

    Args:
        final_eval_samples: samples in the evaluation after the last step; None: all of ``held_out``.
        judge: what to measure over so many of the first samples, `val/loss` among it; None: that alone.

    Raises:
        Stopped: a signal asked for it; everything is saved.
        TrainingError: the loss or the gradients are not finite, or the last step could not be saved.
        CheckpointError: the checkpoint found belongs to another model, tokenizer or data, or is not what was saved.
    """
    stage, seq_len = job.stage, job.experiment.model.seq_len
    all_tokens = total_tokens(stage, seq_len)
    decay_tokens = stage.schedule.decay_tokens or all_tokens
    held = held_out or data
    measure = judge or (lambda samples, count: {"val/loss": evaluate(job, engine, samples, count)})
    probe = Probe(data=held.fingerprint, measure=lambda: measure(held, PROBE_SAMPLES)["val/loss"])
    at = resume(job, engine, data, probe)
    job.reached("checkpoint")
    job.note(from_step=at.step, to_step=at.step, checkpoint_step=at.step)
    saved, stall_s = at.step, 0.0
    while at.step < stage.steps:
        job.mark("step", at.step)
        started = time.perf_counter()
        size = batch_at(stage, at.samples, seq_len)
        batches = _share(job, data, at.samples, size)
        data_wait_s = time.perf_counter() - started
        job.mark("step")
        after = Position(step=at.step + 1, samples=at.samples + size, tokens=at.tokens + size * seq_len)
        lr = learning_rate(stage, after.tokens, decay_tokens)
        result = engine.train_step(batches, lr=lr)
        loss, stopping = dist.mean_and_any(result.loss, bool(job.stop.cause))
        if not (math.isfinite(loss) and math.isfinite(result.grad_norm)):
            raise TrainingError(
                f"step {after.step}: loss {loss}, gradient norm {result.grad_norm}",
                hint=f"the last checkpoint is step {saved}; lower `optimizer.lr`, lengthen the warm-up, or look at "
                f"samples {at.samples} to {after.samples}",
            )
        at = after
        step_s = time.perf_counter() - started
        values = {
            "train/loss": loss,
            "train/lr": lr,
            "train/grad_norm": result.grad_norm,
            **_performance(job, step_s, job.place.data_size * sum(b["tokens"].numel() for b in batches)),
            "perf/data_wait_s": data_wait_s,
            "perf/checkpoint_stall_s": stall_s,
        }
        last = at.step == stage.steps
        if held_out and (last or (stage.eval_every and at.step % stage.eval_every == 0)):
            samples = final_eval_samples if last else stage.eval_samples
            job.mark("evaluate")
            values |= measure(held_out, samples or held_out.samples_per_epoch)
        job.report(at.step, values, tokens=at.tokens)
        job.reached("step")
        stall_s = 0.0
        if last or stopping or at.step % stage.save_every == 0:
            job.mark("save")
            before = time.perf_counter()
            if save(job, engine, data, at, probe):
                saved = at.step
                job.note(to_step=at.step, checkpoint_step=saved)
            stall_s = time.perf_counter() - before
        if stopping:
            break
    job.note(to_step=at.step)
    if saved < at.step:
        raise TrainingError(
            f"the last step, {at.step}, could not be saved; the newest checkpoint is step {saved}",
            hint=f"make room in `{job.run.checkpoints}`, then `orch resume {job.run.name}`",
        )
    if at.step < stage.steps:
        raise Stopped(next(filter(None, dist.gather(job.stop.cause))), at.step)


def evaluate(job: Job, engine: Engine, data: Samples, samples: int) -> float:
    """Mean negative log-likelihood over the first ``samples`` of ``data``, in nats per counted token. Collective."""
    import torch

    summed, tokens = 0.0, 0.0
    for batch, count in in_turns(job, data, samples):
        nll = engine.forward(batch)[:count].double().cpu()
        weight = batch["weight"][:count].double() if "weight" in batch else torch.ones_like(nll)
        summed += (nll * weight).sum().item()
        tokens += weight.sum().item()
    return dist.total(summed) / dist.total(tokens)


def in_turns(job: Job, data: Samples, samples: int) -> Iterator[tuple[Batch, int]]:
    """This data rank's share of the first ``samples`` of ``data``: batches, and how many samples of each count.

    Every rank is given as many batches as any other, so that forward passes are collective; in the last turn perhaps
    one that counts for nothing.
    """
    place, micro = job.place, job.stage.parallel.micro_batch
    samples = min(samples, data.samples_per_epoch)
    for turn in range(-(-samples // (place.data_size * micro))):
        job.mark()
        first = (turn * place.data_size + place.data) * micro
        count = min(max(samples - first, 0), micro)
        yield data.batch(first if count else 0, count or 1), count


def _share(job: Job, data: Samples, first: int, size: int) -> list[Batch]:
    """This data rank's micro-batches of the global samples ``first`` to ``first + size``. Collective with weights.

    Where tokens have a ``weight``, it is scaled so that the mean of all micro-batches' weighted sums is the mean over
    the tokens of the step: else a token among few would count for more.
    """
    place, micro = job.place, job.stage.parallel.micro_batch
    turns, left = divmod(size, place.data_size * micro)
    if left:  # the plan allows none; a job that was started by hand may have other ranks
        raise TrainingError(
            f"a batch of {size} does not split over {place.data_size} data ranks with micro-batches of {micro}",
            hint="start as many ranks as the plan has",
        )
    batches = [data.batch(first + (turn * place.data_size + place.data) * micro, micro) for turn in range(turns)]
    if "weight" in batches[0]:
        mine = sum(b["weight"].sum().item() for b in batches) / len(batches)
        mean = dist.total(mine) / job.ranks.world
        batches = [b | {"weight": b["weight"] / max(mean, 1.0)} for b in batches]
    return batches


def _performance(job: Job, step_s: float, tokens: int) -> dict[str, float]:
    """Speed of one step. MFU counts model flops only (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
    import torch

    cluster, world = job.experiment.cluster, job.ranks.world
    flops = job.experiment.model.flops_per_token * tokens
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "perf/tokens_per_s": tokens / step_s,
        "perf/step_s": step_s,
        "perf/mfu": flops / (step_s * world * cluster.gpu_tflops * 1e12),
        "perf/peak_memory_gb": peak / 1e9,
    }
