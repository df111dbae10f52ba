"""Will it fit, how long, how much: arithmetic on a spec, before any GPU is asked for.

Memory is that of the fullest rank, which is one of the first pipeline stage; GB is 1e9 bytes. Sources:

[R] Rajbhandari et al. 2020, arXiv:1910.02054: ZeRO, bytes per parameter
[K] Korthikanti et al. 2022, arXiv:2205.05198: activation memory, recompute
[N] Narayanan et al. 2021, arXiv:2104.04473: flops, pipeline bubble
[D] Dao et al. 2022, arXiv:2205.14135: fused attention keeps no s x s matrix

A first estimate: it knows no communication, so `step_s` rests on one assumption, MFU.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.checks import Problem, check, lacks_bf16
from orchestrator.errors import ConfigError, PlanError
from orchestrator.registry import did_you_mean, find
from orchestrator.schedule import total_tokens
from orchestrator.spec import Experiment, ModelSpec, ParallelPlan, StageSpec

__all__ = ["Estimate", "Problem", "check", "estimate", "plan", "signal_lead_s"]

# Share of the peak that arithmetic reaches, recompute counted, the pipeline bubble not. Published, bubble
# included: 0.44-0.52 on A100 ([N] table 1), 0.41-0.44 on H100 (Megatron-LM README), 0.40-0.46 (LLM Foundry).
MFU = 0.45
# Unexpected interruptions: 419 in 54 days on 2,048 nodes (Llama 3, arXiv:2407.21783, section 3.3.4).
FAILURES_PER_NODE_S = 419 / (54 * 86400 * 2048)
# fp32 peak over the 16 bit one, without TF32: V100 15.7 of 125; A100 19.5 of 312, H100 67 of 989 (data sheets).
FP32_SHARE = {"old": 1 / 8, "new": 1 / 16}
# Weights, gradients, optimizer ([R], section 3.1): Adam's two moments, and fp32 weights beside bf16 ones.
BYTES_PER_PARAM = {"bf16": (2, 2, 12), "fp32": (4, 4, 8)}
CHECKPOINT_BYTES_PER_PARAM = {"bf16": 14, "fp32": 12}  # all of it but the gradients
CONTEXT_BYTES = {"gpu": 2.0e9, "cpu": 0.6e9}  # an assumption: runtime, communicators, fragments
BUCKET_ELEMENTS = 5e8  # gradients reduced at a time (DeepSpeed's `reduce_bucket_size`)
LOGITS_BYTES = 2**30  # the loss computes larger logits in pieces (jobs/nn/losses.py)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one training stage asks for. Its fields are the keys of `orch plan --json`."""

    stage: str
    engine: str
    params: int
    world: int
    data: int
    tensor: int
    pipeline: int
    micro_batches: int  # per pipeline, in a step of the full batch
    memory_gb: dict[str, float]  # weights, gradients, optimizer, activations, other, total
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

    def to_json(self) -> dict[str, Any]:
        """One object of `orch plan --json`."""
        return asdict(self)


def plan(
    experiment: Experiment, stages: Sequence[str] | None = None, force: bool = False, *, mfu: float = MFU
) -> list[Estimate]:
    """Check ``stages``, or all, and estimate those that train. ``force`` lets through what does not fit.

    Raises:
        ConfigError: there is no such stage.
        PlanError: rules are broken or memory does not suffice; all of it, of every stage, in one error.
    """
    names = list(dict.fromkeys(stages or experiment.stages))
    for name in names:
        if name not in experiment.stages:
            raise ConfigError(f"no stage `{name}`", hint=did_you_mean(name, list(experiment.stages)))
    problems: list[Problem] = []
    estimates = []
    for name in names:
        found = check(experiment, name)
        problems += [p for p in found if p not in problems]
        if found or not find("jobs", experiment.stages[name].kind).PER_GPU:
            continue
        e = estimate(experiment, name, mfu=mfu)
        estimates.append(e)
        if not (e.fits or force):
            problems.append(_does_not_fit(experiment, e))
    if len(problems) == 1:
        raise PlanError(problems[0].message, hint=problems[0].hint)
    if problems:
        lines = [f"{i}. {p.message}" + (f"\n   hint: {p.hint}" if p.hint else "") for i, p in enumerate(problems, 1)]
        raise PlanError("\n".join([f"{len(problems)} problems", *lines]))
    return estimates


