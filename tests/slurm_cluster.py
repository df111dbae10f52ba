"""A real Slurm for the tests, and what every run on it must keep whatever was done to it.

`tests/launch/conftest.py` makes `cluster` and `unbroken` fixtures of all tests there: one box, one reference curve.
"""

import json
import os
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from clock import slowness, wait

from launch import _slurmbox
from orchestrator.errors import LaunchError
from orchestrator.run import Run

SLURMBOX = Path(_slurmbox.__file__).with_name("slurmbox")
ORCH = Path(sys.executable).with_name("orch")
NODES = 12
STEPS, SAVE_EVERY = 40, 9
# A node holds one of these runs, so that they can share the box; a stage of one task goes beside.
CONFIG = """
defaults: [cluster/local]
name: base
cluster:
  gpus_per_node: 1
  nodes: 2
  launcher: slurm
  slurm:
    time: "30"
    mem: 600G
    patience: {beat_s: 1}
    environment: {OMP_NUM_THREADS: "1", MLFLOW_DISABLE_TELEMETRY: "true"}
    setup: ['test -z "$LOGIN_TOKEN" || exit 9', 'touch %(folder)s/set-up']
model: {layers: 2, hidden: 64, heads: 4, vocab: 300, seq_len: 64, dropout: 0.1}
data:
  folder: %(folder)s/data
  sources: {text: {text: [%(folder)s/text.txt]}}
stages:
  prepare: {kind: prepare, options: {workers: 1}}
  pretrain: &train
    kind: pretrain
    after: [prepare]
    engine: deepspeed
    precision: fp32
    parallel: {nodes: 2, zero: 1, micro_batch: 8}
    global_batch: 64
    steps: 40
    save_every: 9
    eval_every: 10
    optimizer: {lr: 2e-3}
  tune: {<<: *train, after: [], init_from: pretrain}
"""
# Runs what it is told, on the login node of the box; several commands at a time.
AGENT = """
import json, subprocess, sys, threading
def answer(number, words):
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=9000, stdin=subprocess.DEVNULL)
        code, said = done.returncode, done.stdout + done.stderr
    except (OSError, subprocess.TimeoutExpired) as e:
        code, said = 255, str(e)
    sys.stdout.write("answer " + json.dumps([number, code, said]) + "\\n")
    sys.stdout.flush()
for line in sys.stdin:
    threading.Thread(target=answer, args=json.loads(line), daemon=True).start()
"""


class Cluster:
    """A box, and a folder on it that login node and nodes see."""

    def __init__(self, folder, nodes=NODES):
        self.folder = folder
        self._lock, self._waiting = threading.Lock(), []
        self._agent = subprocess.Popen(
            [str(SLURMBOX), str(nodes), "--", sys.executable, "-c", AGENT],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"LOGIN_TOKEN": "hunter2"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __call__(self, *words, ok=0):
        """Run a command on the login node; return what it printed. Any thread may."""
        with self._lock:
            answer = Future()
            self._waiting.append(answer)
            self._agent.stdin.write(json.dumps([len(self._waiting) - 1, [str(word) for word in words]]) + "\n")
            self._agent.stdin.flush()
        wait(answer.done, f"the end of `{' '.join(map(str, words))}`", 660)
        code, said = answer.result()
        assert code == ok, said
        return said

    def _read(self):
        for line in self._agent.stdout:
            if line.startswith("answer "):
                number, *answer = json.loads(line.removeprefix("answer "))
                self._waiting[number].set_result(answer)
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(AssertionError("the box is gone"))

    def run(self, name, stage="pretrain"):
        return Run.load(self.folder / "runs" / name / stage)

    def submit(self, name, *words):
        """Start a run of the reference's stage `pretrain` under another name."""
        words = words or ("--stage", "pretrain")
        self(ORCH, "submit", "base.yaml", f"name={name}", "stages.pretrain.after=[]", "--detach", *words)
        return self.run(name)

    def state(self, name):
        """What `orch status` says, by stage."""
        rows = json.loads(self(ORCH, "status", name, "--json"))
        return {row["run"].partition("/")[2]: row["state"] for row in rows}

    def job(self, run, what="%T"):
        """What `squeue` says of the newest job of ``run``; its state, or another of squeue's formats."""
        job_id = run.submissions[-1].job_id
        return self("squeue", "--noheader", "--states=all", f"--format={what}", f"--jobs={job_id}").strip()

    def nodes(self, run):
        """Names of the nodes that the newest job of ``run`` has, its batch node first."""
        return self("scontrol", "show", "hostnames", self.job(run, "%N")).split()

    def shards(self):
        """Overrides that give a preset of GPT-3 data, of which only the names are looked at."""
        for name in ("s.idx", "s.bin", "tokenizer.json"):
            (self.folder / name).touch()
        named = f"{{shards: [{self.folder}/s], val_shards: [{self.folder}/s]}}"
        mix = ("common-crawl", "webtext2", "books1", "books2", "wikipedia")
        return [*(f"data.sources.{name}={named}" for name in mix), f"data.tokenizer={self.folder}/tokenizer.json"]

    def start_mlflow(self):
        """Start a server on the login node, which nodes reach; return its address, its process and its database.

        Settings as in `orchestrator/dashboard.py`; `kill -9 -- -PROCESS` ends it.
        """
        database = self.folder / "served.db"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "login", "--port", "5000", "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{database}", "--allowed-hosts", "login:5000"]
        command += ["--artifacts-destination", self.folder / "served"]
        small = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true"
        script = f'{small} setsid "$@" >"$0" 2>&1 & echo $!'
        process = self("sh", "-c", script, self.folder / "served.log", *command).strip()
        knock = "until (: < /dev/tcp/login/5000) 2>/dev/null; do sleep .2; done"
        self("timeout", f"{200 * slowness():.0f}", "bash", "-c", knock)
        return "http://login:5000", process, database

    def close(self):
        self._agent.stdin.close()
        try:
            self._agent.wait(60 * slowness())
        finally:
            self._agent.kill()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    try:
        _slurmbox.check()
    except LaunchError as error:
        pytest.skip(f"{error}; {error.hint}")
    slowness()  # before anything else runs here
    folder = tmp_path_factory.mktemp("slurm")
    write_text(folder)
    box = Cluster(folder)
    try:
        yield box
    finally:
        box.close()


