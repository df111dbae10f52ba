"""The training loop around a real engine, on one rank: stops, numbers that are not finite, weights of another stage."""

import hashlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

from jobs.engines import torch as torch_engine
from jobs.nn.gpt import GPT
from jobs.pretrain import mean_loss
from jobs.runtime import checkpoint, dist, loop
from jobs.runtime.faults import Stopped
from jobs.runtime.job import Job
from jobs.runtime.mesh import place
from orchestrator.errors import CheckpointError, DataError, TrainingError
from orchestrator.run import Attempt, Run, read_json, write_json
from orchestrator.spec import ClusterSpec, Experiment, ModelSpec, OptimizerSpec, ParallelPlan, StageSpec

MODEL = ModelSpec(layers=1, hidden=16, heads=2, vocab=31, seq_len=8)
STAGE = StageSpec(
    kind="pretrain",
    precision="fp32",
    global_batch=4,
    steps=3,
    save_every=10,
    parallel=ParallelPlan(micro_batch=2),
    optimizer=OptimizerSpec(lr=1e-2),
)


class Numbers:
    """Sample i is the numbers from i."""

    tokenizer_sha256 = "tokenizer"
    fingerprint = "data"
    samples_per_epoch = 1000

    def batch(self, first, count):
        windows = (torch.arange(first, first + count)[:, None] + torch.arange(MODEL.seq_len + 1)) % MODEL.vocab
        return {"tokens": windows[:, :-1], "targets": windows[:, 1:]}


class Unanswered(Numbers):
    """Nothing in it is the model's own to write."""

    def batch(self, first, count):
        batch = super().batch(first, count)
        return batch | {"weight": torch.zeros(batch["targets"].shape)}


def _train(ranks, root, name, stage, *, told="", loss_fn=mean_loss, data=None, learner=None):
    """Train ``stage`` as run ``chain/<name>``; its engine."""
    run = Run(folder=root / "chain" / name, experiment="chain", stage=name, index=1, key=name)
    (run.folder / "attempts").mkdir(parents=True, exist_ok=True)
    run.save()
    cluster = ClusterSpec(gpu="cpu", gpus_per_node=1, gpu_memory_gb=1, gpu_tflops=1)
    job = Job(
        run=run,
        experiment=Experiment(name="chain", model=MODEL, cluster=cluster, stages={name: stage}),
        stage=stage,
        options=None,
        ranks=ranks,
        attempt="1",
        record=Attempt(name="1", job_id="", world=1, host="", started_at=0.0),
    )
    job.stop.cause = told
    engine = torch_engine.build(lambda: GPT(MODEL), stage, ranks, loss_fn)
    data = data or Numbers()
    if learner:
        loop.drive(job, learner(job, engine, data, data, None), data, None)
    else:
        loop.train(job, engine, data, None)
    return engine


def _stops(ranks, root):
    (root / "chain" / "full").mkdir(parents=True)
    (root / "chain" / "full" / "checkpoints").write_text("no folder can be made here")
    with pytest.raises(TrainingError, match="step, 1, could not be saved"):
        _train(ranks, root, "full", STAGE, told="preempted")
    with pytest.raises(Stopped) as stopped:
        _train(ranks, root, "free", STAGE, told="preempted")
    assert (stopped.value.cause, stopped.value.step) == ("preempted", 1)
    assert checkpoint.committed(root / "chain" / "free" / "checkpoints") == [1]
    last = _train(ranks, root, "last", replace(STAGE, steps=1), told="preempted")  # it had no more to do
    assert last.module


def test_told_to_stop(tmp_path):
    run_ranks(_stops, 1, tmp_path)


def _refuses(ranks, root):
    with pytest.raises(TrainingError, match="step 1: loss nan"):
        _train(ranks, root, "nan", replace(STAGE, save_every=1), loss_fn=lambda nll, _: nll.mean() * float("nan"))
    assert checkpoint.committed(root / "chain" / "nan" / "checkpoints") == []
    with pytest.raises(TrainingError, match="a batch of 3 does not split over 1 data ranks with micro-batches of 2"):
        _train(ranks, root, "odd", replace(STAGE, global_batch=3))
    with pytest.raises(DataError, match="no token counts in what is held out"):
        _train(ranks, root, "nothing", STAGE, data=Unanswered())


