"""The search against the published layouts, against brute force, and against the rules."""

import itertools
import time
from dataclasses import replace
from typing import Any

import pytest
from published import A100

from orchestrator.checks import check
from orchestrator.compose import compose
from orchestrator.errors import PlanError
from orchestrator.plan import estimate
from orchestrator.search import search
from orchestrator.spec import Experiment, ModelSpec, ParallelPlan, StageSpec


def experiment(model: ModelSpec, batch: int, engine: str = "deepspeed", **parallel: Any) -> Experiment:
    stage = StageSpec(kind="pretrain", engine=engine, global_batch=batch, steps=100, parallel=ParallelPlan(**parallel))
    return Experiment(name="x", model=model, cluster=A100, stages={"s": stage})


GPT3 = ModelSpec(layers=96, hidden=12288, heads=96, vocab=51200)


@pytest.mark.parametrize(
    ("model", "gpus", "batch", "published"),
    [
        # Narayanan et al. 2021, arXiv:2104.04473, table 1 and section 5.1
        (ModelSpec(layers=36, hidden=4096, heads=32, vocab=51200), 128, 512, {"tensor": 4, "micro_batch": 16}),
        (ModelSpec(layers=48, hidden=8192, heads=64, vocab=51200), 512, 1536, {"tensor": 8, "pipeline": 2}),
        (GPT3, 1024, 1536, {"tensor": 8, "pipeline": 8}),
        (GPT3, 384, 1536, {"tensor": 8, "pipeline": 12}),
    ],
)
def test_at_least_as_fast_as_published(model: ModelSpec, gpus: int, batch: int, published: dict[str, int]) -> None:
    theirs = estimate(experiment(model, batch, nodes=gpus // 8, zero=1, recompute="full", **published), "s")
    best = search(experiment(model, batch), "s", gpus=gpus, top=3)
    assert best[0].estimate.step_s <= theirs.step_s
    assert all(f.estimate.fits and f.estimate.world == gpus for f in best)
    times = [f.estimate.step_s for f in best]
    assert times == sorted(times)


def test_the_line_asks_for_what_was_found() -> None:
    e = compose("gpt3-175b").experiment
    (best,) = search(e, "pretrain", gpus=1024, top=1)
    again = compose("gpt3-175b", best.overrides.split()).experiment
    assert check(again, "pretrain") == []
    assert estimate(again, "pretrain") == best.estimate


def test_the_configs_own_layout_is_one_of_them() -> None:
    model = ModelSpec(layers=48, hidden=7168, heads=56, vocab=51200)  # 30B: 60 GB of states on each of eight
    small = replace(A100, gpus_per_node=8, gpu_memory_gb=40, node_memory_gb=1000)
    e = replace(experiment(model, 64, nodes=1, zero=3, offload="optimizer", recompute="full"), cluster=small)
    (best,) = search(e, "s", top=1)
    assert best.parallel.offload == "optimizer"
    assert best.overrides == ""
    found = [f.parallel for f in search(compose("gpt3-13b").experiment, "pretrain", top=50)]
    assert all(found.count(p) == 1 for p in found)
    bare = experiment(model, 64, nodes=1, zero=3)
    with pytest.raises(PlanError, match="no layout of engine `deepspeed` fits 8") as error:
        search(replace(bare, cluster=small), "s")
    assert "`offload`, which is not searched" in error.value.hint


def test_nothing_is_missed() -> None:
    model = ModelSpec(layers=8, hidden=1024, heads=16, vocab=51200)
    small = replace(experiment(model, 64), cluster=replace(A100, gpu_memory_gb=12))
    (best,) = search(small, "s", gpus=16, top=1)
    fastest = float("inf")
    for t, p, z, b, r, q in itertools.product(
        (1, 2, 4, 8), (1, 2, 4, 8), (0, 1, 2, 3), (1, 2, 4, 8, 16), ("none", "full"), (False, True)
    ):
        parallel = ParallelPlan(
            nodes=2, tensor=t, pipeline=p, zero=z, micro_batch=b, recompute=r, sequence=q  # type: ignore[arg-type]
        )  # fmt: skip
        other = replace(small, stages={"s": replace(small.stages["s"], parallel=parallel)})
        if not check(other, "s"):
            e = estimate(other, "s")
            fastest = min(fastest, e.step_s if e.fits else fastest)
    assert best.estimate.step_s == fastest


def test_goals() -> None:
    model = ModelSpec(layers=32, hidden=4096, heads=32, vocab=51200)
    e = experiment(model, 512)
    speed, money, nodes = (search(e, "s", goal=g, gpus=128, top=1)[0].estimate for g in ("speed", "money", "nodes"))
    assert speed.world == 128
    assert speed.step_s <= min(money.step_s, nodes.step_s)
    assert money.gpu_hours <= min(speed.gpu_hours, nodes.gpu_hours)
    assert nodes.world <= min(speed.world, money.world)


def test_nothing_fits() -> None:
    with pytest.raises(PlanError, match=r"no layout of engine `deepspeed` fits 8 `A100-SXM4-80GB` of 80 GB") as error:
        search(experiment(GPT3, 1536), "s", gpus=8)
    assert "--gpus" in error.value.hint
    with pytest.raises(PlanError, match="12 GPUs are no whole nodes of 8") as error:
        search(experiment(GPT3, 1536), "s", gpus=12)
    assert error.value.hint == "`--gpus` may be 8 or 16"


def test_fewest_nodes_are_no_power_of_two() -> None:
    found = search(compose("gpt3-175b").experiment, "pretrain", goal="nodes", top=1)[0].estimate
    assert found.world == 48  # Rajbhandari et al. 2020, section 3: 16 bytes a parameter are more than 4 nodes have
    for nodes in range(1, 6):
        with pytest.raises(PlanError):
            search(compose("gpt3-175b").experiment, "pretrain", gpus=8 * nodes)


@pytest.mark.parametrize(
    ("overrides", "said", "hint"),
    [
        (["model.heads=0"], "`model.heads` is 0", ""),
        (["stages.pretrain.parallel.nodes=0"], "`stages.pretrain.parallel.nodes` is 0", ""),
        (["model.heads=41"], "`hidden` 5120 does not divide by `heads` 41", "20, 32, 40 or 64"),
        (["cluster=v100-32g"], "`stages.pretrain.precision` is bf16, which `V100-SXM2-32GB`", "fp32"),
        (["cluster.nodes=16"], "`stages.pretrain.parallel.nodes` is 32, and the cluster has 16", "1 to 16"),
        (["cluster.storage_tb=0.1"], "`stages.pretrain.keep` 2 checkpoints", "more storage"),
        (["stages.pretrain.engine=colossalai", "stages.pretrain.compile=true"], "cannot run `compile=true`", "false"),
    ],
)
def test_what_no_layout_mends_is_not_blamed_on_memory(overrides: list[str], said: str, hint: str) -> None:
    with pytest.raises(PlanError) as error:
        search(compose("gpt3-13b", overrides).experiment, "pretrain")
    assert said in str(error.value)
    assert hint in error.value.hint


def test_gpus_that_divide_no_batch() -> None:
    e = compose("gpt3-1.3b").experiment
    with pytest.raises(PlanError, match="batches of 64 do not divide by the data ranks that 40 `A100") as error:
        search(e, "pretrain", gpus=40)
    assert error.value.hint == "`--gpus` may be 32 or 48"
    assert search(e, "pretrain", gpus=32)
    assert search(e, "pretrain", gpus=48)


def test_a_thousand_gpus_in_two_seconds() -> None:
    e = compose("gpt3-175b").experiment
    before = time.process_time()
    search(e, "pretrain", gpus=1024)
    assert time.process_time() - before < 2
