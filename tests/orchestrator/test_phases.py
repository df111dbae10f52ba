"""PPO and DPO by hand-computed sums, and against what InstructGPT took."""

import statistics
from dataclasses import replace
from typing import Any

import published
import pytest

from orchestrator.checks import check
from orchestrator.compose import compose
from orchestrator.hardware import chip
from orchestrator.memory import rank_bytes
from orchestrator.phases import forward_s, frozen_models, iteration, phase_bytes, rollout_s
from orchestrator.plan import Estimate, estimate, plan
from orchestrator.search import search
from orchestrator.spec import ClusterSpec, ModelSpec, ParallelPlan, StageSpec
from orchestrator.timing import Software, step

A100 = chip(ClusterSpec(gpu="A100", gpus_per_node=8, gpu_memory_gb=80, gpu_tflops=312, memory_gb_per_s=2000))
MODEL = ModelSpec(layers=32, hidden=4096, heads=32, kv_heads=8, vocab=32000, position="rope")
N = MODEL.params
OPTIONS = {
    "reward": "reward", "max_tokens": 512, "rollout_batch": 64, "minibatches": 2, "inner_epochs": 3, "ptx_coef": 0.0,
    "ptx_ratio": 8.0,
}  # fmt: skip


def stage(kind: str = "ppo", engine: str = "deepspeed", options: dict[str, Any] | None = None, **p: Any) -> StageSpec:
    plan = ParallelPlan(**{"micro_batch": 4, **p})
    return StageSpec(kind=kind, engine=engine, parallel=plan, options=OPTIONS | (options or {}))


def test_four_models_without_sharding() -> None:
    phases = phase_bytes(MODEL, stage(), 8, 16)
    assert list(phases) == ["rollout", "score", "update"]
    for parts in phases.values():  # actor and critic, each 2 + 4 + 12 bytes a parameter; two frozen ones in fp32
        assert parts["weights"] == 2 * 2 * N
        assert parts["gradients"] == 2 * 4 * N
        assert parts["optimizer"] == 2 * 12 * N
        assert parts["frozen"] == 2 * 4 * N
        assert parts["average"] == 4 * N
    assert phases["rollout"]["buffers"] == 0  # the actor itself samples
    assert phases["update"]["activations"] > phases["score"]["activations"]


def test_four_models_sharded() -> None:
    phases = phase_bytes(MODEL, stage(zero=3), 8, 16)
    for parts in phases.values():
        assert parts["weights"] == 2 * 2 * N / 8
        assert parts["optimizer"] == 2 * 12 * N / 8
        assert parts["frozen"] == 2 * 4 * N / 8
        assert parts["average"] == 4 * N / 8
    bucket = 2 * 5e8  # bytes that DeepSpeed's ZeRO-3 holds for each engine, actor and critic
    assert phases["rollout"]["buffers"] == 2 * N + 2 * bucket  # a gathered copy of the actor samples
    alone = rank_bytes(MODEL, stage(zero=3), 0, 8, 16)
    assert phases["update"]["buffers"] == alone["buffers"] + bucket
    assert phase_bytes(MODEL, stage(options={"ema": None}), 8, 16)["update"]["average"] == 0


def test_the_cache_of_a_rollout() -> None:
    rollout = phase_bytes(MODEL, stage(), 8, 16)["rollout"]
    # 2 (keys, values) x 32 layers x 8 heads of 128 x 2 bytes x 64 sequences of 2,048 tokens
    assert rollout["kv_cache"] == 2 * 32 * 8 * 128 * 2 * 64 * 2048
    halved = phase_bytes(MODEL, stage(tensor=2), 8, 16)["rollout"]
    assert halved["kv_cache"] == rollout["kv_cache"] / 2


def test_gradients_of_one_engine_at_a_time() -> None:
    phases = phase_bytes(MODEL, stage(engine="torch", zero=3), 8, 16)
    assert [parts["gradients"] for parts in phases.values()] == [0, 0, 4 * N / 8]


def test_rules_alone_need_no_reward_model() -> None:
    alone = stage(options={"reward": None})
    assert (frozen_models(alone), frozen_models(stage()), frozen_models(stage("dpo"))) == (1, 2, 1)
    assert frozen_models(stage("sft")) == frozen_models(stage("reward")) == 0


def test_dpo_holds_a_reference_and_reads_it_first() -> None:
    s = stage("dpo")
    (parts,) = phase_bytes(MODEL, s, 8, 4).values()
    assert parts["frozen"] == 4 * N
    assert parts["optimizer"] == 12 * N
    done = iteration(MODEL, s, A100, 8, 4, Software())
    learning = step(MODEL, s, A100, 8, 4, Software()).total_s
    # a forward pass is a third of the arithmetic, and has nothing else to do
    assert 0.25 * learning < done.total_s - learning < 0.35 * learning


