"""The best layouts of a stage: all that divide and fit, by speed, by money, or on the fewest nodes.

Every layout is planned with the same arithmetic as `orch plan`, so that what is found is as right as that.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.checks import check, ranges
from orchestrator.errors import PlanError
from orchestrator.plan import Estimate, estimate, memory, overrides, refusal, step_time
from orchestrator.registry import find
from orchestrator.spec import Experiment, Limits, ModelSpec, ParallelPlan, StageSpec

Goal = Literal["speed", "money", "nodes"]
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
KEYS = (
    "nodes", "tensor", "ulysses", "pipeline", "interleave", "sequence", "zero", "offload", "micro_batch", "recompute",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Found:
    """One layout, what it takes, and how to ask for it."""

    estimate: Estimate
    parallel: ParallelPlan
    overrides: str  # to type behind the config; empty: it is the config's own


def search(
    experiment: Experiment, name: str, *, goal: Goal = "speed", gpus: int | None = None, top: int = 5
) -> list[Found]:
    """The ``top`` layouts of stage ``name`` on ``gpus``, or on as many as it asks for, best first.

    For `speed` on all of them. For `money`, the fewest GPU-hours, on all nodes, a half, a quarter and so on; for
    `nodes`, on the fewest that fit, and the fastest on them.

    Raises:
        PlanError: nothing divides or fits, a rule is broken that no layout mends, or ``gpus`` are no whole nodes.
    """
    stage, cluster = experiment.stages[name], experiment.cluster
    if not find("jobs", stage.kind).PER_GPU:
        raise PlanError(f"stage `{name}` has no layout: kind `{stage.kind}` runs as one process")
    if broken := list(ranges(experiment, name)):
        raise refusal(broken)  # layouts divide by these numbers
    if gpus is not None and (gpus < 1 or gpus % cluster.gpus_per_node):
        below = gpus // cluster.gpus_per_node * cluster.gpus_per_node
        near = " or ".join(str(n) for n in (below, below + cluster.gpus_per_node) if n)
        raise PlanError(f"{gpus} GPUs are no whole nodes of {cluster.gpus_per_node}", hint=f"`--gpus` may be {near}")
    nodes = gpus // cluster.gpus_per_node if gpus else stage.parallel.nodes
    ranked: list[tuple[float, float, ParallelPlan]] = []  # what is wanted least of, the memory it takes, the layout
    for n in _node_counts(nodes, goal):
        # the tokens are given: days go with the step, GPU-hours with the step times the nodes
        timed = list(_timed(experiment, stage, n))
        timed += _own(experiment, name, [p for *_, p in timed]) if n == stage.parallel.nodes else []
        ranked += [(step_s * (n if goal == "money" else 1), gb, p) for step_s, gb, p in timed]
        ranked.sort(key=lambda item: item[:2])
        if goal != "nodes" and n < nodes:
            continue
        if best := _confirmed(experiment, name, [p for *_, p in ranked], top):
            return best
    raise _nothing(experiment, name, nodes, [p for *_, p in ranked])


def _node_counts(nodes: int, goal: Goal) -> list[int]:
    """How many nodes to try, fewest first."""
    if goal == "speed":
        return [nodes]
    if goal == "nodes":
        return list(range(1, nodes + 1))
    return sorted({max(1, nodes >> k) for k in range(nodes.bit_length())})


def _nothing(experiment: Experiment, name: str, nodes: int, fitting: list[ParallelPlan]) -> PlanError:
    """Why ``nodes`` have no layout: a rule that those ``fitting`` break, sizes that do not divide, or memory."""
    stage, cluster = experiment.stages[name], experiment.cluster
    limits: Limits = find("jobs.engines", stage.engine).LIMITS

    def layouts(n: int) -> Iterator[ParallelPlan]:
        return _layouts(experiment.model, stage, n, cluster.gpus_per_node)

    def refused(p: ParallelPlan) -> bool:
        return bool(limits.refusals(replace(stage, parallel=p)))

    first = next(layouts(nodes), None)
    broken = fitting[0] if fitting else first if first and all(map(refused, layouts(nodes))) else None
    if broken:
        other = replace(experiment, stages={**experiment.stages, name: replace(stage, parallel=broken)})
        return refusal(check(other, name))
    where = f"{nodes * cluster.gpus_per_node} `{cluster.gpu}`"
    if first:
        return PlanError(
            f"stage `{name}`: no layout of engine `{stage.engine}` fits {where} of {cluster.gpu_memory_gb:g} GB",
            hint="more GPUs with `--gpus`, larger ones with `cluster=`, another `engine`, or `offload`, which is not "
            "searched",
        )
    fewer, more = range(nodes, 0, -1), range(nodes, 4 * nodes)
    near = [n for counts in (fewer, more) if (n := next((n for n in counts if any(layouts(n))), 0))]
    said = " or ".join(str(n * cluster.gpus_per_node) for n in near)
    return PlanError(
        f"stage `{name}`: batches of {_batch_unit(stage)} do not divide by the data ranks that {where} make, however "
        f"the {experiment.model.layers} layers and {experiment.model.heads} heads are cut",
        hint=f"`--gpus` may be {said}" if said else f"another `stages.{name}.global_batch`",
    )


def _timed(experiment: Experiment, stage: StageSpec, nodes: int) -> Iterator[tuple[float, float, ParallelPlan]]:
    """The step time and GB of every layout on ``nodes`` that divides, that the engine runs, and that fits."""
    cluster = experiment.cluster
    limits: Limits = find("jobs.engines", stage.engine).LIMITS
    runs: dict[tuple[object, ...], bool] = {}  # by what refusals speak of: there are few, and layouts are many
    for p in _layouts(experiment.model, stage, nodes, cluster.gpus_per_node):
        kind = (p.tensor > 1, p.pipeline > 1, p.interleave > 1, p.sequence, p.zero, p.recompute)
        if kind not in runs:
            runs[kind] = not limits.refusals(replace(stage, parallel=p))
        if not runs[kind]:
            continue
        other = replace(stage, parallel=p)
        if (gb := memory(experiment.model, other, cluster)[1]["total"]) <= cluster.gpu_memory_gb:
            yield step_time(experiment.model, other, cluster, stage.global_batch).total_s, gb, p


def _own(experiment: Experiment, name: str, known: list[ParallelPlan]) -> Iterator[tuple[float, float, ParallelPlan]]:
    """What `_timed` says, of the config's own layout where no search finds it: with offload, say, or ulysses."""
    stage, cluster = experiment.stages[name], experiment.cluster
    if stage.parallel in known or check(experiment, name):
        return
    if (gb := memory(experiment.model, stage, cluster)[1]["total"]) <= cluster.gpu_memory_gb:
        yield step_time(experiment.model, stage, cluster, stage.global_batch).total_s, gb, stage.parallel


