"""A rank's signs of life, from a process of its own."""

import subprocess
import sys

import pytest
from clock import slowness, wait

from jobs.runtime import beat, faults
from jobs.runtime.job import Ranks
from orchestrator.run import Attempt, Run, Submission

# Trains for ever, three steps at a time; what it says comes back line by line.
RANK = """
import sys, time
from pathlib import Path
from jobs.runtime import beat
from jobs.runtime.job import Ranks
from orchestrator.run import Run

signs = beat.start(Run.load(Path(sys.argv[1])), "1", Ranks(rank=1, world=2))
print("started", signs is not None, flush=True)
for step in range(3):
    signs.mark("step", step)
    time.sleep(0.1)
print("trained", flush=True)
time.sleep(600)
"""


@pytest.fixture
def run(tmp_path):
    made = Run(folder=tmp_path / "e" / "s", experiment="e", stage="s", index=1, key="k")
    made.folder.mkdir(parents=True)
    made.submissions.append(Submission(number=1, launcher="slurm", job_id="7", submitted_at=0.0))
    made.save()
    return made


@pytest.fixture
def rank(run, monkeypatch):
    monkeypatch.setenv(beat.PERIOD, "0.05")
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    process = subprocess.Popen([sys.executable, "-c", RANK, str(run.folder)], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_rank_says_where_it_is_and_leaves_when_it_is_declared_over(run, rank):
    assert rank.stdout.readline() == "started True\n" and rank.stdout.readline() == "trained\n"
    (sign,) = wait(lambda: [s for s in beat.read(run, "1") if s.marks == 3], "the third mark", every=0.02)
    assert (sign.rank, sign.node, sign.phase, sign.step) == (1, "node7", "step", 2)
    assert sign.step_s >= 0.1
    wait(lambda: any(s.beats > sign.beats for s in beat.read(run, "1")), "the next beat")
    assert faults.is_current(run, "1")
    run.save_end(Attempt(name="1", job_id="7", world=2, host="node7", started_at=1.0, next="requeue"))
    assert rank.wait(60 * slowness()) == 1
    assert not faults.is_current(run, "1"), "it may commit nothing either"


def test_where_nobody_looks_there_are_no_signs(run, monkeypatch):
    monkeypatch.delenv(beat.PERIOD, raising=False)
    assert beat.start(run, "1", Ranks()) is None and not beat.beats(run).exists()


def test_a_sign_that_is_just_being_written_is_passed_over(run):
    beat.beats(run).mkdir()
    (beat.beats(run) / "1-0.json").write_text('{"rank": 0, "no')
    assert beat.read(run, "1") == []


def test_a_sign_is_written_over_the_one_before(run, monkeypatch):
    """In place, and never longer: where the disk is full there is no room for another."""
    monkeypatch.setenv(beat.PERIOD, "600")
    signs = beat.start(run, "1", Ranks(rank=3, world=4))
    file = beat.beats(run) / "1-3.json"
    wait(lambda: beat.read(run, "1"), "the first beat")
    before = file.stat()
    signs.mark("save", 1_000_000)
    signs._write()
    after = file.stat()
    assert (after.st_ino, after.st_size, after.st_blocks) == (before.st_ino, before.st_size, before.st_blocks)
    assert [(s.rank, s.phase, s.step) for s in beat.read(run, "1")] == [(3, "save", 1_000_000)]


def test_attempts_are_in_order_whatever_the_clocks_of_their_nodes_say(run):
    (run.folder / "attempts").mkdir()
    for name, at in (("1", 900.0), ("1r9", 800.0), ("1r10", 700.0), ("2", 600.0)):
        run.save_attempt(Attempt(name=name, job_id="7", world=1, host="n", started_at=at))
    assert [a.name for a in run.attempts()] == ["1", "1r9", "1r10", "2"]


def test_ends_count_over_what_rank_0_said(run):
    (run.folder / "attempts").mkdir()
    said = Attempt(name="1", job_id="7", world=2, host="node1", started_at=1.0, from_step=9, checkpoint_step=18)
    run.save_attempt(said)
    end = Attempt(name="1", job_id="7", world=2, host="?", started_at=0.0, ended_at=5.0, cause="lost", next="requeue")
    run.save_end(end)
    (attempt,) = run.attempts()
    assert (attempt.host, attempt.checkpoint_step, attempt.cause, attempt.ended_at) == ("node1", 18, "lost", 5.0)
    assert (run.state(alive=True), run.state(alive=False)) == ("queued", "failed")


def test_a_draft_is_a_last_word_that_rank_0_may_still_take_back(run):
    """Slurm ends a job within KillWait, in which ranks may save."""
    (run.folder / "attempts").mkdir()
    said = Attempt(name="1", job_id="7", world=2, host="node1", started_at=1.0)
    run.save_attempt(said)
    draft = Attempt(
        name="1", job_id="7", world=2, host="", started_at=0.0, ended_at=4.0, cause="requeued", next="requeue"
    )
    run.save_end(draft, draft=True)
    assert run.attempts()[0].cause == "requeued" and faults.is_current(run, "1"), "it may still commit"
    said.cause, said.ended_at = "cancelled", 5.0
    run.save_attempt(said)
    assert (run.attempts()[0].cause, run.attempts()[0].ended_at, run.attempts()[0].next) == (
        "cancelled",
        5.0,
        "requeue",
    )


def test_want_of_memory_is_told_with_what_was_planned(run):
    (run.folder / "failures").mkdir()
    (run.folder / "plan.json").write_text('{"memory_gb": {"total": 61.5}}')
    faults.record_failure(run, "1", 0, RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    (failure,) = run.failures("1")
    assert "61.5 GB planned" in failure["hint"] and "GB measured" in failure["hint"]
    assert failure["peak_memory_gb"] > 0.001
