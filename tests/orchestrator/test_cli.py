"""The `orch` command: help texts, errors, exit statuses, and whole runs from submit to resume."""

import json
import math
import os
import pty
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner, Result
from clock import slowness, wait
from tracked import make_chain

from launch import local
from orchestrator import show
from orchestrator.cli import cli
from orchestrator.run import Attempt, Submission, list_runs

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "help"
COMMANDS = ["", *cli.commands]
CONFIG = """
name: tiny
model: {layers: 1, hidden: 16, heads: 2, vocab: 300, seq_len: 16}
cluster: {gpu: cpu, gpus_per_node: 2, gpu_memory_gb: 4, gpu_tflops: 0.06, nodes: 1, launcher: local}
data: {folder: data, val_fraction: 0.3, sources: {t: {text: [text.jsonl]}}}
stages:
  prepare: {kind: prepare, options: {workers: 1}}
  train: {kind: pretrain, after: [prepare], global_batch: 4, steps: 10, precision: fp32, save_every: 5}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a config and a text; at the end nothing that was started from it is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ORCH_RUNS", raising=False)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    sources = sorted((ROOT / "orchestrator").glob("*.py"))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f.read_text()}) + "\n" for f in sources))
    yield tmp_path
    for run in list_runs(tmp_path / "runs"):
        for submission in run.submissions:
            local.kill(local.session(submission.job_id))


def orch(*words: str) -> Result:
    return CliRunner().invoke(cli, words, prog_name="orch", terminal_width=100)


def process(*words: str, **how) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "orchestrator.cli", *words]
    return subprocess.Popen(command, env=environment, text=True, **how)


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_as_agreed(command, monkeypatch):
    """`ORCH_UPDATE_GOLDEN=1 pytest` writes these files anew; look at the difference before you commit it."""
    monkeypatch.delenv("ORCH_RUNS", raising=False)
    result = orch(*command.split(), "-h")
    assert result.exit_code == 0
    golden = GOLDEN / f"{command or 'orch'}.txt"
    if os.environ.get("ORCH_UPDATE_GOLDEN"):
        golden.write_text(result.stdout)
    assert result.stdout == golden.read_text()


def test_the_documentation_shows_the_help():
    blocks = re.findall(r"```text\n(.*?)```", (ROOT / "docs" / "cli.md").read_text(), flags=re.DOTALL)
    wanted = [(GOLDEN / f"{command or 'orch'}.txt").read_text() for command in COMMANDS]
    if os.environ.get("ORCH_UPDATE_GOLDEN"):
        text = (ROOT / "docs" / "cli.md").read_text()
        head = text.partition("## `orch`")[0]
        parts = [f"## `orch{' ' + c if c else ''}`\n\n```text\n{w}```\n" for c, w in zip(COMMANDS, wanted, strict=True)]
        (ROOT / "docs" / "cli.md").write_text(head + "\n".join(parts))
        return
    assert blocks == wanted


def test_no_golden_file_is_left_over():
    assert {f.stem for f in GOLDEN.glob("*.txt")} == {command or "orch" for command in COMMANDS}


def test_help_imports_nothing_slow():
    script = "import orchestrator.cli, sys; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    slow = {"torch", "mlflow", "omegaconf", "rich", "submitit", "psutil", "numpy", "yaml", "matplotlib", "launch"}
    assert not slow & set(told.split())


def test_status_and_plan_import_neither_torch_nor_mlflow(folder):
    script = """
import sys
from orchestrator.cli import cli
for words in (["plan", "tiny.yaml"], ["submit", "--dry-run", "tiny.yaml"], ["status"], ["doctor"]):
    cli(words, standalone_mode=False)
