"""`orch doctor` on this machine, and its judgements of a cluster's settings."""

import socket
import sys

import pytest

from launch import _slurm_doctor
from orchestrator import doctor
from orchestrator.compose import compose

SETTINGS = {  # as `scontrol show config` writes them (22.05), of a cluster where nothing is wrong
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "SlurmctldParameters": "preempt_send_user_signal",
    "EnforcePartLimits": "ALL",
    "DependencyParameters": "kill_invalid_depend",
    "KillOnBadExit": "0",
    "JobRequeue": "1",
    "AuthInfo": "socket=/run/munge.socket.2,cred_expire=5",
}


def test_each_remedy_says_something():
    for code, (level, remedy) in (doctor.ADVICE | _slurm_doctor.ADVICE).items():
        assert level in ("warning", "problem") and remedy, code


def test_room_is_asked_for_by_the_plan(tmp_path):
    """GPT-3 175B keeps two checkpoints of 12 bytes a parameter and writes a third: 3 x 2.1 TB, on no disk here."""
    experiment = compose("gpt3-175b", []).experiment
    needs_gb = doctor._room_gb(experiment)
    assert needs_gb == pytest.approx(3 * 12 * experiment.model.params / 1e9, rel=0.01)
    found = doctor.disk(tmp_path, 1e6)
    assert (found.level, found.code) == ("warning", "no-room") and "the 1000000 that it needs" in found.found


def test_a_server_that_does_not_answer_is_said(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    found = doctor.tracking(tmp_path, f"http://127.0.0.1:{port}")
    assert found.code == "no-mlflow" and "orch sync" in found.remedy


def test_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setattr(doctor, "NEEDED", ("no-such-package-of-orch",))
    monkeypatch.setattr(doctor, "ENGINES", ("json",))  # a module, and no package
    missing, engine = doctor.packages(deep=False)
    assert (missing.level, missing.remedy) == ("problem", "`pip install no-such-package-of-orch`")
    assert (engine.level, engine.code) == ("warning", "no-engine")


def test_a_package_that_does_not_import(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "NEEDED", ("torch",))
    (found, *_) = doctor.packages(deep=True)
    assert found.code == "bad-package" and "libcudart.so.12: cannot open" in found.found


@pytest.mark.parametrize(
    ("settings", "partition", "save_s", "code"),
    [
        ({}, {"GraceTime": "120"}, 98, ""),
        ({"PreemptType": "preempt/none"}, {}, 98, ""),
        ({}, {"PreemptMode": "OFF"}, 98, ""),
        ({}, {"GraceTime": "0"}, 98, "no-grace"),
        ({}, {"GraceTime": "20"}, 98, "short-grace"),
        ({"SlurmctldParameters": "(null)"}, {"GraceTime": "120"}, 98, "no-preempt-signal"),
        ({}, {"PreemptMode": "GANG,SUSPEND", "GraceTime": "120"}, 98, "suspends"),
    ],
)
def test_what_preemption_does_to_a_run(settings, partition, save_s, code):
    (found,) = _slurm_doctor._preemption(SETTINGS | settings, "gpu", {"PreemptMode": "REQUEUE"} | partition, save_s)
    assert found.code == code


@pytest.mark.parametrize(
    ("decides", "partition_s", "qos_s", "code", "whose"),
    [
        ("preempt/qos", 0, 120, "", ""),
        ("preempt/qos", 120, 0, "no-grace", "on QOS `gold`:"),
        ("preempt/qos", 120, 20, "short-grace", "of 98 s on QOS `gold`,"),
        ("preempt/partition_prio", 120, 0, "", ""),
        ("preempt/partition_prio", 0, 120, "no-grace", "on partition `gpu`:"),
    ],
)
def test_whose_time_a_preempted_job_has(decides, partition_s, qos_s, code, whose):
    """`_get_grace_time` of Slurm's plug-ins: a partition's, and of preempt/qos that of the job's QOS."""
    settings, partition = SETTINGS | {"PreemptType": decides}, {"PreemptMode": "REQUEUE", "GraceTime": f"{partition_s}"}
    (found,) = _slurm_doctor._preemption(settings, "gpu", partition, 98, qos=("gold", qos_s))
    assert found.code == code and whose in found.remedy
    assert f"`gpu` {partition_s} s, of QOS `gold` {qos_s} s" in found.found


@pytest.mark.parametrize(
    ("settings", "codes"),
    [
        ({}, []),
        ({"EnforcePartLimits": "NO"}, ["no-part-limits"]),
        ({"AuthInfo": "(null)"}, []),  # 120 s by default
        ({"AuthInfo": "cred_expire=3600"}, ["long-requeue"]),
        ({"DependencyParameters": "(null)", "KillOnBadExit": "0", "JobRequeue": "0"}, []),  # each run asks for these
    ],
)
def test_what_the_queue_does_to_a_run(settings, codes):
    assert [f.code for f in _slurm_doctor._queueing(SETTINGS | settings) if f.code] == codes


def test_without_a_controller_the_config_is_not_ready(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    experiment = compose("gpt3-125m", []).experiment
    assert [f.code for f in _slurm_doctor.findings(experiment, tmp_path)] == ["no-controller"]
    assert [f.code for f in _slurm_doctor.findings(None, tmp_path)] == ["no-slurm"]
    assert sys.executable in doctor.python().found
