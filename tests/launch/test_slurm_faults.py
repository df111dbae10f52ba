"""Faults dealt to runs on a real Slurm. Whatever happens, a run ends with the losses of one nothing happened to.

Most of a fault is waiting for Slurm to notice, so faults are dealt side by side; a test then looks at what
is left of its run. `-k` deals those of the chosen tests only.
"""

import json
import math
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime

import pytest
from clock import wait
from slurm_cluster import (
    ORCH,
    SAVE_EVERY,
    STEPS,
    curve,
    finished_once_in_mlflow,
    held,
    is_told,
    no_orphan,
    rank_processes,
    same_curve,
    steps_in_file,
    wait_for_end,
    wait_for_step,
)

pytestmark = pytest.mark.slurm

AT_A_TIME = 4  # a rank costs a processor some seconds to start
ALL = list(range(1, STEPS + 1))
ALONE = ("engine=torch", "parallel.zero=0", "parallel.nodes=1")  # one rank, which no peer stops
SLURM_CONF = threading.Lock()  # of whoever changes how all preempted jobs are told, and of those who are told
NOTICED_S = 400  # Slurm takes half a minute to miss a node, then the run starts anew, beside others


@pytest.fixture(scope="module")
def dealt(cluster, unbroken, request):
    """The runs of the chosen tests, each with its fault coming; `.result()` once it is over."""
    names = {item.function.__name__ for item in request.session.items}
    chosen, runs = [fault for fault in FAULTS if f"test_{fault.__name__}" in names], {}
    pool = ThreadPoolExecutor(AT_A_TIME)
    try:
        for fault in chosen:
            runs[fault] = pool.submit(fault, cluster)
            if fault is outage:  # which would hit the others too
                runs[fault].exception()
        yield runs
    finally:
        pool.shutdown(cancel_futures=True)


def outage(cluster):
    """slurmctld and the MLflow server are killed while the run trains, and come back before its end."""
    uri, server, _ = cluster.start_mlflow()
    run = cluster.submit("outage", f"tracking.uri={uri}", "--stage", "pretrain")
    wait_for_step(run, 3)
    cluster("kill", "-9", "--", f"-{server}")
    cluster("slurmbox", "kill", "slurmctld")
    wait_for_step(run, 15)
    with held(run):
        cluster("slurmbox", "heal", "slurmctld")
        cluster.start_mlflow()
    wait_for_end(cluster, run, "1")
    return run


def power_cut(cluster):
    """A node dies, and its rank with it."""
    run = cluster.submit("power-cut")
    wait_for_step(run, 12)
    with lost(cluster, "kill", cluster.nodes(run)[1]):
        wait_for_end(cluster, run, "1r1", NOTICED_S)
    return run


def batch_node_power_cut(cluster):
    """The node dies that has rank 0 and the batch script."""
    run = cluster.submit("batch-power-cut")
    wait_for_step(run, 12)
    with lost(cluster, "kill", cluster.nodes(run)[0]):
        wait_for_end(cluster, run, "1r1", NOTICED_S)
    return run


def partition(cluster):
    """The batch node loses its network; rank 0 lives on and waits for its peer, until the network is back."""
    run = cluster.submit("partition")
    wait_for_step(run, 12)
    with lost(cluster, "cut", cluster.nodes(run)[0]):
        wait_for_end(cluster, run, "1r1", NOTICED_S)
    return run


def given_up(cluster):
    """A node dies before the first checkpoint. Slurm requeues the job by itself, and this run may fail once only."""
    run = cluster.submit("given-up", "cluster.slurm.patience.attempts=1", "--stage", "pretrain")
    wait(run.attempts, "its start")
    with lost(cluster, "kill", cluster.nodes(run)[0]):
        wait(lambda: cluster.job(run) == "FAILED", "giving up", NOTICED_S)
    return run


def split_brain(cluster):
    """A node loses its network; its rank needs nobody, and trains on beside the one that replaces it."""
    run = cluster.submit("split", *(f"stages.pretrain.{word}" for word in ALONE), "--stage", "pretrain")
    wait_for_step(run, 12)
    with held(run) as (old,), lost(cluster, "cut", cluster.nodes(run)[0]):
        wait(lambda: len(run.attempts()) == 2 and run.attempts()[1].from_step, "the next start", NOTICED_S)
        old.resume()
        wait(lambda: not old.is_running(), "that the old one sees it was replaced")
        wait_for_end(cluster, run, "1r1")
    return run