def write_text(folder):
    """Something to train on, and the config of it."""
    words = Path(os.__file__).parent.glob("[a-d]*.py")  # real text, a few hundred kB
    (folder / "text.txt").write_text("\n".join(p.read_text(errors="replace") for p in sorted(words)))
    (folder / "base.yaml").write_text(CONFIG % {"folder": folder})


@pytest.fixture(scope="session")
def unbroken(cluster):
    """The curve of a run that nothing happened to, behind the stage it waited for."""
    cluster(ORCH, "submit", "base.yaml", "--stage", "prepare", "--stage", "pretrain")
    return curve(cluster.run("base"))


def wait_for_step(run, step):
    wait(lambda: max(run.metrics(), default=0) >= step, f"step {step} of {run.name}")


def wait_for_end(cluster, run, attempt, seconds=300):
    """Wait until ``attempt`` of ``run`` has a cause and the job has left the queue; return all attempts."""
    wait(lambda: [a for a in run.attempts() if a.name == attempt and a.cause], f"the end of {attempt}", seconds)
    wait(lambda: cluster.job(run) in ("", "COMPLETED", "FAILED", "CANCELLED"), "leaving the queue")
    return run.attempts()


def curve(run):
    """What must repeat bit for bit, by step."""
    exact = ("train/loss", "train/grad_norm", "train/lr", "val/loss", "tokens")
    return {step: {key: line.get(key) for key in exact} for step, line in run.metrics().items()}


def same_curve(run, unbroken):
    """Every step is there, with the unbroken run's numbers to the last bit."""
    assert list(run.metrics()) == list(range(1, STEPS + 1))
    assert curve(run) == unbroken


def steps_in_file(run):
    """Steps of `metrics.jsonl` line by line, those trained twice included."""
    return [json.loads(line)["step"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def in_mlflow(run, database=None):
    """Steps of train/loss that MLflow has for ``run``, and the run's status."""
    run_id = json.loads((run.folder / "tracking.json").read_text())["run_id"]
    with sqlite3.connect(database or run.root / "mlflow.db") as db:
        steps = db.execute("select step from metrics where run_uuid = ? and key = 'train/loss'", [run_id]).fetchall()
        (status,) = db.execute("select status from runs where run_uuid = ?", [run_id]).fetchone()
        (runs,) = db.execute("select count(*) from tags where value = ?", [run.key]).fetchone()
    assert runs == 1, "one run for life"
    return sorted(step for (step,) in steps), status


def finished_once_in_mlflow(run, database=None, steps=STEPS):
    """MLflow has one run, FINISHED, with every step once."""
    whole = list(range(1, steps + 1)), "FINISHED"
    if database is None and in_mlflow(run) != whole:  # a forwarder's farewell is short where the machine is slow
        subprocess.run([ORCH, "--runs", run.root, "sync", run.name], check=True, timeout=900, capture_output=True)
    has = in_mlflow(run, database)
    assert has == whole, f"MLflow has {has}"


@contextmanager
def held(run):
    """Stop the ranks of ``run`` where they are, whatever takes its time meanwhile; they go on afterwards."""
    ranks = rank_processes(run)
    assert ranks, f"no rank of {run.name} is there to be held"
    try:
        for rank in ranks:
            rank.suspend()
        yield ranks
    finally:
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.resume()


def is_told(process, number):
    """Whether signal ``number`` waits for ``process``, which is held; Slurm may have woken it, and it has left."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return any(int(line.split()[1], 16) >> (number - 1) & 1 for line in status.splitlines() if "dPnd:" in line)


def rank_processes(run):
    """The ranks of ``run`` on all nodes."""
    return [p for p in processes(run) if p.info["cmdline"][1:4] == ["-u", "-m", "submitit.core._submit"]]


def no_orphan(run):
    """Nothing of ``run`` goes on, on whatever node: neither a rank nor its forwarder, which has a farewell to say."""
    try:
        wait(lambda: not processes(run), f"the end of all processes of {run.name}")
    except AssertionError as error:
        raise AssertionError([*error.args, *(p.info["cmdline"][:8] for p in processes(run))]) from error


def processes(run):
    """Processes of ``run`` on all nodes: this machine sees them all."""
    every = psutil.process_iter(["cmdline"])
    return [p for p in every if any(str(run.folder) in word for word in p.info["cmdline"] or [])]
