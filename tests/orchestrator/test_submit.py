"""What `submit` and `resume` write, refuse and pass over; the launcher is not started here."""

import dataclasses
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from orchestrator import submit as submitting
from orchestrator.compose import Composed, compose
from orchestrator.errors import ConfigError, DataError, LaunchError, PlanError
from orchestrator.relayout import announcements, what_counts
from orchestrator.run import Attempt, Run, Submission, list_runs, write_json
from orchestrator.spec import StageSpec, in_order, layout_of

CONFIG = """
name: tiny
model: {layers: 1, hidden: 16, heads: 2, vocab: 300, seq_len: 16}
cluster: {gpu: cpu, gpus_per_node: 2, gpu_memory_gb: 4, gpu_tflops: 0.06, nodes: 1, launcher: local}
data: {folder: data, sources: {t: {text: [text.txt]}}}
stages:
  tune: {kind: pretrain, init_from: train, global_batch: 4, steps: 5, precision: fp32}
  train: {kind: pretrain, after: [prepare], global_batch: 4, steps: 10, precision: fp32}
  prepare: {kind: prepare}
"""

REAL = {"dry_run": False}  # which are refused before they start
SFT = ["stages.train.kind=sft", "data.examples.demonstrations={}", "stages.train.init_from=null"]
Composer = Callable[..., Composed]


@pytest.fixture
def composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Composer:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text\n" * 100)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return lambda *overrides: compose("tiny.yaml", overrides)


def dry(composed: Composed, **how) -> list[Run]:
    return submitting.submit(composed, root=Path("runs"), **{"dry_run": True, **how})


@contextmanager
def handed_over(run: Run) -> Iterator[None]:
    """As after `submit`: a process of its own session stands for the supervisor."""
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    start = psutil.Process(process.pid).create_time() - psutil.boot_time()
    job_id = f"{socket.gethostname()}:{process.pid}@{start:.2f}"
    run.submissions.append(Submission(number=1, launcher="local", job_id=job_id, submitted_at=time.time()))
    (run.folder / "submitit" / "1").mkdir(parents=True)
    run.save()
    try:
        yield
    finally:
        process.kill()
        process.wait()


def end(run: Run, cause: str, *, step: int = 0) -> None:
    (run.folder / "attempts").mkdir(exist_ok=True)
    run.save_attempt(Attempt(name="1", job_id="", world=2, host="", started_at=1.0, cause=cause, to_step=step))


def test_stages_wait_for_those_they_start_from(composed):
    assert in_order(composed().experiment) == ["prepare", "train", "tune"]


def test_a_run_folder_holds_all_a_job_needs(composed, tmp_path):
    runs = dry(composed())
    assert [(r.name, r.index) for r in runs] == [("tiny/prepare", 1), ("tiny/train", 2), ("tiny/tune", 3)]
    assert len({r.key for r in runs}) == 3
    train = tmp_path / "runs" / "tiny" / "train"
    assert stat.S_IMODE(train.stat().st_mode) == 0o700
    assert json.loads((train / "plan.json").read_text())["stage"] == "train"
    assert Run.load(train).submissions == []
    spec = Run.load(train).spec()
    assert spec.data.folder == str(tmp_path / "data")  # a resume may come from another folder
    assert spec.data.sources["t"].text == [str(tmp_path / "text.txt")]
    code = {str(f.relative_to(train / "code")) for f in (train / "code").rglob("*.py")}
    assert {"orchestrator/run.py", "jobs/__main__.py", "jobs/engines/torch.py", "launch/local.py"} <= code
    for file in code:
        live = Path(submitting.__file__).parents[1] / file
        assert (train / "code" / file).read_bytes() == live.read_bytes()  # uncommitted changes included


def test_the_copied_code_runs_by_itself(composed, tmp_path):
    (prepare, *_) = dry(composed())
    environment = {"PYTHONPATH": str(prepare.folder / "code"), "PYTHONSAFEPATH": "1", "PATH": os.environ["PATH"]}
    script = "import jobs.prepare, launch._supervisor, sys; print(jobs.prepare.__file__, 'torch' in sys.modules)"
    command = [sys.executable, "-c", script]
    told = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert told.split() == [str(prepare.folder / "code" / "jobs" / "prepare.py"), "False"]


def test_a_selection_keeps_its_place_in_the_chain(composed):
    runs = dry(composed(), stages=["train", "prepare"])
    assert [(r.stage, r.index) for r in runs] == [("prepare", 1), ("train", 2)]


