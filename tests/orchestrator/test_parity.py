"""`orch parity` and `orch consolidate` for real, on two engines and two CPU ranks."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jobs.runtime import whole
from jobs.runtime.checkpoint import commit, damage
from jobs.runtime.job import Ranks
from jobs.runtime.pieces import Store
from orchestrator import parity
from orchestrator.consolidate import consolidate, size_bytes
from orchestrator.errors import CheckpointError

pytestmark = [pytest.mark.slow, pytest.mark.parity]

ORCH = Path(sys.executable).with_name("orch")
CONFIG = """
defaults: [cluster/local]
name: tiny
model: {layers: 2, hidden: 32, heads: 4, vocab: 300, seq_len: 32, dropout: 0.1}
data:
  folder: data
  sources: {text: {text: [text.txt]}}
stages:
  prepare: {kind: prepare, options: {workers: 1}}
  pretrain:
    kind: pretrain
    after: [prepare]
    precision: fp32
    parallel: {micro_batch: 4}
    global_batch: 16
    steps: 40
    optimizer: {lr: 2e-3}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a config, its data, and the parity of two engines in two layouts."""
    folder = tmp_path_factory.mktemp("parity")
    words = sorted(Path(os.__file__).parent.glob("[a-c]*.py"))
    (folder / "text.txt").write_text("\n".join(p.read_text(errors="replace") for p in words))
    (folder / "tiny.yaml").write_text(CONFIG)
    orch(folder, "submit", "tiny.yaml", "--stage", "prepare")
    return folder


def orch(folder, *words, ok=0):
    """Run `orch`; return its stdout and its stderr."""
    done = subprocess.run(
        [str(ORCH), *words], cwd=folder, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL,
        check=False,
    )  # fmt: skip
    assert done.returncode == ok, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def report(place):
    out, said = orch(
        place, "parity", "tiny.yaml", "--engines", "torch,deepspeed", "--layout", "zero=1", "--layout", "zero=3",
        "--steps", "6", "--to", "out", "--json",
    )  # fmt: skip
    assert "curves.png" in said
    return {(row["engine"], row["layout"]): row for row in json.loads(out)}


def test_engines_and_layouts_side_by_side(place, report):
    """Each case that can run is equal to the first; the one that cannot says why and what would do."""
    refused = report.pop(("torch", "zero=1"))
    assert refused["result"] == "refused"
    assert "engine `torch` cannot run `parallel.zero=1`" in refused["why"] and "`zero: 2`" in refused["why"]
    assert {key: row["result"] for key, row in report.items()} == {
        ("deepspeed", "zero=1"): "reference",
        ("torch", "zero=3"): "equal",
        ("deepspeed", "zero=3"): "equal",
    }
    for row in report.values():
        assert row["tokens_per_s"] > 0 and row["peak_memory_gb"] > 0
        if row["result"] == "equal":
            assert row["loss_difference"] < 1e-5 and row["grad_norm_difference"] < 1e-4
    assert json.loads((place / "out" / "report.json").read_text())[0]["result"] == "refused"
    assert (place / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    with sqlite3.connect(place / "runs" / "mlflow.db") as db:
        logged = dict(db.execute("select run_uuid, value from metrics where key = 'parity/loss_difference'").fetchall())
    assert sorted(logged.values()) == sorted(r["loss_difference"] for r in report.values() if r["result"] == "equal")


def test_beyond_the_tolerance(report):
    """The same runs, held to a tolerance that they cannot keep: a case whose losses are another's by a hair."""
    rows = [parity.Case(**row) for row in report.values() if row["result"] in ("reference", "equal")]
    lines = Path(rows[1].folder) / "metrics.jsonl"
    kept = lines.read_text()
    changed = [json.loads(line) for line in kept.splitlines()]
    changed[3]["train/loss"] += 0.01
    try:
        lines.write_text("".join(json.dumps(line) + "\n" for line in changed))
        parity.compare(rows, "fp32", None)
        assert rows[1].result == "differs" and rows[1].loss_difference == pytest.approx(0.01, abs=1e-4)
        assert rows[2].result == "equal"
        parity.compare(rows, "fp32", 0.02)
        assert rows[1].result == "equal"
    finally:
        lines.write_text(kept)


def test_what_parity_refuses(place, report):
    _, said = orch(place, "parity", "tiny.yaml", "--engines", "torch", "--layout", "zero=1", ok=1)
    assert "parity takes two cases that can run" in said
    _, said = orch(place, "parity", "tiny.yaml", "--engines", "torch,deepspeed", "--to", "out", ok=1)
    assert "is not empty" in said
    _, said = orch(place, "parity", "tiny.yaml", "--layout", "tensors=2", ok=1)
    assert "tensors" in said and "did you mean" in said


