"""How runs are shown: the table, logs of several ranks and attempts as they grow, and no scheduler to ask."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from clock import slowness, wait
from tracked import make_chain

from launch import _slurm_queue as queue
from launch import local
from orchestrator import show, status
from orchestrator.run import Attempt, Run, Submission, list_runs, write_json

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """A run with two attempts of two ranks each, whose launcher is not asked yet."""
    run = make_chain(tmp_path / "runs")[0]
    (run.folder / "logs").mkdir()
    for name, text in {"1-0": "a\nb\n", "1-1": "c\n", "1r1-0": "d\n", "1r1-1": "e\nhalf"}.items():
        (run.folder / "logs" / f"{name}.log").write_text(text)
    (run.folder / "logs" / "forwarder.log").write_text("not a rank\n")
    run.save_attempt(
        Attempt(name="1", job_id="1", world=2, host="h", started_at=1.0, cause="preempted", next="requeue")
    )
    run.save_attempt(Attempt(name="1r1", job_id="1", world=2, host="h", started_at=2.0))
    return run


@contextmanager
def alive(run):
    """Let ``run`` be alive to the local launcher: its supervisor is a sleeping process."""
    with subprocess.Popen(["sleep", "300"], start_new_session=True) as supervisor:
        try:
            began = psutil.Process(supervisor.pid).create_time() - psutil.boot_time()
            job_id = f"{socket.gethostname()}:{supervisor.pid}@{began:.2f}"
            run.submissions = [Submission(number=1, launcher="local", job_id=job_id, submitted_at=1.0)]
            run.save()
            (run.folder / "submitit" / "1").mkdir(parents=True)
            yield
        finally:
            supervisor.kill()


def orch(run, *words, ok=0, **environment):
    """stdout and stderr of a whole process."""
    command = [sys.executable, "-m", "orchestrator.cli", "--runs", str(run.root), *words]
    base = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(command, env=base, capture_output=True, text=True, check=False, timeout=480 * slowness())
    assert done.returncode == ok, done.stderr
    return done.stdout, done.stderr


# Logs


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "d\n"),
        ("--rank 1", "e\nhalf"),
        ("--attempt 1", "a\nb\n"),
        ("--rank all", "1r1-0| d\n1r1-1| e\n1r1-1| half\n"),
        ("--attempt all", "1-0| a\n1-0| b\n1r1-0| d\n"),
        ("--attempt all --rank all", "1-0| a\n1-0| b\n1-1| c\n1r1-0| d\n1r1-1| e\n1r1-1| half\n"),
    ],
)
def test_logs_of_ranks_and_attempts(run, words, said):
    out, err = orch(run, "logs", "demo/pretrain", *words.split())
    assert out == said
    assert ("==>" in err) == ("all" not in words)


@pytest.mark.parametrize(("words", "code"), [("--rank 7", 1), ("--attempt 9", 1), ("--rank some", 2)])
def test_a_log_that_is_not_there(run, words, code):
    _, err = orch(run, "logs", "demo/pretrain", *words.split(), ok=code)
    assert ("there are (attempt: ranks) 1: 0-1; 1r1: 0-1" in err) == (code == 1)


@pytest.mark.parametrize(("rank", "said"), [("0", "d\nmore\nnew\n"), ("all", "1r1-0| d\n1r1-1| e\n")])
def test_following_goes_on_with_the_next_attempt(run, rank, said):
    """Only whole lines are mixed; what comes with the next start is picked up; the end of the run is the end."""
    logs = run.folder / "logs"
    command = [sys.executable, "-m", "orchestrator.cli", "--runs", str(run.root), "logs", "-f", "demo/pretrain"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    shown = run.root / "shown"
    with alive(run):
        with shown.open("w") as out:
            follower = subprocess.Popen([*command, "--rank", rank], env=environment, stdout=out)
        try:
            wait(lambda: shown.read_text() == said[: len("d\n")] if rank == "0" else shown.read_text() == said)
            with (logs / "1r1-0.log").open("a") as log:
                log.write("more\n")
            (logs / "1r2-0.log").write_text("new\n")
            (logs / "1r2-1.log").write_text("last")
            wait(lambda: "new\n" in shown.read_text())
            if rank == "all":
                assert "half" not in shown.read_text() and "last" not in shown.read_text()
        except BaseException:
            follower.kill()
            raise
    assert follower.wait(60 * slowness()) == 0
    if rank == "0":
        assert shown.read_text() == said
    else:
        assert sorted(re.findall(r"1r\d-\d\| \w+", shown.read_text())) == sorted(
            ["1r1-0| d", "1r1-1| e", "1r1-0| more", "1r2-0| new", "1r1-1| half", "1r2-1| last"]
        )


# The table


def test_where_slurm_is_away_the_folder_is_believed(run, tmp_path):
    run.submissions = [Submission(number=1, launcher="slurm", job_id="7", submitted_at=1.0)]
    run.save()
    tune = list_runs(run.root)[1]
    tune.submissions = [Submission(number=1, launcher="slurm", job_id="8", submitted_at=1.0)]
    tune.save()
    (tmp_path / "bin").mkdir()
    out, err = orch(run, "status", "--json", PATH=str(tmp_path / "bin"))
    rows = {row["run"]: row for row in json.loads(out)}
    assert [(r["state"], r["sure"]) for r in rows.values()] == [("running", False), ("queued", False)]
    assert err == "this is what the run folders say: no `squeue` on PATH\n"
    run.save_attempt(Attempt(name="1r2", job_id="7", world=2, host="h", started_at=3.0, cause="done", to_step=100))
    out, _ = orch(run, "status", PATH=str(tmp_path / "bin"))
    assert re.search(r"^demo/pretrain +done +", out, flags=re.MULTILINE)
    assert re.search(r"^demo/sft +queued\? +", out, flags=re.MULTILINE)


def test_a_run_that_ends_while_its_launcher_is_asked_is_done(run, monkeypatch):
    """A scheduler takes seconds to answer, and the folder was read before it did."""

    def ends_meanwhile(asked):
        asked.save_attempt(
            Attempt(name="1r1", job_id="1", world=2, host="h", started_at=2.0, cause="done", to_step=100)
        )
        return False

    monkeypatch.setattr(local, "alive", ends_meanwhile)
    (standing,), _ = status.look([run])
    assert (standing.state, standing.attempts[-1].cause) == ("done", "done")


def test_watching_without_a_terminal_prints_lines_until_all_have_ended(run):
    with alive(run):
        command = [
            sys.executable,
            "-m",
            "orchestrator.cli",
            "--runs",
            str(run.root),
            "status",
            "--watch",
            "demo/pretrain",
        ]
        shown = run.root / "shown"
        with shown.open("w") as out:
            watcher = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=out)
        try:
            wait(lambda: shown.read_text() == "demo/pretrain: running\n")
        except BaseException:
            watcher.kill()
            raise
    assert watcher.wait(60 * slowness()) == 0
    assert shown.read_text() == "demo/pretrain: running\ndemo/pretrain: failed\n"


def test_list_has_the_last_submitted_first(run):
    later = make_chain(run.root, name="later")[0]
    later.submissions[0].submitted_at = time.time() + 60
    later.save()
    assert orch(run, "list") == ("later: pretrain sft\ndemo: pretrain sft\n", "")
    assert [e["experiment"] for e in json.loads(orch(run, "list", "--json")[0])] == ["later", "demo"]


@pytest.mark.parametrize(
    ("causes", "state", "said"),
    [
        (["preempted", "preempted", ""], "running", "3: 2 preempted"),
        (["preempted", "lost"], "queued", "2: 1 preempted, 1 lost"),
        (["", "error"], "failed", "2: 1 killed, 1 error"),
        (["done"], "done", "1"),
    ],
)
def test_attempts_in_a_few_words(causes, state, said):
    assert status.attempts_note(causes, state) == said


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"state": "queued", "reason": "Priority", "starts_at": 8200.0},
            "others are before it (Priority), starts in about 2 h",
        ),
        ({"state": "queued", "reason": "Odd", "starts_at": None}, "Odd"),
        (
            {"state": "queued", "reason": "Resources", "starts_at": None, "without": ["node3", "node7"]},
            "its nodes are busy (Resources), stays off node3, node7 (until `orch resume`)",
        ),
        # 100 tokens a step at 10 a second: 90 steps of 10 s
        ({"state": "running", "heartbeat_at": 990.0}, "15 min left"),
        ({"state": "running", "heartbeat_at": 400.0}, "15 min left, no step for 10 min"),
        ({"state": "failed", "ended": "out of memory"}, "out of memory"),
    ],
)
def test_the_note(row, said):
    beat = {"step": 10, "steps": 100, "tokens": 1000, "tokens_per_s": 10.0}
    left = status.left_s(beat) if row["state"] == "running" else None
    whole = {
        "starting": False,
        "heartbeat_at": None,
        "left_s": left,
        "why": queue.why(row.get("reason", "")),
        "without": [],
        **beat,
        **row,
    }
    assert status.note(whole, now=1000.0) == said


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("ReqNodeNotAvail, UnavailableNodes:node3", "a node it asks for is down, drained or reserved"),
        ("QOSMaxNodePerUserLimit", "a limit of its QOS"),
        ("AssocGrpNodeLimit", "a limit of its account"),
        ("Whatever", ""),
        ("", ""),
    ],
)
def test_reasons_in_our_words(reason, said):
    assert queue.why(reason) == said


def test_the_table_is_aligned_and_says_why(run):
    beat = {"attempt": "1r1", "step": 1234, "steps": 95000, "tokens": 8, "loss": 2.5, "tokens_per_s": 1e6, "time": 1.0}
    write_json(run.folder / "heartbeat.json", beat)
    run.submissions[0].submitted_at = 1.0  # so that a launcher elsewhere is silent for long
    run.save()
    standings, problem = status.look(list_runs(run.root))
    lines = show.table([status.row(s) for s in standings]).plain.splitlines()
    assert problem == ""
    at = [lines[0].index(name) for name in show.COLUMNS]
    first = [lines[1][a:b].strip() for a, b in zip(at, [*at[1:], None], strict=True)]
    assert first[:7] == [
        "demo/pretrain",
        "failed",
        "1234/95000",
        "2.5000",
        "1,000,000",
        "-",
        "2: 1 preempted, 1 killed",
    ]
    assert first[7].startswith("was killed")


@pytest.mark.parametrize(
    ("attempt", "over"),
    [
        ({}, False),
        ({"cause": "preempted", "next": "requeue"}, False),
        ({"cause": "cancelled", "next": "stop"}, True),
        ({"cause": "done", "next": "stop"}, True),
    ],
)
def test_the_folder_alone_says_that_a_run_is_over(tmp_path, attempt, over):
    run = Run(folder=tmp_path, experiment="e", stage="s", index=1, key="k")
    run.submissions = [Submission(number=1, launcher="slurm", job_id="7", submitted_at=0.0)]
    assert not run.over
    (tmp_path / "attempts").mkdir()
    run.save_attempt(Attempt(name="1", job_id="7", world=1, host="h", started_at=1.0, **attempt))
    assert run.over == over
    run.submissions.append(Submission(number=2, launcher="slurm", job_id="8", submitted_at=2.0))
    assert not run.over
