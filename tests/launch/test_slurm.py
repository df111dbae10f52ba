"""The Slurm launcher: its scripts against golden texts, and whole runs on a real Slurm of two nodes.

The cluster is `launch/slurmbox`: slurmctld, accounting and a slurmd for each node, in namespaces of their own on
this machine. A run that is requeued must have the losses of one that is not, bit for bit.
"""

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import _slurm_script, _slurmbox, slurm
from orchestrator.compose import compose
from orchestrator.errors import ConfigError, LaunchError
from orchestrator.run import Run

REPO = Path(slurm.__file__).parents[1]
GOLDEN = REPO / "tests" / "golden" / "sbatch"
SLURMBOX = REPO / "launch" / "slurmbox"
ORCH = Path(sys.executable).with_name("orch")
BASE = {"PATH": "/usr/bin:/bin", "HOME": "/home/ada", "HF_TOKEN": "hunter2", "LD_LIBRARY_PATH": "/opt/a b/lib"}
STEPS = 40
CONFIG = """
defaults: [cluster/local]
name: base
cluster:
  gpus_per_node: 1
  nodes: 2
  launcher: slurm
  slurm:
    time: "30"
    mem: 2G
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
# Runs what it is told, on the login node of the box.
AGENT = """
import json, subprocess, sys
for line in sys.stdin:
    done = subprocess.run(json.loads(line), capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL)
    print("answer", json.dumps([done.returncode, done.stdout + done.stderr]), flush=True)
"""


# The script


def script(config, stage, *overrides, base=BASE):
    experiment = compose(config, ["cluster.launcher=slurm", *overrides]).experiment
    folder = Path("/runs") / experiment.name / stage
    run = Run(folder=folder, experiment=experiment.name, stage=stage, index=1, key="k")
    return _slurm_script.sbatch_text(
        run, experiment, folder=folder / "submitit" / "1", base=base, python="/venv/bin/python"
    )


EVERYTHING = (
    "cluster.slurm.partition=gpu",
    "cluster.slurm.account=abc",
    "cluster.slurm.qos=high",
    "cluster.slurm.constraint='a100&ib'",
    "cluster.slurm.reservation=maint",
    "cluster.slurm.exclude='node[3,7-9]'",
    "cluster.slurm.time='24:00:00'",
    "cluster.slurm.mem=0",
    "cluster.slurm.cpus_per_task=12",
    "cluster.slurm.setup=['module load cuda/12.4']",
    "cluster.slurm.environment.NCCL_SOCKET_IFNAME=ib0",
    "cluster.slurm.environment.GREETING='it''s; $HOME'",
)
SCRIPTS = {
    "gpt3-175b": ("pretrain", EVERYTHING),
    "demo-prepare": ("prepare", EVERYTHING),
    "gpt3-125m": ("pretrain", ()),
    "gpt3-6.7b-gres": ("pretrain", ("cluster.slurm.gres=gpu:a100:8", "cluster.slurm.time='2-0'")),
}


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_the_script_is_as_it_was(name):
    stage, overrides = SCRIPTS[name]
    preset = name.removesuffix("-prepare").removesuffix("-gres")
    text, file = script(preset, stage, *overrides), GOLDEN / f"{name}.txt"
    if os.environ.get("ORCH_UPDATE_GOLDEN") == "1":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert file.exists(), f"no {file}: look at what ORCH_UPDATE_GOLDEN=1 writes, and commit it"
    assert text == file.read_text()
    assert "hunter2" not in text, "a secret of the submitting shell"


def test_bash_reads_the_script_as_it_was_meant(tmp_path):
    """Whatever a value holds, the variable has it; and the code of the run comes before the user's."""
    lines = script("gpt3-175b", "pretrain", *EVERYTHING).partition("# setup")[2].partition("# command")[0]
    lines = lines.replace("module load cuda/12.4", "export PYTHONPATH=/theirs")
    said = subprocess.run(
        [
            "/bin/bash",
            "-euc",
            lines + 'printf "%s\\n" "$GREETING" "$LD_LIBRARY_PATH" "$PYTHONPATH" "$SRUN_CPUS_PER_TASK"',
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.splitlines() == ["it's; $HOME", "/opt/a b/lib", "/runs/gpt3-175b/pretrain/code:/theirs", "12"]


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("cluster.slurm.partitoin=gpu", "no key `cluster.slurm.partitoin`", "did you mean `partition`?"),
        ("cluster.slurm.cpus_per_task=many", "`cluster.slurm.cpus_per_task` must be a whole number", ""),
        ("cluster.slurm.time=soon", "`cluster.slurm.time` is `soon`", "minutes"),
        ("cluster.slurm.environment.HF_TOKEN=x", "`cluster.slurm.environment.HF_TOKEN`", "secrets"),
    ],
)
def test_what_cannot_be_is_refused(override, message, hint):
    with pytest.raises(ConfigError) as refused:
        script("gpt3-125m", "pretrain", override)
    assert message in str(refused.value)
    assert hint in refused.value.hint