def test_one_canonical_set(place, report, tmp_path):
    """ZeRO-3's and FSDP2's checkpoints come to the same tensors, and a damaged one is refused."""
    found = {}
    for engine in ("torch", "deepspeed"):
        saved = Path(report[engine, "zero=3"]["folder"]) / "checkpoints" / "step-0000006"
        files = consolidate(saved, tmp_path / engine, file_bytes=20_000)
        names = [f.name for f in files]
        assert "MANIFEST.json" in names and sum(n.startswith("model-") for n in names) > 1
        found[engine] = {key: a for f in files if f.suffix == ".safetensors" for key, a in load_file(f).items()}
    assert found["torch"].keys() == found["deepspeed"].keys()
    assert found["torch"]["blocks.0.attn.qkv.weight"].shape == (96, 32)
    for key, array in found["torch"].items():
        assert np.abs(array - found["deepspeed"][key]).max() < 1e-4, key
    assert found["torch"]["step/embed.weight"] == [6.0]

    again = consolidate(tmp_path / "torch", tmp_path / "again")  # it is a checkpoint itself
    assert damage(tmp_path / "again", Ranks()) == ""  # sizes and hashes that were taken while it was written
    whole = {key: a for f in again if f.suffix == ".safetensors" for key, a in load_file(f).items()}
    assert all(np.array_equal(whole[key], array) for key, array in found["torch"].items())
    with pytest.raises(CheckpointError, match="exists"):
        consolidate(tmp_path / "torch", tmp_path / "again")

    broken = shutil.copytree(tmp_path / "again", tmp_path / "broken")
    file = next(broken.glob("model-*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its SHA-256"):
        consolidate(broken, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_one_that_was_broken_off(place, report, tmp_path):
    """What it left is done anew; what is not its own stays. The folder has its name only when it is whole."""
    saved = Path(report["torch", "zero=3"]["folder"]) / "checkpoints" / "step-0000006"
    sizes, partial = [], tmp_path / "out.partial"

    def broken_off(size):
        sizes.append(size)
        if len(sizes) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consolidate(saved, tmp_path / "out", file_bytes=20_000, wrote=broken_off)
    assert list(partial.glob("model-*")) and not (tmp_path / "out").exists()
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"`notes\.txt`, which is not"):
        consolidate(saved, tmp_path / "out")
    (partial / "notes.txt").unlink()
    sizes.clear()
    consolidate(saved, tmp_path / "out", wrote=sizes.append)
    assert not partial.exists() and damage(tmp_path / "out", Ranks()) == ""
    tensors = sum(a.nbytes for f in (tmp_path / "out").glob("*.safetensors") for a in load_file(f).values())
    assert sum(sizes) == tensors


def test_all_models_of_a_checkpoint(tmp_path):
    """Of PPO: the actor, and below it the critic, and the average, which no optimizer keeps anything of."""
    saved, to = tmp_path / "step-0000001", tmp_path / "to"
    held = {}
    for model, slots in (("", ("weight", "exp_avg")), ("critic", ("weight", "exp_avg")), ("ema", ("weight",))):
        (saved / model).mkdir()
        held[model] = {slot: np.random.default_rng(len(held)).random((3, 4), np.float32) for slot in slots}
        files = {"all-0-of-1.safetensors": [(slot, "w", (3, 4)) for slot in slots]}
        for name, parts in files.items():
            whole.write(saved / model / name, parts, lambda part, of=held[model]: of[part[0]], lambda _: None)
        whole.write_index(saved / model, files)
    commit(saved, {"layout": {"precision": "fp32"}})
    sizes = []
    written = consolidate(saved, to, wrote=sizes.append)
    assert sum(sizes) == size_bytes(saved) == 5 * 4 * 12
    assert damage(to, Ranks()) == ""
    for model, of in held.items():
        files = [f for f in written if f.parent == to / model and f.suffix == ".safetensors"]
        assert len(files) == len(of)
        found = {key: a for f in files for key, a in load_file(f).items()}
        assert all(np.array_equal(found[whole.key(slot, "w")], a) for slot, a in of.items())
        with Store(to / model) as store:
            assert "w" in store


def test_the_command(place, report):
    runs = str(place / "out")
    command = ("--runs", runs, "consolidate", "tiny-parity/deepspeed-zero3")
    out, _ = orch(place, *command, "--to", "canonical")
    assert any(line.endswith("model-00001-of-00001.safetensors") for line in out.splitlines())
    _, said = orch(
        place, "--runs", runs, "consolidate", "tiny-parity/deepspeed-zero3", "--step", "5", "--to", "x", ok=1
    )
    assert "does not have the checkpoint of step 5" in said and "steps 6" in said
