"""Every engine and layout against single-process PyTorch: the same losses, and a bitwise resume.

All cases of a world size share one process group. The reference is a plain loop over whole batches.
"""

import math
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks

from jobs.engines import deepspeed as deepspeed_engine
from jobs.engines import torch as torch_engine
from jobs.nn.gpt import GPT, decay_groups, draw, init_weights
from jobs.pretrain import mean_loss
from jobs.runtime import dist, pieces
from jobs.runtime.job import Ranks
from jobs.runtime.resume import load_rng, save_rng
from orchestrator.spec import CHECKPOINT_BYTES_PER_PARAM, ModelSpec, OptimizerSpec, ParallelPlan, StageSpec

pytestmark = pytest.mark.slow

MODEL = ModelSpec(layers=2, hidden=32, heads=4, vocab=97, seq_len=16)
BATCH, STEPS, LR = 8, 20, 3e-3
TORCH = {"ddp": ("torch", 0), "zero2": ("torch", 2), "fsdp2": ("torch", 3)}
DEEPSPEED = {f"ds{z}": ("deepspeed", z) for z in range(4)}
ENGINES = {"torch": torch_engine, "deepspeed": deepspeed_engine}
# Every key of DeepSpeed that `orch plan` lets pass, each away from its default; sizes are smaller than the model.
SETTINGS = {
    "zero_optimization": {
        "reduce_bucket_size": 3000,
        "allgather_bucket_size": 3000,
        "overlap_comm": True,
        "contiguous_gradients": False,
        "sub_group_size": 5000,
        "stage3_prefetch_bucket_size": 1000,
        "stage3_param_persistence_threshold": 100,
        "stage3_model_persistence_threshold": 1000,
        "stage3_max_live_parameters": 4000,
    },
    "wall_clock_breakdown": True,
    "comms_logger": {"enabled": True, "verbose": False},
    "flops_profiler": {"enabled": True, "profile_step": 2},
}


def _stage(engine, zero, **changes):
    parallel = ParallelPlan(zero=zero, micro_batch=2, offload=changes.pop("offload", "none"))
    optimizer = OptimizerSpec(lr=LR, clip=0.5)  # small enough that it clips in these steps
    base = StageSpec(kind="pretrain", engine=engine, parallel=parallel, precision="fp32", optimizer=optimizer)
    return replace(base, global_batch=BATCH, steps=STEPS, **changes)


def _batch(step, first, count, model=MODEL):
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randint(0, model.vocab, (2 * BATCH, model.seq_len + 1), generator=generator)[first : first + count]
    return {"tokens": x[:, :-1].contiguous(), "targets": x[:, 1:].contiguous()}


def _make(model=MODEL):
    module = GPT(model)
    init_weights(module, 0)
    return module


def _build(stage, ranks, model=MODEL):
    return ENGINES[stage.engine].build(lambda: _make(model), stage, ranks, mean_loss)


def _train(engine, ranks, steps, model=MODEL):
    micro = 2
    turns = BATCH // (micro * ranks.world)
    seen = []
    for step in steps:
        batches = [_batch(step, (t * ranks.world + ranks.rank) * micro, micro, model) for t in range(turns)]
        result = engine.train_step(batches, lr=LR)
        seen.append((dist.mean_and_any(result.loss, False)[0], result.grad_norm))
    return seen


def _reference(model=MODEL):
    module = _make(model)
    optimizer = torch.optim.AdamW(decay_groups(module, 0.1), lr=LR, betas=(0.9, 0.95), eps=1e-8)
    seen = []
    for step in range(STEPS):
        batch = _batch(step, 0, BATCH, model)
        loss = module(batch["tokens"], batch["targets"]).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((loss.item(), norm.item()))
    return seen


def _close(ranks, engine):
    """Free what an engine holds on to, so that the next case starts clean."""
    if hasattr(engine, "engine"):
        engine.engine.destroy()
    dist.barrier()


def _parity(ranks, cases):
    seen = {}
    for name, (stage, model) in cases.items():
        engine = _build(stage, ranks, model)
        losses = _train(engine, ranks, range(STEPS), model)
        nll = engine.forward(_batch(99, 0, 2, model))
        with engine.gathered() as whole:
            weights = {k: v.detach().clone() for k, v in whole.named_parameters()}
        elements = sum(w.numel() for w in weights.values())
        seen[name] = (losses, nll.float().mean().item(), elements)
        _close(ranks, engine)
    return seen


def _check(seen, reference, tolerance):
    for (loss, norm), (wanted_loss, wanted_norm) in zip(seen, reference, strict=True):
        assert loss == pytest.approx(wanted_loss, abs=tolerance)
        assert norm == pytest.approx(wanted_norm, rel=10 * tolerance)


def _norms_of_many(ranks, cases):
    """The gradient norm of a step of equal micro-batches, which is that of one of them."""
    batch, seen = _batch(0, 0, 1), {}
    for name, stage in cases.items():
        engine = _build(stage, ranks)
        turns = stage.global_batch // (stage.parallel.micro_batch * ranks.world)
        seen[name] = engine.train_step([batch] * turns, lr=LR).grad_norm
        _close(ranks, engine)
    return seen


