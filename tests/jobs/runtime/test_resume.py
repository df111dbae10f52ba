"""A chat template goes with the weights that learned it, and no other is put on them."""

from types import SimpleNamespace

import pytest
from ranks import run_ranks

from jobs.runtime import checkpoint, pieces, resume
from jobs.runtime.job import Job
from orchestrator.errors import CheckpointError
from orchestrator.run import Attempt, Run
from orchestrator.spec import ChatSpec, ClusterSpec, DataSpec, Experiment, ModelSpec, StageSpec

MODEL = ModelSpec(layers=1, hidden=16, heads=2, vocab=31, seq_len=8)
CLUSTER = ClusterSpec(gpu="cpu", gpus_per_node=1, gpu_memory_gb=1, gpu_tflops=1)
TUNED, RAW = SimpleNamespace(examples="demonstrations"), SimpleNamespace()
ASKS, SAYS = ChatSpec(user="Q: {content}"), ChatSpec(user="{content}")


def _job(ranks, root, stage, options, chat):
    run = Run(folder=root / "chain" / stage, experiment="chain", stage=stage, index=1, key=stage)
    (run.folder / "attempts").mkdir(parents=True, exist_ok=True)
    run.save()
    stages = {stage: StageSpec(kind="sft")}
    return Job(
        run=run,
        experiment=Experiment(name="chain", model=MODEL, cluster=CLUSTER, data=DataSpec(chat=chat), stages=stages),
        stage=stages[stage],
        options=options,
        ranks=ranks,
        attempt="1",
        record=Attempt(name="1", job_id="", world=1, host="", started_at=0.0),
    )


def _loads(ranks, root):
    data = SimpleNamespace(tokenizer_sha256="t", fingerprint="f")
    probe = resume.Probe(data="f", measure=lambda: 1.0)
    for stage, options in (("tuned", TUNED), ("raw", RAW)):
        assert resume.save(_job(ranks, root, stage, options, ASKS), {}, data, resume.Position(step=9), probe, {})
        assert checkpoint.committed(root / "chain" / stage / "checkpoints") == [9]
    pieces.load = lambda *_, **how: None  # there are no weights
    for options, chat, source in ((TUNED, ASKS, "tuned"), (RAW, SAYS, "tuned"), (TUNED, SAYS, "raw")):
        job = _job(ranks, root, "next", options, chat)
        resume.load_weights(job, None, source, "t")
        assert job.record.loaded[source]["step"] == 9
    refused = _job(ranks, root, "next", TUNED, SAYS)
    with pytest.raises(CheckpointError, match=r"`data\.chat\.user` is 'Q: \{content\}' there and '\{content\}' here"):
        resume.load_weights(refused, None, "tuned", "t")
    assert not refused.record.loaded


def test_weights_that_learned_another_template_are_refused(tmp_path):
    run_ranks(_loads, 1, tmp_path)