def time_limit(cluster):
    """The limit of this start comes near; held until Slurm says so, which it looks for every 30 s."""
    run = cluster.submit("limit")
    wait_for_step(run, 5)
    with held(run) as ranks:
        job_id = run.submissions[-1].job_id
        ran_s = time.time() - datetime.fromisoformat(cluster.job(run, "%S")).timestamp()
        minutes = math.ceil((ran_s + 60) / 60)  # a limit is whole minutes; the signal comes a step and 61 s before it
        cluster("scontrol", "update", f"JobId={job_id}", f"TimeLimit={minutes}")
        wait(lambda: all(is_told(rank, signal.SIGUSR2) for rank in ranks), "the signal")
    wait(lambda: run.attempts()[0].cause, "leaving")
    cluster("scontrol", "update", f"JobId={job_id}", "TimeLimit=30")
    wait_for_end(cluster, run, "1r1")
    return run


def preemption(cluster):
    """A job of a partition that goes first wants the nodes."""
    run = cluster.submit("preempted")
    wait_for_step(run, 5)
    with held(run) as ranks, SLURM_CONF:
        make_room(cluster, run, ranks, signal.SIGUSR2)
    wait_for_end(cluster, run, "1r1")
    return run


def grace_alone(cluster):
    """The same on a cluster with a GraceTime and without `preempt_send_user_signal`: SIGTERM, as by a cancel."""
    run = cluster.submit("graced")
    wait_for_step(run, 5)
    with held(run) as ranks, SLURM_CONF:
        conf = cluster("sh", "-c", "echo $SLURM_CONF").strip()
        cluster("sed", "-i", "s/^SlurmctldParameters=/#&/", conf)
        cluster("scontrol", "reconfigure")
        try:
            make_room(cluster, run, ranks, signal.SIGTERM)
        finally:
            cluster("sed", "-i", "s/^#SlurmctldParameters=/SlurmctldParameters=/", conf)
            cluster("scontrol", "reconfigure")
    wait_for_end(cluster, run, "1r1")
    return run


def make_room(cluster, run, ranks, number):
    """Queue what goes before ``run``, and wait until Slurm has told its ``ranks`` so by signal ``number``."""
    urgent = ("--partition=urgent", f"--nodelist={','.join(cluster.nodes(run))}", "--nodes=2", "--exclusive")
    cluster("sbatch", *urgent, "--output=/dev/null", "--wrap=true")
    wait(lambda: all(is_told(rank, number) for rank in ranks), "the signal")


def requeue(cluster):
    """`scontrol requeue` by someone else: Slurm ends the ranks within KillWait."""
    run = cluster.submit("requeued")
    wait_for_step(run, 12)
    cluster("scontrol", "requeue", run.submissions[-1].job_id)
    wait_for_end(cluster, run, "1r1")
    return run


def cancel(cluster):
    """`orch cancel` while a later stage waits; then `orch resume`."""
    run = cluster.submit("cancelled", "--stage", "pretrain", "--stage", "tune")
    behind = cluster.run("cancelled", "tune")
    assert cluster.state("cancelled")["tune"] == "queued"
    wait_for_step(run, 5)
    with held(run):  # the command takes longer than the steps that are left
        cluster(ORCH, "cancel", "cancelled/pretrain")
    wait_for_end(cluster, run, "1")
    assert cluster.job(run) == "FAILED", "status 0 would start what waits, and requeue is not for the cancelled"
    wait(lambda: cluster.job(behind) == "CANCELLED", "the end of what waited")
    assert cluster.state("cancelled") == {"pretrain": "stopped", "tune": "failed"}
    cluster(ORCH, "resume", "cancelled/pretrain", "--detach")
    run = cluster.run("cancelled")
    wait_for_end(cluster, run, "2")
    assert behind.attempts() == []
    return run


def scancel(cluster):
    """Someone types `scancel`; then `orch resume`."""
    run = cluster.submit("scancelled")
    wait_for_step(run, 12)
    cluster("scancel", run.submissions[-1].job_id)
    wait(lambda: cluster.job(run) == "CANCELLED", "the end")
    wait(lambda: not rank_processes(run), "the end of the ranks")
    cluster(ORCH, "resume", "scancelled", "--detach")
    run = cluster.run("scancelled")
    wait_for_end(cluster, run, "2")
    return run


