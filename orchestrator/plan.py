"""Will it fit, how long, how much: arithmetic on a spec, before any GPU is asked for.

What a rank holds is in `memory.py`, how long a step takes in `timing.py`, what failures cost in `failures.py`, the
rules in `checks.py`; here they become one Estimate per stage. GB is 1e9 bytes. docs/plan.md has the formulas, how far
they were from published and measured runs, and where they are known to be wrong.

[K] Korthikanti et al. 2022, arXiv:2205.05198: model and hardware flops
[N] Narayanan et al. 2021, arXiv:2104.04473: pipeline bubble
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator import contracts, phases, timing
from orchestrator.checks import Problem, check
from orchestrator.errors import ConfigError, PlanError, together
from orchestrator.failures import Goodput, goodput, limit_s, storage_gb
from orchestrator.hardware import chip
from orchestrator.inputs import COMPARE
from orchestrator.memory import fullest, rank_bytes, zero_options
from orchestrator.registry import did_you_mean, find
from orchestrator.scaling import epochs
from orchestrator.schedule import batches
from orchestrator.spec import ClusterSpec, Experiment, ModelSpec, ParallelPlan, StageSpec, checkpoint_gb
from orchestrator.timing import Software

__all__ = ["Estimate", "Problem", "check", "estimate", "plan", "signal_lead_s"]

# Nine of ten published rows are within this of `step_s` (docs/plan.md, "How far off").
BAND = 0.10
PPO_BAND = 0.4  # DeepSpeed-Chat's runs took 2 to 59 % longer than planned (docs/plan.md, "PPO and DPO")
# How each engine runs: which gradients it sums, what it sends beside the backward pass (jobs/engines/).
SOFTWARE = {
    "torch": Software(grad_bytes=4, hides_data=True, gathers_by_all_ports=True, gathers_each=True),
    "deepspeed": Software(grad_bytes=2),
    "colossalai": Software(grad_bytes=2, hides_data=True),
}
# DeepSpeed's pipelines sum in fp32, all-reduce 2 bytes of that and gather weights of 2, as much as 4 scattered and 2
# gathered (`PipelineEngine._bf16_reduce_grads`, `communication_data_type`, 0.19.8).
DEEPSPEED_PIPELINE = Software(grad_bytes=4)
ON_CPU = Software(grad_bytes=4, causal=False)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one training stage asks for. Its fields are the keys of `orch plan --json`."""

    stage: str
    engine: str
    params: int
    world: int
    data: int
    tensor: int
    ulysses: int
    pipeline: int
    micro_batches: int  # per pipeline, in a step of the full batch
    memory_gb: dict[str, float]  # of the fullest rank, by memory.PARTS, and their total
    gpu_memory_gb: float
    fits: bool
    step_s: float  # of the full batch
    tokens_per_s: float
    model_tflops_per_gpu: float
    mfu: float  # model flops over peak
    hfu: float  # the same with recomputed flops
    bubble: float  # idle time over busy time of the pipeline
    days: float  # of the whole stage, ramp included, without interruptions
    gpu_hours: float
    usd: float
    checkpoint_gb: float
    save_s: float
    save_every_optimal_steps: int
    fullest_stage: int  # the pipeline stage whose ranks hold memory_gb
    step_parts_s: dict[str, float]  # timing.Step, or phases.Iteration; they add up to step_s
    evaluation_s: float  # of one during the run; 0: there is none
    step_band: float  # both may be this share more or less
    interruptions: float  # expected, over the whole stage
    goodput: float  # share of the time that trains
    days_end_to_end: float  # with saving, interruptions, restarts and the queue
    submissions: int  # jobs that the queue's time limit makes of it
    storage_tb: float  # for the checkpoints that are kept, and the one being written
    energy_mwh: float  # 0: `cluster.gpu_watts` is not set
    phases: dict[str, dict[str, float]]  # GB by use of each phase, of kinds with several models
    epochs: dict[str, float]  # by source: how often the stage reads what is on disk

    def to_json(self) -> dict[str, Any]:
        """One object of `orch plan --json`."""
        return asdict(self)