@pytest.fixture(scope="module")
def reference():
    losses = _reference()
    assert max(norm for _, norm in losses) > 0.5, "nothing would be clipped"
    return losses


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.parity)])
def test_fp32_equals_plain_pytorch(world, reference):
    cases = {name: (_stage(*case), MODEL) for name, case in (TORCH | DEEPSPEED).items()}
    cases["ds2-offload"] = (_stage("deepspeed", 2, offload="optimizer"), MODEL)
    cases["ds3-offload"] = (_stage("deepspeed", 3, offload="all"), MODEL)
    if world < 4:
        cases |= {f"ds{z}-settings": (_stage("deepspeed", z, engine_config=SETTINGS), MODEL) for z in range(4)}
    results = run_ranks(_parity, world, cases)
    assert all(r == results[0] for r in results), "the ranks disagree about what they report"
    forwards = [forward for _, forward, _ in results[0].values()]
    for losses, forward, elements in results[0].values():
        _check(losses, reference, 1e-5)
        assert forward == pytest.approx(forwards[0], abs=1e-5)
        assert elements == MODEL.params


@pytest.mark.parity
def test_compiled_blocks_compute_the_same(reference):
    names = {"ddp": ("torch", 0), "fsdp2": ("torch", 3), "ds1": ("deepspeed", 1), "ds2": ("deepspeed", 2)}
    cases = {name: (_stage(*case, compile=True), MODEL) for name, case in names.items()}
    for losses, _, elements in run_ranks(_parity, 2, cases)[0].values():
        _check(losses, reference, 1e-5)
        assert elements == MODEL.params


def test_every_setting_that_passes_was_held_against_plain_pytorch():
    """`pipeline.partition` in test_parallel, the others above."""
    inside = {f"zero_optimization.{key}" for key in SETTINGS["zero_optimization"]}
    seen = inside | SETTINGS.keys() - {"zero_optimization"} | {"pipeline.partition"}
    assert seen == deepspeed_engine.LIMITS.allowed.keys()


def test_many_micro_batches_add_up_in_bf16():
    """ZeRO-2 and 3 sum more than BF16_SUMS of them in fp32; in bf16 a sum of 512 equal ones is a quarter short."""
    many = {}
    for zero in (2, 3):
        stage = _stage("deepspeed", zero, precision="bf16")
        many[f"ds{zero}"] = replace(stage, parallel=replace(stage.parallel, micro_batch=1), global_batch=512)
    norms = run_ranks(_norms_of_many, 1, many)[0]
    one = _make()
    batch = _batch(0, 0, 1)
    one(batch["tokens"], batch["targets"]).mean().backward()
    wanted = torch.nn.utils.get_total_norm([p.grad for p in one.parameters()]).item()
    assert norms == {name: pytest.approx(wanted, rel=1e-2) for name in many}


def test_bf16_stays_near_fp32(reference):
    cases = {name: (_stage(*case, precision="bf16"), MODEL) for name, case in (TORCH | DEEPSPEED).items()}
    for losses, _, _ in run_ranks(_parity, 2, cases)[0].values():
        for (loss, norm), (wanted, wanted_norm) in list(zip(losses, reference, strict=True))[:6]:
            assert loss == pytest.approx(wanted, abs=1e-3)  # measured: 3.1e-4
            assert norm == pytest.approx(wanted_norm, rel=6e-3)  # measured: 2e-3
        assert losses != reference, "this was fp32"


RAMP = [4, 8, 8, 12, 4]


def _ramp(ranks):
    """A batch that changes; losses must be those of the same batches at once."""
    seen = {}
    for name, case in (TORCH | DEEPSPEED).items():
        engine = _build(_stage(*case), ranks)
        losses = []
        for step, size in enumerate(RAMP):
            turns = size // (2 * ranks.world)
            batches = [_batch(step, (t * ranks.world + ranks.rank) * 2, 2) for t in range(turns)]
            losses.append(dist.mean_and_any(engine.train_step(batches, lr=LR).loss, False)[0])
        seen[name] = losses
        _close(ranks, engine)
    return seen


