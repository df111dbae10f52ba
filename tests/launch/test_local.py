"""The local launcher with real processes: chains, failures, signals, orphans.

A launcher's contract is to start `jobs.__main__.main(<run folder>)` once per rank. Here that is a job of these
tests, without torch and MLflow, which exists in the run's own copy of the code only: that it runs proves that
the copy is what runs. The whole path, with the real jobs, is in tests/orchestrator/test_cli.py.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from clock import slowness, wait

from launch import local
from orchestrator.errors import LaunchError
from orchestrator.run import Run, Submission, read_json
from orchestrator.spec import ClusterSpec, Experiment, ModelSpec, ParallelPlan, StageSpec

CODE = Path(local.__file__).parents[1]
CLUSTER = ClusterSpec(gpu="cpu", gpus_per_node=2, gpu_memory_gb=1, gpu_tflops=0.1, nodes=1, launcher="local")

JOB = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from jobs.runtime import faults
from jobs.runtime.job import Ranks
from orchestrator.errors import DataError
from orchestrator.run import Attempt, Run, write_json

def main(folder):
    stop = faults.StopFlag().install()
    run, ranks = Run.load(Path(folder)), Ranks.from_env()
    number = faults.attempt_name(run)
    options = {"seconds": 60, "fail": None, "deaf": False} | run.spec().stages[run.stage].options
    for name in ("attempts", "failures"):
        (run.folder / name).mkdir(exist_ok=True)
    print("rank", ranks.rank, "of", ranks.world)
    attempt = Attempt(name=number, job_id="", world=ranks.world, host="", started_at=time.time())
    if ranks.rank == 0:
        run.save_attempt(attempt)
    if options["deaf"]:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        for signum in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)
    told = {"pid": os.getpid(), "file": __file__, "world": ranks.world, "environment": dict(os.environ)}
    write_json(run.folder / f"told-{ranks.rank}.json", told)
    end = time.monotonic() + options["seconds"]
    while time.monotonic() < end and not stop.cause:
        if options["fail"] == ranks.rank:
            faults.record_failure(run, number, ranks.rank, DataError("no such shard", hint="prepare it"))
            os._exit(1)
        time.sleep(0.05)
    attempt.cause, attempt.to_step, attempt.ended_at = stop.cause or "done", 7, time.time()
    if ranks.rank == 0:
        run.save_attempt(attempt)
"""


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Callable[..., list[Run]]]:
    """Makes runs that wait; at the end, nothing that they started is left."""
    made: list[Run] = []

    def make(*options: dict, grace_s: float = 1.0) -> list[Run]:
        from omegaconf import OmegaConf

        stages = {f"s{i}": StageSpec(kind="waits", options=o) for i, o in enumerate(options)}
        model = ModelSpec(layers=1, hidden=8, heads=1, vocab=256, seq_len=8)
        experiment = Experiment(name="e", model=model, cluster=CLUSTER, stages=stages)
        for i, name in enumerate(stages):
            folder = tmp_path / "runs" / "e" / name
            for package in ("orchestrator", "launch", "jobs"):
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(CODE / package, folder / "code" / package, ignore=ignore)
            (folder / "code" / "jobs" / "waits.py").write_text("PER_GPU = True\n")
            (folder / "code" / "jobs" / "__main__.py").write_text(JOB)
            supervisor = folder / "code" / "launch" / "_supervisor.py"
            text = supervisor.read_text()
            assert "GRACE_S = 15.0" in text
            supervisor.write_text(text.replace("GRACE_S = 15.0", f"GRACE_S = {grace_s}"))
            (folder / "spec.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(experiment)))
            made.append(Run(folder=folder, experiment="e", stage=name, index=i + 1, key=secrets.token_hex(8)))
            made[-1].save()
        return made

    yield make
    for run in made:
        for submission in Run.load(run.folder).submissions:
            local.kill(local.session(submission.job_id))


def told(run: Run, rank: int) -> dict:
    wait((run.folder / f"told-{rank}.json").exists, f"rank {rank} of {run.name} runs")
    return read_json(run.folder / f"told-{rank}.json")


def state(run: Run) -> str:
    run = Run.load(run.folder)
    return run.state(alive=local.alive(run))


def settled(run: Run) -> str:
    wait(lambda: not local.alive(Run.load(run.folder)), f"{run.name} ends")
    return state(run)


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def leftovers(job_id: str) -> list[psutil.Process]:
    wait(lambda: not list(local.session(job_id)), "the session is empty")
    return list(local.session(job_id))


def test_a_chain_runs_in_order_with_the_runs_own_code(chain, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    first, second = chain({"seconds": 0.3}, {"seconds": 0.3})
    local.submit([first, second])
    assert state(second) == "queued"
    assert [settled(first), settled(second)] == ["done", "done"]
    job_id = first.submissions[-1].job_id
    assert job_id == second.submissions[-1].job_id
    assert leftovers(job_id) == []
    assert first.attempts()[0].ended_at <= second.attempts()[0].started_at
    for run in (first, second):
        for rank in (0, 1):
            rank_told = told(run, rank)
            environment = rank_told["environment"]
            assert rank_told["file"] == str(run.folder / "code" / "jobs" / "__main__.py")
            assert rank_told["world"] == 2
            assert "MASTER_ADDR" not in environment
            assert environment["GLOO_SOCKET_IFNAME"] == "lo"
            assert environment["CUDA_VISIBLE_DEVICES"] == ""
            assert environment["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
            assert f"rank {rank} of 2" in (run.folder / "logs" / f"1-{rank}.log").read_text()


def test_a_failing_rank_ends_its_peers_and_the_chain(chain):
    first, second = chain({"fail": 1}, {})
    local.submit([first, second])
    assert settled(first) == "failed"
    wait(lambda: state(second) == "new", "as if it had not been submitted: `orch resume` will")
    assert [(f["rank"], f["type"], f["hint"]) for f in first.failures("1")] == [(1, "DataError", "prepare it")]
    assert not lives(told(first, 0)["pid"])
    assert leftovers(first.submissions[-1].job_id) == []


def test_a_rank_killed_without_a_word_ends_its_peers(chain):
    (run,) = chain({})
    local.submit([run])
    pids = [told(run, rank)["pid"] for rank in (0, 1)]
    os.kill(pids[1], signal.SIGKILL)
    assert settled(run) == "failed"
    assert run.failures("1") == []
    assert leftovers(run.submissions[-1].job_id) == []


def test_cancel_lets_a_run_save_and_starts_nothing_more(chain):
    first, second = chain({}, {})
    local.submit([first, second])
    told(first, 0), told(first, 1)
    local.cancel(first)
    assert settled(first) == "stopped"
    assert (first.attempts()[0].cause, first.attempts()[0].to_step) == ("cancelled", 7)
    wait(lambda: state(second) == "new", "the queued run is withdrawn")
    assert leftovers(first.submissions[-1].job_id) == []
    with pytest.raises(LaunchError, match="is not running"):
        local.cancel(Run.load(first.folder))
    local.submit([first])  # a resume: the next submission, in a folder of its own
    assert Run.load(first.folder).submissions[-1].number == 2
    local.cancel(first, now=True)
    assert leftovers(first.submissions[-1].job_id) == []


def test_cancel_of_a_queued_run_leaves_the_running_one_alone(chain):
    first, second, third = chain({"seconds": 3}, {}, {})
    local.submit([first, second, third])
    told(first, 0)
    local.cancel(second)
    wait(lambda: (state(second), state(third)) == ("new", "new"), "the queued runs are withdrawn")
    assert state(first) == "running"
    assert settled(first) == "done"


def test_cancel_now_ends_ranks_that_do_not_listen_and_their_children(chain):
    (run,) = chain({"deaf": True})
    local.submit([run])
    pids = [told(run, rank)["pid"] for rank in (0, 1)]
    children = [c.pid for pid in pids for c in psutil.Process(pid).children()]
    assert len(children) >= 2
    local.cancel(run, now=True)
    assert not local.alive(run)
    assert not [pid for pid in (*pids, *children) if lives(pid)]


def test_ranks_that_outlive_their_supervisor_count_and_can_be_cancelled(chain):
    (run,) = chain({})
    local.submit([run])
    told(run, 0), told(run, 1)
    supervisor = int(run.submissions[-1].job_id.rpartition(":")[2].partition("@")[0])
    os.kill(supervisor, signal.SIGKILL)
    wait(lambda: psutil.Process(supervisor).status() == psutil.STATUS_ZOMBIE, "the supervisor is gone")
    assert local.alive(run)  # or a second writer could start
    local.cancel(run)
    assert settled(run) == "stopped"


def test_a_supervisor_whose_submitter_died_starts_nothing(chain):
    (run,) = chain({"seconds": 0.1})
    command = [sys.executable, "-m", "launch._supervisor", str(run.folder)]
    environment = local.environment(run, os.environ)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, env=environment, timeout=300 * slowness(), check=True)
    assert done.returncode == 0
    assert run.attempts() == []


def test_a_job_that_cannot_begin_leaves_its_words_in_the_log(chain):
    (run,) = chain({})
    (run.folder / "code" / "jobs" / "__main__.py").write_text("raise RuntimeError('broken install')")
    local.submit([run])
    assert settled(run) == "failed"
    words = (run.folder / "logs" / "supervisor.log").read_text()
    assert "broken install" in words


def test_a_pid_given_to_another_process_is_not_the_run(tmp_path):
    run = Run(folder=tmp_path / "e" / "s", experiment="e", stage="s", index=1, key="k")
    sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        process = psutil.Process(sleeper.pid)
        since_boot = process.create_time() - psutil.boot_time()
        host = local.socket.gethostname()
        for start, expected in ((since_boot, True), (since_boot - 100, False)):
            job_id = f"{host}:{sleeper.pid}@{start:.2f}"
            run.submissions = [Submission(number=1, launcher="local", job_id=job_id, submitted_at=time.time())]
            assert local.alive(run) is expected
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_run_on_another_host_lives_as_long_as_it_is_heard_of(tmp_path):
    run = Run(folder=tmp_path, experiment="e", stage="s", index=1, key="k")
    submission = Submission(number=1, launcher="local", job_id="far-away:1@1.00", submitted_at=time.time() - 3600)
    run.submissions = [submission]
    assert not local.alive(run)
    (tmp_path / "heartbeat.json").write_text(json.dumps({"time": time.time() - 5}))
    assert local.alive(run)
    with pytest.raises(LaunchError, match="is on `far-away`"):
        local.cancel(run)


def test_check_refuses_what_this_machine_cannot_hold(monkeypatch):
    def experiment(nodes: int, gpu: str) -> Experiment:
        cluster = ClusterSpec(gpu=gpu, gpus_per_node=8, gpu_memory_gb=80, gpu_tflops=312, launcher="local")
        stage = StageSpec(kind="pretrain", steps=1, parallel=ParallelPlan(nodes=nodes))
        model = ModelSpec(layers=1, hidden=8, heads=1)
        return Experiment(name="e", model=model, cluster=cluster, stages={"s": stage})

    with pytest.raises(LaunchError, match=r"`parallel\.nodes` is 2, and the local launcher has 1"):
        local.check(experiment(2, "cpu"), "s")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(LaunchError, match="has 8 GPUs a node, this machine 2"):
        local.check(experiment(1, "a100"), "s")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5ebe9f43")
    with pytest.raises(LaunchError, match="needs numbers"):
        local.check(experiment(1, "a100"), "s")
    local.check(experiment(1, "cpu"), "s")
