"""One step of PPO on every engine, against an account of the papers in double precision; gates and bad rewards."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks

from jobs import ppo
from jobs.data import bpe
from jobs.data.chat import Chat
from jobs.data.examples import Files
from jobs.data.indexed import ShardWriter
from jobs.data.prompts import Prompts, Rows
from jobs.nn.gpt import GPT
from jobs.nn.heads import Scorer
from jobs.runtime import dist, start
from jobs.runtime.experience import REWARD_FILE, reward_facts
from jobs.runtime.gates import Gates
from jobs.runtime.job import Job, Ranks
from jobs.runtime.resume import Position, Probe, resume, save
from orchestrator.compose import compose
from orchestrator.errors import CheckpointError, DataError, TrainingError
from orchestrator.run import Attempt, Run, read_json, write_json
from orchestrator.spec import (
    ChatSpec,
    ClusterSpec,
    DataSpec,
    ExamplesSpec,
    Experiment,
    ModelSpec,
    OptimizerSpec,
    ParallelPlan,
    SourceSpec,
    StageSpec,
)

MODEL = ModelSpec(layers=2, hidden=32, heads=4, vocab=300, seq_len=32, init_std=0.1)
LR, VALUE_LR, BETAS, EPS, DECAY, CLIP_NORM = 2e-3, 1e-3, (0.9, 0.95), 1e-5, 0.1, 0.5
MEAN, STD = 0.3, 0.5
OPTIONS = ppo.Options(
    max_tokens=10,
    temperature=0.7,
    rollout_batch=3,
    minibatches=2,
    inner_epochs=2,
    kl_coef=0.2,
    kl_target=0.5,
    gamma=0.99,
    no_end_penalty=0.4,
    clip_reward=1.5,
    rules={"test_ppo:vowels": 0.3},
    value_lr=VALUE_LR,
    clip=0.05,
    value_clip=0.02,
    ema=0.9,
)
MIXED = replace(OPTIONS, temperature=1.0, ptx_coef=0.5, ptx_ratio=1)  # each update reads 4 windows of text: all
TEXT = np.random.default_rng(0).integers(MODEL.vocab, size=4 * MODEL.seq_len + 1)
BF16 = 0.1  # of what a step says, or absolutely where that is below 1; measured up to 0.08
ENGINES = [("torch", 0, 1), ("torch", 3, 1), ("torch", 0, 2), ("deepspeed", 1, 1), ("deepspeed", 3, 1)]


def vowels(prompt, response, line):
    """A rule: the share of vowels, and more for prompts that ask for them."""
    return sum(c in "aei" for c in response) / (len(response) + 1) + line["bonus"]


def _place(folder):
    """A tokenizer and prompts."""
    bpe.train(["abcdefghi " * 20], vocab=MODEL.vocab, end_of_text="<|end|>").save(str(folder / "tokenizer.json"))
    lines = [json.dumps({"prompt": "abcdefghi"[: k % 7 + 1] + "?", "bonus": k / 10}) + "\n" for k in range(12)]
    (folder / "p.jsonl").write_text("".join(lines))
    _write_text(folder, TEXT)
    return _data(folder)


def _write_text(folder, tokens):
    with ShardWriter(folder / "text", "<u2") as shard:
        shard.add(tokens.astype("<u2"), np.array([len(tokens)]))


def _job(ranks, folder, name, stage, options=None):
    run = Run(folder=folder / "runs" / "chain" / name, experiment="chain", stage=name, index=1, key=name)
    (run.folder / "attempts").mkdir(parents=True, exist_ok=True)
    if ranks.rank == 0:
        run.save()
    cluster = ClusterSpec(gpu="cpu", gpus_per_node=2, gpu_memory_gb=1, gpu_tflops=1)
    stages = {name: stage}
    return Job(
        run=run,
        experiment=Experiment(name="chain", model=MODEL, cluster=cluster, data=_data(folder), stages=stages),
        stage=stage,
        options=options,
        ranks=ranks,
        attempt="1",
        record=Attempt(name="1", job_id="", world=ranks.world, host="", started_at=0.0),
    )


def _data(folder):
    files = [str(folder / "p.jsonl")]
    return DataSpec(
        folder=str(folder),
        tokenizer=str(folder / "tokenizer.json"),
        chat=ChatSpec(end="<|end|>"),
        sources={"text": SourceSpec(shards=[str(folder / "text")])},
        examples={"prompts": ExamplesSpec(train=files, val=files)},
    )


def _prompts(folder, chat):
    return Prompts(Files(names=[str(folder / "p.jsonl")]), chat, longest=MODEL.seq_len - OPTIONS.max_tokens, seed=3)


def _stages_before(ranks, folder, chat):
    """A policy and a reward model as their stages would have left them, drawn and not trained."""
    for seed, (name, model) in enumerate((("sft", GPT), ("reward", Scorer)), 1):
        job = _job(ranks, folder, name, StageSpec(kind=name, precision="fp32", seed=seed))
        engine = start.build(job, model, lambda nll, _: nll.mean())
        probe = Probe(data="", measure=lambda: 0.0)
        assert save(job, {"": engine}, _prompts(folder, chat), Position(step=1), probe, {})
    if ranks.rank == 0:
        facts = {"mean": MEAN, "std": STD, "accuracy": 0.9, "template": chat.sha256, "step": 1}
        write_json(job.run.folder / REWARD_FILE, facts)
    dist.barrier()


def _learner(ranks, folder, engine, zero, tensor, offload="none", options=OPTIONS, precision="fp32"):
    optimizer = OptimizerSpec(lr=LR, betas=BETAS, eps=EPS, eps_beside="uncorrected", weight_decay=DECAY, clip=CLIP_NORM)
    plan = ParallelPlan(zero=zero, tensor=tensor, offload=offload, micro_batch=2)
    name = f"{engine}-{zero}-{tensor}-{offload}-{precision}"
    stage = StageSpec(
        kind="ppo", engine=engine, parallel=plan, precision=precision, init_from="sft", global_batch=8, steps=2,
        optimizer=optimizer, seed=5,
    )  # fmt: skip
    job = _job(ranks, folder, name, stage, options)
    chat = Chat.open(job.experiment.data)
    prompts = _prompts(folder, chat)
    learner = ppo.PPO(job, chat, prompts, prompts)
    learner.begin()
    return learner


def _told(ranks, folder, engines, precision="fp32", options=OPTIONS):
    """What each engine says of two steps, its weights behind them, what it answers then and what it had answered."""
    _stages_before(ranks, folder, Chat.open(_data(folder)))
    told = {}
    for engine in engines:
        learner = _learner(ranks, folder, *engine, options=options, precision=precision)
        drawn = _keep(learner.ask, "answers")
        steps = []
        for step in range(2):
            taken = learner.step(Position(step=step, samples=8 * step), 8, LR)
            loss = dist.mean_and_any(taken.loss, False)[0]
            steps.append(taken.values | {"train/loss": loss, "train/grad_norm": taken.grad_norm})
        had = [answers.responses() for answers in drawn]
        answers = learner.ask.answers(learner.train.take(0, 8), 0)
        weights = {}
        for part in ("actor", "critic"):
            with getattr(learner, part).gathered() as module:
                weights[part] = {k: v.detach().clone().float().numpy() for k, v in module.named_parameters()}
        told[engine] = steps, weights, answers.tokens_BT.tolist(), learner.more["kl_coef"], had
    return told


def _keep(thing, method):
    """A list of what ``method`` of ``thing`` returns from now on."""
    kept, run = [], getattr(thing, method)

    def call(*args, **how):
        kept.append(run(*args, **how))
        return kept[-1]

    setattr(thing, method, call)
    return kept


# The same in double precision, response by response, from the papers: no function of ours but the model's forward.


def reference_run(folder, responses_of, options=OPTIONS):
    """Two steps of PPO as a list of metrics, and both models behind them."""
    chat = Chat.open(_data(folder))
    actor, frozen = _model(GPT, 1), _model(GPT, 1)
    critic, reward = _model(Scorer, 2), _model(Scorer, 2)
    with torch.no_grad():
        critic.score.weight.mul_(1 / STD)
        critic.score.bias.sub_(MEAN).mul_(1 / STD)
    states, kl_coef, told = {id(m): {} for m in (actor, critic)}, options.kl_coef, []
    temperature = options.temperature
    prompts = _prompts(folder, chat)
    for step in range(2):
        asked = prompts.take(8 * step, 8)
        answers = responses_of(actor, asked, 8 * step, temperature)
        with torch.no_grad():
            old = [_logp(actor, p.ids, r, temperature) for p, r in zip(asked, answers, strict=True)]
            ref = [_logp(frozen, p.ids, r, temperature) for p, r in zip(asked, answers, strict=True)]
            values = [_values(critic, p.ids, r) for p, r in zip(asked, answers, strict=True)]
        rewards, kls = [], []
        for prompt, answer, log_p, log_ref in zip(asked, answers, old, ref, strict=True):
            raw = reward(torch.tensor([prompt.ids + answer]))[0, -1].item()
            total = min(max((raw - MEAN) / STD, -1.5), 1.5) + 0.3 * vowels("", chat.text(answer), prompt.line)
            total -= 0.4 * (answer[-1] != chat.end)
            of_tokens = [-kl_coef * (a - b) for a, b in zip(log_p.tolist(), log_ref.tolist(), strict=True)]
            of_tokens[-1] += total
            rewards.append((total, of_tokens))
            kls.append(sum(log_p.tolist()) - sum(log_ref.tolist()))
        gains = [_gae(r, v.tolist()) for (_, r), v in zip(rewards, values, strict=True)]
        flat = [g for row in gains for g in row]
        mean = sum(flat) / len(flat)
        std = math.sqrt(sum((g - mean) ** 2 for g in flat) / len(flat) + 1e-8)
        losses = []
        for epoch in range(2):
            order = ppo_order(8, 5, step * 2 + epoch)
            for half in (order[:4], order[4:]):
                done = step * 4 + len(losses)
                policy, value = options.ptx_coef * _text_loss(actor), 0.0
                tokens = sum(len(answers[i]) for i in half)
                for i in half:
                    log_p = _logp(actor, asked[i].ids, answers[i], temperature)
                    v = _values(critic, asked[i].ids, answers[i])
                    for t in range(len(answers[i])):
                        ratio, a = (log_p[t] - old[i][t]).exp(), (gains[i][t] - mean) / std
                        policy = policy - torch.min(ratio * a, ratio.clamp(0.95, 1.05) * a) / tokens
                        goal = gains[i][t] + values[i][t].item()
                        near = values[i][t] + (v[t] - values[i][t]).clamp(-0.02, 0.02)
                        value = value + 0.5 * torch.max((v[t] - goal) ** 2, (near - goal) ** 2) / tokens
                norms = [
                    _adam(model, loss, states[id(model)], lr, done + 1)
                    for model, loss, lr in ((actor, policy, LR), (critic, value, VALUE_LR))
                ]
                losses.append([policy.item(), value.item(), *norms])
        sums = [sum(column) / len(losses) for column in zip(*losses, strict=True)]
        names = ("train/loss", "train/value_loss", "train/grad_norm", "train/value_grad_norm")
        kl = sum(kls) / len(kls)
        told.append(dict(zip(names, sums, strict=True)) | {"train/kl": kl, "train/kl_coef": kl_coef})
        told[-1]["train/reward"] = sum(total for total, _ in rewards) / 8
        kl_coef *= 1 + min(max(kl / 0.5 - 1, -0.2), 0.2) * 8 / 10_000
    return told, {"actor": actor.state_dict(), "critic": critic.state_dict()}, kl_coef


def ppo_order(count, seed, number):
    from jobs.data.examples import shuffled

    return shuffled(count, seed, number).tolist()


def _model(kind, seed):
    from jobs.nn.gpt import init_weights

    return init_weights(kind(MODEL), seed).double().eval()


def _text_loss(model):
    """Nats per token of all the text, in whatever order."""
    tokens, targets = (torch.from_numpy(part).view(4, MODEL.seq_len) for part in (TEXT[:-1], TEXT[1:]))
    logits = model(tokens).double()
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    return -log_p.gather(-1, targets[..., None]).mean()


def _logp(model, prompt, answer, temperature):
    logits = model(torch.tensor([prompt + answer]))[0].double() / temperature
    rows = logits[len(prompt) - 1 : -1]
    return (rows - rows.exp().sum(-1, keepdim=True).log())[range(len(answer)), answer]


def _values(model, prompt, answer):
    return model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1].double()


def _gae(rewards, values):
    out = []
    for t in range(len(rewards)):
        gain = 0.0
        for k in range(t, len(rewards)):
            following = values[k + 1] if k + 1 < len(values) else 0.0
            gain += (0.99 * 0.95) ** (k - t) * (rewards[k] + 0.99 * following - values[k])
        out.append(gain)
    return out


def _adam(model, loss, state, lr, t):
    """TensorFlow 1's Adam with decoupled decay, after clipping; the norm before."""
    model.zero_grad()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum((g**2).sum().item() for g in grads.values()))
    scale = min(1.0, CLIP_NORM / (norm + 1e-6))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in grads:
                continue
            m, v = state.setdefault(name, (torch.zeros_like(p), torch.zeros_like(p)))
            g = grads[name] * scale
            m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
            state[name] = m, v
            decays = not (name.endswith("bias") or "norm" in name)
            p.mul_(1 - lr * DECAY * decays)
            size = lr * math.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t)
            p.sub_(size * m / (v.sqrt() + EPS))
    return norm


