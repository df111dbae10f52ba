"""A checkpoint goes through engines, layouts and numbers of ranks: not a bit of it changes on the way, and training
goes on as if nothing had happened.

Each hop loads what the one before saved, saves it at once, trains two steps and saves again. The ranks of
neighbouring hops share a process group where they are as many.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks

from jobs.nn.gpt import GPT
from jobs.pretrain import mean_loss
from jobs.runtime import dist, pieces
from jobs.runtime.mesh import place
from jobs.runtime.pieces import Extent, Store
from jobs.runtime.resume import PROBE_TOLERANCE
from orchestrator import registry
from orchestrator.spec import ModelSpec, OptimizerSpec, ParallelPlan, StageSpec

pytestmark = [pytest.mark.slow, pytest.mark.parity]

MODEL = ModelSpec(layers=4, hidden=32, heads=4, vocab=96, seq_len=16, kv_heads=2, activation="swiglu", ffn_hidden=48)
MICRO, BATCH, LR, HOP = 2, 8, 3e-3, 2


def stage_of(engine, *, precision="fp32", **parallel):
    return StageSpec(
        kind="pretrain", engine=engine, parallel=ParallelPlan(micro_batch=MICRO, **parallel), precision=precision,
        optimizer=OptimizerSpec(lr=LR, clip=0.5), global_batch=BATCH, steps=100,
    )  # fmt: skip


FP32 = [  # ranks, and the layouts that they take in turn
    (1, {"torch": stage_of("torch")}),
    (
        4,
        {
            "torch tp2 fsdp2": stage_of("torch", tensor=2, zero=3),
            "ds z3": stage_of("deepspeed", zero=3),
        },
    ),
    (
        2,
        {
            "ds pp2 z1": stage_of("deepspeed", pipeline=2, zero=1),
            "colossalai tp2": stage_of("colossalai", tensor=2),
        },
    ),
    (2, {"ds u2 z3": stage_of("deepspeed", ulysses=2, zero=3)}),
    (1, {"torch again": stage_of("torch")}),
    (
        2,
        {
            "ds u2 z1": stage_of("deepspeed", ulysses=2, zero=1),
            "colossalai z1": stage_of("colossalai", zero=1),
            "ds z2 offload": stage_of("deepspeed", zero=2, offload="optimizer"),
            "colossalai pp2 interleaved": stage_of("colossalai", pipeline=2, interleave=2),
            "torch ddp": stage_of("torch"),
        },
    ),
    (
        4,
        {
            "ds z0": stage_of("deepspeed"),
            "ds tp2 pp2 z1": stage_of("deepspeed", tensor=2, pipeline=2, zero=1),
            "colossalai tp2 pp2": stage_of("colossalai", tensor=2, pipeline=2),
            "torch tp2 sp": stage_of("torch", tensor=2, sequence=True),
            "fsdp2 z2": stage_of("torch", zero=2),
        },
    ),
]
BF16 = [
    (
        2,
        {
            "torch ddp": stage_of("torch", precision="bf16"),
            "ds z0": stage_of("deepspeed", precision="bf16"),
            "colossalai gemini": stage_of("colossalai", zero=3, precision="bf16"),
            "ds u2 z3": stage_of("deepspeed", ulysses=2, zero=3, precision="bf16"),
            "ds z3": stage_of("deepspeed", zero=3, precision="bf16"),
        },
    ),
    (
        4,
        {
            "colossalai tp2 z1": stage_of("colossalai", tensor=2, zero=1, precision="bf16"),
            "ds tp2 pp2 z1 sp": stage_of("deepspeed", tensor=2, pipeline=2, zero=1, sequence=True, precision="bf16"),
            "fsdp2": stage_of("torch", zero=3, precision="bf16"),
        },
    ),
    (2, {"colossalai z2": stage_of("colossalai", zero=2, precision="bf16")}),
]


def batch_of(step, first, count):
    """Samples ``first`` to ``first + count`` of a step: odd tokens follow from the even ones before."""
    x = torch.randint(0, MODEL.vocab, (BATCH, MODEL.seq_len + 1), generator=torch.Generator().manual_seed(step))
    x[:, 1::2] = (3 * x[:, 0::2] + 1)[:, : x[:, 1::2].shape[1]] % MODEL.vocab
    x = x[first : first + count]
    return {"tokens": x[:, :-1].contiguous(), "targets": x[:, 1:].contiguous()}


def build(stage, ranks):
    def make(tensor=None):
        return GPT(MODEL, tensor=tensor)

    dist.seed(stage.seed, ranks, stage.parallel)
    return registry.find("jobs.engines", stage.engine).build(make, stage, ranks, mean_loss)


def train(engine, stage, ranks, steps):
    """Loss over all data ranks, and gradient norm, of each step."""
    at = place(ranks.rank, ranks.world, stage.parallel)
    seen = []
    for step in steps:
        turns = BATCH // (MICRO * at.data_size)
        batches = [batch_of(step, (turn * at.data_size + at.data) * MICRO, MICRO) for turn in range(turns)]
        result = engine.train_step(batches, lr=LR)
        seen.append((dist.mean_and_any(result.loss, False)[0], result.grad_norm))
    return seen


def probe(engine):
    return engine.forward(batch_of(999, 0, MICRO)).double().mean().item()


def hops(ranks, root, number, stages, before):
    """Losses of each hop, and those on the probe after its load and at its end."""
    seen = {}
    for name, stage in stages.items():
        try:
            engine = build(replace(stage, seed=number), ranks)
            loaded = None
            if before:
                train(engine, stage, ranks, [77])  # so that there is something to be replaced
                pieces.load(Path(before), engine)
                loaded = probe(engine)
            for folder in (root / f"{number}-loaded", root / f"{number}-trained"):
                folder.mkdir(exist_ok=True)
            dist.barrier()
            pieces.save(root / f"{number}-loaded", engine, ranks)
            losses = train(engine, stage, ranks, range(number * HOP, number * HOP + HOP))
            pieces.save(root / f"{number}-trained", engine, ranks)
            seen[name] = losses, loaded, probe(engine)
            if hasattr(engine, "engine"):
                engine.engine.destroy()
        except Exception as e:
            raise RuntimeError(f"hop `{name}`") from e
        dist.barrier()
        before, number = root / f"{number}-trained", number + 1
    return seen


def unbroken(ranks, stage, steps):
    return train(build(stage, ranks), stage, ranks, range(steps))


def travel(root, groups):
    """All hops, one after the other, and the checkpoints of two neighbours compared bit by bit."""
    seen, number, before = {}, 0, ""
    for world, stages in groups:
        seen |= run_ranks(hops, world, root, number, stages, str(before))[0]
        number += len(stages)
        before = root / f"{number - 1}-trained"
    for hop in range(1, number):
        saved, converted = content(root / f"{hop - 1}-trained"), content(root / f"{hop}-loaded")
        assert saved.keys() == converted.keys()
        for key, array in saved.items():
            assert np.array_equal(array, converted[key]), (list(seen)[hop], key)
    return seen


def content(folder):
    """Every tensor of a checkpoint, whole."""
    found = {}
    with Store(folder) as store:
        for name, entry in store.index["tensors"].items():
            for slot in ("weight", "exp_avg", "exp_avg_sq", "step"):
                shape = tuple(entry["shape"]) if slot != "step" else (1,)
                found[slot, name] = np.full(int(np.prod(shape)), np.nan, np.float32)
                store.read(Extent(name, slot, shape, None, 0, found[slot, name].size), found[slot, name])
    assert sum(a.size for (slot, _), a in found.items() if slot == "weight") == MODEL.params
    return found


def compare(seen, wanted, tolerance):
    """The losses of all hops on end against those of an unbroken run, and the probe at the save and after the load."""
    probes, before = [], None
    for hop, (name, (losses, loaded, trained)) in enumerate(seen.items()):
        there = wanted[hop * HOP : hop * HOP + HOP]
        loss = max(abs(a - b) for (a, _), (b, _) in zip(losses, there, strict=True))
        norm = max(abs(a - b) / b for (_, a), (_, b) in zip(losses, there, strict=True))
        probes.append(abs(loaded - before) if hop else 0.0)
        print(f"{name:28} loss {loss:.1e} norm {norm:.1e} probe {probes[-1]:.1e}")
        assert loss < tolerance and norm < 10 * tolerance, name
        before = trained
    return max(probes)


def test_fp32_through_every_layout(tmp_path):
    seen = travel(tmp_path, FP32)
    wanted = run_ranks(unbroken, 1, stage_of("torch"), HOP * len(seen))[0]
    assert compare(seen, wanted, 1e-5) < PROBE_TOLERANCE["fp32"] / 20


def test_bf16_through_every_layout(tmp_path):
    """Masters and moments are fp32 everywhere and go through unchanged; what is computed with them is rounded."""
    seen = travel(tmp_path, BF16)
    wanted = run_ranks(unbroken, 1, stage_of("torch", precision="bf16"), HOP * len(seen))[0]
    assert compare(seen, wanted, 3e-3) < PROBE_TOLERANCE["bf16"] / 10  # a lost gradient of the head came to 1e-3, 0.3
