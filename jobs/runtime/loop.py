"""The training loop: read a batch, take a step, say so, save when due, leave when told to.

What a run is made of is (weights, optimizer, RNG, position); the position is three numbers. So a run that
was killed goes on bit for bit from its newest checkpoint, whatever has happened to the process.
"""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from jobs.runtime import dist
from jobs.runtime.faults import Stopped
from jobs.runtime.job import Job
from jobs.runtime.resume import PROBE_SAMPLES, Position, Probe, load_weights, resume, save
from orchestrator.errors import DataError, TrainingError
from orchestrator.schedule import adam_eps, batch_at, learning_rate, total_tokens

if TYPE_CHECKING:
    from jobs.engines import Batch, Engine
    from jobs.runtime.pieces import Part

    Judge = Callable[["Samples", int], dict[str, float]]

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
class Taken:
    """What one step says of itself."""

    loss: float  # of this rank; the mean over the ranks is logged
    grad_norm: float
    tokens: int  # over all ranks
    values: dict[str, float] = field(default_factory=dict)  # more to log, the same on every rank


class Learner(Protocol):
    """What the loop drives: how a step is taken, how it is judged, what of it is saved. Every method is collective."""

    parts: Mapping[str, Part]  # by the folder below the checkpoint; "", the model that is handed on
    more: dict[str, Any]  # plain values that belong to the state too, the same on every rank

    def begin(self) -> None:
        """Start from nothing, or from other stages: there is no checkpoint yet."""
        ...

    def step(self, at: Position, size: int, lr: float) -> Taken | None:
        """Learn from the samples from ``at``, ``size`` of them. None: not begun, since a rank was told to stop."""
        ...

    def measure(self, at: Position, samples: int) -> dict[str, float]:
        """Metrics over so many of the first held-out samples."""
        ...

    def probe(self) -> float:
        """A loss in nats per token that no layout may change, quickly."""
        ...

    def astray(self) -> TrainingError | None:
        """Why it should not go on, though every step was finite. By ``more`` alone: a resumed run says the same."""
        ...


class Supervised:
    """One engine that learns from given batches."""

    def __init__(self, job: Job, engine: Engine, data: Samples, held_out: Samples, judge: Judge | None) -> None:
        self.job, self.engine, self.data, self.held_out = job, engine, data, held_out
        self.judge = judge or (lambda samples, count: {"val/loss": evaluate(job, engine, samples, count)})
        self.parts: Mapping[str, Part] = {"": engine}
        self.more: dict[str, Any] = {}

    def begin(self) -> None:
        """Start from the weights of ``init_from``, or from what was drawn."""
        stage = self.job.stage.init_from
        if stage:
            probe = Probe(data=self.held_out.fingerprint, measure=self.probe)
            load_weights(self.job, self.engine, stage, self.data.tokenizer_sha256, probe)

    def step(self, at: Position, size: int, lr: float) -> Taken:
        """One step of the optimizer."""
        started = time.perf_counter()
        batches = _share(self.job, self.data, at.samples, size)
        waited_s = time.perf_counter() - started
        self.job.mark("step")
        result = self.engine.train_step(batches, lr=lr, eps=adam_eps(self.job.stage.optimizer, at.step + 1))
        tokens = self.job.place.data_size * sum(b["tokens"].numel() for b in batches)
        values = {"perf/data_wait_s": waited_s}
        return Taken(loss=result.loss, grad_norm=result.grad_norm, tokens=tokens, values=values)

    def measure(self, at: Position, samples: int) -> dict[str, float]:
        """What the judge says."""
        return self.judge(self.held_out, samples)

    def probe(self) -> float:
        """The loss on a few held-out samples."""
        return self.judge(self.held_out, PROBE_SAMPLES)["val/loss"]

    def astray(self) -> None:
        """Nothing but a loss that is not finite stops it."""


