"""The ranks in a container image: options of srun for pyxis, or a command around the rank's for Apptainer.

Only the ranks are inside. The batch script stays outside, and with it everything that talks to Slurm.
Options: pyxis `args.c` (github.com/NVIDIA/pyxis, 0.21), `man apptainer-exec` (1.3).
"""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from orchestrator.errors import ConfigError
from orchestrator.inputs import BUILTIN
from orchestrator.run import Run
from orchestrator.spec import DataSpec

WILD = frozenset("*?[")


@dataclass(frozen=True, kw_only=True)
class Container:
    """What `cluster.slurm.container` may say."""

    image: str | None = None  # a file that all nodes see, or a registry's name for it; None: no container
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: list[str] = field(
        default_factory=list
    )  # `/here`, `/here:/there` or `/here:/there:ro`, besides runs and data
    python: str = "python3"  # the image's interpreter; it has orch's packages


def check(container: Container) -> None:
    """Raise ConfigError for mounts that the runtime would read otherwise than they are meant."""
    for mount in container.mounts:
        parts = mount.split(":")
        known = len(parts) < 3 or parts[2:] in (["ro"], ["rw"])
        if not known or "," in mount or not all(part.startswith("/") for part in parts[:2]):
            raise ConfigError(
                f"`cluster.slurm.container.mounts` has `{mount}`, which is no mount",
                hint="`/here`, `/here:/there` or `/here:/there:ro`, whole paths without `:` and `,`, one for each",
            )
    image = container.image
    if image is not None and (not image or image[0] == "-" or not image.isprintable()):
        raise ConfigError(f"`cluster.slurm.container.image` is `{image}`, which is no image", hint="a path or a name")


def folders(run: Run, data: DataSpec) -> list[str]:
    """What a job touches: the runs folder, the data's, and those of the files it is made from; none inside another."""
    files = [p for source in data.sources.values() for p in (*source.text, *source.shards, *source.val_shards)]
    files = [_fixed(p) for p in (*files, *([data.tokenizer] if data.tokenizer else [])) if not p.startswith(BUILTIN)]
    found = {str(run.root), data.folder, *(str(PurePosixPath(p).parent) for p in files)}
    return [f for f in sorted(found) if not any(Path(f).is_relative_to(g) for g in found if f != g)]


def mounts(container: Container, run: Run, data: DataSpec) -> list[str]:
    """All mounts, `here:there[:flags]`: what the job touches, and the user's.

    Raises:
        ConfigError: a folder has `:` or `,` in its name, by which the runtimes split.
    """
    touched = folders(run, data)
    for folder in touched:
        if {":", ","} & set(folder):
            raise ConfigError(
                f"`{folder}` cannot be mounted into a container: `:` and `,` separate mounts", hint="rename the folder"
            )
    return [f"{f}:{f}" for f in touched] + [m if ":" in m else f"{m}:{m}" for m in container.mounts]


def srun_options(container: Container, run: Run, data: DataSpec, environment: Iterable[str]) -> list[str]:
    """What pyxis adds to srun. ``environment``: variables that win over the image's own of that name."""
    if container.image is None or container.runtime != "pyxis":
        return []
    return [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(mounts(container, run, data))}",
        f"--container-workdir={run.folder}",
        "--no-container-mount-home",
        f"--container-env={','.join(environment)}",
    ]


def interpreter(container: Container, run: Run, data: DataSpec, python: str, *, on_gpu: bool) -> str:
    """The beginning of a rank's command line: ``python`` without a container, else the image's."""
    if container.image is None:
        return shlex.quote(python)
    if container.runtime == "pyxis":
        return shlex.quote(container.python)
    bind = ",".join(mounts(container, run, data))
    words = ["apptainer", "exec", *(["--nv"] if on_gpu else []), "--no-home", "--bind", bind]
    return shlex.join([*words, "--pwd", str(run.folder), container.image, container.python])


def preparation(container: Container, data: DataSpec) -> list[str]:
    """Lines of bash before srun: a folder must be there to be mounted."""
    return [f"mkdir -p {shlex.quote(data.folder)}"] if container.image is not None else []


def _fixed(path: str) -> str:
    """``path`` up to its first wildcard."""
    parts = PurePosixPath(path).parts
    fixed = next((i for i, part in enumerate(parts) if WILD & set(part)), None)
    return path if fixed is None else str(PurePosixPath(*parts[:fixed], "_"))