def test_compare_samples_and_learns_nothing() -> None:
    whole = stage("compare", options={"samples": 4}, micro_batch=16)  # 4 prompts
    (parts,) = phase_bytes(MODEL, whole, 8, 4).values()
    assert parts["frozen"] == 4 * N
    assert parts["kv_cache"] == 2 * 32 * 8 * 128 * 2 * 16 * 2048
    assert parts["buffers"] == 0
    assert not {"gradients", "optimizer", "weights"} & {*parts}
    (sharded,) = phase_bytes(MODEL, replace(whole, parallel=replace(whole.parallel, zero=3)), 8, 4).values()
    assert (sharded["frozen"], sharded["buffers"]) == (4 * N / 8, 2 * N)  # a gathered copy samples
    taken = iteration(MODEL, whole, A100, 8, 4, Software())
    assert taken.rollout_s == rollout_s(MODEL, whole, A100, 8, 64, Software())
    assert taken.total_s == taken.rollout_s + 64 * 1e-3  # a rule judges
    assert {*phase_bytes(MODEL, stage("compare", options={"samples": 0}), 8, 4)["rollout"]} == {"frozen", "other"}


def test_compare_is_planned_with_all_its_samples() -> None:
    e = compose("chatgpt-demo", ["model=gpt3-1.3b", "cluster=a100-80g", "stages.compare.global_batch=512"]).experiment

    def planned(samples: int) -> Estimate:
        s = replace(e.stages["compare"], options=e.stages["compare"].options | {"samples": samples})
        return estimate(replace(e, stages={"s": s}), "s")

    none, two, eight = planned(0), planned(2), planned(8)
    assert eight.memory_gb["kv_cache"] == 4 * two.memory_gb["kv_cache"]
    assert two.memory_gb["frozen"] == 4 * e.model.params / 1e9
    assert none.memory_gb["frozen"] == 0
    assert (two.checkpoint_gb, two.save_s, two.evaluation_s) == (0, 0, 0)
    assert none.step_s < two.step_s < eight.step_s
    assert 0 < two.mfu < eight.mfu < 1


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_a_prompt_is_as_many_rows_as_it_has_responses(kind: str) -> None:
    e = compose("instructgpt-1.3b", ["model.attention=dense"]).experiment  # masks of bands are as large for any rows

    def planned(responses: int) -> Estimate:
        s = replace(e.stages["reward"], kind=kind, options={"responses": responses})
        return estimate(replace(e, stages={"s": s}), "s")

    two, eight = planned(2), planned(8)
    assert eight.memory_gb["activations"] == pytest.approx(4 * two.memory_gb["activations"])
    assert (eight.data, eight.micro_batches) == (two.data, two.micro_batches)  # these count prompts
    assert 3 < eight.days / two.days < 4
    assert eight.tokens_per_s * eight.step_s == pytest.approx(4 * two.tokens_per_s * two.step_s)
    assert eight.mfu < 1


def test_sampling_reads_all_weights_and_the_cache_for_each_token() -> None:
    for rows in (1, 64):
        mean = 2048 - 512 / 2  # tokens in the cache, over the response
        each = (2 * N + 2 * 32 * 8 * 128 * 2 * rows * mean) / (0.8 * 2e12)
        sampled = rollout_s(MODEL, stage(), A100, 8, rows, Software())
        prompts = step(MODEL, stage(micro_batch=rows), A100, 1, 1, Software()).total_s / 3  # at most
        assert 512 * each < sampled < 512 * each + prompts
    one, two = (rollout_s(MODEL, stage(), A100, 8, rows, Software()) for rows in (64, 128))
    assert two == pytest.approx(2 * one)  # in two groups


def test_small_models_wait_for_their_kernels() -> None:
    small = ModelSpec(layers=12, hidden=768, heads=12)
    sampled = rollout_s(small, stage(), A100, 1, 1, Software())
    assert sampled == pytest.approx(512 * 12 * 20 * 10e-6, rel=0.02)


def test_actor_and_critic_learn_in_turn() -> None:
    done = iteration(MODEL, stage(), A100, 8, 16, Software())
    minibatch = step(MODEL, stage(), A100, 8, 8, Software())
    assert done.compute_s == pytest.approx(2 * 3 * 2 * minibatch.compute_s)  # minibatches, passes, models
    assert done.optimizer_s == pytest.approx(2 * 3 * 2 * minibatch.optimizer_s)
    mixed = iteration(MODEL, stage(options={"ptx_coef": 27.8}), A100, 8, 16, Software())
    assert mixed.compute_s == pytest.approx(done.compute_s * (1 + 8 + 1) / 2)


