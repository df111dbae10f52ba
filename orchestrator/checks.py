"""The rules a stage must keep before it is worth a GPU: what divides, what the engine can, what the cluster has.

Each broken rule is a Problem with both numbers and the nearest values that keep it. The rules of 3D parallelism
are Megatron's (Narayanan et al. 2021, arXiv:2104.04473, sections 2 and 3).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.failures import storage_gb
from orchestrator.hardware import lacks_bf16
from orchestrator.memory import host_bytes
from orchestrator.registry import did_you_mean, find
from orchestrator.schedule import total_tokens
from orchestrator.spec import (
    BF16_SUMS,
    ClusterSpec,
    DataSpec,
    Experiment,
    Limits,
    ModelSpec,
    ParallelPlan,
    StageSpec,
    asks,
    checkpoint_gb,
    summed,
)
from orchestrator.store import mask

RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "at least 1": (
        lambda x: x >= 1,
        "model.layers model.hidden model.heads model.vocab model.seq_len model.kv_heads model.ffn_hidden "
        "model.window cluster.gpus_per_node cluster.nodes parallel.nodes parallel.tensor parallel.ulysses "
        "parallel.pipeline parallel.interleave parallel.micro_batch global_batch eval_samples save_every keep "
        "schedule.ramp_from schedule.ramp_step",
    ),
    "more than 0": (
        lambda x: 0 < x < math.inf,
        "model.norm_eps model.rope_theta cluster.gpu_memory_gb cluster.node_memory_gb cluster.gpu_tflops "
        "cluster.checkpoint_gb_per_s cluster.matmul_tflops cluster.memory_gb_per_s cluster.link_gb_per_s "
        "cluster.network_gb_per_s cluster.storage_tb cluster.step_factor cluster.memory_factor "
        "optimizer.lr optimizer.eps schedule.decay_tokens",
    ),
    "at least 0": (
        lambda x: 0 <= x < math.inf,
        "model.init_std cluster.usd_per_gpu_hour cluster.gpu_watts cluster.failures_per_node_day cluster.restart_s "
        "cluster.queue_s optimizer.weight_decay optimizer.clip schedule.warmup_tokens "
        "schedule.ramp_tokens steps eval_every skip_batches seed data.seed",
    ),
    "from 0 to 1": (lambda x: 0 <= x <= 1, "schedule.min_lr_ratio"),
    "from 0 up to but not 1": (lambda x: 0 <= x < 1, "model.dropout data.val_fraction optimizer.betas"),
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One broken rule."""

    message: str
    hint: str = ""


def check(experiment: Experiment, name: str) -> list[Problem]:
    """Every rule that stage ``name`` breaks. A stage that does not run on every GPU has few to keep."""
    stage, model, cluster = experiment.stages[name], experiment.model, experiment.cluster
    found = list(ranges(experiment, name))
    if found:
        return found  # the other rules divide by these numbers
    found += _model(model)
    found += _tracking(experiment.tracking.uri)
    found += _sources(experiment.data)
    found += _examples(experiment.data)
    if not find("jobs", stage.kind).PER_GPU:
        return found
    where = f"stages.{name}"
    limits: Limits = find("jobs.engines", stage.engine).LIMITS
    found += _machines(where, stage, cluster)
    found += _split(where, stage, model, cluster)
    found += _batch(where, stage, cluster)
    found += _rounds(where, stage, cluster, limits)
    found += _sums(where, stage, cluster, limits)
    found += _engine(where, stage, limits)
    found += _schedule(where, stage, model)
    found += _saves(where, stage, model, cluster)
    found += _host(where, stage, model, cluster)
    return found


def ranges(experiment: Experiment, name: str) -> Iterator[Problem]:
    """Numbers that no run can have."""
    for words, (holds, keys) in RANGES.items():
        for key in keys.split():
            of_stage = key.split(".")[0] not in ("model", "cluster", "data")
            value: Any = experiment.stages[name] if of_stage else experiment
            for part in key.split("."):
                value = getattr(value, part)
            full = f"stages.{name}.{key}" if of_stage else key
            for x in value if isinstance(value, tuple) else (value,):
                if x is not None and not holds(x):
                    yield Problem(message=f"`{full}` is {x:g}, and must be {words}")