def signal_lead_s(estimate: Estimate | None) -> int:
    """How long before its end a job must be told, to save in time; None stands for a stage that does not train."""
    return 60 + math.ceil(2 * estimate.save_s if estimate else 0)


def estimate(experiment: Experiment, name: str, *, mfu: float = MFU) -> Estimate:
    """Memory, time and cost of a stage that passes ``check`` and trains.

    Args:
        mfu: share of the peak that arithmetic reaches, recompute counted and the pipeline bubble not, 0 to 1.
    """
    model, cluster, stage = experiment.model, experiment.cluster, experiment.stages[name]
    p = stage.parallel
    world = p.nodes * cluster.gpus_per_node
    data = world // (p.tensor * p.pipeline)
    micro_batches = stage.global_batch // (data * p.micro_batch)
    memory_gb = _memory_gb(model, stage, data, micro_batches, on_gpu=cluster.gpu != "cpu")

    tokens = stage.global_batch * model.seq_len
    model_flops = model.flops_per_token * tokens
    hardware_flops = model_flops + _recomputed_flops_per_token(model, p) * tokens
    bubble = (p.pipeline - 1) / micro_batches  # [N] section 2.2.1
    peak = world * cluster.gpu_tflops * 1e12
    reached = mfu * (_fp32_share(cluster.gpu) if stage.precision == "fp32" else 1)
    step_s = hardware_flops / (peak * reached) * (1 + bubble)
    run_s = step_s * total_tokens(stage, model.seq_len) / tokens
    gpu_hours = run_s / 3600 * world

    checkpoint_gb = model.params * CHECKPOINT_BYTES_PER_PARAM[stage.precision] / 1e9
    save_s = checkpoint_gb / cluster.checkpoint_gb_per_s
    return Estimate(
        stage=name,
        engine=stage.engine,
        params=model.params,
        world=world,
        data=data,
        tensor=p.tensor,
        pipeline=p.pipeline,
        micro_batches=micro_batches,
        memory_gb=memory_gb,
        gpu_memory_gb=cluster.gpu_memory_gb,
        fits=memory_gb["total"] <= cluster.gpu_memory_gb,
        step_s=step_s,
        tokens_per_s=tokens / step_s,
        model_tflops_per_gpu=model_flops / step_s / world / 1e12,
        mfu=model_flops / (step_s * peak),
        hfu=hardware_flops / (step_s * peak),
        bubble=bubble,
        days=run_s / 86400,
        gpu_hours=gpu_hours,
        usd=gpu_hours * cluster.usd_per_gpu_hour,
        checkpoint_gb=checkpoint_gb,
        save_s=save_s,
        save_every_optimal_steps=max(1, min(stage.steps, round(_young_s(save_s, p.nodes) / step_s))),
    )


def _fp32_share(gpu: str) -> float:
    """How much of ``gpu_tflops`` fp32 arithmetic can reach; a CPU's peak is stated in fp32."""
    return 1 if gpu == "cpu" else FP32_SHARE["old" if lacks_bf16(gpu) else "new"]


def _young_s(save_s: float, nodes: int) -> float:
    """Seconds between saves that lose the least time: sqrt(2 x cost x mean time to failure) (Young 1974)."""
    return math.sqrt(2 * save_s / (nodes * FAILURES_PER_NODE_S))


def _recomputed_flops_per_token(model: ModelSpec, p: ParallelPlan) -> float:
    """The second forward pass of the layers: full, [N] eq. 3; selective, [K] appendix A, attention only."""
    head = 6 * model.vocab * model.hidden
    if p.recompute == "full":
        return (model.flops_per_token - head) / 3
    if p.recompute == "selective":
        return 12 * model.layers * model.hidden * model.seq_len
    return 0.0


