"""What the warden does on a real Slurm: who froze, who vanished, what is the user's own, and when to give up.

A run that was brought back must have the losses of one that nothing happened to, bit for bit. As in
`test_slurm_faults.py`, faults are dealt side by side, and `-k` deals those of the chosen tests only.
"""

import signal
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from clock import wait
from slurm_cluster import (
    NODES,
    ORCH,
    finished_once_in_mlflow,
    no_orphan,
    processes,
    same_curve,
    wait_for_end,
    wait_for_step,
)

pytestmark = pytest.mark.slurm

AT_A_TIME = 3
# Short, but longer than a rank of a busy machine stands still.
PATIENCE = {"step_s": 40, "silent_s": 30, "save_s": 90, "beat_s": 1}
SHORT = [f"cluster.slurm.patience.{key}={value}" for key, value in PATIENCE.items()]
# A user's mistake in the run's own code, which hurts one rank.
BUG = """
def mean_loss(nll_BT, batch):
    import os

    if os.environ["SLURM_PROCID"] == "1":
        raise ValueError("the batch of rank 1 is upside down")
    return nll_BT.mean()
"""


@pytest.fixture(scope="module")
def dealt(cluster, unbroken, request):
    """The runs of the chosen tests, each with its fault coming; `.result()` once it is over."""
    chosen = {item.function.__name__ for item in request.session.items}
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield {fault: pool.submit(fault, cluster) for fault in FAULTS if f"test_{fault.__name__}" in chosen}


def submit(cluster, name, *words):
    return cluster.submit(name, "--stage", "pretrain", *SHORT, *words)


def rank_of(run, rank, attempt="0"):
    """The process of ``rank`` in the start after ``attempt`` requeues, once it is there."""

    def find():
        for process in processes(run):
            try:
                environ = process.environ()
                words = process.cmdline()
            except psutil.Error:
                continue
            if "submitit.core._submit" in words[:5] and (
                environ.get("SLURM_PROCID"),
                environ.get("SLURM_RESTART_COUNT", "0"),
            ) == (str(rank), attempt):
                return process
        return None

    return wait(find, f"rank {rank} of {run.name} after {attempt} requeues")


def frozen_rank(cluster):
    """A rank stands still; its peer waits for ever in the collective."""
    run = submit(cluster, "frozen")
    wait_for_step(run, 12)
    rank_of(run, 1).suspend()
    wait_for_end(cluster, run, "1r1", 400)
    return run


def vanished_rank(cluster):
    """A rank is gone without a word, as by a signal of the kernel's."""
    run = submit(cluster, "vanished")
    wait_for_step(run, 12)
    rank_of(run, 1).send_signal(signal.SIGKILL)
    wait_for_end(cluster, run, "1r1", 400)
    return run


def users_error(cluster):
    """One rank raises; the other one's connection is lost by that."""
    (cluster.folder / "bug.py").write_text(BUG)
    run = submit(cluster, "bug", f"cluster.slurm.setup=['cat {cluster.folder}/bug.py >> code/jobs/pretrain.py']")
    wait_for_end(cluster, run, "1", 400)
    return run


def no_progress(cluster):
    """A rank is killed at every start, where there is one node more than are needed."""
    few = f"cluster.slurm.exclude='node[1-{NODES - 3}]'"
    run = submit(cluster, "hopeless", few)
    for restarts in range(3):
        rank_of(run, 1, str(restarts)).send_signal(signal.SIGKILL)
    wait(lambda: cluster.job(run) == "FAILED", "giving up", 400)
    return run


def cancel_now(cluster):
    """`orch cancel --now`: no rank saves."""
    run = submit(cluster, "now")
    wait_for_step(run, 5)
    cluster(ORCH, "cancel", "now", "--now")
    wait(lambda: cluster.job(run) == "CANCELLED", "the end")
    return run


FAULTS = (frozen_rank, vanished_rank, users_error, no_progress, cancel_now)


def goes_on_without(cluster, run, unbroken):
    """The first attempt's end is put down to rank 1, whose node the second does without."""
    first, second = run.attempts()
    (node,) = first.culprits
    assert (first.next, first.ranks, first.excluded) == ("requeue", [1], [node])
    assert node in cluster("scontrol", "show", "hostnames", first.nodes).split()
    assert node not in cluster("scontrol", "show", "hostnames", second.nodes).split()
    assert (second.name, second.cause, second.next) == ("1r1", "done", "stop")
    assert second.from_step == first.checkpoint_step >= 9
    same_curve(run, unbroken)
    finished_once_in_mlflow(run)
    no_orphan(run)
    return first


def test_frozen_rank(dealt, cluster, unbroken):
    run = dealt[frozen_rank].result()
    first = goes_on_without(cluster, run, unbroken)
    assert first.cause == "frozen" and "no sign of life" in first.note
    assert "loop.py" in (run.folder / "logs" / "1-0.log").read_text(), "where the living rank hung"


def test_vanished_rank(dealt, cluster, unbroken):
    first = goes_on_without(cluster, dealt[vanished_rank].result(), unbroken)
    assert first.cause == "lost" and "without a word: Killed" in first.note


def test_users_error(dealt, cluster):
    run = dealt[users_error].result()
    (only,) = run.attempts()
    assert (only.cause, only.next, only.ranks) == ("error", "stop", [1])
    assert only.note == "rank 1: ValueError: the batch of rank 1 is upside down"
    assert run.failures("1")[0]["rank"] == 1, "the other rank's lost connection is not the cause"
    assert cluster.state("bug") == {"pretrain": "failed"}
    no_orphan(run)


def test_no_progress(dealt, cluster):
    run = dealt[no_progress].result()
    attempts = run.attempts()
    assert [(a.name, a.cause, a.next) for a in attempts] == [
        ("1", "lost", "requeue"),
        ("1r1", "lost", "requeue"),
        ("1r2", "lost", "stop"),
    ]
    assert "3 attempts in a row brought no new checkpoint" in attempts[-1].note
    first, second = (attempt.culprits for attempt in attempts[:2])
    assert [a.excluded for a in attempts] == [first, second, second], "without both, the job would wait for ever"
    assert f"not excluded any more: {first[0]}: of 3 nodes that are up, 2 are needed" in attempts[1].note
    assert cluster.state("hopeless") == {"pretrain": "failed"}
    no_orphan(run)


def test_cancel_now(dealt, cluster):
    run = dealt[cancel_now].result()
    wait(lambda: run.attempts()[0].cause, "the warden's word")
    assert [(a.cause, a.next) for a in run.attempts()] == [("cancelled", "stop")]
    assert cluster.state("now") == {"pretrain": "stopped"}
    no_orphan(run)
