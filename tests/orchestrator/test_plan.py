"""The plan against published numbers, and one problem with a way out for each rule broken."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.compose import compose
from orchestrator.errors import ConfigError, PlanError
from orchestrator.plan import Estimate, check, estimate, plan, signal_lead_s
from orchestrator.spec import (
    ClusterSpec,
    Experiment,
    ModelSpec,
    ParallelPlan,
    ScheduleSpec,
    StageSpec,
    TrackingSpec,
    summed,
)

A100 = ClusterSpec(gpu="A100-SXM4-80GB", gpus_per_node=8, gpu_memory_gb=80, gpu_tflops=312)
GPT3 = ModelSpec(layers=96, hidden=12288, heads=96, vocab=51200)
TRAIN = StageSpec(kind="pretrain", engine="deepspeed", global_batch=16, steps=10)


def experiment(
    *, model: ModelSpec = GPT3, cluster: ClusterSpec = A100, stage: StageSpec = TRAIN, **parallel: Any
) -> Experiment:
    stage = replace(stage, parallel=replace(stage.parallel, **parallel))
    return Experiment(name="x", model=model, cluster=cluster, stages={"s": stage})


# Published numbers


@pytest.mark.parametrize(
    ("data", "zero", "gb"),
    [
        # Rajbhandari et al. 2020, table 1, 7.5B parameters
        (1, 1, 120), (4, 1, 52.5), (4, 2, 41.3), (4, 3, 30), (16, 1, 35.6), (16, 2, 21.6), (16, 3, 7.5),
        (64, 1, 31.4), (64, 2, 16.6), (64, 3, 1.88), (256, 1, 30.4), (256, 2, 15.4), (256, 3, 0.47), (1024, 1, 30.1),
        (1024, 2, 15.1), (1024, 3, 0.12),
    ],
)  # fmt: skip
def test_model_states_are_zeros_table_1(data: int, zero: int, gb: float) -> None:
    cluster, stage = replace(A100, gpus_per_node=data), replace(TRAIN, global_batch=data)
    e = estimate(experiment(cluster=cluster, stage=stage, zero=zero), "s")
    states = sum(e.memory_gb[key] for key in ("weights", "gradients", "optimizer"))
    assert states / GPT3.params * 7.5e9 == pytest.approx(gb, rel=0.025)


def test_offload_leaves_what_zero_offload_leaves() -> None:
    # Ren et al. 2021, arXiv:2101.06840, section 4: with ZeRO-2, 2 bytes a parameter stay on the GPU.
    e = estimate(experiment(zero=2, offload="optimizer"), "s")
    assert e.memory_gb["weights"] == pytest.approx(2 * GPT3.params / 1e9)
    assert e.memory_gb["gradients"] == e.memory_gb["optimizer"] == 0


def test_flops_are_narayanans_equation_3() -> None:
    b, s, layers, h, v = 16, 2048, 96, 12288, 51200
    e = estimate(experiment(recompute="full"), "s")
    expected = 96 * b * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    assert e.hfu * e.step_s * e.world * 312e12 == pytest.approx(expected)
    assert e.model_tflops_per_gpu == pytest.approx(e.mfu * 312)


@pytest.mark.parametrize(("layers", "hidden", "mfu", "hfu"), [(48, 6144, 41.5, 43.7), (96, 12288, 51.4, 52.8)])
def test_selective_recompute_costs_what_korthikanti_prints(layers: int, hidden: int, mfu: float, hfu: float) -> None:
    model = ModelSpec(layers=layers, hidden=hidden, heads=64, vocab=51200)  # table 5
    e = estimate(experiment(model=model, recompute="selective"), "s")
    assert e.hfu / e.mfu == pytest.approx(hfu / mfu, rel=0.002)


def test_days_are_tokens_over_speed() -> None:
    # Narayanan et al. 2021, equation 4: 300B tokens of 175B at 140 TFLOP/s (recompute counted) on 1,024 GPUs: 34 days
    stage = replace(TRAIN, global_batch=1536, steps=round(300e9 / 1536 / 2048))
    e = estimate(experiment(stage=stage, nodes=128, tensor=8, zero=1, recompute="full"), "s")
    at_140 = e.days * e.hfu * 312 / 140
    assert at_140 == pytest.approx(34, rel=0.03)
    assert e.gpu_hours == pytest.approx(e.days * 24 * 1024)


def test_bubble() -> None:
    stage = replace(TRAIN, global_batch=128)
    e = estimate(experiment(stage=stage, nodes=8, tensor=8, pipeline=8), "s")
    assert (e.micro_batches, e.bubble) == (128, 7 / 128)  # Narayanan et al. 2021, section 2.2.1
    half = estimate(experiment(stage=stage, nodes=8, tensor=8, pipeline=8, interleave=2), "s")
    assert half.bubble == 7 / 256  # section 2.2.2
    assert half.step_parts_s["bubble_s"] == pytest.approx(e.step_parts_s["bubble_s"] / 2)


@pytest.mark.parametrize(
    ("model", "terabytes"),
    [(GPT3, 2.44), (ModelSpec(layers=128, hidden=25600, heads=160, vocab=51200), 13.8)],  # Narayanan, section 5.10
)
def test_checkpoint_size(model: ModelSpec, terabytes: float) -> None:
    """Theirs hold the bf16 weights beside the fp32 ones: 14 bytes a parameter. What ours hold: test_engines."""
    e = estimate(experiment(model=model), "s")
    assert e.checkpoint_gb == pytest.approx(terabytes * 12 / 14 * 1000, rel=0.025)
    assert e.storage_tb == pytest.approx(3 * e.checkpoint_gb / 1000)  # two are kept, a third is being written


def test_a_ramp_is_counted() -> None:
    ramp = ScheduleSpec(ramp_from=8, ramp_step=8, ramp_tokens=24 * 2048)
    ramped = experiment(stage=replace(TRAIN, global_batch=24, steps=5, schedule=ramp))

    def step_s(batch: int) -> float:
        return estimate(experiment(stage=replace(TRAIN, global_batch=batch)), "s").step_s

    # batches by hand: 8 (grown 0 of 16), 8 (5.3), 16 (10.7), then 24, 24
    assert estimate(ramped, "s").days * 86400 == pytest.approx(2 * step_s(8) + step_s(16) + 2 * step_s(24))


def test_signal_lead() -> None:
    e = estimate(experiment(), "s")
    # the step at work is ended first, and may take longer than planned
    assert e.evaluation_s == 0
    assert signal_lead_s(e) == math.ceil(60 + e.step_s * (1 + e.step_band) + 2 * e.save_s)
    assert signal_lead_s(None) == 60


@pytest.mark.parametrize(("samples", "batches"), [(TRAIN.global_batch, 1), (10 * TRAIN.global_batch, 10)])
def test_an_evaluation_may_be_due_before_the_save(samples: int, batches: float) -> None:
    e = estimate(experiment(stage=replace(TRAIN, eval_every=5, eval_samples=samples)), "s")
    assert e.evaluation_s == pytest.approx(batches * e.step_s / 3)  # a third of training goes forward
    assert signal_lead_s(e) == math.ceil(60 + (e.step_s + e.evaluation_s) * (1 + e.step_band) + 2 * e.save_s)


def test_an_evaluation_of_ppo_samples_and_scores() -> None:
    config = compose("instructgpt-1.3b")
    e = estimate(config.experiment, "ppo")
    asked = e.step_parts_s["rollout_s"] + e.step_parts_s["score_s"]
    stage = config.experiment.stages["ppo"]
    assert e.evaluation_s == pytest.approx(asked * stage.eval_samples / stage.global_batch)


def test_keys_of_the_json() -> None:
    keys = (
        "stage engine params world data tensor ulysses pipeline micro_batches memory_gb gpu_memory_gb fits step_s "
        "tokens_per_s model_tflops_per_gpu mfu hfu bubble days gpu_hours usd checkpoint_gb save_s "
        "save_every_optimal_steps fullest_stage step_parts_s evaluation_s step_band interruptions goodput "
        "days_end_to_end submissions storage_tb energy_mwh phases epochs"
    )
    e = estimate(experiment(), "s").to_json()
    assert list(e) == keys.split()
    parts = ["weights", "gradients", "optimizer", "activations", "logits", "buffers", "other"]
    assert list(e["memory_gb"]) == [*parts, "total"]
    assert e["memory_gb"]["total"] == pytest.approx(sum(e["memory_gb"].values()) / 2)
    assert e["step_s"] == pytest.approx(sum(e["step_parts_s"].values()))


def test_a_measured_cluster_is_planned_with_what_was_measured() -> None:
    plain = estimate(experiment(), "s")
    slow = estimate(experiment(cluster=replace(A100, step_factor=1.25, memory_factor=1.1)), "s")
    assert slow.step_s == pytest.approx(1.25 * plain.step_s)
    assert slow.days == pytest.approx(1.25 * plain.days)
    for part, gb in plain.memory_gb.items():
        if part not in ("other", "total"):  # which no allocator measures
            assert slow.memory_gb[part] == pytest.approx(1.1 * gb)
    assert slow.memory_gb["other"] == plain.memory_gb["other"]
    assert slow.memory_gb["total"] == pytest.approx(sum(slow.memory_gb.values()) / 2)


# Rules

S = "stages.pretrain"
RULES = [
    ([f"{S}.parallel.nodes=0"], f"`{S}.parallel.nodes` is 0, and must be at least 1", ""),
    ([f"{S}.optimizer.lr=0"], f"`{S}.optimizer.lr` is 0, and must be more than 0", ""),
    ([f"{S}.optimizer.lr=.nan"], f"`{S}.optimizer.lr` is nan, and must be more than 0", ""),
    ([f"{S}.optimizer.betas=[0.9, 1]"], f"`{S}.optimizer.betas` is 1, and must be from 0 up to but not 1", ""),
    (["model.dropout=1.5"], "`model.dropout` is 1.5", ""),
    (["data.examples.x.max_prompt=0"], "`data.examples.x.max_prompt` is 0, and must be at least 1", ""),
    (["model.heads=7"], "`hidden` 768 does not divide by `heads` 7", "`model.heads` may be 3, 4, 6 or 8"),
    (["model.kv_heads=5"], "`heads` 12 does not divide by `kv_heads` 5", "`model.kv_heads` may be 2, 3, 4 or 6"),
    (["model.heads=256", "model.position=rope"], "rope turns pairs, and `hidden` 768 / `heads` 256 = 3", "even"),
    (["model.window=4096"], "`window` 4096 is longer than `seq_len` 2048", "may be 1 to 2048"),
    (["cluster.nodes=2", f"{S}.parallel.nodes=4"], f"`{S}.parallel.nodes` is 4, and the cluster has 2", "1 to 2"),
    (["cluster=v100-32g"], f"`{S}.precision` is bf16, which `V100-SXM2-32GB` does not have", f"{S}.precision=fp32"),
    ([f"{S}.parallel.tensor=16"], "16 does not divide the 8 GPUs of a node", "may be 1, 2, 4 or 8"),
    ([f"{S}.parallel.interleave=2"], "engine `deepspeed` cannot run `parallel.interleave=2`: ", "`interleave: 1`"),
    (
        [f"{S}.parallel.tensor=4", "model.ffn_hidden=3001"],
        "`model.ffn_hidden` 3001 does not split over",
        "`model.ffn_hidden` may be 3000 or 3004",
    ),
    (
        [f"{S}.parallel={{tensor: 4, sequence: true}}", "model.seq_len=2046"],
        "`model.seq_len` 2046 does not split over",
        "`model.seq_len` may be 2044 or 2048",
    ),
    ([f"{S}.parallel.tensor=8"], "`model.heads` 12 does not split", f"`{S}.parallel.tensor` may be 1, 2 or 4"),
    ([f"{S}.parallel.pipeline=5"], "`model.layers` 12 do not split", f"`{S}.parallel.pipeline` may be 2, 3, 4 or 6"),
    ([f"{S}.parallel.pipeline=3"], "8 GPUs (1 nodes x 8) do not divide by tensor 1 x pipeline 3 = 3", "may be 3"),
    ([f"{S}.parallel.sequence=true"], "cannot run `parallel.sequence=true`, `parallel.tensor=1`: ", "`tensor: 2`"),
    ([f"{S}.parallel.ulysses=5"], "`model.heads` 12 does not split", f"`{S}.parallel.ulysses` may be 1, 2 or 4"),
    ([f"{S}.parallel.ulysses=3"], "`model.seq_len` 2048 does not split", f"`{S}.parallel.ulysses` may be 1, 2 or 4"),
    ([f"{S}.parallel.ulysses=16"], "do not divide by tensor 1 x ulysses 16 x pipeline 1 = 16", "nodes` may be 2"),
    ([f"{S}.global_batch=250"], "250 does not divide by data 8 x micro_batch 2 = 16", "may be 240 or 256"),
    ([f"{S}.schedule.ramp_from=12"], "12 does not divide by data 8 x micro_batch 2 = 16", "may be 16"),
    ([f"{S}.schedule.ramp_step=40"], "40 does not divide by data 8 x micro_batch 2 = 16", "may be 32 or 48"),
    ([f"{S}.schedule.ramp_from=512"], "512 is more than `global_batch` 256", "a ramp goes up"),
    ([f"{S}.schedule.ramp_tokens=0"], "`ramp_tokens` is 0", "ramp_from: null"),
    ([f"{S}.schedule.ramp_from=null"], "schedule.ramp_tokens` is", "`stages.pretrain.schedule.ramp_tokens=0`"),
    (
        [f"{S}.engine=torch"],
        "`stages.pretrain`: engine `torch` cannot run `parallel.zero=1`: ",
        "`zero: 2` or `zero: 3`",
    ),
    ([f"{S}.parallel.offload=all"], "cannot run `parallel.offload=all`, `parallel.zero=1`: ", "`zero: 3`"),
    ([f"{S}.engine_config.zero_optimization.stage=3"], "zero_optimization.stage` is the plan's to set", "take it out"),
    ([f"{S}.engine_config={{bf16: {{enabled: true}}}}"], "config.bf16.enabled` is the plan's to set", "take it out"),
    ([f"{S}.engine=torch", f"{S}.engine_config.x=1"], "engine `torch` takes none", "take them out"),
    ([f"{S}.engine_config.prescale_gradients=true"], "`deepspeed` has not been shown to compute the same with it", ""),
    ([f"{S}.engine_config.pipeline.partition=params"], "pipeline.partition` is `params`", "uniform or parameters"),
    ([f"{S}.engine_config.wall_clock_breakdown=1.5"], "wall_clock_breakdown` is `1.5`", "it may be true or false"),
    ([f"{S}.engine_config.zero_optimization=3"], "engine_config.zero_optimization`: engine", "did you mean"),
    (
        [f"{S}.engine_config.zero_optimization={{reduce_bucket_sise: 1}}"],
        "engine_config.zero_optimization.reduce_bucket_sise`: engine",
        "did you mean `zero_optimization.reduce_bucket_size`?",
    ),
    (["cluster.storage_tb=0.004"], "2 checkpoints of 1.5 GB, and one being written, are 4.5 GB", "keep` may be 1"),
    (
        [f"{S}.parallel={{zero: 3, offload: all}}", "cluster.node_memory_gb=2"],
        f"`{S}.parallel.offload` all takes 2 GB of each node's memory, and `cluster.node_memory_gb` is 2",
        f"`{S}.parallel.nodes` may be 2 and more",
    ),
    (
        [f"{S}.parallel.micro_batch=1", f"{S}.global_batch=1024"],
        f"`{S}`: engine `deepspeed` would add up 128 micro-batches in bf16, and sums of more than 64",
        f"`{S}.parallel.micro_batch` may be 2 and more; or `zero: 2` or `zero: 3`, which then add in fp32",
    ),
    ([f"{S}.parallel.interleave=0"], f"`{S}.parallel.interleave` is 0, and must be at least 1", ""),
    ([f"{S}.skip_batches=-1"], f"`{S}.skip_batches` is -1, and must be at least 0", ""),
    (["cluster.network_gb_per_s=0"], "`cluster.network_gb_per_s` is 0, and must be more than 0", ""),
    (["cluster.failures_per_node_day=-1"], "failures_per_node_day` is -1, and must be at least 0", ""),
    ([f"{S}.steps=0"], f"`{S}.steps` is 0, and kind `pretrain` trains", f"such as `{S}.steps=1000`"),
    ([f"{S}.steps=10"], "warmup_tokens` 3.75e+08 is more than the whole run: 3.277e+05", "may be 0 to 3.277e+05"),
    ([f"{S}.schedule.decay_tokens=1e8"], "is more than `decay_tokens`: 1e+08", "may be 0 to 1e+08"),
]


@pytest.mark.parametrize(("overrides", "message", "hint"), RULES)
def test_broken_rules(overrides: list[str], message: str, hint: str) -> None:
    problems = check(compose("gpt3-125m", overrides).experiment, "pretrain")
    found = [p for p in problems if message in p.message]
    assert found, problems
    assert hint in found[0].hint


@pytest.mark.parametrize(
    "key",
    [
        "zero_optimization.zero_quantized_weights",
        "zero_optimization.zero_quantized_gradients",
        "communication_data_type",
        "zero_optimization.zero_hpz_partition_size",
        "zero_optimization.mics_shard_size",
        "sparse_gradients",
        "zero_optimization.stage3_max_reuse_distance",
        "torch_autocast.enabled",
        "data_types.grad_accum_dtype",
        "compression_training.x",
        "curriculum_learning.enabled",
        "steps_per_print",
        "amp",
    ],
)
def test_keys_of_deepspeed_that_nobody_has_proven_equal_are_refused(key: str) -> None:
    (problem,) = check(compose("gpt3-125m", [f"{S}.engine_config.{key}=1"]).experiment, "pretrain")
    assert f"`{S}.engine_config.{key}`" in problem.message


def test_keys_of_deepspeed_that_the_plan_does_not_own_pass() -> None:
    overrides = [f"{S}.engine_config={{zero_optimization: {{overlap_comm: true}}, wall_clock_breakdown: true}}"]
    assert check(compose("gpt3-125m", overrides).experiment, "pretrain") == []


@settings(deadline=None)
@given(
    nodes=st.integers(1, 6),
    micro_batch=st.integers(1, 6),
    global_batch=st.integers(1, 400),
    ramp=st.one_of(st.none(), st.integers(1, 100)),
)
def test_what_passes_divides_and_the_hint_helps(
    nodes: int, micro_batch: int, global_batch: int, ramp: int | None
) -> None:
    schedule = ScheduleSpec(ramp_from=ramp, ramp_tokens=1e6 if ramp else 0)
    stage = replace(TRAIN, global_batch=global_batch, schedule=schedule)
    e = experiment(stage=stage, nodes=nodes, micro_batch=micro_batch)
    problems = check(e, "s")
    if not problems:
        done = estimate(e, "s")
        assert done.world == done.data * done.tensor * done.pipeline == nodes * 8
        assert global_batch == done.micro_batches * done.data * micro_batch
    for problem in problems:
        if "`stages.s.global_batch` may be" in problem.hint:
            legal = [int(w) for w in problem.hint.replace(",", "").split() if w.isdigit()]
            for size in legal:
                other = replace(stage, global_batch=size)
                rest = check(experiment(stage=other, nodes=nodes, micro_batch=micro_batch), "s")
                assert not any("`stages.s.global_batch`" in p.message for p in rest)


@pytest.mark.parametrize(("ptx_coef", "turns"), [(0, 64), (27.8, 576)])
def test_text_beside_ppo_adds_up_too(ptx_coef: float, turns: int) -> None:
    words = {"global_batch": 512, "parallel": "{nodes: 1, zero: 1, micro_batch: 1}", "options.ptx_coef": ptx_coef}
    words |= {"options.minibatches": 1, "options.ptx_ratio": 8}
    e = compose("instructgpt-1.3b", [f"stages.ppo.{key}={value}" for key, value in words.items()]).experiment
    assert summed(e.stages["ppo"], 8) == turns
    found = [p.message for p in check(e, "ppo") if "in bf16, and sums of more than 64" in p.message]
    assert len(found) == (turns > 64)


def test_all_problems_in_one_error(tmp_path: Path) -> None:
    config = tmp_path / "two.yaml"
    config.write_text(
        "defaults: [gpt3-125m]\nstages:\n"
        "  pretrain: {global_batch: 250, steps: 0}\n"
        "  more: {kind: pretrain, engine: torch, parallel: {zero: 1}, global_batch: 8, steps: 1}\n"
    )
    with pytest.raises(PlanError) as e:
        plan(compose(config).experiment)
    first, *lines = str(e.value).splitlines()
    assert first == "3 problems"
    assert [line for line in lines if not line.startswith("   hint: ")] == [
        "1. `stages.pretrain.global_batch` 250 does not divide by data 8 x micro_batch 2 = 16",
        "2. `stages.pretrain.steps` is 0, and kind `pretrain` trains",
        "3. `stages.more`: engine `torch` cannot run `parallel.zero=1`: FSDP2 shards gradients and weights too",
    ]
    with pytest.raises(PlanError, match=r"FSDP2 shards gradients and weights too$") as e:
        plan(compose(config).experiment, ["more"])
    assert e.value.hint == "`zero: 2` or `zero: 3`"


def test_a_time_limit_is_longer_than_a_start_and_a_step() -> None:
    schedule = f"{S}.schedule={{ramp_from: null, ramp_tokens: 0}}"
    overrides = [f"{S}.parallel={{nodes: 1, zero: 1, micro_batch: 8}}", "model=gpt3-1.3b", schedule]
    e = estimate(compose("gpt3-125m", overrides).experiment, "pretrain")
    least = 600 + signal_lead_s(e)  # of which a minute and two saves alone would be 662
    for minutes, enough in ((math.floor(least / 60), False), (math.floor(least / 60) + 1, True)):
        spec = compose("gpt3-125m", [*overrides, f"cluster.slurm.time={minutes}"]).experiment
        if enough:
            assert plan(spec)
            continue
        with pytest.raises(PlanError, match="starting takes 600 s, and to end in time a step of") as error:
            plan(spec)
        assert f"may be {minutes + 1} (minutes) and more" in error.value.hint


def test_checkpoints_of_all_stages_need_room_together() -> None:
    e = compose("instructgpt-175b").experiment
    alone = max(plan(e, [name])[0].storage_tb for name in ("sft", "reward", "ppo"))
    assert plan(replace(e, cluster=replace(e.cluster, storage_tb=alone)), ["ppo"])
    with pytest.raises(PlanError, match=r"kept \(`sft` \d+ of [\d,.]+, `reward` .* and the largest being written"):
        plan(replace(e, cluster=replace(e.cluster, storage_tb=alone)), ["sft", "reward", "ppo"])


def test_what_slurm_would_not_understand_is_among_the_problems() -> None:
    with pytest.raises(PlanError) as e:
        plan(compose("gpt3-125m", ["cluster.slurm.tiem=5", f"{S}.global_batch=250"]).experiment)
    assert str(e.value).startswith("2 problems\n1. no key `cluster.slurm.tiem`\n   hint: did you mean `time`?\n2. ")


def test_a_model_too_large_is_refused_and_the_hint_fits() -> None:
    overrides = ["model=gpt3-13b", f"{S}.schedule={{ramp_from: null, ramp_tokens: 0}}"]
    e = compose("gpt3-125m", overrides).experiment
    with pytest.raises(PlanError, match=r"needs \d+\.\d GB on each `A100-SXM4-80GB` .* which has 80 GB") as error:
        plan(e)
    ways = [w for w in error.value.hint.split("`") if w.startswith("stages.")]
    assert ways
    for way in ways:
        assert plan(compose("gpt3-125m", [*overrides, *way.split()]).experiment)[0].fits
    (forced,) = plan(e, force=True)
    assert not forced.fits
    assert forced.memory_gb["total"] > 80


def test_stages_that_do_not_train_have_no_estimate() -> None:
    e = compose("demo").experiment
    assert [x.stage for x in plan(e)] == ["pretrain"]
    assert plan(e, ["prepare"]) == []
    with pytest.raises(ConfigError, match="no stage `pretran`") as error:
        plan(e, ["pretran"])
    assert error.value.hint == "did you mean `pretrain`?"


def test_an_estimate_has_plain_fields() -> None:
    e = estimate(experiment(), "s")
    assert isinstance(e, Estimate)
    assert replace(e, stage="t").to_json() == {**e.to_json(), "stage": "t"}
    assert ParallelPlan().zero == 0


def test_a_password_never_reaches_a_run_folder() -> None:
    tracked = replace(experiment(), tracking=TrackingSpec(uri="https://ann:secret@mlflow.example.org"))
    (problem,) = [p for p in check(tracked, "s") if "tracking.uri" in p.message]
    assert "secret" not in problem.message + problem.hint
    assert "MLFLOW_TRACKING_PASSWORD" in problem.hint
    assert not check(replace(experiment(), tracking=TrackingSpec(uri="https://mlflow.example.org")), "s")