def _model(model: ModelSpec) -> Iterator[Problem]:
    """A model that cannot be built."""
    if model.hidden % model.heads:
        yield Problem(
            message=f"model: `hidden` {model.hidden} does not divide by `heads` {model.heads}",
            hint=f"`model.heads` may be {_any(_divisors(model.hidden, model.heads))}",
        )
    elif model.position == "rope" and model.head_dim % 2:
        yield Problem(
            message=f"model: rope turns pairs, and `hidden` {model.hidden} / `heads` {model.heads} = {model.head_dim}",
            hint="choose `model.heads` so that `hidden` / `heads` is even",
        )
    if model.kv_heads and model.heads % model.kv_heads:
        yield Problem(
            message=f"model: `heads` {model.heads} does not divide by `kv_heads` {model.kv_heads}",
            hint=f"`model.kv_heads` may be {_any(_divisors(model.heads, model.kv_heads))}",
        )
    if model.attention != "dense" and model.window > model.seq_len:
        yield Problem(
            message=f"model: `window` {model.window} is longer than `seq_len` {model.seq_len}",
            hint=f"`model.window` may be 1 to {model.seq_len}; or `model.attention=dense`",
        )


def _tracking(uri: str | None) -> Iterator[Problem]:
    """A secret in the config would be copied into every run folder."""
    if uri and mask(uri) != uri:
        yield Problem(
            message=f"`tracking.uri` {mask(uri)} names a user or a password, and configs are kept in run folders",
            hint="leave them out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )


def _sources(data: DataSpec) -> Iterator[Problem]:
    """Weights that are no shares."""
    weights = {name: source.weight for name, source in data.sources.items()}
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            yield Problem(message=f"`data.sources.{name}.weight` is {weight:g}, and must be at least 0")
    if weights and not any(weights.values()):
        yield Problem(message="all weights in `data.sources` are 0", hint="give one source a share of the samples")


def _examples(data: DataSpec) -> Iterator[Problem]:
    """Lengths that leave nothing."""
    for name, examples in data.examples.items():
        for key, least in (("max_prompt", 1), ("max_response", 2)):  # a response is a token and the end
            value = getattr(examples, key)
            if value is not None and value < least:
                yield Problem(message=f"`data.examples.{name}.{key}` is {value}, and must be at least {least}")


def _machines(where: str, stage: StageSpec, cluster: ClusterSpec) -> Iterator[Problem]:
    """Nodes there are not, a number format the GPU has not, tensor groups that leave a node."""
    p = stage.parallel
    if cluster.nodes is not None and p.nodes > cluster.nodes:
        yield Problem(
            message=f"`{where}.parallel.nodes` is {p.nodes}, and the cluster has {cluster.nodes}",
            hint=f"`{where}.parallel.nodes` may be 1 to {cluster.nodes}",
        )
    if stage.precision == "bf16" and lacks_bf16(cluster.gpu):
        yield Problem(
            message=f"`{where}.precision` is bf16, which `{cluster.gpu}` does not have",
            hint=f"`{where}.precision=fp32`, or an A100 or newer",
        )
    if cluster.gpus_per_node % p.tensor:
        yield Problem(
            message=f"`{where}.parallel.tensor` {p.tensor} does not divide the {cluster.gpus_per_node} GPUs of a node; "
            "its all-reduces would leave the node",
            hint=f"`{where}.parallel.tensor` may be {_any(_divisors(cluster.gpus_per_node, p.tensor))}",
        )


def _split(where: str, stage: StageSpec, model: ModelSpec, cluster: ClusterSpec) -> Iterator[Problem]:
    """Layers over pipeline stages, everything inside a layer over tensor."""
    p = stage.parallel
    if model.layers % p.pipeline:
        yield Problem(
            message=f"`model.layers` {model.layers} do not split into `{where}.parallel.pipeline` {p.pipeline}",
            hint=f"`{where}.parallel.pipeline` may be {_any(_divisors(model.layers, p.pipeline))}",
        )
    elif model.layers % (p.pipeline * p.interleave):
        yield Problem(
            message=f"`model.layers` {model.layers} do not split into pipeline {p.pipeline} x "
            f"`{where}.parallel.interleave` {p.interleave} = {p.pipeline * p.interleave} chunks",
            hint=f"`{where}.parallel.interleave` may be {_any(_divisors(model.layers // p.pipeline, p.interleave))}",
        )
    tensors = _any(_divisors(math.gcd(model.heads, model.kv_heads or model.heads, cluster.gpus_per_node), p.tensor))
    for key, size in {"heads": model.heads, "kv_heads": model.kv_heads}.items():
        if size and size % p.tensor:
            yield Problem(
                message=f"`model.{key}` {size} does not split over `{where}.parallel.tensor` {p.tensor}",
                hint=f"`{where}.parallel.tensor` may be {tensors}",
            )
    yield from _rows(where, p, model)
    sizes = {"ffn_hidden": model.ffn, **({"seq_len": model.seq_len} if p.sequence else {})}
    for key, size in sizes.items():  # not the vocabulary: some ranks hold a row of it more (jobs/nn/cut.py)
        if size % p.tensor:
            yield Problem(
                message=f"`model.{key}` {size} does not split over `{where}.parallel.tensor` {p.tensor}",
                hint=f"`model.{key}` may be {_any(_multiples(size, p.tensor))}",
            )


def _rows(where: str, p: ParallelPlan, model: ModelSpec) -> Iterator[Problem]:
    """Heads and tokens over the ranks that share a row."""
    heads = math.gcd(model.heads, model.kv_heads or model.heads)
    for key, size in {"heads": model.heads, "kv_heads": model.kv_heads, "seq_len": model.seq_len}.items():
        if size and size % p.ulysses:
            yield Problem(
                message=f"`model.{key}` {size} does not split over `{where}.parallel.ulysses` {p.ulysses}",
                hint=f"`{where}.parallel.ulysses` may be {_any(_divisors(math.gcd(heads, model.seq_len), p.ulysses))}",
            )


def _batch(where: str, stage: StageSpec, cluster: ClusterSpec) -> Iterator[Problem]:
    """World over the ranks of a replica, batches over data x micro_batch."""
    p, s = stage.parallel, stage.schedule
    world = p.nodes * cluster.gpus_per_node
    if world % p.replica:
        unit = math.lcm(p.replica, cluster.gpus_per_node) // cluster.gpus_per_node
        yield Problem(
            message=f"`{where}`: {world} GPUs ({p.nodes} nodes x {cluster.gpus_per_node}) do not divide by "
            f"{p.replica_words}",
            hint=f"`{where}.parallel.nodes` may be {_any(_multiples(p.nodes, unit))}",
        )
        return
    data = world // p.replica
    each = data * p.micro_batch
    batches = {"global_batch": stage.global_batch, "schedule.ramp_from": s.ramp_from, "schedule.ramp_step": s.ramp_step}
    for key, size in batches.items():
        if size and size % each:
            yield Problem(
                message=f"`{where}.{key}` {size} does not divide by data {data} x micro_batch {p.micro_batch} = {each}",
                hint=f"`{where}.{key}` may be {_any(_multiples(size, each))}",
            )
    parts = max(1, stage.options.get("minibatches", 1))
    if stage.global_batch % each == 0 and stage.global_batch % (parts * each):
        yield Problem(
            message=f"`{where}.global_batch` {stage.global_batch} does not divide by `options.minibatches` {parts} x "
            f"data {data} x micro_batch {p.micro_batch} = {parts * each}",
            hint=f"`{where}.global_batch` may be {_any(_multiples(stage.global_batch, parts * each))}",
        )
    elif stage.global_batch % each == 0 and stage.options.get("ptx_coef"):
        responses, ratio = stage.global_batch // parts, stage.options["ptx_ratio"]
        if ratio > 0 and (responses * ratio) % each:  # a whole ratio always splits, as the responses do
            yield Problem(
                message=f"`{where}.options.ptx_ratio` {ratio:g} x {responses} responses of a minibatch = "
                f"{responses * ratio:g} does not divide by data {data} x micro_batch {p.micro_batch} = {each}",
                hint=f"`{where}.options.ptx_ratio` may be {_any(_multiples(int(ratio), 1))}",
            )


def _rounds(where: str, stage: StageSpec, cluster: ClusterSpec, limits: Limits) -> Iterator[Problem]:
    """Micro-batches that fill a pipeline; interleaved, they come in rounds of as many as there are stages."""
    p, s = stage.parallel, stage.schedule
    data, left = divmod(p.nodes * cluster.gpus_per_node, p.replica)
    if left or p.pipeline == 1:
        return
    stages, each = p.pipeline, data * p.micro_batch
    batches = {"global_batch": stage.global_batch, "schedule.ramp_from": s.ramp_from, "schedule.ramp_step": s.ramp_step}
    for key, size in batches.items():
        turns, left = divmod(size or 0, each)
        short = limits.full_pipeline and turns < stages and key != "schedule.ramp_step"
        if size and not left and (short or (p.interleave > 1 and turns % stages)):
            words = "at least as many" if p.interleave == 1 else "a multiple of them"
            yield Problem(
                message=f"`{where}.{key}` {size} makes {turns} micro-batches for a pipeline of {stages} stages, and "
                f"engine `{stage.engine}` needs {words}",
                hint=f"`{where}.{key}` may be {_any(_multiples(size, each * stages))}",
            )


def _sums(where: str, stage: StageSpec, cluster: ClusterSpec, limits: Limits) -> Iterator[Problem]:
    """Micro-batches whose gradients add up in bf16, too many for its 8 bits."""
    p = stage.parallel
    data = p.nodes * cluster.gpus_per_node // p.replica
    turns = summed(stage, data)
    in_bf16 = stage.precision == "bf16" and limits.bf16_sums is not None and asks(stage, limits.bf16_sums)
    if in_bf16 and turns > BF16_SUMS and stage.kind != "compare":  # which has no gradients
        where_not = [f"`zero: {zero}`" for zero in (2, 3) if zero not in (limits.bf16_sums or {}).get("zero", (zero,))]
        yield Problem(
            message=f"`{where}`: engine `{stage.engine}` would add up {turns} micro-batches in bf16, and sums of "
            f"more than {BF16_SUMS} lose what each brings",
            hint=f"`{where}.parallel.micro_batch` may be {math.ceil(p.micro_batch * turns / BF16_SUMS)} and more"
            + (f"; or {_any(where_not)}, which then add in fp32" if where_not else "; or another `engine`"),
        )


def _engine(where: str, stage: StageSpec, limits: Limits) -> Iterator[Problem]:
    """What the engine's LIMITS do not allow."""
    engine = f"engine `{stage.engine}`"
    for refusal in limits.refusals(stage):
        asked = ", ".join(_asked(stage, name) for name in refusal.when)
        yield Problem(message=f"`{where}`: {engine} cannot run {asked}: {refusal.why}", hint=refusal.instead)
    if stage.engine_config and not limits.allowed:
        yield Problem(message=f"`{where}.engine_config` has keys, and {engine} takes none", hint="take them out")
        return
    for key in _keys(stage.engine_config):
        if _within(key, limits.owned):
            yield Problem(
                message=f"`{where}.engine_config.{key}` is the plan's to set",
                hint=f"take it out; `{where}` says it in `parallel`, `global_batch`, `precision` or `optimizer`",
            )
        elif not _within(key, limits.allowed):
            yield Problem(
                message=f"`{where}.engine_config.{key}`: {engine} has not been shown to compute the same with it",
                hint=did_you_mean(key, list(limits.allowed)),
            )
        elif key in limits.choices and (value := _at(stage.engine_config, key)) not in limits.choices[key]:
            yield Problem(
                message=f"`{where}.engine_config.{key}` is `{value}`",
                hint=f"it may be {_any(str(c).lower() for c in limits.choices[key])}",
            )


def _asked(stage: StageSpec, name: str) -> str:
    inside = hasattr(stage.parallel, name)
    value = getattr(stage.parallel if inside else stage, name)
    return f"`{'parallel.' if inside else ''}{name}={str(value).lower() if isinstance(value, bool) else value}`"


def _schedule(where: str, stage: StageSpec, model: ModelSpec) -> Iterator[Problem]:
    """Steps, warm-up, decay and ramp in an order that makes sense."""
    s = stage.schedule
    if stage.steps < 1:
        yield Problem(
            message=f"`{where}.steps` is {stage.steps}, and kind `{stage.kind}` trains",
            hint=f"such as `{where}.steps=1000`",
        )
        return
    if s.ramp_from is None and (s.ramp_tokens or s.ramp_step):
        key = "ramp_tokens" if s.ramp_tokens else "ramp_step"
        yield Problem(
            message=f"`{where}.schedule.{key}` is {getattr(s, key):.4g}, and there is no `ramp_from`",
            hint=f"say where the batch begins; or, for no ramp, `{where}.schedule.ramp_tokens=0` and "
            f"`{where}.schedule.ramp_step=null`",
        )
    if s.ramp_from is not None and not s.ramp_tokens:
        yield Problem(
            message=f"`{where}.schedule.ramp_from` is {s.ramp_from}, and `ramp_tokens` is 0",
            hint="say after how many tokens the batch is whole, or `ramp_from: null`",
        )
        return
    if s.ramp_from is not None and s.ramp_from > stage.global_batch:
        yield Problem(
            message=f"`{where}.schedule.ramp_from` {s.ramp_from} is more than `global_batch` {stage.global_batch}",
            hint="a ramp goes up",
        )
        return
    total = total_tokens(stage, model.seq_len)
    end, what = (total, "the whole run") if s.decay_tokens is None else (s.decay_tokens, "`decay_tokens`")
    for last, name in ((end, what), (total, "the whole run")):
        if s.warmup_tokens > last:
            yield Problem(
                message=f"`{where}.schedule.warmup_tokens` {s.warmup_tokens:.4g} is more than {name}: {last:.4g}",
                hint=f"`{where}.schedule.warmup_tokens` may be 0 to {last:.4g}",
            )
            return


def _host(where: str, stage: StageSpec, model: ModelSpec, cluster: ClusterSpec) -> Iterator[Problem]:
    """What is offloaded into less memory than it takes."""
    p, has_gb = stage.parallel, cluster.node_memory_gb
    data = p.nodes * cluster.gpus_per_node // p.replica
    needs_gb = cluster.gpus_per_node * host_bytes(model, stage, max(1, data)) / 1e9
    if has_gb is not None and needs_gb > has_gb:
        yield Problem(
            message=f"`{where}.parallel.offload` {p.offload} takes {needs_gb:,.0f} GB of each node's memory, and "
            f"`cluster.node_memory_gb` is {has_gb:g}",
            hint=f"`{where}.parallel.nodes` may be {math.ceil(p.nodes * needs_gb / has_gb)} and more",
        )


def _saves(where: str, stage: StageSpec, model: ModelSpec, cluster: ClusterSpec) -> Iterator[Problem]:
    """Checkpoints there is no room for."""
    gb = checkpoint_gb(model, stage)
    if cluster.storage_tb is not None and storage_gb(gb, stage.keep) > cluster.storage_tb * 1000:
        most = int(cluster.storage_tb * 1000 // gb) - 1
        yield Problem(
            message=f"`{where}.keep` {stage.keep} checkpoints of {gb:,.1f} GB, and one being written, are "
            f"{storage_gb(gb, stage.keep):,.1f} GB, and `cluster.storage_tb` is {cluster.storage_tb:g}",
            hint=f"`{where}.keep` may be {'1' if most == 1 else f'1 to {most}'}" if most > 0 else "more storage",
        )


def _keys(config: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Every key of ``config`` that has a value, dotted."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


def _at(config: Mapping[str, Any], key: str) -> Any:
    """The value of the dotted ``key``."""
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value


def _within(key: str, sections: Iterable[str]) -> bool:
    """Whether the dotted ``key`` is one of ``sections``, or in one."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _divisors(n: int, near: int, count: int = 4) -> list[int]:
    """The divisors of ``n`` nearest to ``near``, in order."""
    every = [d for d in range(1, n + 1) if n % d == 0]
    return sorted(sorted(every, key=lambda d: abs(d - near))[:count])


def _multiples(n: int, unit: int) -> list[int]:
    """The multiples of ``unit`` below and above ``n``."""
    below = n // unit * unit
    return [m for m in (below, below + unit) if m]


def _any(values: Any) -> str:
    """`2, 4 or 8`."""
    *most, last = [str(v) for v in values]
    return f"{', '.join(most)} or {last}" if most else last
