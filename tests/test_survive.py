"""Real runs through `orch`, ended in the middle and resumed: the losses are those of an unbroken run, bit for bit.

The unbroken run and the broken one are trained by the same command from the same config; only the name differs.
"""

import functools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from clock import wait

from orchestrator.run import Run

pytestmark = pytest.mark.slow

ORCH = Path(sys.executable).with_name("orch")
STEPS, SAVE_EVERY = 40, 9
CONFIG = """
defaults: [cluster/local]
name: base
model: {layers: 2, hidden: 64, heads: 4, vocab: 300, seq_len: 64, dropout: 0.1}
data:
  folder: %(folder)s/data
  sources: {text: {text: [%(folder)s/text.txt]}}
stages:
  pretrain:
    kind: pretrain
    precision: fp32
    parallel: {micro_batch: 8}
    global_batch: 64
    steps: 40
    save_every: 9
    eval_every: 10
    optimizer: {lr: 2e-3}
"""
ENGINES = {
    "ddp": ("engine=torch", "parallel.zero=0"),
    "fsdp2": ("engine=torch", "parallel.zero=3"),
    "zero1": ("engine=deepspeed", "parallel.zero=1"),
    "zero2": ("engine=deepspeed", "parallel.zero=2"),
    "zero3": ("engine=deepspeed", "parallel.zero=3"),
    "colossal": ("engine=colossalai", "parallel.pipeline=2"),
    "3d": ("engine=deepspeed", "parallel={tensor: 2, pipeline: 2, sequence: true, zero: 1, micro_batch: 8}"),
}
RANKS = {"3d": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a config, its prepared data, and runs; whatever still trains in it at the end is killed."""
    folder = tmp_path_factory.mktemp("survive")
    words = Path(os.__file__).parent.glob("[a-d]*.py")  # real text, a few hundred kB
    (folder / "text.txt").write_text("\n".join(p.read_text(errors="replace") for p in sorted(words)))
    (folder / "base.yaml").write_text(CONFIG % {"folder": folder})
    (folder / "prepare.yaml").write_text(
        "defaults: [base.yaml]\nname: prepare\nstages: {prepare: {kind: prepare, options: {workers: 1}}}\n"
    )
    orch(folder, "submit", "prepare.yaml", "--stage", "prepare")
    yield folder
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or []):
            process.kill()


def orch(folder, *words, ok=0):
    """Run `orch`; return what it printed."""
    done = subprocess.run(
        [str(ORCH), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1800,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def submit(folder, name, engine, *words):
    overrides = [f"cluster.gpus_per_node={RANKS.get(engine, 2)}", *(f"stages.pretrain.{w}" for w in ENGINES[engine])]
    return orch(folder, "submit", "base.yaml", f"name={name}", *overrides, *words)


@functools.cache
def whole(folder, engine):
    """The curve of a run that nothing happened to."""
    submit(folder, f"whole-{engine}", engine)
    return curve(open_run(folder, f"whole-{engine}"))


def open_run(folder, name):
    return Run.load(folder / "runs" / name / "pretrain")


def rank_process(run, rank):
    """The process of one rank: found by what submitit put into its environment."""
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        try:
            if (
                "submitit.core._submit" in words
                and str(run.folder) in words
                and process.environ().get("SUBMITIT_LOCAL_GLOBALID") == str(rank)
            ):
                return process
        except psutil.Error:
            continue
    return None


def state(folder, run):
    (row,) = json.loads(orch(folder, "status", run.name, "--json"))
    return row["state"]


def curve(run):
    """What must repeat bit for bit, by step."""
    exact = ("train/loss", "train/grad_norm", "train/lr", "val/loss", "tokens")
    return {step: {key: line.get(key) for key in exact} for step, line in run.metrics().items()}


def in_mlflow(folder, run):
    """Steps of train/loss that MLflow has for ``run``, and the run's status."""
    tracked = json.loads((run.folder / "tracking.json").read_text())
    run_id = next(str(v) for k, v in tracked.items() if k.endswith("run_id"))
    with sqlite3.connect(folder / "runs" / "mlflow.db") as db:
        steps = db.execute("select step from metrics where run_uuid = ? and key = 'train/loss'", [run_id]).fetchall()
        (status,) = db.execute("select status from runs where run_uuid = ?", [run_id]).fetchone()
        (runs,) = db.execute("select count(*) from tags where value = ?", [run.key]).fetchone()
    assert runs == 1, "one run for life"
    return [step for (step,) in steps], status


ALWAYS = ("zero1",)  # the others with the parity tests


@pytest.mark.parametrize(
    "engine", [pytest.param(e, marks=[] if e in ALWAYS else [pytest.mark.parity]) for e in ENGINES]
)
def test_a_killed_rank(place, engine):
    unbroken = whole(place, engine)
    submit(place, f"broken-{engine}", engine, "--detach")
    run = open_run(place, f"broken-{engine}")
    seed = time.time_ns()
    rng = random.Random(seed)
    at, rank = rng.randrange(2, STEPS - 5), rng.randrange(RANKS.get(engine, 2))
    wait(lambda: run.heartbeat() and max(run.metrics(), default=0) >= at, f"step {at}")
    victim = rank_process(run, rank)
    victim.send_signal(signal.SIGKILL)
    wait(lambda: state(place, run) == "failed", "the end")
    reached = max(run.metrics())
    saved = max((int(p.parent.name.removeprefix("step-")) for p in run.checkpoints.glob("*/MANIFEST.json")), default=0)
    assert saved <= reached < STEPS, f"killed too late: seed {seed}"
    assert not any(rank_process(run, r) for r in range(RANKS.get(engine, 2))), "a rank was left behind"

    orch(place, "resume", run.name)
    where = f"rank {rank} killed after step {at}, seed {seed}"
    assert curve(run) == unbroken, where
    assert sorted(curve(run)) == list(range(1, STEPS + 1))
    second = run.attempts()[-1]
    assert second.from_step == saved >= reached - SAVE_EVERY, where
    assert (second.cause, second.to_step) == ("done", STEPS)
    orch(place, "sync", run.name)
    steps, status = in_mlflow(place, run)
    assert sorted(steps) == list(range(1, STEPS + 1)), "a step is missing in MLflow, or there twice"
    assert status == "FINISHED"


def test_asked_to_stop(place):
    """`orch cancel` saves at the next step's end; nothing is repeated, nothing lost."""
    submit(place, "asked", "ddp", "--detach")
    run = open_run(place, "asked")
    wait(lambda: max(run.metrics(), default=0) >= 5, "step 5")
    orch(place, "cancel", run.name)
    wait(lambda: state(place, run) == "stopped", "the stop")
    (first,) = run.attempts()
    assert first.cause == "cancelled"
    assert first.checkpoint_step == first.to_step == max(run.metrics()) < STEPS
    orch(place, "resume", run.name)
    assert run.attempts()[-1].from_step == first.to_step
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    assert curve(run) == whole(place, "ddp")


def test_a_run_goes_on_in_another_layout(place):
    """torch DDP, stopped; DeepSpeed ZeRO-3, stopped; a pipeline to the end: the losses of the run nobody stopped."""
    plain = "model.dropout=0"  # each layout draws other random numbers
    submit(place, "unmoved", "ddp", plain)
    submit(place, "moved", "ddp", plain, "--detach")
    run = open_run(place, "moved")
    for steps, layout in ((5, "engine=deepspeed zero=3"), (15, "engine=deepspeed zero=1 pipeline=2")):
        wait(lambda steps=steps: max(run.metrics(), default=0) >= steps, f"step {steps}")
        orch(place, "cancel", run.name)
        wait(lambda: state(place, run) == "stopped", "the stop")
        engine, *parallel = layout.split()
        words = [f"stages.pretrain.{engine}", *(f"stages.pretrain.parallel.{word}" for word in parallel)]
        said = orch(place, "resume", run.name, *words, *(["--detach"] if steps == 5 else []))
        assert "continues from step" in said and "converts to deepspeed" in said
    moved, unmoved = curve(run), curve(open_run(place, "unmoved"))
    assert sorted(moved) == list(range(1, STEPS + 1))
    for step, line in unmoved.items():
        for key, value in line.items():
            assert moved[step][key] == (value if value is None else pytest.approx(value, abs=2e-4)), (step, key)
    log = (run.folder / "logs" / "3-0.log").read_text()
    assert "saved by deepspeed ZeRO-3 on 2 ranks in fp32, converted to deepspeed ZeRO-1, pipeline 2, on 2 ranks" in log
    assert run.spec().stages["pretrain"].parallel.pipeline == 2


def test_a_damaged_checkpoint_is_passed_over(place):
    submit(place, "damaged", "zero1", "--detach")
    run = open_run(place, "damaged")
    wait(lambda: max(run.metrics(), default=0) >= 20, "step 20")
    orch(place, "cancel", run.name, "--now")
    newest = max((run.folder / "checkpoints").glob("step-*/MANIFEST.json")).parent
    shard = max(newest.glob("pieces-*.safetensors"), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    orch(place, "resume", run.name)
    assert "is damaged and is passed over" in (run.folder / "logs" / "2-0.log").read_text()
    assert run.attempts()[-1].from_step == int(newest.name.removeprefix("step-")) - SAVE_EVERY
    assert curve(run) == whole(place, "zero1")


def test_a_checkpoint_of_another_model_or_data_is_refused(place):
    """A run whose spec was changed by hand must not train on with weights, or in an order, of another."""
    submit(place, "other", "ddp")
    run = open_run(place, "other")
    spec = run.folder / "spec.yaml"
    changed = spec.read_text()
    for old, new in {"heads: 4": "heads: 2", "steps: 40": "steps: 45", "seed: 1234": "seed: 4321"}.items():
        assert old in changed
        changed = changed.replace(old, new)
    spec.write_text(changed)
    attempt = run.folder / "attempts" / "1.json"
    attempt.write_text(attempt.read_text().replace('"done"', '"cancelled"'))
    said = orch(place, "resume", run.name, ok=1)
    assert "does not belong to this run" in said
    assert "`model.heads` is 4 there and 2 here" in said
    assert "`data` is" in said
    assert max(run.metrics()) == STEPS
