"""DPO: engines against equation 7 written out, response by response, in double precision."""

import gc
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from ranks import run_ranks

from jobs import dpo
from jobs.data import bpe
from jobs.data.chat import Chat
from jobs.data.examples import Files
from jobs.engines.torch import Frozen
from jobs.nn.gpt import GPT, decay_groups, init_weights
from jobs.runtime import dist
from orchestrator.registry import find
from orchestrator.spec import ChatSpec, DataSpec, ModelSpec, OptimizerSpec, ParallelPlan, StageSpec

MODEL = ModelSpec(layers=2, hidden=32, heads=4, vocab=300, seq_len=32, init_std=0.1)
BATCH, MICRO, STEPS, LR, BETA, REFERENCE = 4, 2, 3, 3e-3, 0.5, 7  # the last: seed of the reference's weights
RESPONSES = [["aa", "b"], ["c", "dd", "eee", "f"], ["gg", "h", "i"], ["bad", "cab fed"]] * 2
ENGINES = {"torch": (0, 2, 3), "deepspeed": (0, 1, 2, 3), "colossalai": (0, 1, 2)}  # with their ZeRO stages in fp32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    bpe.train(["abcdefghi " * 20], vocab=MODEL.vocab, end_of_text="<|end|>").save(str(folder / "tokenizer.json"))
    lines = [json.dumps({"prompt": f"{'i' * k}?", "responses": r}) + "\n" for k, r in enumerate(RESPONSES)]
    (folder / "p.jsonl").write_text("".join(lines))
    return folder


def _data(folder, reference):
    chat = Chat.open(DataSpec(tokenizer=str(folder / "tokenizer.json"), chat=ChatSpec(end="<|end|>")))
    files = Files(names=[str(folder / "p.jsonl")])
    return dpo.Referenced(reference, "version", files, chat, seq_len=MODEL.seq_len, seed=3, responses=4)


def _engine(ranks, folder, name):
    seen = {}
    for zero in ENGINES[name]:
        plan = ParallelPlan(zero=zero, micro_batch=MICRO)
        stage = StageSpec(
            kind="dpo",
            engine=name,
            parallel=plan,
            precision="fp32",
            global_batch=BATCH,
            optimizer=OptimizerSpec(lr=LR, clip=1000.0),
        )
        frozen = replace(stage, engine="torch", parallel=replace(plan, zero=3 if zero == 3 else 0), seed=REFERENCE)
        data = _data(folder, Frozen(lambda tensor=None: GPT(MODEL), frozen, ranks))
        make, loss = lambda tensor=None: GPT(MODEL), partial(dpo.loss, beta=BETA)
        engine = find("jobs.engines", name).build(make, stage, ranks, loss)
        seen[zero] = []
        for step in range(STEPS):
            result = engine.train_step([data.batch(step * BATCH + ranks.rank * MICRO, MICRO)], lr=LR)
            seen[zero].append((dist.mean_and_any(result.loss, False)[0], result.grad_norm))
        if name == "deepspeed":
            engine.engine.destroy()
        del engine
        gc.collect()
        dist.barrier()
    return seen


def _written_out(folder):
    """Losses and gradient norms of plain AdamW in fp64, without padding, masks or batches."""
    data = _data(folder, None)
    models = []
    for seed in (0, REFERENCE):
        model = GPT(MODEL)
        init_weights(model, seed)
        models.append(model.double())
    policy, reference = models
    optimizer = torch.optim.AdamW(decay_groups(policy, 0.1), lr=LR, betas=(0.9, 0.95), eps=1e-8)

    def log_prob(model, response):
        ids = torch.tensor(response.ids)
        log_p = torch.log_softmax(model(ids[None, :-1])[0].double(), -1)
        return sum(log_p[t - 1, ids[t]] for t in range(1, len(ids)) if response.learn[t])

    seen = []
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for n in range(step * BATCH, (step + 1) * BATCH):
            responses = data.prompts[data._prompt(n)].responses
            ratios = [log_prob(policy, r) - log_prob(reference, r).detach() for r in responses]
            pairs = [(i, j) for j in range(len(ratios)) for i in range(j)]
            total += sum(torch.log1p(torch.exp(-BETA * (ratios[i] - ratios[j]))) for i, j in pairs) / len(pairs)
        loss = total / BATCH
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in policy.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        seen.append((loss.item(), norm))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "deepspeed", pytest.param("colossalai", marks=pytest.mark.parity)])
def test_every_engine_takes_the_steps_of_equation_7(folder, name):
    expected = _written_out(folder)
    assert expected[0][0] != pytest.approx(math.log(2), abs=0.01), "policy and reference must differ at the start"
    preload = "colossalai.booster.plugin" if name == "colossalai" else None
    by_rank = run_ranks(_engine, 2, folder, name, preload=preload)
    assert by_rank[0] == by_rank[1]
    for zero, steps in by_rank[0].items():
        for (loss, norm), (wanted, wanted_norm) in zip(steps, expected, strict=True):
            assert loss == pytest.approx(wanted, abs=1e-5), zero
            assert norm == pytest.approx(wanted_norm, rel=1e-4), zero
