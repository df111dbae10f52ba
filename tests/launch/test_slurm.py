"""The Slurm launcher: its scripts against golden texts, and whole runs on a real Slurm of two nodes.

The cluster is `launch/slurmbox`: slurmctld, accounting and a slurmd for each node, in namespaces of their own on
this machine. What runs survive is in `test_slurm_faults.py` and `test_slurm_recover.py`.
"""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from slurm_cluster import ORCH, SLURMBOX, STEPS, finished_once_in_mlflow, write_text

from launch import _slurm_script, slurm
from orchestrator.cli import cli
from orchestrator.compose import compose
from orchestrator.errors import ConfigError, LaunchError
from orchestrator.run import Run

REPO = Path(slurm.__file__).parents[1]
GOLDEN = REPO / "tests" / "golden" / "sbatch"
BASE = {"PATH": "/usr/bin:/bin", "HOME": "/home/ada", "HF_TOKEN": "hunter2", "LD_LIBRARY_PATH": "/opt/a b/lib"}


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


@pytest.mark.parametrize(
    ("words", "warned"),
    [([], True), (["cluster.slurm.cpus_per_task=12"], False), (["cluster=local", "cluster.launcher=slurm"], False)],
)
def test_ranks_that_would_share_a_core_are_warned_of(words, warned):
    stage = [f"stages.pretrain.{word}" for word in ("parallel={}", "global_batch=256")]
    said = CliRunner().invoke(cli, ["plan", "gpt3-125m", "--force", *stage, *words])
    assert said.exit_code == 0, said.output
    assert ("cpus_per_task` is not set: a rank gets one core" in said.stderr) == warned


@pytest.mark.slurm
def test_a_chain_over_two_nodes(cluster, unbroken):
    """From `orch submit` to `done`: a stage of one task, then DeepSpeed's ZeRO-1 over gloo, one task on each node."""
    prepare, run = cluster.run("base", "prepare"), cluster.run("base")
    assert cluster.state("base") == {"prepare": "done", "pretrain": "done"}
    assert (prepare.attempts()[0].world, run.attempts()[0].world) == (1, 2)
    assert prepare.attempts()[0].ended_at <= run.attempts()[0].started_at
    said = [next((run.folder / "submitit" / "1").glob(f"*_{rank}_log.out")).read_text() for rank in (0, 1)]
    first, second = cluster.nodes(run)
    assert f"hostname={first}" in said[0] and f"hostname={second}" in said[1]
    assert list(unbroken) == list(range(1, STEPS + 1))
    finished_once_in_mlflow(run)
    assert (cluster.folder / "set-up").exists()
    shown = cluster(ORCH, "submit", "base.yaml", "name=shown", "--dry-run")
    assert next(run.folder.glob("submitit/1/*_submission.sh")).read_text().replace("base/", "shown/") in shown
    for file in (p for p in cluster.folder.rglob("*") if p.is_file()):
        assert b"hunter2" not in file.read_bytes(), f"a secret of the login shell is in {file}"


# Shows folders that lie below one of root's alone to all users, in a mount namespace, and becomes a command there.
REVEAL = """
import os, subprocess, sys, tempfile
from pathlib import Path
split = sys.argv.index("--")
places = {Path(word): tempfile.mkdtemp(dir=sys.argv[1]) for word in sys.argv[2:split]}
shut = {next((p for p in reversed(place.parents) if not p.stat().st_mode & 1), None) for place in places} - {None}
hidden = {place: held for place, held in places.items() if shut & {*place.parents}}
for place, held in hidden.items():
    subprocess.run(["mount", "--bind", place, held], check=True)
for folder in shut:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", folder], check=True)
for place, held in hidden.items():
    place.mkdir(parents=True)
    subprocess.run(["mount", "--bind", held, place], check=True)
os.execvp(sys.argv[split + 1], sys.argv[split + 1:])
"""


@pytest.mark.slurm
def test_an_ordinary_user(cluster):
    """Without root, in a user namespace: from `orch submit` to FINISHED, on a Slurm of that user's own."""
    folder, held = (Path(tempfile.mkdtemp(prefix="orch-test-", dir="/tmp")) for _ in range(2))  # pytest's are root's
    try:
        write_text(folder)
        user = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
        if os.geteuid() == 0:
            for path in (folder, *folder.iterdir()):
                os.chown(path, user.pw_uid, user.pw_gid)
        become = [
            *("unshare", "--mount", "--propagation=private", sys.executable, "-c", REVEAL, str(held)),
            *(sys.base_prefix, sys.prefix, str(REPO), "--"),
            *("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"),
        ]
        overrides = ("engine=torch", "parallel.zero=0", "steps=6")
        command = [
            *(become if os.geteuid() == 0 else []),
            *("env", "-i", f"--chdir={folder}", "PATH=/usr/bin:/bin", f"HOME={folder}", "OMP_NUM_THREADS=1"),
            *("MLFLOW_DISABLE_TELEMETRY=true", f"PYTHONPATH={os.environ.get('PYTHONPATH', '')}"),
            *(SLURMBOX, "2", "--", ORCH, "submit", "base.yaml", "--stage", "prepare", "--stage", "pretrain"),
            *(f"stages.pretrain.{word}" for word in overrides),
        ]
        ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=1800)
        if "no namespaces for user" in ran.stderr:
            pytest.skip(ran.stderr.strip())
        assert ran.returncode == 0, ran.stdout + ran.stderr
        run = Run.load(folder / "runs" / "base" / "pretrain")
        assert {path.stat().st_uid for path in folder.rglob("*")} == {user.pw_uid}
        assert run.folder.stat().st_mode & 0o77 == 0, "others may look into the run"
        finished_once_in_mlflow(run, steps=6)
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(held)
