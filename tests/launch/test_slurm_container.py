"""Ranks in a container: the scripts against golden texts, and what bash makes of them."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from launch import _slurm_script
from orchestrator.compose import compose
from orchestrator.errors import ConfigError
from orchestrator.run import Run

GOLDEN = Path(__file__).parents[1] / "golden" / "sbatch"
DATA = (
    "data.folder=/data/mix",
    "data.sources.books1.shards=[/data/mix/books]",
    "data.sources.webtext2.text=['/web/**/*.txt']",
)
IMAGES = {
    "container-pyxis": ("cluster.slurm.container.image=nvcr.io#nvidia/pytorch:25.09-py3",),
    "container-apptainer": (
        "cluster.slurm.container={image: /images/orch.sif, runtime: apptainer, mounts: ['/scratch:/tmp:rw', /etc/ssl]}",
    ),
}


def script(*overrides, root="/runs"):
    experiment = compose("gpt3-6.7b", ["cluster.launcher=slurm", "cluster.slurm.cpus_per_task=12", *DATA, *overrides])
    experiment = experiment.experiment
    folder = Path(root) / "gpt3-6.7b" / "pretrain"
    run = Run(folder=folder, experiment="gpt3-6.7b", stage="pretrain", index=1, key="k")
    return _slurm_script.sbatch_text(
        run, experiment, folder=folder / "submitit" / "1", base={"PATH": "/bin"}, python="/venv/bin/python"
    )


def words(text):
    """The words of the line that starts the ranks, as bash reads them."""
    line = next(line for line in text.splitlines() if "-m submitit.core._submit" in line)
    return shlex.split(line)


@pytest.mark.parametrize("name", list(IMAGES))
def test_the_script_is_as_it_was(name):
    text, file = script(*IMAGES[name]), GOLDEN / f"{name}.txt"
    if os.environ.get("ORCH_UPDATE_GOLDEN") == "1":
        file.write_text(text)
    assert file.exists(), f"no {file}: look at what ORCH_UPDATE_GOLDEN=1 writes, and commit it"
    assert text == file.read_text()
    assert subprocess.run(["/bin/bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_pyxis_mounts_what_the_ranks_touch_and_carries_what_the_user_set():
    said = words(script(*IMAGES["container-pyxis"], "cluster.slurm.environment.NCCL_DEBUG=INFO"))
    (mounts,) = [w.partition("=")[2] for w in said if w.startswith("--container-mounts=")]
    assert mounts.split(",") == ["/data/mix:/data/mix", "/runs:/runs", "/web:/web"]
    (carried,) = [w.partition("=")[2] for w in said if w.startswith("--container-env=")]
    assert {"PYTHONPATH", "OMP_NUM_THREADS", "NCCL_DEBUG"} <= set(carried.split(","))
    assert "--container-workdir=/runs/gpt3-6.7b/pretrain" in said
    assert said[said.index("submitit.core._submit") - 3] == "python3", "the image's own"


def test_apptainer_stands_around_the_ranks_command():
    said = words(script(*IMAGES["container-apptainer"]))
    at = said.index("apptainer")
    assert said[at : at + 4] == ["apptainer", "exec", "--nv", "--no-home"]
    assert said[said.index("--bind") + 1].endswith(",/scratch:/tmp:rw,/etc/ssl:/etc/ssl")
    assert said[said.index("/images/orch.sif") + 1 :][:4] == ["python3", "-u", "-m", "submitit.core._submit"]
    assert "--nv" not in words(script(*IMAGES["container-apptainer"], "cluster.gpu=cpu"))


def test_no_name_is_a_command():
    """Folders and images of any name reach the runtime as they are."""
    evil = "/runs/$(touch hacked); 'a' b"
    for runtime in ("pyxis", "apptainer"):
        image = "cluster.slurm.container={image: '/i/$HOME `id`.sif'}"
        said = words(script(image, f"cluster.slurm.container.runtime={runtime}", root=evil))
        assert any(f"{evil}:{evil}" in word for word in said)
        assert any(word.endswith("/i/$HOME `id`.sif") for word in said)


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("{image: x, mount: [/a]}", "no key `cluster.slurm.container.mount`", "did you mean `mounts`?"),
        ("{image: x, runtime: docker}", "`cluster.slurm.container.runtime` must be one of `pyxis`, `apptainer`", ""),
        ("{image: x, mounts: ['/a:/b:/c:ro']}", "has `/a:/b:/c:ro`, which is no mount", "`/here:/there:ro`"),
        ("{image: x, mounts: ['a']}", "has `a`, which is no mount", "whole paths"),
        ("{image: x, mounts: ['/a:/b:ro,/etc:/etc']}", "which is no mount", "whole paths"),
        ("{image: '--writable'}", "`--writable`, which is no image", ""),
    ],
)
def test_what_cannot_be_is_refused(override, message, hint):
    with pytest.raises(ConfigError) as refused:
        script(f"cluster.slurm.container={override}")
    assert message in str(refused.value) and hint in refused.value.hint


def test_a_folder_that_cannot_be_mounted_is_refused():
    with pytest.raises(ConfigError, match="cannot be mounted"):
        script(*IMAGES["container-pyxis"], root="/runs/a,b")