assert not {"torch", "mlflow", "deepspeed", "matplotlib"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


# Errors


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        ("submit tiny.yaml stages.train.stepps=3", "no key `stages.train.stepps`", "did you mean `steps`?"),
        ("submit tiny.yaml steps=3", "no key `steps`", "did you mean `stages.<stage>.steps`?"),
        ("submit tiny.yaml stages.train.steps=many", "must be a whole number", ""),
        ("submit tiny.yaml stages.trian.steps=3", "no stage `trian`", "did you mean `train`?"),
        ("submit tiny.yaml --stage trian", "no stage `trian`", "did you mean `train`?"),
        ("plan tiny.yaml --stage trian", "no stage `trian`", "did you mean `train`?"),
        ("submit tiny.yaml model=gpt3-13", "gpt3-13", "did you mean `gpt3-13b`?"),
        ("submit tiny.yaml stages.train.engine=deepsped", "no engine `deepsped`", "did you mean `deepspeed`?"),
        ("submit tiny.yaml stages.train.kind=pretrian", "no stage kind `pretrian`", "did you mean `pretrain`?"),
        ("submit tiny.yaml --launcher lokal", "no launcher `lokal`", "did you mean `local`?"),
        ("submit tiny.yaml name=../up", "override `name=../up`: experiment name `../up` cannot be", "letters"),
        ("submit tiny.yaml data.sources.t.weight=-1", "`data.sources.t.weight` is -1, and must be at least 0", ""),
        ("submit tiny.yaml data.sources.t.weight=0", "all weights in `data.sources` are 0", "give one"),
        ("submit tiny.yaml data.sources.t.text=[gone.txt]", "no text at", "data.sources.t.text"),
        ("submit tiny.yaml --stage train", "waits for `prepare`", "--stage prepare --stage train"),
        ("submit tony.yaml", "tony.yaml", ""),
        ("show tiny.yaml --why model.hiden", "model.hiden", "did you mean `hidden`?"),
        ("plan tiny.yaml --what-if a='b", "`--what-if` a='b: no closing quotation", "overrides as a shell"),
        ("plan tiny.yaml --stage prepare --report x.png", "none of these stages trains", "leave `--report` out"),
        ("resume tiny", "no run `tiny`", "`orch status` lists the runs"),
        ("cancel ../tiny", "no run `../tiny`", "`orch status` lists the runs"),
        ("logs tiny", "no run `tiny`", "`orch status` lists the runs"),
        ("status tiny/train", "no run `tiny/train`", "`orch status` lists the runs"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_writes_nothing(folder, words, error, hint):
    before = set(folder.rglob("*"))
    result = orch(*words.split())
    assert result.exit_code == 1, result.stderr
    told = result.stderr.splitlines()
    assert told[0].startswith("error: ") and error in told[0]
    assert hint in result.stderr
    assert not hint or told[1].startswith("hint: ")
    assert result.stdout == ""
    assert set(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("sumbit tiny.yaml", "did you mean `orch submit`?"),
        ("plan", "Missing argument"),
        ("status --jsn", "--json"),
        ("plan demo --gpus 8", "`--gpus` goes with `--search` alone"),
        ("plan demo --for money", "`--for` goes with `--search` alone"),
        ("plan demo --calibrate x.yaml", "`--calibrate` goes with `--compare` alone"),
        ("plan demo --search --what-if name=x", "`--search` does not go with `--what-if`"),
        ("plan demo --what-if name=x --report x.png", "`--report` does not go with `--what-if`"),
        ("plan demo --report x.pdf", "`x.pdf` is neither X.html nor X.png"),
        ("plan demo --compare demo", "`--compare` takes a RUN, and neither CONFIG nor `--stage`"),
        ("plan --stage pretrain --compare demo", "`--compare` takes a RUN, and neither CONFIG nor `--stage`"),
        ("plan demo --search --force", "`--force` does not go with `--search`"),
        ("show demo --why name --json", "`--why` does not go with `--json`"),
    ],
)
def test_a_wrong_command_line_is_status_2(words, error):
    result = orch(*words.split())
    assert result.exit_code == 2
    assert error in result.stderr


def test_no_color(folder):
    for environment in ({"NO_COLOR": "1"}, {"TERM": "xterm"}):
        result = CliRunner().invoke(cli, ["resume", "x"], env=environment, color=True)
        assert ("\x1b[" in result.stderr) is ("NO_COLOR" not in environment)


# Data on stdout


def test_show_and_plan_print_data(folder):
    assert json.loads(orch("show", "tiny.yaml", "--json").stdout)["stages"]["train"]["steps"] == 10
    assert "tiny.yaml:7" in orch("show", "tiny.yaml", "--why", "stages.prepare.kind").stdout
    (estimate,) = json.loads(orch("plan", "tiny.yaml", "--json").stdout)
    assert json.loads(orch("plan", "tiny.yaml", "--json", "--stage", "train", "--stage", "train").stdout) == [estimate]
    table = orch("plan", "tiny.yaml")
    assert estimate["world"] == 2
    assert "train" in table.stdout and "`orch submit tiny.yaml`" in table.stderr


def test_json_has_null_for_what_is_no_number(capsys):
    show.as_json({"loss": [math.nan, math.inf, -math.inf, 1.5], "folder": Path("a")})
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"loss": [None, None, None, 1.5], "folder": "a"}