def _sampled(actor, asked, first, temperature):
    """What is drawn is not on trial here: the tested sampler, from the double-precision model's weights."""
    from jobs.nn.rollout import Sampling, generate

    copy = GPT(MODEL)
    copy.load_state_dict({k: v.float() for k, v in actor.state_dict().items()})
    copy.temperature = temperature
    end = _sampled.end
    return generate(copy, [p.ids for p in asked], Sampling(max_tokens=10), end=end, seed=5, first=first).responses()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    _sampled.end = Chat.open(_place(folder)).end
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    return reference_run(folder, _sampled)


@pytest.fixture(scope="module")
def told(folder, tmp_path_factory):
    return run_ranks(_told, 2, folder, ENGINES)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_two_steps_are_those_of_the_papers(engine, told, expected):
    _holds(engine, told, expected)


@pytest.mark.slow
def test_with_pretraining_text_too(folder):
    engine = ENGINES[0]
    told = run_ranks(_told, 2, folder, [engine], "fp32", MIXED)
    _holds(engine, told, reference_run(folder, _sampled, MIXED))


def test_text_of_another_tokenizer_is_not_mixed_in(folder):
    job = _job(Ranks(), folder, "mixed", StageSpec(kind="ppo", precision="fp32"))
    assert ppo.pretraining_text(job, Chat.open(_data(folder)).tokenizer_sha256).tokens == len(TEXT)
    with pytest.raises(DataError, match=r"is of tokenizer .*, the prompts of ffffffffffff"):
        ppo.pretraining_text(job, "f" * 64)


