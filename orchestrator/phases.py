"""Stages of more models than one, by their phases: what a rank holds in each, and how long it takes.

PPO has four, as InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, section 3.5): actor and critic train, reference and
reward model are frozen. The actor samples (rollout), all read what it wrote (score), actor and critic train in turn
(update). Every prompt and response is planned at full length: together they fill the context. DPO has a frozen
reference that reads each batch first. `compare` only samples, from a frozen policy, and learns nothing.

[P] Pope et al. 2022, arXiv:2211.05102, section 2: each token that is sampled reads all weights and the cache
"""

import math
from dataclasses import dataclass, fields, replace

from orchestrator.hardware import Chip, matmul_s
from orchestrator.inputs import COMPARE
from orchestrator.memory import bucket, logit_bytes, rank_bytes, sharded_params, slice_of, spared_bytes
from orchestrator.spec import ModelSpec, StageSpec
from orchestrator.timing import COLLECTIVE_S, FORWARD_KERNELS, GATHER_SHARE, Software, Step, layer, step

SAMPLING_BYTES = 32  # a logit of the newest token: fp32, its share and their sum in fp64 (jobs/nn/rollout.py)
LAUNCH_S = 10e-6  # a kernel from Python; those of a single token take less than that: an assumption
JUDGE_S = 1e-3  # of a rule, for a response: an assumption


@dataclass(frozen=True, kw_only=True)
class Iteration(Step):
    """Seconds of one iteration: the update, by use as in a Step, and the phases before it."""

    rollout_s: float
    score_s: float


def has_phases(stage: StageSpec) -> bool:
    """Whether ``stage`` is planned here."""
    return stage.kind in ("ppo", "dpo", COMPARE)


def frozen_models(stage: StageSpec) -> int:
    """Models that are only asked."""
    o = stage.options
    return {"ppo": 2 if o.get("reward") else 1, "dpo": 1, COMPARE: int(bool(o.get("samples")))}.get(stage.kind, 0)


# Memory


def phase_bytes(
    model: ModelSpec, stage: StageSpec, data: int, micro_batches: int, *, on_gpu: bool = True
) -> dict[str, dict[str, float]]:
    """Bytes of one rank in each phase, by memory.PARTS and what is beside them: frozen, average, kv_cache."""
    p = stage.parallel
    mine = sharded_params(model, slice_of(model, stage, 0, 1), p.tensor)
    base = rank_bytes(model, stage, 0, data, micro_batches, on_gpu=on_gpu)
    frozen = frozen_models(stage) * 4 * mine / (data if p.zero == 3 else 1)  # fp32 (jobs/runtime/start.py)
    if stage.kind == "dpo":
        return {"update": base | {"frozen": frozen}}
    if stage.kind == COMPARE:
        rollout = rollout_bytes(model, stage) if frozen else {}
        return {"rollout": {"frozen": frozen, **rollout, "other": base["other"]}}
    # One engine's gradients at a time, but for what DeepSpeed allocates once
    lasting = 2 * base["gradients"] if stage.engine == "deepspeed" and p.zero in (0, 3) else 0.0
    a_bucket = _width(stage) * bucket(stage) if stage.engine == "deepspeed" and p.zero == 3 else 0.0  # of each engine
    held = {
        "weights": 2 * base["weights"],
        "gradients": lasting,
        "optimizer": 2 * base["optimizer"],
        "frozen": frozen,
        "average": 4 * mine / (data if p.zero else 1) if stage.options.get("ema", 1) is not None else 0.0,
        "other": base["other"],
    }
    scoring = {
        "activations": _passing_bytes(model, stage, p.micro_batch * model.seq_len),
        "logits": logit_bytes(model, stage, on_gpu=on_gpu),
        "buffers": base["buffers"] + spared_bytes(model, stage) + a_bucket,
    }
    training = {name: base[name] for name in ("activations", "logits")} | {"buffers": base["buffers"] + a_bucket}
    rollout = rollout_bytes(model, stage)
    return {
        "rollout": held | rollout | {"buffers": rollout["buffers"] + 2 * a_bucket},
        "score": held | scoring,
        "update": held | training | {"gradients": max(lasting, base["gradients"])},
    }


def rollout_bytes(model: ModelSpec, stage: StageSpec) -> dict[str, float]:
    """While responses are sampled: the cache, and a copy of a policy that is sharded or cast."""
    p, rows, width = stage.parallel, rollout_batch(stage), _width(stage)
    cast = stage.kind == "ppo" and stage.engine == "torch" and (p.zero > 0 or stage.precision == "bf16")
    copied = p.zero == 3 or cast
    return {
        "kv_cache": cache_bytes(model, stage, rows * model.seq_len),
        "buffers": width * sharded_params(model, slice_of(model, stage, 0, 1), p.tensor) if copied else 0.0,
        "activations": _passing_bytes(model, stage, rows * (model.seq_len - stage.options["max_tokens"])),
        "logits": SAMPLING_BYTES * rows * model.vocab,
    }


def rollout_batch(stage: StageSpec) -> int:
    """Responses a rank samples at a time."""
    return stage.parallel.micro_batch if stage.kind == COMPARE else int(stage.options["rollout_batch"])