@pytest.mark.parametrize(
    ("text", "seconds"),  # man sbatch, --time
    [("90", 5400), ("5:30", 330), ("1:02:03", 3723), ("2-0", 172_800), ("1-2:30", 95_400), ("1-0:00:01", 86_401)],
)
def test_times_are_read_as_sbatch_does(text, seconds):
    assert _slurm_script.limit_s(_slurm_script.Options(time=text)) == seconds


def test_without_slurm_the_way_out_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    experiment = compose("gpt3-125m", []).experiment
    with pytest.raises(LaunchError) as refused:
        slurm.check(experiment, "pretrain")
    assert "no `sbatch`" in str(refused.value) and "--launcher local" in refused.value.hint


def test_a_limit_too_short_to_save_in_is_refused():
    experiment = compose("gpt3-125m", ["cluster.slurm.time='2'"]).experiment
    with pytest.raises(LaunchError, match="is 120 s"):
        slurm.check(experiment, "pretrain")


# Whole runs


class Cluster:
    """A box of two nodes, and a folder on it."""

    def __init__(self, folder):
        self.folder = folder
        self._agent = subprocess.Popen(
            [str(SLURMBOX), "2", "--", sys.executable, "-c", AGENT],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"LOGIN_TOKEN": "hunter2"},
        )

    def __call__(self, *words, ok=0):
        """Run a command on the login node; return what it printed."""
        self._agent.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        self._agent.stdin.flush()
        answer = next((line for line in self._agent.stdout if line.startswith("answer ")), None)
        assert answer, "the box is gone"
        code, said = json.loads(answer.removeprefix("answer "))
        assert code == ok, said
        return said

    def run(self, name, stage="pretrain"):
        return Run.load(self.folder / "runs" / name / stage)

    def close(self):
        self._agent.stdin.close()
        try:
            self._agent.wait(60)
        finally:
            self._agent.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    try:
        _slurmbox.check()
    except LaunchError as error:
        pytest.skip(f"{error}; {error.hint}")
    folder = tmp_path_factory.mktemp("slurm")
    words = Path(os.__file__).parent.glob("[a-d]*.py")  # real text, a few hundred kB
    (folder / "text.txt").write_text("\n".join(p.read_text(errors="replace") for p in sorted(words)))
    (folder / "base.yaml").write_text(CONFIG % {"folder": folder})
    box = Cluster(folder)
    try:
        yield box
    finally:
        box.close()


@pytest.fixture(scope="module")
def unbroken(cluster):
    """The curve of a run that nothing happened to, behind the stage it waited for."""
    cluster(ORCH, "submit", "base.yaml", "--stage", "prepare", "--stage", "pretrain")
    return curve(cluster.run("base"))


def submit(cluster, name, *words):
    cluster(ORCH, "submit", "base.yaml", f"name={name}", "stages.pretrain.after=[]", "--detach", *words)
    return cluster.run(name)


def wait(condition, what, seconds=180):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds} s"
        time.sleep(0.1)
    return value


def curve(run):
    """What must repeat bit for bit, by step."""
    exact = ("train/loss", "train/grad_norm", "train/lr", "val/loss", "tokens")
    return {step: {key: line.get(key) for key in exact} for step, line in run.metrics().items()}


def state(cluster, name):
    rows = json.loads(cluster(ORCH, "status", name, "--json"))
    return {row["run"].partition("/")[2]: row["state"] for row in rows}


def job_state(cluster, run):
    said = cluster("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={run.submissions[-1].job_id}")
    return said.strip()


def in_mlflow(run):
    """Steps of train/loss that MLflow has for ``run``, and the run's status."""
    run_id = json.loads((run.folder / "tracking.json").read_text())["run_id"]
    with sqlite3.connect(run.root / "mlflow.db") as db:
        steps = db.execute("select step from metrics where run_uuid = ? and key = 'train/loss'", [run_id]).fetchall()
        (status,) = db.execute("select status from runs where run_uuid = ?", [run_id]).fetchone()
        (runs,) = db.execute("select count(*) from tags where value = ?", [run.key]).fetchone()
    assert runs == 1, "one run for life"
    return sorted(step for (step,) in steps), status