def test_a_batch_of_changing_size():
    module = _make()
    optimizer = torch.optim.AdamW(decay_groups(module, 0.1), lr=LR, betas=(0.9, 0.95))
    wanted = []
    for step, size in enumerate(RAMP):
        batch = _batch(step, 0, size)
        loss = module(batch["tokens"], batch["targets"]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
    for name, losses in run_ranks(_ramp, 2)[0].items():
        assert losses == pytest.approx(wanted, abs=1e-5), name


DROPOUT = replace(MODEL, dropout=0.1)


def _exploding(nll, batch):
    return mean_loss(nll, batch) * float("inf")


def _resume(ranks, root, cases):
    """Unbroken losses, and those after a save at half way into an engine of other weights, which a step that was not
    finite has spoiled besides."""
    seen = {}
    for name, stage in cases.items():
        folder = root / name
        folder.mkdir(exist_ok=True)
        dist.barrier()
        torch.manual_seed(ranks.rank)
        engine = _build(stage, ranks, DROPOUT)
        _train(engine, ranks, range(3), DROPOUT)
        engine.forward(_batch(99, 0, 2, DROPOUT))  # an evaluation before the save must leave no trace
        pieces.save(folder, engine, ranks)
        save_rng(folder, ranks.rank)
        dist.barrier()
        unbroken = _train(engine, ranks, range(3, 6), DROPOUT)
        _close(ranks, engine)

        torch.manual_seed(77 + ranks.rank)
        engine = _build(replace(stage, seed=7), ranks, DROPOUT)
        _train(engine, ranks, range(9, 10), DROPOUT)
        engine.loss_fn = _exploding
        assert not math.isfinite(_train(engine, ranks, range(10, 11), DROPOUT)[0][0]), name
        engine.loss_fn = mean_loss
        pieces.load(folder, engine)
        load_rng(folder, ranks.rank)
        seen[name] = (unbroken, _train(engine, ranks, range(3, 6), DROPOUT))
        _close(ranks, engine)
    return seen


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bitwise(tmp_path, precision):
    cases = {name: _stage(*case, precision=precision) for name, case in (TORCH | DEEPSPEED).items()}
    for unbroken, resumed in run_ranks(_resume, 2, tmp_path, cases)[0].values():
        assert resumed == unbroken
    for name in cases:
        saved = sum(_tensor_bytes(path) for path in (tmp_path / name).glob("pieces-*.safetensors"))
        steps = 4 * sum(1 for _ in GPT(MODEL).parameters())
        assert saved == CHECKPOINT_BYTES_PER_PARAM * MODEL.params + steps, name


def _tensor_bytes(path):
    """What is in a safetensors file behind its header."""
    with path.open("rb") as f:
        return path.stat().st_size - 8 - int.from_bytes(f.read(8), "little")


def _starts(ranks, cases):
    """How far each engine's first fp32 weights are from those that are drawn."""
    seen = {}
    for name, stage in cases.items():
        engine = _build(stage, ranks)
        seen[name] = 0.0
        for piece in engine.pieces():
            if piece.slot == "weight":
                whole = draw(MODEL, stage.seed, piece.name, piece.shape, torch.device("cpu")).view(-1)
                drawn = whole[piece.start : piece.start + piece.data.numel()]
                seen[name] = max(seen[name], (piece.data - drawn).abs().max().item())
        _close(ranks, engine)
    return seen


def test_every_engine_begins_with_the_same_fp32_weights():
    cases = {name: _stage(*case, precision="bf16") for name, case in (TORCH | DEEPSPEED).items()}
    assert run_ranks(_starts, 2, cases) == [dict.fromkeys(cases, 0.0)] * 2


def _start_from(ranks, root, cases):
    """Loss with the weights of another run, before and after they are loaded, and how far the first step moves them."""
    seen = {}
    for name, stage in cases.items():
        folder = root / name
        folder.mkdir(exist_ok=True)
        dist.barrier()
        engine = _build(stage, ranks)
        _train(engine, ranks, range(3))
        pieces.save(folder, engine, ranks)
        wanted = engine.forward(_batch(99, 0, 2)).tolist()
        _close(ranks, engine)

        engine = _build(replace(stage, optimizer=replace(stage.optimizer, weight_decay=0.0)), ranks)
        fresh = engine.forward(_batch(99, 0, 2)).tolist()
        pieces.load(folder, engine, weights_only=True)
        loaded = engine.forward(_batch(99, 0, 2)).tolist()
        tables = []
        for steps in (range(0), range(5, 6)):
            _train(engine, ranks, steps)
            with engine.gathered() as whole:
                tables.append(whole.embed.weight.detach().float().clone())
        optimizer = engine.engine.optimizer if hasattr(engine, "engine") else engine.optimizer
        moved = (tables[1] - tables[0]).abs().mean().item()
        seen[name] = (wanted, fresh, loaded, moved, [g["weight_decay"] for g in optimizer.param_groups])
        _close(ranks, engine)
    return seen


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_weights_of_another_run(tmp_path, precision):
    """Adam's first step moves each weight by the learning rate (arXiv:1412.6980, section 2.1), a later one by less."""
    cases = {name: _stage(*case, precision=precision) for name, case in (TORCH | DEEPSPEED).items()}
    for name, (wanted, fresh, loaded, moved, decay) in run_ranks(_start_from, 2, tmp_path, cases)[0].items():
        assert loaded == wanted != fresh, name
        assert moved == pytest.approx(LR, rel=0.02), name
        assert set(decay) == {0.0}, name


def test_the_users_deepspeed_keys_lie_under_the_plan():
    """What the user passes reaches DeepSpeed, section by section; what the plan says cannot be displaced."""
    stage = _stage("deepspeed", 2, engine_config={"wall_clock_breakdown": True, "zero_optimization": {"stage": 0}})
    stage.engine_config["zero_optimization"]["reduce_bucket_size"] = 1000
    made = deepspeed_engine.config(stage, Ranks(world=2))
    assert made["wall_clock_breakdown"] is True
    assert made["zero_optimization"]["reduce_bucket_size"] == 1000
    assert made["zero_optimization"]["stage"] == 2