def test_deepspeed_chat_took_somewhat_longer() -> None:
    # Its README, tables 1 and 2, step 3: hours for 264,292 samples of 256 + 256 tokens; 16 a GPU as in its scripts
    layers = {4096: 32, 5120: 40, 7168: 48, 9216: 64, 12288: 96}  # OPT 6.7B, 13B, 30B, 66B, 175B; heads 128 wide
    errors = []
    for hidden, gpus, hours in [
        (4096, 8, 4.1), (5120, 8, 9), (7168, 8, 18), (9216, 8, 50.4), (5120, 64, 1.25), (7168, 64, 4), (9216, 64, 7.5),
        (12288, 64, 20),
    ]:  # fmt: skip
        model = ModelSpec(layers=layers[hidden], hidden=hidden, heads=hidden // 128, vocab=50272, seq_len=512)
        s = stage(options={"max_tokens": 256, "rollout_batch": 16}, zero=3, micro_batch=16, recompute="full")
        software, c = Software(), chip(published.A100)
        one = rollout_s(model, s, c, gpus, 16, software) + step(model, s, c, gpus, 1, software).total_s
        one += 2 * forward_s(model, s, c, gpus, 1, software)  # actor and reference; critic and reward model have 350M
        errors.append(one * 264_292 / (16 * gpus) / 3600 / hours - 1)
    assert all(-0.4 < e < 0 for e in errors), errors
    assert statistics.median(errors) > -0.22


def test_flops_are_those_of_instructgpt() -> None:
    e = compose("instructgpt-175b").experiment
    done = estimate(e, "ppo")
    s = e.stages["ppo"]
    total = done.mfu * done.step_s * done.world * 312e12 * s.steps
    tokens = s.global_batch * s.steps * e.model.seq_len
    # its critic and reward model have 6B: without their two scores and the critic's training
    without = total - e.model.flops_per_token * tokens * (2 / 3 + 1)
    assert without / (1e15 * 86400) == pytest.approx(60, rel=0.1)  # Ouyang et al. 2022, section 5.1: 60 PF-days


def test_the_plan_takes_the_fullest_phase() -> None:
    e = compose("instructgpt-6b").experiment
    done = estimate(e, "ppo")
    assert done.memory_gb == max(done.phases.values(), key=lambda gb: gb["total"])
    assert done.step_s == pytest.approx(sum(done.step_parts_s.values()))
    assert {"rollout_s", "score_s"} < set(done.step_parts_s)
    assert estimate(e, "sft").phases == {}
    assert done.checkpoint_gb == pytest.approx(28 / 12 * estimate(e, "sft").checkpoint_gb)
    without = compose("instructgpt-6b", ["stages.ppo.options.ema=null"]).experiment
    assert estimate(without, "ppo").checkpoint_gb == pytest.approx(24 / 28 * done.checkpoint_gb)
    more = replace(e.stages["ppo"], options=e.stages["ppo"].options | {"rollout_batch": 1024})
    (forced,) = plan(replace(e, stages={**e.stages, "ppo": more}), ["ppo"], force=True)
    assert forced.memory_gb == forced.phases["rollout"]
    assert not forced.fits


def test_minibatches_split_over_the_data_ranks() -> None:
    e = compose("instructgpt-6b", ["stages.ppo.options.minibatches=24"]).experiment
    (problem,) = check(e, "ppo")
    assert "512 does not divide by `options.minibatches` 24 x data 16 x micro_batch 2 = 768" in problem.message
    assert "may be 768" in problem.hint


def test_text_to_mix_in_splits_over_the_data_ranks() -> None:
    assert not check(compose("instructgpt-6b", ["stages.ppo.options.ptx_ratio=0.5"]).experiment, "ppo")  # 32
    (problem,) = check(compose("instructgpt-6b", ["stages.ppo.options.ptx_ratio=1.25"]).experiment, "ppo")
    assert "1.25 x 64 responses of a minibatch = 80 does not divide by data 16 x micro_batch 2 = 32" in problem.message
    assert problem.hint == "`stages.ppo.options.ptx_ratio` may be 1 or 2"


def test_layouts_are_found_for_ppo_too() -> None:
    e = compose("instructgpt-1.3b").experiment
    (best,) = search(e, "ppo", top=1)
    assert best.estimate.step_s <= estimate(e, "ppo").step_s
    assert best.parallel.pipeline == 1
