"""The warden without Slurm: what it refuses before any rank starts, and what it reads of Slurm's words."""

import signal

import pytest

from jobs.runtime import commands, warden
from orchestrator.run import Run, Submission


@pytest.fixture
def run(tmp_path):
    made = Run(folder=tmp_path / "e" / "s", experiment="e", stage="s", index=1, key="k")
    made.folder.mkdir(parents=True)
    made.submissions.append(Submission(number=2, launcher="slurm", job_id="8", submitted_at=0.0))
    made.save()
    return made


def test_a_job_whose_run_was_resumed_by_another_leaves_at_once(run, monkeypatch):
    """Its ranks would be attempt `2` as well, and could commit."""
    monkeypatch.setattr(warden, "KNOWN_S", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    started = run.folder / "started"
    with pytest.raises(SystemExit, match=r"job 7 leaves: .* is job 8's by now"):
        warden.main([str(run.folder), "--steps=2.5", "--", "touch", str(started)])
    assert not started.exists() and not (run.folder / "ends").exists()
    assert warden._known(run.folder, "8").submissions == run.submissions


def test_where_slurm_does_not_answer_nodes_are_kept_as_they_are(run, monkeypatch, tmp_path):
    """What `sinfo` says of its failure is no list of nodes; the requeue after this must come."""
    (tmp_path / "slurm.conf").write_text("")  # with none at all its commands look for one for a minute
    slurm = {"CONF": str(tmp_path / "slurm.conf"), "JOB_ID": "8", "JOB_NUM_NODES": "2", "NTASKS_PER_NODE": "1"}
    for key, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        guard = warden.Warden(run, warden.Patience())
        kept, exclude, said = guard._without(["n1"], ["n2"], {"Partition": "batch"})
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (kept, exclude) == (["n1"], "") and said.startswith("; not excluded: without n1,n2: ")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("00:10:05", 605), ("1-00:30:00", 88200), ("05:00", 300), ("UNLIMITED", None), ("Partition_Limit", None)],
)
def test_times_of_slurm(text, seconds):
    assert commands.seconds(text) == seconds


@pytest.mark.parametrize(
    ("said", "away"),
    [
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", True),
        ("slurm_requeue error: Socket timed out on send/recv operation", True),
        ("slurm_requeue error: Zero Bytes were transmitted or received", True),
        ("Job is pending execution for job 7", False),
        ("Requested operation is presently disabled for job 7", False),
        ("slurm_load_jobs error: Invalid job id specified", False),
    ],
)
def test_only_a_controller_that_is_away_is_asked_again(said, away):
    assert bool(commands.AWAY.search(said)) == away