@dataclass
class BadBatches:
    """The samples of steps that were not finite, which the run goes on without."""

    allowed: int  # in a row
    ends: dict[int, int] = field(default_factory=dict)  # by the first sample of a batch, the first behind it
    step: int = 0  # the latest that was undone
    in_a_row: int = 0

    @property
    def too_many(self) -> bool:
        """Whether it is the run that is at fault, rather than a batch."""
        return self.in_a_row > self.allowed

    def add(self, at: Position, after: Position) -> None:
        """The step from ``at`` to ``after`` was not finite."""
        self.ends[at.samples] = after.samples
        self.step, self.in_a_row = after.step, self.in_a_row + 1

    def ended(self, step: int) -> None:
        """``step`` was finite; one that only comes before the latest bad one again proves nothing."""
        if step >= self.step:
            self.in_a_row = 0

    def behind(self, at: Position) -> Position:
        """``at``, or where the data goes on behind the batches that begin there."""
        while at.samples in self.ends:
            at = replace(at, samples=self.ends[at.samples])
        return at


def train(
    job: Job,
    engine: Engine,
    data: Samples,
    held_out: Samples | None,
    *,
    final_eval_samples: int | None = None,
    judge: Judge | None = None,
) -> None:
    """Train ``engine`` on ``data``, as ``drive`` does.

    Args:
        judge: what to measure over so many of the first samples, `val/loss` among it; None: that alone.
    """
    learner = Supervised(job, engine, data, held_out or data, judge)
    drive(job, learner, data, held_out, final_eval_samples=final_eval_samples)


def drive(
    job: Job, learner: Learner, data: Samples, held_out: Samples | None, *, final_eval_samples: int | None = None
) -> None:
    """Train ``job.stage`` from its newest checkpoint, or from its first step, to its last. Collective.

    Args:
        final_eval_samples: samples in the evaluation after the last step; None: all of ``held_out``.

    A step that is not finite is undone: the run goes back to its newest checkpoint, takes the steps from there again,
    and passes over the samples of that step, as if they were not in the data. PaLM's spikes went away like this
    (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1). The same happens again in a run that was killed meanwhile.

    A learner that has gone astray is saved and stops; so it does at once when it is resumed, unless it says otherwise.

    Raises:
        Stopped: a signal asked for it; everything is saved.
        TrainingError: more than ``stage.skip_batches`` steps in a row are not finite, or one before there is a
            checkpoint; the learner has gone astray; or the last step could not be saved.
        CheckpointError: the checkpoint found belongs to another model, tokenizer or data, or is not what was saved.
    """
    stage, seq_len = job.stage, job.experiment.model.seq_len
    decay_tokens = stage.schedule.decay_tokens or total_tokens(stage, seq_len)
    probe = Probe(data=(held_out or data).fingerprint, measure=learner.probe)
    at = _begin(job, learner, data, held_out, probe)
    saved, stall_s = at.step, 0.0
    bad, astray = BadBatches(stage.skip_batches), learner.astray()
    while at.step < stage.steps and not astray:
        job.mark("step", at.step)
        at = bad.behind(at)
        started = time.perf_counter()
        size = batch_at(stage, at.samples, seq_len)
        after = Position(step=at.step + 1, samples=at.samples + size, tokens=at.tokens + size * seq_len)
        lr = learning_rate(stage, after.tokens, decay_tokens)
        taken = learner.step(at, size, lr)
        stopping = taken is None
        if taken:
            loss, stopping = dist.mean_and_any(taken.loss, bool(job.stop.cause))
            said = {"train/loss": loss, "train/grad_norm": taken.grad_norm, **taken.values}
            if not all(map(math.isfinite, said.values())):
                bad.add(at, after)
                at = _undo(job, learner, data, probe, bad, saved, _not_finite(at, after, said, saved))
                continue
            bad.ended(after.step)
            at = after
            values = {
                "train/lr": lr,
                **_performance(job, time.perf_counter() - started, taken.tokens),
                **said,
                "perf/checkpoint_stall_s": stall_s,
            }
            last = at.step == stage.steps
            if held_out and (last or (stage.eval_every and at.step % stage.eval_every == 0)):
                samples = final_eval_samples if last else stage.eval_samples
                job.mark("evaluate")
                values |= learner.measure(at, samples or held_out.samples_per_epoch)
            job.report(at.step, values, tokens=at.tokens)
            job.reached("step")
            stall_s, astray = 0.0, learner.astray()
        if saved < at.step and (stopping or astray or at.step == stage.steps or at.step % stage.save_every == 0):
            job.mark("save")
            before = time.perf_counter()
            if save(job, learner.parts, data, at, probe, learner.more):
                saved = at.step
                job.note(to_step=at.step, checkpoint_step=saved)
            stall_s = time.perf_counter() - before
        if stopping:
            break
    job.note(to_step=at.step)
    if astray:
        raise astray
    if saved < at.step:
        raise TrainingError(
            f"the last step, {at.step}, could not be saved; the newest checkpoint is step {saved}",
            hint=f"make room in `{job.run.checkpoints}`, then `orch resume {job.run.name}`",
        )
    if at.step < stage.steps:
        raise Stopped(next(filter(None, dist.gather(job.stop.cause))), at.step)