def test_init_makes_configs_that_plan(folder):
    result = orch("init", "mine")
    assert result.exit_code == 0
    assert "mine/configs/demo.yaml" in result.stdout.splitlines()
    assert orch("plan", "mine/configs/demo.yaml").exit_code == 0
    again = orch("init", "mine")
    assert again.exit_code == 1 and "exists already" in again.stderr


def test_a_dry_run_shows_up_in_status(folder):
    result = orch("--runs", "elsewhere", "submit", "tiny.yaml", "--dry-run")
    assert result.stdout.splitlines() == [str(folder / "elsewhere" / "tiny" / s) for s in ("prepare", "train")]
    rows = json.loads(CliRunner().invoke(cli, ["status", "--json"], env={"ORCH_RUNS": "elsewhere"}).stdout)
    assert [(r["run"], r["state"], r["step"], r["steps"]) for r in rows] == [
        ("tiny/prepare", "new", 0, 0),
        ("tiny/train", "new", 0, 10),
    ]
    assert orch("status").stdout == ""  # the other folder has no runs


def test_doctor_finds_what_runs_this_test(folder):
    result = orch("doctor", "--json")
    found = {f["check"]: f for f in json.loads(result.stdout)}
    assert result.exit_code == 0
    assert found["python"]["found"].startswith(".".join(map(str, sys.version_info[:3])))
    assert all(found[name]["level"] == "ok" for name in ("torch", "mlflow", "runs folder"))
    broken = orch("--runs", "/proc/runs", "doctor")  # where even root cannot write
    assert broken.exit_code == 1 and "cannot write to /proc" in broken.stdout
    (folder / "runs").mkdir()
    (folder / "runs" / "mlflow.db").write_text("not a database")
    assert "file is not a database" in orch("doctor").stdout


def test_the_next_command_can_be_pasted(folder):
    words = "--runs 'my runs' submit tiny.yaml 'stages.train.after=[prepare, prepare]' --stage prepare --launcher local"
    result = orch(*shlex.split(words), "--force", "--dry-run")
    (told,) = re.findall(r"^next: `orch (.*)`$", result.stderr, flags=re.MULTILINE)
    assert shlex.split(told) == [*shlex.split(words), "--force"]
    again = orch("--runs", "my runs", "status", "x")
    assert "`orch --runs 'my runs' status` lists the runs" in again.stderr
    told = CliRunner().invoke(cli, ["status", "x"], env={"ORCH_RUNS": "my runs"}).stderr
    assert "`orch status` lists the runs" in told  # the next command sees the variable too


def test_the_plan_fits_a_terminal(folder, monkeypatch):
    plan = orch("plan", "tiny.yaml", "stages.train.parallel.recompute=full").stdout
    assert max(map(len, plan.splitlines())) < 80
    assert re.search(r"^layout +2 = 2 x 1 x 1 *$", plan, flags=re.MULTILINE)
    nothing = orch("plan", "tiny.yaml", "--stage", "prepare")
    assert (nothing.exit_code, nothing.stdout) == (0, "") and "none of these stages trains" in nothing.stderr


@pytest.mark.parametrize(
    ("file", "content"),
    [*[("run.json", text) for text in ("{", "[]", "{}")], *[("spec.yaml", text) for text in ("nme: 3", "{", None)]],
)
def test_a_damaged_run_folder_is_named(folder, file, content):
    orch("submit", "tiny.yaml", "--dry-run")
    damaged = folder / "runs" / "tiny" / "train" / file
    damaged.write_text(content) if content else damaged.unlink()
    result = orch("status")
    assert result.exit_code == 1
    shutil.rmtree(damaged.parent)
    assert f"error: cannot read `{damaged}`" in result.stderr and "hint: restore it" in result.stderr
    assert orch("status").exit_code == 0


