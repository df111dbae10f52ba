"""What the warden does on a real Slurm: who froze, who vanished, what is the user's own, and when to give up.

A run that was brought back must have the losses of one that nothing happened to, bit for bit.
"""

import signal

import pytest
from slurm_cluster import (
    finished_once_in_mlflow,
    no_orphan,
    rank_processes,
    same_curve,
    wait_for_end,
    wait_for_step,
)

pytestmark = pytest.mark.slurm
# Short, but longer than a rank of a busy machine stands still.
SHORT = [f"cluster.slurm.patience.{key}={value}" for key, value in {"step_s": 25, "silent_s": 20, "beat_s": 1}.items()]


def submit(cluster, name, *words):
    return cluster.submit(name, "--stage", "pretrain", *SHORT, *words)


def rank_of(run, rank):
    """The process of ``rank``."""
    (found,) = [p for p in rank_processes(run) if p.environ()["SLURM_PROCID"] == str(rank)]
    return found


def test_a_frozen_rank(cluster, unbroken):
    """Its peer waits for ever in the collective. The node is named, left out, and the run goes on without it."""
    run = submit(cluster, "frozen")
    wait_for_step(run, 12)
    nodes = cluster.nodes(run)
    rank_of(run, 1).suspend()
    first, second = wait_for_end(cluster, run, "1r1", 300)
    assert (first.cause, first.next, first.ranks, first.culprits) == ("frozen", "requeue", [1], [nodes[1]])
    assert "no sign of life" in first.note and first.excluded == [nodes[1]]
    assert (second.name, second.cause, second.next) == ("1r1", "done", "stop")
    assert nodes[1] not in cluster("scontrol", "show", "hostnames", second.nodes).split()
    assert second.from_step == first.checkpoint_step >= 9
    assert "loop.py" in (run.folder / "logs" / "1-0.log").read_text(), "where the living rank hung"
    same_curve(run, unbroken)
    finished_once_in_mlflow(run)
    no_orphan(run)


def test_a_rank_that_vanishes(cluster, unbroken):
    """Without a word, as by a signal of the kernel's: its peer's lost connection is not the cause."""
    run = submit(cluster, "vanished")
    wait_for_step(run, 12)
    nodes = cluster.nodes(run)
    rank_of(run, 1).send_signal(signal.SIGKILL)
    first, second = wait_for_end(cluster, run, "1r1", 300)
    assert (first.cause, first.next, first.ranks, first.culprits) == ("lost", "requeue", [1], [nodes[1]])
    assert "without a word" in first.note
    assert second.cause == "done" and nodes[1] not in cluster("scontrol", "show", "hostnames", second.nodes).split()
    same_curve(run, unbroken)
    finished_once_in_mlflow(run)
    no_orphan(run)