def _begin(job: Job, learner: Learner, data: Samples, held_out: Samples | None, probe: Probe) -> Position:
    """Where to go on. What starts from another stage is judged before its first step: has it learned?"""
    found = resume(job, learner.parts, data, probe)
    at, more = found or (Position(), {})
    learner.more.update(more)
    if not found:
        learner.begin()
    job.reached("checkpoint")
    job.note(from_step=at.step, to_step=at.step, checkpoint_step=at.step)
    if not found and job.stage.init_from and job.stage.eval_every and held_out:
        job.mark("evaluate")
        values = learner.measure(at, job.stage.eval_samples or held_out.samples_per_epoch)
        job.report(0, values, tokens=0)
    return at


def _undo(
    job: Job, learner: Learner, data: Samples, probe: Probe, bad: BadBatches, saved: int, error: TrainingError
) -> Position:
    """Go back to the newest checkpoint, step ``saved``, from a step that was not finite; or raise ``error``."""
    job.mark("start")  # which may take longer than a step
    found = None if bad.too_many or not saved else resume(job, learner.parts, data, probe)
    if not found:
        raise error
    at, more = found
    learner.more.clear()  # of what the undone steps have put there
    learner.more.update(more)
    job.note(passed_over=sorted(bad.ends.items()))
    log.warning("%s: undone; back to step %d, and on without the samples of that step", error, at.step)
    return at


def _not_finite(at: Position, after: Position, said: dict[str, float], saved: int) -> TrainingError:
    shown = {name: value for name, value in said.items() if name in ("train/loss", "train/grad_norm")}
    shown |= {name: value for name, value in said.items() if not math.isfinite(value)}
    return TrainingError(
        f"step {after.step}: " + ", ".join(f"{name.removeprefix('train/')} {value}" for name, value in shown.items()),
        hint=f"the last checkpoint is step {saved}; lower `optimizer.lr`, lengthen the warm-up, or look at samples "
        f"{at.samples} to {after.samples}",
    )


def evaluate(job: Job, engine: Engine, data: Samples, samples: int) -> float:
    """Mean negative log-likelihood over the first ``samples`` of ``data``, in nats per counted token. Collective."""
    import torch

    summed, tokens = 0.0, 0.0
    for batch, count in in_turns(job, data, samples):
        nll = engine.forward(batch)[:count].double().cpu()
        weight = batch["weight"][:count].double() if "weight" in batch else torch.ones_like(nll)
        summed += (nll * weight).sum().item()
        tokens += weight.sum().item()
    counted = dist.total(tokens)
    if not counted:
        raise DataError("no token counts in what is held out", hint="is there a response in the first of its samples?")
    return dist.total(summed) / counted


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