def test_an_attempt_killed_before_its_first_step_has_no_time(folder):
    orch("submit", "tiny.yaml", "--dry-run")
    run = list_runs(folder / "runs")[1]
    (run.folder / "attempts").mkdir()
    run.save_attempt(Attempt(name="1", job_id="", world=2, host="h", started_at=100.0))
    run.save_attempt(Attempt(name="2", job_id="", world=2, host="h", started_at=500.0))
    (run.folder / "heartbeat.json").write_text('{"attempt": "1", "step": 3, "steps": 10, "tokens": 8, "time": 103.0}')
    told = orch("status", "tiny/train").stdout
    assert re.search(r"^1 .* 3 s +h .* killed", told, flags=re.MULTILINE)
    assert re.search(r"^2 .* - +h .* killed", told, flags=re.MULTILINE)


def test_a_full_disk_or_foreign_folder_is_no_traceback(folder):
    (folder / "runs" / "tiny" / "prepare").mkdir(parents=True)
    (folder / "runs" / "tiny" / "prepare" / "spec.yaml").mkdir()  # cannot be replaced, not even by root
    result = orch("submit", "tiny.yaml", "--dry-run")
    assert result.exit_code == 1 and result.stderr.startswith("error: [Errno 21]")


def test_a_server_that_is_away_does_not_keep_the_others_from_being_synced(folder):
    away = make_chain(folder / "runs", name="a", uri="http://127.0.0.1:1")[0]
    here = make_chain(folder / "runs", name="b")[0]
    (here.folder / "metrics.jsonl").write_text('{"step": 1, "time": 1, "attempt": "1", "tokens": 8, "train/loss": 2}\n')
    result = orch("sync")
    shutil.rmtree(folder / "runs")
    assert result.exit_code == 1 and "b/pretrain: 1 steps sent" in result.stdout
    assert f"error: run `{away.name}`: no MLflow at" in result.stderr


