"""Checkpoint folders on two ranks: commit, damage, full disk, a replaced attempt, retention."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import save_file

from jobs.runtime import checkpoint, dist, resume
from jobs.runtime.job import Job
from orchestrator.errors import CheckpointError
from orchestrator.run import Attempt, Run
from orchestrator.spec import ClusterSpec, Experiment, ModelSpec, StageSpec


def _save(ranks, root, step, *, keep=3, elements=0, expected_bytes=0, current=(True, True), fails=None):
    def write(folder):
        if fails and ranks.rank == 1:
            raise fails
        names = [f"shard-{ranks.rank}", f"shard-{ranks.rank}.safetensors"]
        (folder / names[0]).write_text(f"{step}-{ranks.rank}")
        save_file({"x": torch.zeros(elements)}, folder / names[1])
        return names

    answers = iter(current)
    done = checkpoint.save(
        root,
        step,
        {"step": step},
        write,
        ranks=ranks,
        expected_bytes=expected_bytes,
        may_commit=lambda: next(answers),
    )
    if done:
        checkpoint.retire(root, keep, saved=step, ranks=ranks)
    dist.barrier()
    return done


def _everything(ranks, root):
    """All cases in one process group; returns what was seen."""
    seen = {"nothing": checkpoint.newest(root, ranks=ranks)}
    for step in (10, 20, 30, 40):
        assert _save(ranks, root, step)
    seen["kept"] = checkpoint.committed(root)
    seen["newest"] = checkpoint.newest(root, ranks=ranks)[1]

    seen["fails"] = _save(ranks, root, 50, fails=OSError(28, "No space left on device"))
    seen["replaced"] = _save(ranks, root, 40, current=[False])
    seen["replaced_meanwhile"] = _save(ranks, root, 50, current=[True, False])
    seen["too_big"] = _save(ranks, root, 50, expected_bytes=10**18)
    seen["after_failures"] = sorted(p.name for p in root.iterdir())
    dist.barrier()

    if ranks.rank == 0:  # a kill half-way: files and no manifest
        half = checkpoint.folder_of(root, 60)
        half.mkdir()
        (half / "shard-0").write_text("half")
    dist.barrier()
    seen["half_written"] = checkpoint.newest(root, ranks=ranks)[1]

    if ranks.rank == 0:
        shard = checkpoint.folder_of(root, 40) / "shard-1"
        shard.write_text("49-1")  # the same size
    dist.barrier()
    seen["damaged"] = checkpoint.newest(root, ranks=ranks)[1]
    assert _save(ranks, root, 35, keep=1)
    seen["beyond_the_damage"] = checkpoint.newest(root, ranks=ranks)[1]
    seen["kept_beside_the_damaged"] = checkpoint.committed(root)
    assert _save(ranks, root, 30) and _save(ranks, root, 20)

    if ranks.rank == 0:
        (checkpoint.folder_of(root, 35) / "shard-1").write_text("")
        (checkpoint.folder_of(root, 30) / "shard-0").unlink()
        (checkpoint.folder_of(root, 20) / checkpoint.MANIFEST).write_text("{")
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"all 4 checkpoints in .* are damaged"):
        checkpoint.newest(root, ranks=ranks)

    assert _save(ranks, root, 70)
    seen["recovered"] = checkpoint.newest(root, ranks=ranks)[1]
    seen["swept"] = sorted(p.name for p in root.iterdir())
    return seen


def test_two_ranks(tmp_path):
    first, second = run_ranks(_everything, 2, tmp_path)
    assert first == second
    assert first == {
        "nothing": None,
        "kept": [40, 30, 20],
        "newest": {"step": 40},
        "fails": False,
        "replaced": False,
        "replaced_meanwhile": False,
        "too_big": False,
        "after_failures": ["step-0000020", "step-0000030", "step-0000040"],
        "half_written": {"step": 40},
        "damaged": {"step": 30},
        "beyond_the_damage": {"step": 35},
        "kept_beside_the_damaged": [40, 35],
        "recovered": {"step": 70},
        "swept": ["step-0000035", "step-0000040", "step-0000070"],
    }


def _bug(ranks, root):
    with pytest.raises((ValueError, dist.PeerBug)) as error:
        _save(ranks, root, 1, fails=ValueError("of another shape"))
    dist.barrier()  # the ranks are still in step
    return type(error.value).__name__, str(error.value), checkpoint.committed(root)


def test_a_bug_on_one_rank_ends_all_of_them(tmp_path):
    """It would fail at every save, and a run that trains on without checkpoints helps nobody."""
    assert run_ranks(_bug, 2, tmp_path) == [
        ("PeerBug", "rank 1: ValueError: of another shape", []),
        ("ValueError", "of another shape", []),
    ]


def _fill(ranks, root):
    ok = _save(ranks, root, 1, elements=250)
    too_much = _save(ranks, root, 2, elements=2_000_000)
    return ok, too_much, checkpoint.newest(root, ranks=ranks)[1]


def test_a_full_disk_loses_nothing(tmp_path):
    """A real file system of 4 MB, filled by the save itself, its size not foreseen."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root: run the tests as root to enable this one")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], check=True)
    try:
        for ok, too_much, newest in run_ranks(_fill, 2, Path(small)):
            assert ok
            assert not too_much
            assert newest == {"step": 1}
        assert [p.name for p in small.iterdir()] == ["step-0000001"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def _asks(ranks, root):
    model = ModelSpec(layers=10**6, hidden=10**6, heads=1)
    stage = StageSpec(kind="ppo")
    cluster = ClusterSpec(gpu="cpu", gpus_per_node=1, gpu_memory_gb=1, gpu_tflops=1)
    job = Job(
        run=Run(folder=root, experiment="x", stage="ppo", index=1, key="ppo"),
        experiment=Experiment(name="x", model=model, cluster=cluster, stages={"ppo": stage}),
        stage=stage,
        options=None,
        ranks=ranks,
        attempt="1",
        record=Attempt(name="1", job_id="", world=1, host="", started_at=0.0),
    )
    (root / "attempts").mkdir()
    job.run.save()
    parts, data = dict.fromkeys(("", "critic", "ema")), SimpleNamespace(tokenizer_sha256="", fingerprint="")
    said = []
    checkpoint.log.addFilter(lambda record: said.append(record.getMessage()) or True)
    assert not resume.save(job, parts, data, resume.Position(), resume.Probe(data="", measure=float), {})
    return said, model.params


def test_a_save_of_ppo_asks_for_what_the_plan_says(tmp_path):
    """Of a model so large that no disk has room for it: 28 bytes a parameter, and 2 % for what is beside."""
    (((said,), params),) = run_ranks(_asks, 1, tmp_path)
    assert "it takes" in said
    asked = float(said.partition("it takes ")[2].partition(" GB")[0])
    assert asked == pytest.approx(28 * 1.02 * params / 1e9)


def test_identity_names_every_difference(tmp_path):
    mine = {"model": {"layers": 4, "hidden": 64}, "layout": {"world": 2, "zero": 1}}
    checkpoint.check_identity(tmp_path, mine, mine)
    saved = {"model": {"layers": 8, "hidden": 64}, "layout": {"world": 4, "zero": 1}}
    with pytest.raises(CheckpointError, match=r"`layout.world` is 4 there and 2 here; `model.layers` is 8 there and 4"):
        checkpoint.check_identity(tmp_path, saved, mine)
    with pytest.raises(CheckpointError, match=r"model\.layers"):
        checkpoint.check_identity(tmp_path, saved, mine, free=("layout.world",))