def _layouts(model: ModelSpec, stage: StageSpec, nodes: int, per_node: int) -> Iterator[ParallelPlan]:
    """Every way to cut ``stage`` over ``nodes``, by what divides what (checks.py)."""
    world, batch = nodes * per_node, _batch_unit(stage)
    heads = math.gcd(model.heads, model.kv_heads or model.heads, model.ffn, per_node)
    for tensor in _divisors(heads):
        for pipeline in _divisors(model.layers):
            if world % (tensor * pipeline):
                continue
            data = world // (tensor * pipeline)
            for micro_batch in MICRO_BATCHES:
                if batch % (data * micro_batch):
                    continue
                yield from _variants(model, stage, nodes, tensor, pipeline, micro_batch, batch // (data * micro_batch))


def _variants(
    model: ModelSpec, stage: StageSpec, nodes: int, tensor: int, pipeline: int, micro_batch: int, micro_batches: int
) -> Iterator[ParallelPlan]:
    """Interleave, recompute, ZeRO and sequence parallel of one cut. Scores are never kept, so that selective
    recompute would cost time and save nothing."""
    chunks = [
        v for v in _divisors(model.layers // pipeline) if v == 1 or (pipeline > 1 and micro_batches % pipeline == 0)
    ]
    for interleave in chunks:
        for recompute in ("none", "full"):
            for zero in (0, 1, 2, 3):
                for sequence in (False, True) if tensor > 1 else (False,):
                    yield ParallelPlan(
                        nodes=nodes, tensor=tensor, pipeline=pipeline, interleave=interleave, sequence=sequence,
                        zero=zero, offload="none", micro_batch=micro_batch, recompute=recompute,
                    )  # fmt: skip


def _batch_unit(stage: StageSpec) -> int:
    """What data x micro_batch must divide: the batch, and what it grows from and by."""
    s = stage.schedule
    return math.gcd(stage.global_batch, s.ramp_from or 0, s.ramp_step or 0)


def _confirmed(experiment: Experiment, name: str, ranked: list[ParallelPlan], top: int) -> list[Found]:
    """The first ``top`` of ``ranked`` that keep every rule, with their estimates."""
    found: list[Found] = []
    stage = experiment.stages[name]
    for p in ranked:
        other = replace(experiment, stages={**experiment.stages, name: replace(stage, parallel=p)})
        if check(other, name):
            continue
        change = {key: getattr(p, key) for key in KEYS if getattr(p, key) != getattr(stage.parallel, key)}
        found.append(Found(estimate=estimate(other, name), parallel=p, overrides=overrides(name, change)))
        if len(found) == top:
            break
    return found


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