def plan(
    experiment: Experiment, stages: Sequence[str] | None = None, force: bool = False, root: Path | None = None
) -> list[Estimate]:
    """Check ``stages``, or all, and estimate those that train. ``force`` lets through what does not fit.

    With ``root``, the runs folder, they are also held against what earlier stages left there.

    Raises:
        ConfigError: there is no such stage.
        PlanError: rules are broken or memory does not suffice; all of it, of every stage, in one error.
    """
    names = list(dict.fromkeys(stages or experiment.stages))
    for name in names:
        if name not in experiment.stages:
            raise ConfigError(f"no stage `{name}`", hint=did_you_mean(name, list(experiment.stages)))
    problems = list(_launcher(experiment))
    estimates = []
    for name in names:
        found = [*check(experiment, name), *contracts.check(experiment, name, root)]
        problems += [p for p in found if p not in problems]
        if found or not find("jobs", experiment.stages[name].kind).PER_GPU:
            continue
        e = estimate(experiment, name)
        estimates.append(e)
        if not (e.fits or force):
            problems.append(_does_not_fit(experiment, e))
        problems += _too_short(experiment.cluster, e)
    problems += _no_room(experiment, [e.stage for e in estimates])
    if problems:
        raise refusal(problems)
    return estimates


def _launcher(experiment: Experiment) -> Iterator[Problem]:
    """What the cluster's launcher cannot read of its settings."""
    read = getattr(find("launch", experiment.cluster.launcher), "advice", None)
    try:
        if read:
            read(experiment)
    except ConfigError as error:
        yield Problem(message=str(error), hint=error.hint)


def refusal(problems: Sequence[Problem]) -> PlanError:
    """All ``problems``, of which there is at least one, as one error."""
    return together([PlanError(p.message, hint=p.hint) for p in problems])


def signal_lead_s(estimate: Estimate | None) -> int:
    """How long before its end a job must be told, to save in time; None stands for a stage that does not train."""
    if estimate is None:
        return 60
    e = estimate
    return math.ceil(_lead_s(e.step_s, e.evaluation_s, e.step_band, e.save_s))


def _lead_s(step_s: float, evaluation_s: float, step_band: float, save_s: float) -> float:
    """The step at work is ended, and the evaluation that may be due, which take ``step_band`` longer; then it is saved.
    With a minute to spare."""
    return 60 + (step_s + evaluation_s) * (1 + step_band) + 2 * save_s


def _evaluation_s(stage: StageSpec, step: timing.Step, micro_batches: int) -> float:
    """An evaluation: of training a third goes forward; what is asked beside it is asked once more. The last one, of
    all that is held out, is not planned."""
    if not stage.eval_every or stage.kind == COMPARE:
        return 0.0
    asked = step.rollout_s + step.score_s if isinstance(step, phases.Iteration) else 0.0
    forward = 0.0 if stage.kind == "ppo" else (step.total_s - asked) / 3
    return (asked + forward) * max(stage.eval_samples / stage.global_batch, 1 / micro_batches)


