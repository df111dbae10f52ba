"""What the torch and DeepSpeed engines refuse, rule by rule, and that they refuse nothing that is proven."""

from dataclasses import replace

import pytest
from test_parallel import BF16, CHANGING, ON_2, ON_4, ON_8, stage_of

from jobs.engines import deepspeed, torch
from orchestrator.checks import check
from orchestrator.spec import ClusterSpec, Experiment, ModelSpec

LIMITS = {"torch": torch.LIMITS, "deepspeed": deepspeed.LIMITS}
MODEL = ModelSpec(layers=4, hidden=32, heads=4, vocab=97, seq_len=16)
REFUSED = {
    "torch zero1": (stage_of("torch", zero=1), "FSDP2 shards gradients and weights too"),
    "torch offload": (stage_of("torch", offload="optimizer"), "keeps everything on the GPU"),
    "torch pipeline": (stage_of("torch", pipeline=2), "has no pipeline"),
    "torch chunks": (stage_of("torch", interleave=2), "has no pipeline"),
    "torch compile": (replace(stage_of("torch", tensor=2), compile=True), "torch.compile"),
    "torch sequence": (stage_of("torch", sequence=True), "cuts over tensor ranks"),
    "torch scores": (replace(stage_of("torch", tensor=2, sequence=True), kind="reward"), "their own tokens alone"),
    "zero2 in a pipeline": (stage_of("deepspeed", pipeline=2, zero=2), "whole gradients and weights"),
    "zero3 in a pipeline": (stage_of("deepspeed", pipeline=2, zero=3), "whole gradients and weights"),
    "bf16 pipeline": (stage_of("deepspeed", pipeline=2, precision="bf16"), "does not resume bit for bit"),
    "bf16 tensor": (stage_of("deepspeed", tensor=2, precision="bf16"), "a norm that misses what is cut"),
    "offload in a pipeline": (stage_of("deepspeed", pipeline=2, zero=1, offload="optimizer"), "not been shown"),
    "compile in a pipeline": (replace(stage_of("deepspeed", pipeline=2), compile=True), "not been shown"),
    "compile where weights are gathered": (replace(stage_of("deepspeed", zero=3), compile=True), "gather its weights"),
    "compile over tensor": (replace(stage_of("deepspeed", tensor=2), compile=True), "torch.compile"),
    "sequence": (stage_of("deepspeed", sequence=True, zero=1), "cuts over tensor ranks"),
    "chunks": (stage_of("deepspeed", interleave=2), "one chunk a rank"),
    "scores": (replace(stage_of("deepspeed", tensor=2, sequence=True), kind="reward"), "their own tokens alone"),
    "offload without shards": (stage_of("deepspeed", offload="optimizer"), "offload comes with ZeRO's shards"),
    "offload of whole weights": (stage_of("deepspeed", zero=2, offload="all"), "only ZeRO-3 shards weights"),
    "torch ulysses": (stage_of("torch", ulysses=2), "no exchange of tokens for heads"),
    "ulysses over tensor": (stage_of("deepspeed", ulysses=2, tensor=2), "heads that tensor ranks share"),
    "ulysses in a pipeline": (stage_of("deepspeed", ulysses=2, pipeline=2), "pipelines know no ranks that share"),
    "ulysses compiled": (replace(stage_of("deepspeed", ulysses=2), compile=True), "keep the exchange inside a block"),
    "ulysses scores": (replace(stage_of("deepspeed", ulysses=2), kind="reward"), "equal for pretrain and sft alone"),
    "tuning in a pipeline": (replace(stage_of("deepspeed", pipeline=2), kind="sft"), "which text of a row"),
    "sampling in a pipeline": (replace(stage_of("deepspeed", pipeline=2), kind="ppo"), "through all layers at once"),
}


def problems(stage, ranks):
    cluster = ClusterSpec(gpu="cpu", gpus_per_node=ranks, gpu_memory_gb=10, gpu_tflops=1)
    return check(Experiment(name="x", model=MODEL, cluster=cluster, stages={"s": stage}), "s")


@pytest.mark.parametrize("name", REFUSED)
def test_a_rule_refuses_and_says_why(name):
    stage, words = REFUSED[name]
    said = [p for p in problems(stage, 2) if words in p.message]
    assert said and all(p.hint for p in said), problems(stage, 2)


@pytest.mark.parametrize("engine", LIMITS)
def test_every_rule_is_tested(engine):
    for rule in LIMITS[engine].refused:
        assert any(stage.engine == engine and rule.applies(stage) for stage, _ in REFUSED.values()), rule


def test_no_proven_layout_is_refused():
    for ranks, cases in ((2, ON_2), (4, ON_4), (8, ON_8), (4, BF16)):
        for name, (stage, _) in cases.items():
            assert not problems(stage, ranks), name
    for name, stage in CHANGING.items():
        assert not problems(stage, 4), name