def _memory_gb(model: ModelSpec, stage: StageSpec, data: int, micro_batches: int, *, on_gpu: bool) -> dict[str, float]:
    """Memory of one rank of the first pipeline stage, by use."""
    p = stage.parallel
    w_bytes, g_bytes, o_bytes = BYTES_PER_PARAM[stage.precision]
    params: float = model.params
    if p.pipeline > 1:  # the first stage holds the embeddings, the last one the head
        positions = model.seq_len * model.hidden if model.position == "learned" else 0
        params = model.layers // p.pipeline * model.layer_params + model.vocab * model.hidden + positions
    mine = params / p.tensor

    # [R] figure 1: each level spreads one more part over the data ranks.
    weights = w_bytes * mine / (data if p.zero >= 3 else 1)
    gradients = g_bytes * mine / (data if p.zero >= 2 else 1)
    optimizer = o_bytes * mine / (data if p.zero >= 1 else 1)
    if p.offload != "none":  # ZeRO-Offload, arXiv:2101.06840: sharded gradients follow the optimizer
        optimizer = 0
        gradients = 0 if p.zero >= 2 else gradients
    if p.offload == "all":
        weights = 0

    per_layer = _layer_activation_bytes(model, p, w_bytes)
    layers = model.layers // p.pipeline
    held: float = per_layer * layers
    at_work: float = 0
    if p.recompute == "full":  # [K] section 5: the input of each layer, and one layer at work
        held = w_bytes * model.seq_len * p.micro_batch * model.hidden * layers
        at_work = per_layer
    logits = min(LOGITS_BYTES, w_bytes * model.seq_len * p.micro_batch * model.vocab / p.tensor)
    in_flight = min(p.pipeline, micro_batches)  # 1F1B, [N] section 2.2.1
    activations = held * in_flight + at_work + (logits if p.pipeline == 1 else 0)

    other = CONTEXT_BYTES["gpu" if on_gpu else "cpu"]
    if p.zero:
        other += w_bytes * min(BUCKET_ELEMENTS, mine)
    if p.zero == 3 or p.offload == "all":  # the layer at work, and the next one on its way
        other += w_bytes * 2 * max(model.layer_params, model.vocab * model.hidden) / p.tensor
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "other": other,
    }
    return {key: value / 1e9 for key, value in {**parts, "total": sum(parts.values())}.items()}


def _layer_activation_bytes(model: ModelSpec, p: ParallelPlan, width: int) -> float:
    """What one layer keeps of one micro-batch for its backward pass, ``width`` bytes an element.

    [K] section 4.1, term by term: s b h (10 + 24 / t) for GPT-3 in 16 bit with dropout. Its 5 a s / h, the
    scores, is left out: the kernels behind `scaled_dot_product_attention` keep none of them [D].
    """
    h, f = model.hidden, model.ffn
    norms = 1 if model.parallel_block else 2
    masks = 2 * h if model.dropout else 0  # a byte each
    whole = width * h * (norms + 2) + masks  # inputs of the norms, of the qkv and of the up projection
    queries = h + 2 * model.kv_hidden + h  # q, k, v and the attention's output
    up = (3 if model.activation == "swiglu" else 2) * f  # before and behind the activation
    return model.seq_len * p.micro_batch * (whole + width * (queries + up) / p.tensor)


def _does_not_fit(experiment: Experiment, e: Estimate) -> Problem:
    """The estimate, part by part, and single changes that would make it fit."""
    stage = experiment.stages[e.stage]
    parts = ", ".join(f"{key} {gb:.1f}" for key, gb in e.memory_gb.items() if key != "total")
    p = stage.parallel
    changes: list[dict[str, Any]] = [
        *({"zero": z} for z in (1, 2, 3) if z > p.zero),
        {"recompute": "full"},
        *({"micro_batch": p.micro_batch // n} for n in (2, 4, 8) if p.micro_batch % n == 0),
        *({"nodes": p.nodes * n} for n in (2, 4, 8)),
        {"offload": "optimizer"},
        {"zero": 3, "recompute": "full"},
        {"zero": 3, "recompute": "full", "micro_batch": 1},
        {"zero": 3, "recompute": "full", "micro_batch": 1, "offload": "all"},
    ]
    ways = []
    for change in changes:
        other = replace(experiment, stages={e.stage: replace(stage, parallel=replace(p, **change))})
        if not check(other, e.stage) and estimate(other, e.stage).fits:
            ways.append(" ".join(f"stages.{e.stage}.parallel.{key}={value}" for key, value in change.items()))
    hint = "any of these would: " + "; ".join(f"`{way}`" for way in ways[:3]) if ways else "use more or larger GPUs"
    return Problem(
        message=f"stage `{e.stage}` needs {e.memory_gb['total']:.1f} GB on each `{experiment.cluster.gpu}` ({parts}), "
        f"which has {e.gpu_memory_gb:g} GB",
        hint=f"{hint}; `--force` submits all the same",
    )
