"""The training loop: read a batch, take a step, say so, save when due, leave when told to.

What a run is made of is (weights, optimizer, RNG, position); the position is three numbers. So a run that
was killed goes on bit for bit from its newest checkpoint, whatever has happened to the process.
"""

from __future__ import annotations

import logging
import math
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jobs.runtime import checkpoint, dist
from jobs.runtime.faults import Stopped, is_current
from jobs.runtime.job import Job
from orchestrator.errors import CheckpointError, TrainingError
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


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands. Samples are global: over all ranks."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


def train(
    job: Job, engine: Engine, data: Samples, held_out: Samples | None, *, final_eval_samples: int | None = None
) -> None:
    """Train ``job.stage`` from its newest checkpoint, or from its first step, to its last. Collective.

    Args:
        final_eval_samples: samples in the evaluation after the last step; None: all of ``held_out``.

    Raises:
        Stopped: a signal asked for it; everything is saved.
        TrainingError: the loss or the gradients are not finite, or the last step could not be saved.
        CheckpointError: the checkpoint found belongs to another model, tokenizer, data or layout.
    """
    stage, seq_len = job.stage, job.experiment.model.seq_len
    all_tokens = total_tokens(stage, seq_len)
    decay_tokens = stage.schedule.decay_tokens or all_tokens
    at = _resume(job, engine, data)
    job.note(from_step=at.step, to_step=at.step, checkpoint_step=at.step)
    saved, stall_s = at.step, 0.0
    while at.step < stage.steps:
        started = time.perf_counter()
        size = batch_at(stage, at.samples, seq_len)
        batches = _share(job, data, at.samples, size)
        data_wait_s = time.perf_counter() - started
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
            **_performance(job, step_s, size * seq_len),
            "perf/data_wait_s": data_wait_s,
            "perf/checkpoint_stall_s": stall_s,
        }
        last = at.step == stage.steps
        if held_out and (last or (stage.eval_every and at.step % stage.eval_every == 0)):
            samples = final_eval_samples if last else stage.eval_samples
            values["val/loss"] = evaluate(job, engine, held_out, samples or held_out.samples_per_epoch)
        job.report(at.step, values, tokens=at.tokens)
        stall_s = 0.0
        if last or stopping or at.step % stage.save_every == 0:
            before = time.perf_counter()
            if _save(job, engine, data, at):
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
    """Mean negative log-likelihood over the first ``samples`` of ``data``, in nats per token. Collective.

    Each data rank takes its turn; every one runs as many forward passes as any other.
    """
    place, micro = job.place, job.stage.parallel.micro_batch
    samples = min(samples, data.samples_per_epoch)
    summed, tokens = 0.0, 0
    for turn in range(-(-samples // (place.data_size * micro))):
        first = (turn * place.data_size + place.data) * micro
        count = min(max(samples - first, 0), micro)
        nll = engine.forward(data.batch(first if count else 0, count or 1))[:count]
        summed += nll.double().sum().item()
        tokens += nll.numel()
    return dist.total(summed) / dist.total(tokens)


def _share(job: Job, data: Samples, first: int, size: int) -> list[Batch]:
    """This data rank's micro-batches of the global samples ``first`` to ``first + size``."""
    place, micro = job.place, job.stage.parallel.micro_batch
    turns, left = divmod(size, place.data_size * micro)
    if left:  # the plan allows none; a job that was started by hand may have other ranks
        raise TrainingError(
            f"a batch of {size} does not split over {place.data_size} data ranks with micro-batches of {micro}",
            hint="start as many ranks as the plan has",
        )
    return [data.batch(first + (turn * place.data_size + place.data) * micro, micro) for turn in range(turns)]


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


def identity(job: Job, engine: Engine, data: Samples) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that loads it."""
    stage, p = job.stage, job.stage.parallel
    model = asdict(job.experiment.model)
    del model["dropout"]
    return {
        "model": model,
        "tokenizer": data.tokenizer_sha256,
        "data": data.fingerprint,
        "layout": {
            "engine": stage.engine,
            "precision": stage.precision,
            "world": job.ranks.world,
            "parallel": {"zero": p.zero, "tensor": p.tensor, "pipeline": p.pipeline, "offload": p.offload},
        },
    }


def _free(job: Job) -> tuple[str, ...]:
    """What of the layout may differ."""
    return ("layout.world", "layout.parallel.zero") if job.stage.engine == "torch" else ()


def _resume(job: Job, engine: Engine, data: Samples) -> Position:
    """Load the newest whole checkpoint; without one, the weights of ``init_from``, or nothing."""
    found = checkpoint.newest(job.run.checkpoints, ranks=job.ranks)
    if found is None:
        if job.stage.init_from:
            _start_from(job, engine, data, job.stage.init_from)
        return Position()
    folder, state = found
    free = _free(job)
    checkpoint.check_identity(folder, state["identity"], identity(job, engine, data), free=free)
    engine.load(folder)
    _load_rng(folder, job)
    at = Position(**state["position"])
    log.info("resumed `%s` at step %d, %d tokens", folder, at.step, at.tokens)
    return at


def _start_from(job: Job, engine: Engine, data: Samples, stage: str) -> None:
    """Load the weights another stage of this experiment ended with."""
    other = job.run.root / job.run.experiment / stage / "checkpoints"
    found = checkpoint.newest(other, ranks=job.ranks)
    if found is None:
        raise CheckpointError(f"`init_from: {stage}`: no checkpoint in `{other}`", hint=f"run stage `{stage}` first")
    folder, state = found
    free = ("data", *_free(job))
    checkpoint.check_identity(folder, state["identity"], identity(job, engine, data), free=free)
    engine.load(folder, weights_only=True)
    log.info("weights of `%s`", folder)


def _save(job: Job, engine: Engine, data: Samples, at: Position) -> bool:
    """Write and commit a checkpoint, then retire old ones; on failure training goes on without."""

    def write(folder: Path) -> None:
        engine.save(folder)
        _save_rng(folder, job)

    model, bf16_zero = job.experiment.model, job.stage.engine != "torch" and job.stage.precision == "bf16"
    done = checkpoint.save(
        job.run.checkpoints,
        at.step,
        {"identity": identity(job, engine, data), "position": asdict(at), "attempt": job.attempt, "time": time.time()},
        write,
        ranks=job.ranks,
        # fp32 weights and AdamW's two moments, and bf16 weights beside fp32 masters (arXiv:1910.02054, section 3.1)
        expected_bytes=int(model.params * (14 if bf16_zero else 12) * 1.02) + 1_000_000,
        may_commit=lambda: is_current(job.run, job.attempt),
    )
    if done:
        checkpoint.retire(job.run.checkpoints, job.stage.keep, saved=at.step, ranks=job.ranks)
    return done


def _save_rng(folder: Path, job: Job) -> None:
    import torch
    from safetensors.torch import save_file

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, folder / f"rng-{job.ranks.rank:05d}.safetensors")


def _load_rng(folder: Path, job: Job) -> None:
    """Go on with the random numbers of this rank; a rank that is new keeps those of its seed."""
    import torch
    from safetensors.torch import load_file

    path = folder / f"rng-{job.ranks.rank:05d}.safetensors"
    if not path.exists():
        return
    states = load_file(path)
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