def estimate(experiment: Experiment, name: str) -> Estimate:
    """Memory, time and cost of a stage that passes ``check`` and trains."""
    model, cluster, stage = experiment.model, experiment.cluster, experiment.stages[name]
    p = stage.parallel
    world, data, micro_batches = layout(stage, cluster)
    index, memory_gb = memory(model, stage, cluster)

    step = step_time(model, stage, cluster, stage.global_batch)
    tokens = stage.global_batch * responses(stage) * model.seq_len
    asked, trained = phases.passes(stage)
    model_flops = model.flops_per_token * (asked / 3 + trained) * tokens
    hardware_flops = model_flops + recomputed_flops_per_token(model, p) * trained * tokens
    peak = world * cluster.gpu_tflops * 1e12
    run_s = _run_s(model, stage, cluster)
    gpu_hours = run_s / 3600 * world

    size_gb = checkpoint_gb(model, stage)
    save_s = size_gb / cluster.checkpoint_gb_per_s
    band = PPO_BAND if stage.kind in ("ppo", COMPARE) else BAND
    evaluation_s = _evaluation_s(stage, step, micro_batches)
    lead_s = _lead_s(step.total_s, evaluation_s, band, save_s)
    kept = _goodput(stage, cluster, run_s, save_s, step.total_s, lead_s)
    return Estimate(
        stage=name,
        engine=stage.engine,
        params=model.params,
        world=world,
        data=data,
        tensor=p.tensor,
        ulysses=p.ulysses,
        pipeline=p.pipeline,
        micro_batches=micro_batches,
        memory_gb=memory_gb,
        gpu_memory_gb=cluster.gpu_memory_gb,
        fits=memory_gb["total"] <= cluster.gpu_memory_gb,
        step_s=step.total_s,
        tokens_per_s=tokens / step.total_s,
        model_tflops_per_gpu=model_flops / step.total_s / world / 1e12,
        mfu=model_flops / (step.total_s * peak),
        hfu=hardware_flops / (step.total_s * peak),
        bubble=(p.pipeline - 1) / (p.interleave * micro_batches),  # [N] section 2.2
        days=run_s / 86400,
        gpu_hours=gpu_hours,
        usd=gpu_hours * cluster.usd_per_gpu_hour,
        checkpoint_gb=size_gb,
        save_s=save_s,
        save_every_optimal_steps=max(1, min(stage.steps, round(min(kept.interval_s / step.total_s, 1e12)))),
        fullest_stage=index,
        step_parts_s=vars(step),
        evaluation_s=evaluation_s,
        step_band=band,
        interruptions=kept.interruptions,
        goodput=kept.goodput,
        days_end_to_end=kept.days,
        submissions=kept.submissions,
        storage_tb=storage_gb(size_gb, stage.keep) / 1000,
        energy_mwh=gpu_hours * cluster.gpu_watts / 1e6,
        phases=phases_gb(model, stage, cluster),
        epochs=epochs(experiment, name),
    )


def layout(stage: StageSpec, cluster: ClusterSpec) -> tuple[int, int, int]:
    """World, data ranks, and micro-batches per pipeline of a full batch."""
    p = stage.parallel
    world = p.nodes * cluster.gpus_per_node
    data = world // p.replica
    return world, data, stage.global_batch // (data * p.micro_batch)


def responses(stage: StageSpec) -> int:
    """Rows of a sample: a prompt with all its responses, as many as the stage allows or samples."""
    sampled = stage.options.get("samples", 1) if stage.kind == COMPARE else 1
    return max(1, int(stage.options.get("responses", sampled)))


def in_rows(stage: StageSpec) -> StageSpec:
    """``stage`` with its micro-batch counted in rows, for what a layer sees; the layout counts samples."""
    p = stage.parallel
    return replace(stage, parallel=replace(p, micro_batch=p.micro_batch * responses(stage)))


def memory_of_rank_0(model: ModelSpec, stage: StageSpec, cluster: ClusterSpec) -> dict[str, float]:
    """GB by use, with their total, of the rank whose memory a run measures."""
    if stage.parallel.pipeline == 1:
        return memory(model, stage, cluster)[1]
    _, data, micro_batches = layout(stage, cluster)
    return _gb(rank_bytes(model, in_rows(stage), 0, data, micro_batches, on_gpu=cluster.gpu != "cpu"), cluster)


def memory(model: ModelSpec, stage: StageSpec, cluster: ClusterSpec) -> tuple[int, dict[str, float]]:
    """The fullest pipeline stage, and its GB by use with their total, as measured on this cluster if they were."""
    if by_phase := phases_gb(model, stage, cluster):
        return 0, max(by_phase.values(), key=lambda gb: gb["total"])
    _, data, micro_batches = layout(stage, cluster)
    index, parts = fullest(model, in_rows(stage), data, micro_batches, on_gpu=cluster.gpu != "cpu")
    return index, _gb(parts, cluster)


