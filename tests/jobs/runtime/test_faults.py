"""Which attempt may commit: the newest one on disk, counting requeues."""

import time

import pytest

from jobs.runtime.faults import is_current
from orchestrator.run import Attempt, Run, Submission


@pytest.mark.parametrize(
    ("submissions", "attempts", "current"),
    [
        ([], ["1"], "1"),  # started by hand
        ([1], ["1"], "1"),
        ([1], ["1", "1r1", "1r2"], "1r2"),
        ([1], [f"1r{n}" for n in range(1, 12)], "1r11"),  # by number, not by letter
        ([1, 2], ["1", "1r1"], None),  # submitted anew: the old one may not, though the new one has not begun
        ([1, 2], ["1", "1r1", "2"], "2"),
    ],
)
def test_only_the_newest_attempt_may_commit(tmp_path, submissions, attempts, current):
    run = Run(folder=tmp_path, experiment="e", stage="s", index=1, key="k")
    run.submissions = [Submission(number=n, launcher="slurm", job_id="1", submitted_at=0.0) for n in submissions]
    run.save()
    (tmp_path / "attempts").mkdir()
    for name in attempts:
        run.save_attempt(Attempt(name=name, job_id="1", world=1, host="h", started_at=time.time()))
    assert [name for name in attempts if is_current(run, name)] == ([current] if current else [])
