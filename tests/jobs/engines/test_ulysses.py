"""Ulysses where rows hold several texts, in the training loop: the same numbers as one process with whole rows."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

from jobs.nn import ulysses
from jobs.nn.gpt import GPT
from jobs.runtime import dist, loop
from jobs.runtime.job import Job
from jobs.sft import loss
from orchestrator.errors import ConfigError, DataError
from orchestrator.memory import layer_activation_bytes
from orchestrator.registry import find
from orchestrator.run import Attempt, Run
from orchestrator.spec import ClusterSpec, Experiment, ModelSpec, OptimizerSpec, ParallelPlan, StageSpec
from orchestrator.track import Metrics

MODEL = ModelSpec(layers=2, hidden=32, heads=4, kv_heads=2, vocab=61, seq_len=12, attention="alternating", window=3)

ROWS, WIDE = 8, ModelSpec(layers=1, hidden=128, heads=4, vocab=64, seq_len=128)


class Packed:
    """Rows of three texts each, whose first tokens are not to be learned; the middle one lies on both ranks."""

    tokenizer_sha256 = "tokenizer"
    fingerprint = "data"
    samples_per_epoch = 6

    def batch(self, first, count):
        rows = [torch.Generator().manual_seed(first + i) for i in range(count)]
        x = torch.stack([torch.randint(0, MODEL.vocab, (MODEL.seq_len + 1,), generator=g) for g in rows])
        segments = torch.tensor([0] * 3 + [1] * 5 + [2] * 4).expand(count, -1)
        weight = (torch.arange(MODEL.seq_len) % 4 > 0).float() * (1 + torch.arange(first, first + count)[:, None] % 3)
        return {"tokens": x[:, :-1], "targets": x[:, 1:], "segments": segments, "weight": weight}


def stage_of(engine, **parallel):
    return StageSpec(
        kind="sft", engine=engine, parallel=ParallelPlan(micro_batch=1, **parallel), precision="fp32", global_batch=2,
        steps=4, eval_every=2, eval_samples=3, save_every=10, optimizer=OptimizerSpec(lr=1e-2, clip=0.5),
    )  # fmt: skip


def train(ranks, root, stage):
    run = Run(folder=root / "chain" / "s", experiment="chain", stage="s", index=1, key="s")
    (run.folder / "attempts").mkdir(parents=True, exist_ok=True)
    run.save()
    cluster = ClusterSpec(gpu="cpu", gpus_per_node=ranks.world, gpu_memory_gb=1, gpu_tflops=1)
    experiment = Experiment(name="chain", model=MODEL, cluster=cluster, stages={"s": stage})
    record = Attempt(name="1", job_id="", world=ranks.world, host="", started_at=0.0)
    job = Job(
        run=run, experiment=experiment, stage=stage, options=None, ranks=ranks, attempt="1", record=record,
        metrics=Metrics(run, "1") if ranks.rank == 0 else None,
    )  # fmt: skip
    engine = find("jobs.engines", stage.engine).build(lambda: GPT(MODEL), stage, ranks, loss)
    seen = []
    engine.module.blocks[0].mlp.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    loop.train(job, engine, Packed(), Packed())
    if job.metrics:
        job.metrics.close()
    row = Packed().batch(0, 1)["tokens"]
    with engine.gathered() as module, torch.no_grad():
        alone = module(row if ranks.rank == 0 else row[:, :5])  # no rank waits for another in here
    scores = engine.forward(Packed().batch(0, 1))
    assert scores.shape == row.shape
    if hasattr(engine, "engine"):
        engine.engine.destroy()
    dist.barrier()
    return set(seen), alone[:, :5].tolist(), scores.tolist()


def numbers(root):
    lines = [json.loads(line) for line in (root / "chain" / "s" / "metrics.jsonl").read_text().splitlines()]
    keys = ("train/loss", "train/grad_norm", "val/loss")
    return [{key: line[key] for key in keys if key in line} for line in lines]


@pytest.mark.slow
def test_packed_rows_in_the_loop(tmp_path):
    plain, shared = tmp_path / "plain", tmp_path / "shared"
    [(_, alone, scores)] = run_ranks(train, 1, plain, stage_of("torch"))
    both = run_ranks(train, 2, shared, stage_of("deepspeed", ulysses=2, zero=3))
    wanted, found = numbers(plain), numbers(shared)
    assert len(wanted) == 4 and [set(a) for a in wanted] == [set(a) for a in found]
    assert sum("val/loss" in a for a in wanted) == 2
    for a, b in zip(wanted, found, strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    for lengths, logits, nll in both:
        assert lengths >= {MODEL.seq_len // 2}, "every rank computed whole rows"
        torch.testing.assert_close(torch.tensor(logits), torch.tensor(alone), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.tensor(nll), torch.tensor(scores), atol=1e-4, rtol=1e-4)


def kept(ranks, model):
    """Bytes that models of one and of two layers keep for their backward pass, beside their weights."""
    stage = stage_of("deepspeed", ulysses=2)
    found = []
    for layers in (1, 2):
        engine = find("jobs.engines", "deepspeed").build(
            lambda n=layers: GPT(replace(model, layers=n)), stage, ranks, loss
        )
        weights = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
        storages = {}

        def pack(t, weights=weights, storages=storages):
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return t

        rows = torch.zeros(ROWS, model.seq_len, dtype=torch.long)  # enough that the turns of rope are little beside
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            engine._run({"tokens": rows, "targets": rows}).sum()
        found.append(sum(storages.values()))
        engine.engine.destroy()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_layer_keeps_what_the_plan_says(position):
    """By what autograd saves: PyTorch's profiler, as in test_memory_measured, misses blocks that gloo's threads free,
    a quarter of those exchanged."""
    model = replace(WIDE, position=position)
    one, two = run_ranks(kept, 2, model)[0]
    stage = stage_of("deepspeed", ulysses=2)
    assert ROWS * layer_activation_bytes(model, stage) == pytest.approx(two - one, rel=0.02)


def test_what_does_not_split():
    of_3 = SimpleNamespace(size=3, rank=0, group=None)
    with pytest.raises(ConfigError, match="2 heads of keys and values do not split over 3 ulysses ranks"):
        ulysses.spread(GPT(MODEL), of_3)
    batch = {"tokens": torch.zeros(1, 13), "targets": torch.zeros(1, 13)}
    with pytest.raises(DataError, match="13 tokens do not split over 3 ulysses ranks"):
        ulysses.own(batch, of_3)