def test_what_cannot_be_trained_on(tmp_path):
    run_ranks(_refuses, 1, tmp_path)


BAD = 5  # a token no other sample begins with


def _exploding(nll, batch):
    """The mean, but for a batch with a sample that begins with BAD."""
    return nll.mean() * (float("inf") if (batch["tokens"][:, 0] % MODEL.vocab == BAD).any() else 1.0)


class Without(Numbers):
    """The same data, had it never held the samples of the second step."""

    def batch(self, first, count):
        return super().batch(first + (4 if first >= 4 else 0), count)


def _passes_over(ranks, root):
    """A run whose second step is not finite, also one that was stopped before, ends as one on data without that."""
    stage = replace(STAGE, steps=4, save_every=1)
    run = _train(ranks, root, "bad", stage, loss_fn=_exploding)
    assert read_json(root / "chain" / "bad" / "attempts" / "1.json")["passed_over"] == [[4, 8]]
    with pytest.raises(Stopped):
        _train(ranks, root, "again", stage, told="preempted", loss_fn=_exploding)  # after its first step
    again = _train(ranks, root, "again", stage, loss_fn=_exploding)
    clean = _train(ranks, root, "clean", stage, data=Without())
    wanted = list(clean.module.parameters())
    for engine in (run, again):
        assert all(torch.equal(a, b) for a, b in zip(engine.module.parameters(), wanted, strict=True))
    with pytest.raises(TrainingError, match="step 2: loss inf"):
        _train(ranks, root, "none", replace(stage, skip_batches=0), loss_fn=_exploding)
    assert checkpoint.committed(root / "chain" / "none" / "checkpoints") == [1]


def test_a_batch_that_is_not_finite_is_passed_over(tmp_path):
    run_ranks(_passes_over, 1, tmp_path)


def _gives_up(ranks, root):
    """All is well for two steps, and nothing after them; one good step does not count as many."""
    seen = []

    def loss_fn(nll, batch):
        seen.append(int(batch["tokens"][0, 0]))
        return nll.mean() * (float("nan") if batch["tokens"][0, 0] >= 8 else 1.0)

    with pytest.raises(TrainingError, match="step 3: loss nan"):
        _train(ranks, root, "lost", replace(STAGE, steps=9, save_every=1, skip_batches=2), loss_fn=loss_fn)
    assert sorted(set(seen)) == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18], (
        "two batches are passed over, the third is too much"
    )
    assert checkpoint.committed(root / "chain" / "lost" / "checkpoints") == [2, 1]


def test_a_run_that_is_lost_is_given_up(tmp_path):
    run_ranks(_gives_up, 1, tmp_path)


class Straying(loop.Supervised):
    """Astray after ``bound`` steps."""

    bound = 2

    def step(self, at, size, lr):
        assert len(self.more) == at.step, "what undone steps have put there is gone"
        self.more[str(at.step)] = True
        return super().step(at, size, lr)

    def astray(self):
        return TrainingError(f"{self.bound} steps were too many") if len(self.more) == self.bound else None


class StrayingLast(Straying):
    """Astray after the last step."""

    bound = 3


class Steady(Straying):
    """What another bound makes of it."""

    bound = None