@pytest.mark.parametrize(
    ("overrides", "how", "error", "words"),
    [
        (["stages.train.global_batch=3"], {}, PlanError, "global_batch"),
        (["stages.train.parallel.nodes=2"], {}, (PlanError, LaunchError), "nodes"),
        (["data.sources.t.text=[nowhere.txt]"], {}, DataError, r"no text at `.*/nowhere\.txt`"),
        (["data.tokenizer=nowhere.json"], {}, DataError, "no tokenizer"),
        ([], {"stages": ["train"]}, LaunchError, "stage `train` waits for `prepare`, which is not done"),
        (["stages.train.after=[]"], {"stages": ["train"]}, DataError, r"reads `.*/data/t-train\.idx`"),
        (["data.sources.t={shards: [no/s]}"], {}, DataError, r"no shard at `.*/no/s\.idx`"),
        (["data.sources.t={shards: [], text: []}"], REAL, DataError, r"`t` has neither `text` nor `shards`"),
        (SFT, REAL, DataError, r"no examples at `.*/data/demonstrations-train\.jsonl`"),
        ([*SFT, "stages.train.after=[]"], {"stages": ["train"]}, DataError, r"reads `.*/data/dataset\.json`"),
        ([], {"stages": ["trian"]}, ConfigError, "no stage `trian`"),
        ([], {"launcher": "slrum"}, ConfigError, "no launcher `slrum`"),
    ],
)
def test_refused_before_anything_is_written(composed, overrides, how, error, words):
    if "shards" in str(overrides):
        overrides = [*overrides, "stages.train.after=[]"]
        how = {**how, "stages": ["train"]}
    with pytest.raises(error, match=words) as caught:
        dry(composed(*overrides), **how)
    assert caught.value.hint
    assert not Path("runs").exists()


def test_a_preset_without_data_can_be_looked_at(composed, caplog):
    with caplog.at_level("WARNING"):
        assert [run.stage for run in dry(compose("gpt3-125m", ["cluster=local", "data.folder=data"]), force=True)]
    assert "source `common-crawl` has neither `text` nor `shards`; to train, set" in caplog.text


@pytest.mark.parametrize(("keep", "said"), [(2, False), (10**9, True)])
def test_checkpoints_that_the_disk_has_no_room_for(composed, caplog, keep, said):
    with caplog.at_level("WARNING"):
        dry(composed(f"stages.train.keep={keep}"))
    assert ("checkpoints will take" in caplog.text) == said


def test_a_runs_folder_that_cannot_be_written(composed):
    Path("runs").write_text("a file")
    with pytest.raises(LaunchError, match="cannot write to"):
        dry(composed())


def test_submitting_what_runs_is_refused(composed):
    _, train, _ = dry(composed())
    before = {f: f.read_bytes() for f in train.folder.rglob("*") if f.is_file()}
    with handed_over(train):
        with pytest.raises(LaunchError, match="`tiny/train` is queued already"):
            dry(composed())
        with pytest.raises(LaunchError, match="`tiny/train` is queued already") as caught:
            submitting.resume([Run.load(train.folder)])
        assert "orch cancel tiny/train" in caught.value.hint
    changed = {f.name for f in before if f.read_bytes() != before[f]}
    assert changed <= {"run.json"}  # what `handed_over` wrote


def test_submitting_again_passes_over_what_is_done(composed, caplog):
    prepare, train, _ = dry(composed())
    with handed_over(prepare):
        end(prepare, "done")
    with pytest.raises(DataError, match=r"t-train\.idx"):
        dry(composed())
    Path("data").mkdir()
    for name in ("t-train.idx", "t-train.bin", "t-val.idx", "t-val.bin", "dataset.json"):
        (Path("data") / name).touch()
    with handed_over(train):
        end(train, "cancelled", step=4)
    with caplog.at_level("INFO"):
        assert [r.stage for r in dry(composed())] == ["train", "tune"]
    assert "`tiny/prepare` is done: passed over" in caplog.text
    with pytest.raises(LaunchError, match="nothing to resume"):
        submitting.resume([prepare])
    with pytest.raises(LaunchError, match="nothing to cancel: `tiny/prepare` is done"):
        submitting.cancel([prepare])


def test_another_config_under_the_same_name_is_refused(composed):
    _, train, _ = dry(composed())
    with handed_over(train):
        end(train, "cancelled")
    with pytest.raises(LaunchError) as caught:
        dry(composed("stages.train.steps=20", "model.layers=2"))
    assert "`model.layers` was 1, is 2; `stages.train.steps` was 10, is 20" in str(caught.value)
    assert "name=" in caught.value.hint and "orch resume tiny/train" in caught.value.hint
    end(train, "done")
    with pytest.raises(LaunchError) as caught:
        dry(composed("model.layers=2"))
    assert "name=" in caught.value.hint and "orch resume" not in caught.value.hint  # nothing is left to resume
    end(train, "cancelled")
    # What the stage does not depend on may change: the launcher, the other stages.
    dry(composed("cluster.launcher=slurm", "stages.tune.steps=6"), launcher="local")
    assert len(list_runs(Path("runs"))) == 3
    dry(composed("stages.train.steps=20", "name=other"))
    assert len(list_runs(Path("runs"))) == 6