def test_following_waits_for_the_log_of_the_newest_attempt(folder):
    orch("submit", "tiny.yaml", "--dry-run")
    (run, _) = list_runs(folder / "runs")
    (run.folder / "logs" / "1-0.log").write_text("old\n")
    supervisor = subprocess.Popen(["sleep", "60"], start_new_session=True)
    start = psutil.Process(supervisor.pid).create_time() - psutil.boot_time()
    job_id = f"{socket.gethostname()}:{supervisor.pid}@{start:.2f}"
    run.submissions = [Submission(number=2, launcher="local", job_id=job_id, submitted_at=1.0)]
    run.save()
    (run.folder / "submitit" / "2").mkdir(parents=True)
    try:
        follower = process("logs", "-f", "tiny/prepare", stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            follower.communicate(timeout=3)
        (run.folder / "logs" / "2-0.log").write_text("new\n")
        (run.folder / "attempts").mkdir()
        run.save_attempt(Attempt(name="2", job_id="", world=1, host="", started_at=2.0))
        time.sleep(1.5)
    finally:
        supervisor.kill()
        supervisor.wait()
    assert follower.communicate(timeout=120 * slowness())[0] == "new\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell):
    script = orch("completion", shell).stdout
    assert "_ORCH_COMPLETE" in script and "orch" in script


def test_runs_are_completed(folder):
    orch("submit", "tiny.yaml", "--dry-run")
    environment = {"_ORCH_COMPLETE": "bash_complete", "COMP_WORDS": "orch logs ti", "COMP_CWORD": "2"}
    told = CliRunner().invoke(cli, prog_name="orch", env=environment).stdout
    assert told.split() == ["plain,tiny", "plain,tiny/prepare", "plain,tiny/train"]


# Whole runs


@pytest.mark.slow
def test_a_failing_stage_shows_its_error_first_and_is_resumed_once_that_is_mended(folder):
    text = (folder / "text.jsonl").read_text()
    (folder / "text.jsonl").write_text(text + '{"no text": 1}\n')
    submitted = process("submit", "tiny.yaml", stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    out, err = submitted.communicate(timeout=600 * slowness())
    assert (submitted.returncode, out) == (1, "")
    (error,) = re.findall("^error: .*", err, flags=re.MULTILINE)
    assert error.startswith("error: `tiny/prepare` failed: rank 0: DataError: ") and "text.jsonl" in error
    assert "`orch resume tiny`" in err
    states = {r["run"]: r["state"] for r in json.loads(orch("status", "--json").stdout)}
    assert states == {"tiny/prepare": "failed", "tiny/train": "new"}
    assert "text.jsonl" in orch("status", "tiny/prepare").stdout
    assert "text.jsonl" in orch("logs", "tiny/prepare").stdout

    (folder / "text.jsonl").write_text(text)
    resumed = process("resume", "tiny/prepare", stderr=subprocess.PIPE)
    _, err = resumed.communicate(timeout=600 * slowness())
    assert resumed.returncode == 0, err
    assert "tiny/prepare: done" in err and "`orch status tiny`" in err
    assert (folder / "data" / "t-train.idx").exists()
    again = orch("submit", "tiny.yaml", "--stage", "prepare")
    assert again.exit_code == 0 and "all stages are done" in again.stderr


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_is_resumed_from_anywhere(folder):
    """On a terminal: progress bars, Ctrl-C saves and stops, a resume goes on; `cancel --now` kills it."""
    terminal, there = pty.openpty()
    first = process(
        "submit", "tiny.yaml", "stages.train.steps=100000", stderr=there, stdout=there, start_new_session=True
    )
    os.close(there)
    shown = watch(terminal, lambda text: re.search(r"/100000 +loss", text), 600)
    first.send_signal(signal.SIGINT)
    shown += watch(terminal, lambda _: first.poll() is not None, 480)
    assert first.wait(timeout=240 * slowness()) == 1, shown
    os.close(terminal)
    assert "asking the runs to save and stop" in shown and "`orch resume tiny`" in shown
    row = json.loads(orch("status", "tiny/train", "--json").stdout)[0]
    assert row["state"] == "stopped" and row["checkpoint_step"] == row["step"] > 0
    log = orch("logs", "tiny/train", "--rank", "1")
    assert "saved and left: cancelled at step" in log.stdout
    other = orch("submit", "tiny.yaml")
    assert other.exit_code == 1 and "`stages.train.steps` was 100000, is 10" in other.stderr

    (folder / "far").mkdir()
    second = process("--runs", "../runs", "resume", "tiny", "--detach", cwd=folder / "far", stderr=subprocess.PIPE)
    _, err = second.communicate(timeout=600 * slowness())
    assert second.returncode == 0 and "`orch --runs ../runs logs -f tiny`" in err
    live = orch("resume", "tiny")
    assert live.exit_code == 1 and "already" in live.stderr
    until_step(folder / "runs" / "tiny" / "train", row["step"] + 1)
    killed = orch("cancel", "tiny", "--now")
    assert killed.exit_code == 0
    row = json.loads(orch("status", "tiny/train", "--json").stdout)[0]
    assert row["state"] == "failed" and "killed" in row["ended"]
    assert row["attempts"] == 2
    steps = len(list_runs(folder / "runs")[1].metrics())
    assert re.search(r"^tiny/train: \d+ steps sent$", orch("sync").stdout, flags=re.MULTILINE)
    assert steps >= row["step"] and "tiny/train: 0 steps sent" in orch("sync", "tiny/train").stdout


def watch(terminal: int, seen, timeout_s: float) -> str:
    """What appears on ``terminal`` until ``seen`` holds of it."""
    text, deadline = "", time.monotonic() + timeout_s * slowness()
    while not seen(text):
        assert time.monotonic() < deadline, text
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text + os.read(terminal, 1 << 16).decode(errors="replace"))
            except OSError:  # the other end is closed
                break
    return text


def until_step(run: Path, step: int) -> None:
    wait(lambda: json.loads((run / "heartbeat.json").read_text())["step"] >= step, f"step {step}", every=0.2)
