"""Planned memory against what PyTorch's allocator hands out, of small models on CPU ranks.

The profiler sees every block the allocator gives and takes back, storages that FSDP2 empties included. All cases of
a world size share one process group; the runtime itself, which the plan calls `other`, is not PyTorch's to count.
"""

import gc
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from torch.profiler import ProfilerActivity, profile, record_function

from jobs.nn.gpt import GPT
from jobs.nn.rollout import Sampling, generate
from jobs.pretrain import mean_loss
from jobs.runtime import dist
from jobs.runtime.mesh import place
from orchestrator.memory import rank_bytes
from orchestrator.phases import rollout_bytes
from orchestrator.registry import find
from orchestrator.spec import ModelSpec, ParallelPlan, StageSpec

pytestmark = [pytest.mark.slow, pytest.mark.parity]  # peaks move where other work delays a rank

MODEL = ModelSpec(layers=4, hidden=128, heads=4, vocab=512, seq_len=128)
MICRO, TURNS = 8, 4  # sequences in a micro-batch, micro-batches in a step
TOLERANCE = 0.05
# DeepSpeed's buckets hold half a billion elements unless told: as many as a test's models
BUCKETS = {"reduce_bucket_size": 200_000, "allgather_bucket_size": 200_000, "stage3_param_persistence_threshold": 0}


def case(engine, precision="fp32", **parallel):
    config = {"zero_optimization": BUCKETS} if engine == "deepspeed" and parallel.get("zero") else {}
    return StageSpec(
        kind="pretrain", engine=engine, precision=precision, engine_config=config, steps=2,
        parallel=ParallelPlan(micro_batch=MICRO, **parallel),
    )  # fmt: skip


TWO_RANKS = {
    "ddp": case("torch"),
    "ddp, bf16": case("torch", precision="bf16"),
    "ddp, full recompute": case("torch", recompute="full"),
    "fsdp zero 2": case("torch", zero=2),
    "fsdp zero 3": case("torch", zero=3),
    "fsdp zero 3, bf16": case("torch", zero=3, precision="bf16"),
    "torch tensor 2": case("torch", tensor=2),
    "deepspeed zero 0": case("deepspeed"),
    "deepspeed zero 0, bf16": case("deepspeed", precision="bf16"),
    "deepspeed zero 0, full recompute": case("deepspeed", recompute="full"),
    "deepspeed zero 1": case("deepspeed", zero=1),
    "deepspeed zero 2": case("deepspeed", zero=2),
    "deepspeed zero 3": case("deepspeed", zero=3),
    "deepspeed pipeline 2": case("deepspeed", pipeline=2),
    "deepspeed pipeline 2, full recompute": case("deepspeed", pipeline=2, recompute="full"),
    "colossalai zero 0": case("colossalai"),
    "colossalai zero 1": case("colossalai", zero=1),
    "colossalai zero 2": case("colossalai", zero=2),
    "colossalai pipeline 2": case("colossalai", pipeline=2),
    "colossalai pipeline 2, interleave 2": case("colossalai", pipeline=2, interleave=2),
}


# prompt, response, how many at once
ROLLOUTS = [(64, 64, 16), (64, 192, 32), (128, 128, 16)]


def peaks(ranks, cases):
    """Most bytes allocated in a step of each case, on this rank, once the optimizer has its state."""
    return {name: _peak(stage, MODEL, ranks) for name, stage in cases.items()}


def _peak(stage, model, ranks):
    at = place(ranks.rank, ranks.world, stage.parallel)
    generator = torch.Generator().manual_seed(at.data)
    batches = [
        {k: torch.randint(0, model.vocab, (MICRO, model.seq_len), generator=generator) for k in ("tokens", "targets")}
        for _ in range(TURNS)
    ]

    def make(tensor=None):
        return GPT(model, recompute=stage.parallel.recompute, tensor=tensor)

    stage = replace(stage, global_batch=MICRO * TURNS * at.data_size)
    dist.seed(stage.seed, ranks, stage.parallel)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        engine = find("jobs.engines", stage.engine).build(make, stage, ranks, mean_loss)
        for _ in range(2):
            with record_function("STEP"):
                engine.train_step(batches, lr=1e-3)
    if hasattr(engine, "engine"):
        engine.engine.destroy()
    del engine
    gc.collect()
    dist.barrier()
    # DeepSpeed gives the optimizer its state in the first step, the torch engine before
    return _most(p.profiler.kineto_results.events(), 0 if stage.engine == "torch" else 1)


def _most(events, first):
    """The least of the peaks of the steps from ``first`` on: blocks that gloo's threads free are missed, and add up."""
    steps = sorted((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == "STEP")
    now, series = 0, []
    for at, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        series.append((at, now))
    return min(max(held for at, held in series if begin <= at <= end) for begin, end in steps[first:])


def planned(stage, at):
    parts = rank_bytes(MODEL, stage, at.pipeline, at.data_size, TURNS, on_gpu=False)
    return sum(size for name, size in parts.items() if name != "other")


def compare(cases, world):
    """Planned over measured, less 1, by case and pipeline stage. Ranks of a stage hold the same: the least counts,
    because blocks that threads free are missed now and then, and only ever add."""
    measured = run_ranks(peaks, world, cases, timeout_s=900)
    errors = {}
    for name, stage in cases.items():
        places = [place(rank, world, stage.parallel) for rank in range(world)]
        for index in range(stage.parallel.pipeline):
            is_now = min(measured[r][name] for r, at in enumerate(places) if at.pipeline == index)
            was = planned(stage, next(at for at in places if at.pipeline == index))
            errors[name, index] = was / is_now - 1
            print(f"{name:38} stage {index}  planned {was / 1e6:6.2f} MB  measured {is_now / 1e6:6.2f} MB  "
                  f"{errors[name, index]:+.1%}")  # fmt: skip
    return errors


def test_two_ranks():
    errors = compare(TWO_RANKS, 2)
    assert abs(errors.pop(("deepspeed zero 3", 0))) < 0.10  # what is gathered ahead depends on timing
    assert len({name for name, _ in errors}) >= 19
    assert {key: e for key, e in errors.items() if abs(e) > TOLERANCE} == {}


@pytest.mark.parametrize(("prompt", "response", "rows"), ROLLOUTS)
def test_rollouts(prompt, response, rows):
    model = replace(MODEL, seq_len=prompt + response)
    gpt, sampling = GPT(model), Sampling(max_tokens=response)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p, record_function("STEP"):
        generate(gpt, [[1] * prompt] * rows, sampling, end=0, seed=1)
    is_now = _most(p.profiler.kineto_results.events(), 0)
    options = {"rollout_batch": rows, "max_tokens": response}
    stage = StageSpec(kind="ppo", engine="deepspeed", precision="fp32", options=options)
    was = sum(rollout_bytes(model, stage).values())
    assert abs(was / is_now - 1) <= TOLERANCE, (was, is_now)