FAULTS = (outage, power_cut, batch_node_power_cut, partition, split_brain, given_up)
FAULTS += (time_limit, preemption, grace_alone, requeue, cancel, scancel)


@contextmanager
def lost(cluster, how, node):
    """``node`` is cut or killed meanwhile, and is back afterwards."""
    cluster("slurmbox", how, node)
    try:
        yield
    finally:
        cluster("slurmbox", "heal", node)
        wait(lambda: cluster("sinfo", "-h", "-n", node, "-o", "%T").split()[0] in ("idle", "mixed", "allocated"), node)


def goes_on_in_place(run, unbroken):
    """``run`` was told in time: its second start takes the step after the first one's last."""
    first, second = run.attempts()
    assert first.to_step == first.checkpoint_step == second.from_step < STEPS
    assert second.cause == "done"
    assert steps_in_file(run) == ALL, "a step was trained twice"
    is_whole(run, unbroken)


def goes_on_from_a_checkpoint(run, unbroken):
    """``run`` was not told: what was trained after the last save is trained again, and no more."""
    first, second = run.attempts()
    reached = max(line["step"] for line in lines(run) if line["attempt"] == first.name)
    assert reached - SAVE_EVERY <= second.from_step <= reached < STEPS
    assert second.cause == "done"
    is_whole(run, unbroken)


def is_whole(run, unbroken):
    same_curve(run, unbroken)
    finished_once_in_mlflow(run)
    no_orphan(run)


def lines(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_outage(dealt, cluster, unbroken):
    run = dealt[outage].result()
    assert [(a.name, a.cause) for a in run.attempts()] == [("1", "done")], "training needs neither of the two"
    same_curve(run, unbroken)
    no_orphan(run)
    finished_once_in_mlflow(run, cluster.folder / "served.db")


def test_power_cut(dealt, unbroken):
    goes_on_from_a_checkpoint(dealt[power_cut].result(), unbroken)


def test_batch_node_power_cut(dealt, unbroken):
    goes_on_from_a_checkpoint(dealt[batch_node_power_cut].result(), unbroken)


def test_partition(dealt, unbroken):
    goes_on_from_a_checkpoint(dealt[partition].result(), unbroken)


def test_split_brain(dealt, cluster, unbroken):
    run = dealt[split_brain].result()
    assert [a.name for a in run.attempts()] == ["1", "1r1"]
    whole = cluster.submit("alone", *(f"stages.pretrain.{word}" for word in ALONE), "--stage", "pretrain")
    wait_for_end(cluster, whole, "1")
    goes_on_from_a_checkpoint(run, curve(whole))


def test_time_limit(dealt, unbroken):
    run = dealt[time_limit].result()
    assert run.attempts()[0].cause == "preempted"
    goes_on_in_place(run, unbroken)


def test_preemption(dealt, unbroken):
    run = dealt[preemption].result()
    assert run.attempts()[0].cause == "preempted"
    goes_on_in_place(run, unbroken)


def test_grace_alone(dealt, unbroken):
    run = dealt[grace_alone].result()
    first = run.attempts()[0]
    assert (first.cause, first.next) == ("preempted", "requeue"), "told from a cancel by the job's PreemptTime"
    goes_on_in_place(run, unbroken)


def test_given_up(dealt, cluster):
    run = dealt[given_up].result()
    assert [(a.name, a.cause, a.next) for a in run.attempts()] == [
        ("1", "lost", "requeue"),
        ("1r1", "fruitless", "stop"),
    ]
    assert "1 attempt brought no new checkpoint" in run.attempts()[1].note
    assert cluster.state("given-up") == {"pretrain": "failed"}
    no_orphan(run)


def test_requeue(dealt, unbroken):
    goes_on_from_a_checkpoint(dealt[requeue].result(), unbroken)


def test_cancel(dealt, unbroken):
    run = dealt[cancel].result()
    assert [(a.name, a.cause) for a in run.attempts()] == [("1", "cancelled"), ("2", "done")]
    goes_on_in_place(run, unbroken)


def test_scancel(dealt, unbroken):
    goes_on_from_a_checkpoint(dealt[scancel].result(), unbroken)