def test_what_is_passed_to_the_engine_belongs_to_the_layout():
    """Another partition of a pipeline puts other layers on a rank, whose random numbers are then not its own."""
    stage = StageSpec(kind="pretrain", engine="deepspeed")
    other = dataclasses.replace(stage, engine_config={"pipeline": {"partition": "parameters"}})
    assert layout_of(stage, 4) != layout_of(other, 4)


def test_room_for_more_responses_is_no_other_config(composed):
    e = composed().experiment
    stages = [{"s": StageSpec(kind="reward", options={"responses": n})} for n in (2, 9)]
    two, nine = (what_counts(dataclasses.replace(e, stages=s), "s") for s in stages)
    assert two == nine


def test_the_layout_of_a_run_may_change(composed, caplog):
    """Engine, parallel plan and cluster; what is computed may not, by `orch resume` either."""
    _, train, _ = dry(composed())
    with handed_over(train):
        end(train, "cancelled")
    checkpoint = train.checkpoints / "step-0000005"
    checkpoint.mkdir(parents=True)
    stage = train.spec().stages["train"]
    write_json(checkpoint / "state.json", {"position": {"step": 5}, "layout": layout_of(stage, 2)})
    write_json(checkpoint / "MANIFEST.json", {})
    moved = "stages.train.engine=deepspeed", "stages.train.parallel.zero=2", "cluster.gpus_per_node=4"
    with caplog.at_level("INFO"):
        dry(composed(*moved))
    said = "continues from step 5, saved by torch ZeRO-0 on 2 ranks in fp32; converts to deepspeed ZeRO-2 on 4 ranks"
    assert f"`tiny/train` {said} in fp32" in caplog.text
    spec = Run.load(train.folder).spec()
    assert (spec.stages["train"].engine, spec.cluster.gpus_per_node) == ("deepspeed", 4)
    assert spec.stages["train"].parallel.zero == 2
    assert announcements(train.root, spec, ["train"]) == [f"`tiny/train` {said} in fp32"]

    with pytest.raises(LaunchError, match=r"`stages.train.optimizer.lr` was 0.0001, is 0.1"):
        submitting.resume([Run.load(train.folder)], ["stages.train.optimizer.lr=0.1"])
    with pytest.raises(ConfigError, match="`cluster=h200`: only a config has groups to swap"):
        submitting.resume([Run.load(train.folder)], ["cluster=h200"])


def test_a_dry_run_binds_nobody(composed):
    dry(composed())
    dry(composed("stages.train.steps=20"))
    assert Run.load(Path("runs/tiny/train").absolute()).spec().stages["train"].steps == 20


def test_half_a_folder_is_written_again(composed):
    """A kill in the middle of `submit` leaves a folder without its last file, run.json."""
    _, train, _ = dry(composed())
    (train.folder / "run.json").unlink()
    (train.folder / "spec.yaml").write_text("name: ha")
    shutil.rmtree(train.folder / "code" / "launch")
    runs = dry(composed())
    assert [r.stage for r in runs] == ["prepare", "train", "tune"]
    assert Run.load(train.folder).spec().name == "tiny"
    assert (train.folder / "code" / "launch" / "local.py").exists()


def test_two_submissions_do_not_meet(composed, monkeypatch):
    _, train, _ = dry(composed())
    held = Run.lock
    monkeypatch.setattr(Run, "lock", lambda self, what: held(self, what, wait_s=0.1))
    with held(train, "run"), pytest.raises(LaunchError, match=r"another process has held `\.run\.lock`"):
        dry(composed())


def test_the_state_is_that_of_the_newest_submission(composed):
    _, train, _ = dry(composed())
    assert train.state(alive=False) == "new"
    with handed_over(train):
        end(train, "cancelled")
    assert train.state(alive=False) == "stopped"
    train.submissions.append(Submission(number=2, launcher="local", job_id="", submitted_at=2.0))
    assert (train.state(alive=True), train.state(alive=False)) == ("queued", "failed")  # it never began
    train.save_attempt(Attempt(name="2r1", job_id="", world=2, host="", started_at=3.0))
    assert (train.state(alive=True), train.state(alive=False)) == ("running", "failed")


@pytest.mark.parametrize("again", ["submit", "resume"])
def test_what_changes_while_waiting_for_the_lock_is_seen(composed, again):
    prepare, train, _ = dry(composed())
    with ThreadPoolExecutor() as pool, ExitStack() as living:
        with train.lock("run"):
            second = (
                (dry, composed())
                if again == "submit"
                else (submitting.resume, [Run.load(run.folder) for run in (prepare, train)])
            )
            waiting = pool.submit(*second)
            while not taken(prepare):
                assert not waiting.done()
            living.enter_context(handed_over(train))
        with pytest.raises(LaunchError, match="`tiny/train` is queued already"):
            waiting.result()


def taken(run: Run) -> bool:
    try:
        with run.lock("run", wait_s=0):
            return False
    except LaunchError:
        return True