def test_samples_that_cannot_be_written_end_nothing(folder, caplog):
    job = _job(Ranks(), folder, "full", StageSpec(kind="ppo", precision="fp32"))
    (job.run.folder / "samples").write_text("no folder")
    ppo.PPO._keep_samples(SimpleNamespace(job=job, o=replace(OPTIONS, samples=0)), 3, [], None)
    assert "the samples of step 3 could not be written" in caplog.text


def _holds(engine, told, expected):
    metrics, weights, kl_coef = expected
    for rank in told:
        steps, got, _, coef, _ = rank[engine]
        for mine, theirs in zip(steps, metrics, strict=True):
            for name, value in theirs.items():
                assert mine[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name
        assert coef == pytest.approx(kl_coef, rel=1e-6)
        for part, tensors in weights.items():
            for name, tensor in tensors.items():
                assert torch.allclose(torch.from_numpy(got[part][name]).double(), tensor, atol=2e-5), (part, name)


@pytest.mark.slow
def test_every_layout_answers_alike(told):
    first = told[0][ENGINES[0]]
    for rank in told:
        for engine in ENGINES:
            assert rank[engine][2] == first[2], engine
    assert first[0][0]["train/kl"] == pytest.approx(0, abs=1e-6)  # it begins as the reference
    assert 0 < first[0][1]["train/clipped"] < 1
    assert abs(first[0][1]["train/logp_gap"]) < 1e-5


@pytest.mark.parity
def test_deepspeed_takes_the_same_steps_at_every_level(folder, expected):
    levels = [("deepspeed", 0, 1), ("deepspeed", 2, 1), ("deepspeed", 2, 1, "optimizer"), ("deepspeed", 3, 1, "all")]
    told = run_ranks(_told, 2, folder, levels)
    for level in levels:
        _holds(level, told, expected)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("engines", "preload"),
    [
        ([("torch", 0, 1), ("torch", 3, 1), ("deepspeed", 1, 1), ("deepspeed", 3, 1)], None),
        ([("colossalai", 1, 1), ("colossalai", 3, 1)], "jobs.engines._colossalai_cpu"),
    ],
    ids=["torch and deepspeed", "colossalai"],
)
def test_bf16_is_near(folder, engines, preload):
    """Each engine against the papers' account of the answers that it drew itself: in bf16 they are not the same."""
    told, *_ = run_ranks(_told, 2, folder, engines, "bf16", preload=preload)
    off = {}
    for engine, (steps, _, _, _, had) in told.items():
        metrics, *_ = reference_run(folder, lambda *about, had=had: had[about[2] // 8])
        for step, (mine, theirs) in enumerate(zip(steps, metrics, strict=True)):
            off |= {(engine, step, n): abs(mine[n] - value) / max(1, abs(value)) for n, value in theirs.items()}
            assert abs(mine["train/logp_gap"]) < 1e-2, engine
    print(*(f"{key} {x:.2e}" for key, x in off.items()), sep="\n")
    assert {key: x for key, x in off.items() if not x < BF16} == {}


@pytest.mark.parity
def test_colossalai_takes_the_same_steps(folder, tmp_path_factory, expected):
    preload = "jobs.engines._colossalai_cpu"
    for rank in run_ranks(_told, 2, folder, [("colossalai", 1, 1), ("colossalai", 2, 1)], preload=preload):
        for steps, *_ in rank.values():
            for mine, theirs in zip(steps, expected[0], strict=True):
                for name, value in theirs.items():
                    assert mine[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name


def test_rows_are_read_without_a_mask():
    rows = Rows.of([[5, 6], [7]], [[8], [9, 10, 11]], pad=0)
    assert rows.ids_BT.tolist() == [[5, 6, 8, 0], [7, 9, 10, 11]]
    assert rows.at_BR.tolist() == [[1, 1, 1], [0, 1, 2]]
    assert rows.mask_BR.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert rows.last_B.tolist() == [2, 3]
    some = rows.take([0])
    assert some.ids_BT.tolist() == [[5, 6, 8]]
    assert some.pick(torch.tensor([[0.1, 0.2, 0.3]])).tolist() == [[pytest.approx(0.2), 0, 0]]


BOUNDS = ppo.Options(max_kl=1.0, min_entropy=0.1, min_length=2.0, max_logp_gap=0.1, patience=2, hack_patience=2)
FINE = {"kl": 0.5, "entropy": 1.0, "length": 9.0, "logp_gap": 0.0, "reward": 0.0}
GOOD = torch.linspace(0, 1, 50)


@pytest.mark.parametrize(("name", "value"), [("kl", 1.1), ("entropy", 0.01), ("length", 1.0), ("logp_gap", 0.2)])
def test_what_goes_astray_is_warned_of_and_stopped(name, value, tmp_path, caplog):
    gates = Gates(BOUNDS, {}, [], evidence=tmp_path)
    gates.step(FINE | {name: value})
    assert gates.astray() is None
    assert name in caplog.text
    gates.step(FINE)
    gates.step(FINE | {name: value})
    assert gates.astray() is None  # not on end
    gates.step(FINE | {name: value})
    assert f"{name} was out of bounds 2 times on end" in str(gates.astray())


def test_a_bound_that_was_moved_lets_a_run_go_on(tmp_path):
    more = {}
    gates = Gates(BOUNDS, more, [], evidence=tmp_path)
    for _ in range(2):
        gates.step(FINE | {"kl": 1.5})
    kept = json.loads(json.dumps(more))
    assert "kl was out of bounds" in str(Gates(BOUNDS, kept, [], evidence=tmp_path).astray())
    moved = Gates(replace(BOUNDS, max_kl=1.2), kept, [], evidence=tmp_path)
    assert moved.astray() is None
    moved.step(FINE | {"kl": 1.5})
    assert moved.astray() is None  # the first time beyond the new one
    moved.step(FINE | {"kl": 1.5})
    assert "kl was out of bounds 2 times" in str(moved.astray())


def _hacked(gates, rewards, every):
    """The steps until ``gates`` stop a run whose reward rises at the cost of a rule that is only watched."""
    gates.evaluation({"reward": GOOD, "rule/good": GOOD})
    for step, reward in enumerate(rewards, 1):
        gates.step(FINE | {"reward": reward})
        if step % every == 0:
            gates.evaluation({"reward": GOOD + reward, "rule/good": GOOD - step / len(rewards)})
        if gates.astray():
            return step
    return None


def test_a_hacked_reward_is_found(tmp_path):
    more = {}
    gates = Gates(BOUNDS, more, ["rule/good"], evidence=tmp_path)
    assert _hacked(gates, [0.0, 1.0, 2.0], 1) == 3
    stopped = gates.astray()
    assert "held-out rule/good was out of bounds 2 times" in str(stopped)
    assert "a larger `hack_patience`" in stopped.hint
    assert json.loads(json.dumps(more)) == more  # a checkpoint keeps it
    assert Gates(replace(BOUNDS, hack_patience=3), more, ["rule/good"], evidence=tmp_path).astray() is None


def test_one_lucky_batch_hides_nothing(tmp_path):
    lucky = [3.0] + [0.0] * 9 + [1.0] * 30
    assert _hacked(Gates(BOUNDS, {}, ["rule/good"], evidence=tmp_path), lucky, 10) == 30
    unlucky = [1.0] * 20 + [0.9] * 19 + [1.1]  # a last batch above the first, the rest below: it has not risen
    assert _hacked(Gates(BOUNDS, {}, ["rule/good"], evidence=tmp_path), unlucky, 10) is None


@pytest.mark.parametrize("config", ["chatgpt-demo", "instructgpt-1.3b", "instructgpt-175b"])
def test_what_is_shipped_stops_a_hacked_reward_in_time(config, tmp_path):
    stage = compose(config).experiment.stages["ppo"]
    gates = Gates(ppo.Options(**stage.options), {}, ["rule/good"], evidence=tmp_path)
    rewards = [step / stage.steps for step in range(stage.steps)]
    assert _hacked(gates, rewards, stage.eval_every) <= 0.75 * stage.steps


def _stopped(ranks, folder):
    _stages_before(ranks, folder, Chat.open(_data(folder)))
    learner = _learner(ranks, folder, "torch", 0, 1)
    assert learner.astray() is None
    if ranks.rank == 0:
        learner.more["beyond"] = {"kl": [OPTIONS.max_kl, OPTIONS.patience]}
    stopped = learner.astray()
    return str(stopped), stopped.hint


def test_all_ranks_stop_or_none(tmp_path):
    _place(tmp_path)
    first, other = run_ranks(_stopped, 2, tmp_path)
    assert first == other
    assert first[0] == "kl was out of bounds 5 times on end"


RULE = "def score(prompt, response, line):\n    return len(response) / 10\n"


def _changed(ranks, folder):
    """A run goes on with the rule and the pretraining text that it began with alone."""
    _stages_before(ranks, folder, Chat.open(_data(folder)))
    sys.path.insert(0, str(folder))
    probe = Probe(data="", measure=lambda: 0.0)

    def write(rule=RULE, text=TEXT):
        (folder / "our_rules.py").write_text(rule)
        _write_text(folder, text)

    def learner():
        return _learner(ranks, folder, "torch", 0, 1, options=replace(MIXED, rules={"our_rules:score": 1.0}))

    def resumed():
        found = learner()
        return resume(found.job, found.parts, found.train, probe)

    write()
    first = learner()
    assert save(first.job, first.parts, first.train, Position(step=1), probe, first.more)
    assert resumed()[0].step == 1
    for change in ({"rule": RULE.replace("10", "-10")}, {"text": TEXT[::-1]}):
        write(**change)
        with pytest.raises(CheckpointError, match="does not belong to this run: `data` is"):
            resumed()
    write()
    assert resumed()[0].step == 1


def test_another_rule_or_text_is_another_run(tmp_path):
    _place(tmp_path)
    run_ranks(_changed, 1, tmp_path)


def _refused(ranks, folder):
    chat = Chat.open(_data(folder))
    _stages_before(ranks, folder, chat)
    learner = _learner(ranks, folder, "torch", 0, 1)
    piece = next(p for p in learner.ask.reward.pieces() if p.name == "score.bias")
    piece.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="the reward of a response is nan"):
        learner.step(Position(), 8, LR)
    job = learner.job
    facts = read_json(job.run.root / "chain" / "reward" / REWARD_FILE)
    for change, said in (
        ({"accuracy": 0.55}, "is right on 0.550"),
        ({"template": "other"}, "another tokenizer or chat"),
    ):
        write_json(job.run.root / "chain" / "reward" / REWARD_FILE, facts | change)
        with pytest.raises(DataError, match=said):
            reward_facts(job, chat)
    write_json(job.run.root / "chain" / "reward" / REWARD_FILE, facts | {"step": 2})
    with pytest.raises(DataError, match=r"is step 1, and `reward\.json` speaks of step 2"):
        _learner(ranks, folder, "torch", 0, 1)
    (job.run.root / "chain" / "reward" / REWARD_FILE).unlink()
    with pytest.raises(DataError, match=r"no `.*reward\.json`"):
        reward_facts(job, chat)


def test_bad_rewards_are_refused(tmp_path):
    _place(tmp_path)
    run_ranks(_refused, 1, tmp_path)