def _strays(ranks, root):
    """It is saved first, stops at once when it is resumed, and with another bound ends as if nothing had been."""
    whole = _train(ranks, root, "whole", STAGE)
    for learner, step in ((Straying, 2), (StrayingLast, 3)):
        name = learner.__name__
        for _ in range(2):
            with pytest.raises(TrainingError, match=f"{step} steps were too many"):
                _train(ranks, root, name, STAGE, learner=learner)
            assert checkpoint.committed(root / "chain" / name / "checkpoints") == [step]
        moved = _train(ranks, root, name, STAGE, learner=Steady)
        assert checkpoint.committed(root / "chain" / name / "checkpoints")[0] == 3
        pairs = zip(whole.module.parameters(), moved.module.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    _train(ranks, root, "undone", replace(STAGE, steps=4, save_every=1), loss_fn=_exploding, learner=Steady)


def test_a_run_that_has_gone_astray_is_saved_first(tmp_path):
    run_ranks(_strays, 2, tmp_path)


def _chain(ranks, root):
    first = _train(ranks, root, "first", STAGE)
    second = replace(STAGE, seed=1, init_from="first", optimizer=OptimizerSpec(lr=0.0))  # so that nothing moves
    after = _train(ranks, root, "second", second)
    for (name, a), b in zip(first.module.named_parameters(), after.module.parameters(), strict=True):
        assert torch.equal(a, b), name

    other = Numbers()
    other.fingerprint = "other data"
    _train(ranks, root, "third", second, data=other)
    other.tokenizer_sha256 = "other tokenizer"
    with pytest.raises(CheckpointError, match="`tokenizer` is 'tokenizer' there and 'other tokenizer' here"):
        _train(ranks, root, "fourth", second, data=other)
    with pytest.raises(CheckpointError, match="stage `nowhere` has no checkpoint"):
        _train(ranks, root, "fifth", replace(second, init_from="nowhere"))


def test_a_stage_begins_where_another_ended(tmp_path):
    run_ranks(_chain, 1, tmp_path)


def _gate(ranks, root):
    """A run that goes on in another layout, and one whose weights are not those that were saved."""
    _train(ranks, root, "same", replace(STAGE, steps=1))
    sharded = replace(STAGE, parallel=ParallelPlan(micro_batch=2, zero=3))
    moved = _train(ranks, root, "same", sharded)
    folder = checkpoint.folder_of(root / "chain" / "same" / "checkpoints", 3)
    layout = read_json(folder / "state.json")["layout"]

    state = read_json(folder / "state.json")
    saved = state["probe"]["loss"]
    state["probe"]["loss"] += 0.001  # as if the weights of the save had come to this
    write_json(folder / "state.json", state)
    manifest = read_json(folder / "MANIFEST.json")
    content = (folder / "state.json").read_bytes()
    manifest["files"]["state.json"] = [len(content), hashlib.sha256(content).hexdigest()]
    write_json(folder / "MANIFEST.json", manifest)
    _train(ranks, root, "same", sharded)  # the same layout needs no gate
    with pytest.raises(CheckpointError) as refused:
        _train(ranks, root, "same", replace(STAGE, steps=4))
    assert checkpoint.committed(root / "chain" / "same" / "checkpoints") == [3, 1], "it trained on"
    return layout, saved, str(refused.value), len(list(moved.module.parameters()))


def test_a_converted_checkpoint_must_compute_the_same(tmp_path):
    layout, saved, refused, parameters = run_ranks(_gate, 1, tmp_path)[0]
    assert (layout["zero"], layout["engine"], layout["world"]) == (3, "torch", 1)
    assert f"was {saved + 0.001:.6f} and is {saved:.6f}, further apart than 0.0001" in refused
    assert "saved by torch ZeRO-3 on 1 rank in fp32, does not compute the same in torch ZeRO-0" in refused
    assert parameters


def _shares(ranks):
    """Held-out loss by the loop and by one forward pass; the samples of a step that the ranks read."""
    engine = torch_engine.build(lambda: GPT(MODEL), STAGE, ranks, mean_loss)
    job = SimpleNamespace(stage=STAGE, place=place(ranks.rank, ranks.world, STAGE.parallel), mark=lambda *phase: None)
    losses = [
        (loop.evaluate(job, engine, Numbers(), n), engine.forward(Numbers().batch(0, n)).double().mean().item())
        for n in (1, 5, 7)
    ]
    mine = [batch["tokens"][:, 0].tolist() for batch in loop._share(job, Numbers(), 12, 8)]
    return losses, [i for share in dist.gather(mine) for batch in share for i in batch]


def test_every_sample_is_read_once():
    """Held-out samples too, where they do not divide by the ranks."""
    for losses, read in run_ranks(_shares, 2):
        for by_the_loop, at_once in losses:
            assert by_the_loop == pytest.approx(at_once, abs=1e-6)
        assert sorted(read) == list(range(12, 20))