def phases_gb(model: ModelSpec, stage: StageSpec, cluster: ClusterSpec) -> dict[str, dict[str, float]]:
    """GB by use, with their total, of each phase of a stage that has some; else nothing."""
    if not phases.has_phases(stage):
        return {}
    _, data, micro_batches = layout(stage, cluster)
    found = phases.phase_bytes(model, in_rows(stage), data, micro_batches, on_gpu=cluster.gpu != "cpu")
    return {phase: _gb(parts, cluster) for phase, parts in found.items()}


def _gb(parts: Mapping[str, float], cluster: ClusterSpec) -> dict[str, float]:
    """``parts`` as measured on this cluster if they were; `other` is not PyTorch's to measure."""
    gb = {key: value * (1 if key == "other" else cluster.memory_factor) / 1e9 for key, value in parts.items()}
    return {**gb, "total": sum(gb.values())}


def step_time(model: ModelSpec, stage: StageSpec, cluster: ClusterSpec, batch: int) -> timing.Step:
    """The time of a step of ``batch`` sequences, as measured on this cluster if it was."""
    _, data, _ = layout(stage, cluster)
    software = ON_CPU if cluster.gpu == "cpu" else software_of(stage)
    micro_batches = max(1, batch // (data * stage.parallel.micro_batch))
    timed = phases.iteration if phases.has_phases(stage) else timing.step
    step = timed(model, in_rows(stage), chip(cluster, stage.precision), data, micro_batches, software)
    if cluster.step_factor == 1:
        return step
    return type(step)(**{key: seconds * cluster.step_factor for key, seconds in vars(step).items()})


def software_of(stage: StageSpec) -> Software:
    """How the engine of ``stage`` runs on GPUs; several texts in a row need a mask, which no kernel leaves out."""
    found = SOFTWARE.get(stage.engine, Software())
    if stage.engine == "deepspeed" and stage.parallel.pipeline > 1:
        found = DEEPSPEED_PIPELINE
    elif stage.engine == "deepspeed" and zero_options(stage).get("overlap_comm") is True:
        found = replace(found, hides_data=True)
    return replace(found, causal=False) if stage.kind == "sft" else found


def recomputed_flops_per_token(model: ModelSpec, p: ParallelPlan) -> float:
    """The second forward pass of the layers: full, [N] eq. 3; selective, [K] appendix A, attention only."""
    head = 6 * model.vocab * model.hidden
    if p.recompute == "full":
        return (model.flops_per_token - head) / 3
    if p.recompute == "selective":
        return 12 * model.layers * model.hidden * model.seq_len
    return 0.0


def _run_s(model: ModelSpec, stage: StageSpec, cluster: ClusterSpec) -> float:
    """All steps, those of a growing batch at their own size."""
    sizes = batches(stage, model.seq_len)
    return sum(n * step_time(model, stage, cluster, size).total_s for size, n in sizes.items())


def _goodput(
    stage: StageSpec, cluster: ClusterSpec, run_s: float, save_s: float, step_s: float, lead_s: float
) -> Goodput:
    return goodput(
        run_s=run_s,
        save_s=save_s,
        interval_s=stage.save_every * step_s if save_s else math.inf,  # `compare` begins anew
        nodes=stage.parallel.nodes,
        per_node_day=cluster.failures_per_node_day,
        restart_s=cluster.restart_s,
        queue_s=cluster.queue_s,
        limit_s=limit_s(cluster.slurm.get("time")),
        lead_s=lead_s,
    )


def _too_short(cluster: ClusterSpec, e: Estimate) -> Iterator[Problem]:
    """A time limit whose jobs are told to end before they have trained a step."""
    limit, least = limit_s(cluster.slurm.get("time")), cluster.restart_s + signal_lead_s(e)
    if limit and limit <= least:
        yield Problem(
            message=f"`cluster.slurm.time` is {limit:,.0f} s, and of a job of stage `{e.stage}` starting takes "
            f"{cluster.restart_s:,.0f} s, and to end in time a step of {e.step_s:,.3g} s, an evaluation of "
            f"{e.evaluation_s:,.3g} s, two saves of {e.save_s:,.3g} s and a minute",
            hint=f"`cluster.slurm.time` may be {math.floor(least / 60) + 1} (minutes) and more; "
            f"of {math.ceil(10 * least / 60)}, nine tenths train",
        )


def _no_room(experiment: Experiment, stages: Sequence[str]) -> Iterator[Problem]:
    """Checkpoints that ``stages`` keep, and the largest being written, which there is no room for together."""
    sizes = {name: checkpoint_gb(experiment.model, experiment.stages[name]) for name in stages}
    room_tb = experiment.cluster.storage_tb
    if room_tb is None or len(sizes) < 2:
        return  # one stage alone: checks.py
    needs = room_gb(experiment, stages)
    if needs > room_tb * 1000:
        said = ", ".join(f"`{name}` {experiment.stages[name].keep} of {gb:,.1f}" for name, gb in sizes.items())
        yield Problem(
            message=f"the checkpoints that are kept ({said} GB), and the largest being written, are {needs:,.1f} GB, "
            f"and `cluster.storage_tb` is {room_tb:g}",
            hint="a smaller `keep` of some stages, or more storage",
        )


def room_gb(experiment: Experiment, stages: Sequence[str]) -> float:
    """For the checkpoints that ``stages`` keep, and the largest of them being written."""
    sizes = {name: checkpoint_gb(experiment.model, experiment.stages[name]) for name in stages}
    return sum(experiment.stages[name].keep * gb for name, gb in sizes.items()) + max(sizes.values(), default=0.0)


def _does_not_fit(experiment: Experiment, e: Estimate) -> Problem:
    """The estimate, the part that overflows, and single changes that would make it fit."""
    stage = experiment.stages[e.stage]
    parts = {key: gb for key, gb in e.memory_gb.items() if key != "total" and gb >= 0.05}
    most = max(parts, key=lambda key: parts[key])
    said = ", ".join(f"{key} {gb:.1f}" for key, gb in parts.items())
    ways = ["`" + overrides(e.stage, change) + "`" for change in _ways_out(experiment, e.stage, stage.parallel)]
    hint = "any of these would: " + "; ".join(ways) if ways else "use more or larger GPUs"
    return Problem(
        message=f"stage `{e.stage}` needs {e.memory_gb['total']:.1f} GB on each `{experiment.cluster.gpu}` ({said}), "
        f"which has {e.gpu_memory_gb:g} GB; most of it is {most}",
        hint=f"{hint}; `--force` submits all the same",
    )


def _ways_out(experiment: Experiment, name: str, p: ParallelPlan, count: int = 3) -> list[dict[str, Any]]:
    """Up to ``count`` changes of the layout with which it would fit, the gentle ones first."""
    stage = experiment.stages[name]
    changes: list[dict[str, Any]] = [
        *({"zero": z} for z in (1, 2, 3) if z > p.zero),
        {"recompute": "full"},
        *({"micro_batch": p.micro_batch // n} for n in (2, 4, 8) if p.micro_batch % n == 0),
        *({"tensor": t} for t in (2, 4, 8) if t > p.tensor),
        *({"nodes": p.nodes * n} for n in (2, 4, 8)),
        {"offload": "optimizer"},
        {"zero": 3, "recompute": "full"},
        {"zero": 3, "recompute": "full", "micro_batch": 1},
        *({"tensor": 8, "pipeline": n, "zero": 1, "recompute": "full", "micro_batch": 1} for n in (2, 4, 8, 16)),
        {"zero": 3, "recompute": "full", "micro_batch": 1, "offload": "all"},
    ]
    found = []
    for change in changes:
        other = replace(stage, parallel=replace(p, **change))
        if not check(replace(experiment, stages={name: other}), name) and _fits(experiment, other):
            found.append(change)
        if len(found) == count:
            break
    return found


def _fits(experiment: Experiment, stage: StageSpec) -> bool:
    return memory(experiment.model, stage, experiment.cluster)[1]["total"] <= experiment.cluster.gpu_memory_gb


def overrides(name: str, change: Mapping[str, Any]) -> str:
    """``change`` of stage ``name``'s layout, as it is typed."""

    def text(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    return " ".join(f"stages.{name}.parallel.{key}={text(value)}" for key, value in change.items())
