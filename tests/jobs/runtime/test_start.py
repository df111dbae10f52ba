"""How a stage that trains begins: how many steps so many epochs take."""

import pytest

from jobs.runtime.job import Job, Ranks
from jobs.runtime.start import limited_to
from orchestrator.run import Attempt, Run
from orchestrator.spec import ClusterSpec, Experiment, ModelSpec, ScheduleSpec, StageSpec


def limited(tmp_path, epochs, samples, **stage):
    spec = StageSpec(kind="sft", **stage)
    job = Job(
        run=Run(folder=tmp_path, experiment="x", stage="s", index=1, key=""),
        experiment=Experiment(
            name="x",
            model=ModelSpec(layers=1, hidden=8, heads=1, vocab=300, seq_len=10),
            cluster=ClusterSpec(gpu="cpu", gpus_per_node=1, gpu_memory_gb=1, gpu_tflops=1),
            stages={"s": spec},
        ),
        stage=spec,
        options=None,
        ranks=Ranks(),
        attempt="1",
        record=Attempt(name="1", job_id="", world=1, host="", started_at=0.0),
    )
    return limited_to(job, samples, epochs).stage.steps


@pytest.mark.parametrize(("epochs", "steps"), [(None, 99), (1, 4), (2, 7), (0.5, 2), (0.01, 1), (1000, 99)])
def test_epochs_end_a_stage_with_the_step_that_completes_them(tmp_path, epochs, steps):
    assert limited(tmp_path, epochs, samples=13, global_batch=4, steps=99) == steps


def test_small_batches_at_first_need_more_steps(tmp_path):
    ramp = ScheduleSpec(ramp_from=2, ramp_step=2, ramp_tokens=120)  # 2, 2, 2, 2, 2, 2, then 4
    assert limited(tmp_path, 2, samples=12, global_batch=4, steps=99, schedule=ramp) == 6 + 3