@pytest.mark.slurm
def test_a_chain_over_two_nodes(cluster, unbroken):
    """From `orch submit` to `done`: a stage of one task, then DeepSpeed's ZeRO-1 over gloo, one task on each node."""
    prepare, run = cluster.run("base", "prepare"), cluster.run("base")
    assert state(cluster, "base") == {"prepare": "done", "pretrain": "done"}
    assert (prepare.attempts()[0].world, run.attempts()[0].world) == (1, 2)
    assert prepare.attempts()[0].ended_at <= run.attempts()[0].started_at
    said = [next((run.folder / "submitit" / "1").glob(f"*_{rank}_log.out")).read_text() for rank in (0, 1)]
    assert "hostname=node1" in said[0] and "hostname=node2" in said[1]
    assert list(unbroken) == list(range(1, STEPS + 1))
    assert in_mlflow(run) == (list(range(1, STEPS + 1)), "FINISHED")
    assert (cluster.folder / "set-up").exists()
    shown = cluster(ORCH, "submit", "base.yaml", "name=shown", "--dry-run")
    assert next(run.folder.glob("submitit/1/*_submission.sh")).read_text().replace("base/", "shown/") in shown
    for file in (p for p in cluster.folder.rglob("*") if p.is_file()):
        assert b"hunter2" not in file.read_bytes(), f"a secret of the login shell is in {file}"


@pytest.mark.slurm
def test_preempted_by_an_urgent_job(cluster, unbroken):
    """The signal that comes before a time limit too: all save, the job is requeued once, no step is trained twice."""
    run = submit(cluster, "preempted", "--stage", "pretrain")
    wait(lambda: max(run.metrics(), default=0) >= 5, "step 5")
    cluster("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    wait(lambda: len(run.attempts()) == 2 and run.attempts()[1].cause, "the end")
    first, second = run.attempts()
    assert (first.name, first.cause, second.name, second.cause) == ("1", "preempted", "1r1", "done")
    assert first.to_step == first.checkpoint_step == second.from_step < STEPS
    lines = [json.loads(line)["step"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, STEPS + 1))
    assert curve(run) == unbroken
    wait(lambda: job_state(cluster, run) == "COMPLETED", "leaving the queue")
    assert in_mlflow(run) == (list(range(1, STEPS + 1)), "FINISHED")


@pytest.mark.slurm
def test_requeued_by_someone_else(cluster, unbroken):
    """`scontrol requeue`: the ranks are ended within KillWait; what is lost is made up for, to the last bit."""
    run = submit(cluster, "requeued", "--stage", "pretrain")
    wait(lambda: max(run.metrics(), default=0) >= 12, "step 12")
    cluster("scontrol", "requeue", run.submissions[-1].job_id)
    wait(lambda: len(run.attempts()) == 2 and run.attempts()[1].cause, "the end")
    first, second = run.attempts()
    assert (second.name, second.cause) == ("1r1", "done")
    assert second.from_step == first.checkpoint_step >= 9
    assert curve(run) == unbroken
    wait(lambda: job_state(cluster, run) == "COMPLETED", "leaving the queue")
    assert in_mlflow(run) == (list(range(1, STEPS + 1)), "FINISHED")


@pytest.mark.slurm
def test_cancel_saves_and_takes_along_what_waits(cluster, unbroken):
    run = submit(cluster, "cancelled", "--stage", "pretrain", "--stage", "tune")
    assert state(cluster, "cancelled")["tune"] == "queued"
    wait(lambda: max(run.metrics(), default=0) >= 5, "step 5")
    cluster(ORCH, "cancel", "cancelled/pretrain")
    wait(lambda: state(cluster, "cancelled")["pretrain"] == "stopped", "the stop")
    (first,) = run.attempts()
    assert first.cause == "cancelled" and first.checkpoint_step == first.to_step == max(run.metrics()) < STEPS
    behind = cluster.run("cancelled", "tune")
    wait(lambda: job_state(cluster, behind) == "CANCELLED", "the end of what waited")
    assert behind.attempts() == [] and len(run.attempts()) == 1
    assert job_state(cluster, run) == "FAILED", "status 0 would start what waits, and requeue is not for the cancelled"