def cache_bytes(model: ModelSpec, stage: StageSpec, tokens: float) -> float:
    """Keys and values of ``tokens``."""
    return 2 * model.layers * model.kv_hidden / stage.parallel.tensor * _width(stage) * tokens


def _passing_bytes(model: ModelSpec, stage: StageSpec, tokens: int) -> float:
    """What one layer holds at work where nothing waits for a backward pass."""
    return _width(stage) * tokens * (2 * model.ffn / stage.parallel.tensor + 4 * model.hidden)


# Time


def iteration(
    model: ModelSpec, stage: StageSpec, c: Chip, data: int, micro_batches: int, software: Software
) -> Iteration:
    """The time of one iteration over ``micro_batches`` a data rank."""
    rows = micro_batches * stage.parallel.micro_batch
    if stage.kind == COMPARE:
        sampling = rollout_s(model, stage, c, data, rows, software) if frozen_models(stage) else 0.0
        nothing = dict.fromkeys((f.name for f in fields(Step)), 0.0)
        return Iteration(rollout_s=sampling, score_s=rows * JUDGE_S, **nothing)
    reading = forward_s(model, stage, c, data, micro_batches, software)
    if stage.kind == "dpo":
        learning = step(model, stage, c, data, micro_batches, software)
        return Iteration(rollout_s=0.0, score_s=reading, **vars(learning))
    o = stage.options
    turns = max(1, micro_batches // o["minibatches"])
    text = round(turns * o["ptx_ratio"]) if o["ptx_coef"] else 0  # micro-batches of pretraining text, for the actor
    actor, critic = (step(model, stage, c, data, n, software) for n in (turns + text, turns))
    updates = o["minibatches"] * o["inner_epochs"]
    return Iteration(
        rollout_s=rollout_s(model, stage, c, data, rows, software),
        score_s=(2 + frozen_models(stage)) * reading,
        **{name: updates * (s + vars(critic)[name]) for name, s in vars(actor).items()},
    )


def rollout_s(model: ModelSpec, stage: StageSpec, c: Chip, data: int, rows: int, software: Software) -> float:
    """Seconds in which a data rank samples ``rows`` responses, `rollout_batch` at a time.

    The prompts pass as in training. Then each token takes what is slowest: to read weights and cache [P], to compute,
    or to launch its kernels.
    """
    p, response = stage.parallel, stage.options["max_tokens"]
    batch, prompt = min(rows, rollout_batch(stage)), model.seq_len - response
    prompts = layer(replace(model, seq_len=max(1, prompt)), c, batch, p.tensor, False, stage.precision, software)
    weights = model.params / p.tensor
    token = max(
        (_width(stage) * weights + cache_bytes(model, stage, batch * (prompt + response / 2))) / c.memory,
        2 * weights * batch / c.matmul,
        0.0 if c.cpu else model.layers * FORWARD_KERNELS * LAUNCH_S,
    )
    token += 2 * model.layers * COLLECTIVE_S if p.tensor > 1 else 0.0
    copied = p.zero == 3 or (stage.kind == "ppo" and stage.engine == "torch" and p.zero > 0)
    group = model.layers * (prompts.forward_s + prompts.tensor_forward_s) + response * token
    return (_gather_s(model, stage, c, data) if copied else 0.0) + math.ceil(rows / batch) * group


def forward_s(model: ModelSpec, stage: StageSpec, c: Chip, data: int, micro_batches: int, software: Software) -> float:
    """Seconds of a forward pass alone over ``micro_batches``; with ZeRO-3 each gathers the weights first."""
    p = stage.parallel
    one = layer(model, c, p.micro_batch, p.tensor, p.sequence, stage.precision, software)
    vocab = math.ceil(model.vocab / p.tensor / 64) * 64
    head = matmul_s(c, model.seq_len * p.micro_batch, vocab, model.hidden, width=_width(stage))
    gather = _gather_s(model, stage, c, data) if p.zero == 3 else 0.0
    return micro_batches * (model.layers * (one.forward_s + one.tensor_forward_s) + head + gather)


def _gather_s(model: ModelSpec, stage: StageSpec, c: Chip, data: int) -> float:
    """All that a tensor rank has of the weights, from the data ranks that share them."""
    p = stage.parallel
    rate = c.link if data * p.tensor <= c.per_node else c.network * GATHER_SHARE
    return _width(stage) * model.params / p.tensor * (data - 1) / data / rate


def passes(stage: StageSpec) -> tuple[float, float]:
    """How often an iteration passes forward alone over its tokens, and how often it trains on them, all models
    together. A forward pass is a third of training."""
    o, frozen = stage.options, frozen_models(stage)
    if stage.kind == COMPARE:
        return frozen, 0.0
    if stage.kind != "ppo":
        return frozen, 1.0
    asked = 1 + 2 + frozen  # the rollout, and the scores of all models
    return asked, o["inner_epochs"] * (2 + (o["ptx_ratio"] if o["ptx_coef"] else 0))


def _width(stage: StageSpec) -> int:
    return 2 if stage.precision == "bf16" else 4
