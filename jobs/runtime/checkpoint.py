"""Checkpoint folders: write, commit, find, retire. MANIFEST.json is written last and removed first.

A folder counts as a checkpoint once its manifest lists every file with size and SHA-256, as OLMo-core
commits with a metadata file. Whatever a kill leaves behind has no manifest, and is passed over. Every
function here but ``committed``, ``commit`` and ``damage`` is collective.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.runtime import dist
from jobs.runtime.job import Ranks
from orchestrator.errors import CheckpointError
from orchestrator.run import file_sha256, read_json, write_json

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
STATE = "state.json"
NAME = re.compile(r"step-(\d{7,})")
REPLACED = "a newer attempt of this run has taken over"


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies below ``root``."""
    return root / f"step-{step:07d}"


def committed(root: Path) -> list[int]:
    """Steps that have a manifest, newest first. Says nothing about damage."""
    found = (NAME.fullmatch(p.name) for p in root.glob("step-*") if (p / MANIFEST).exists())
    return sorted((int(m[1]) for m in found if m), reverse=True)


def save(
    root: Path,
    step: int,
    state: dict[str, Any],
    write: Callable[[Path], Sequence[str]],
    *,
    ranks: Ranks,
    expected_bytes: int,
    may_commit: Callable[[], bool],
) -> bool:
    """Write and commit one checkpoint; where any rank cannot, leave nothing behind and return False.

    A bug is not taken for a full disk: where a rank raises one, all ranks raise.

    Args:
        write: writes this rank's files into the folder it is given, and returns their names; collective.
        expected_bytes: size of the whole checkpoint, compared with the free space before a byte is written.
        may_commit: asked on rank 0, before anything is touched and right before the commit; False where this
            attempt has been replaced.
    """
    folder, first = folder_of(root, step), ranks.rank == 0
    problem = dist.together(lambda: _prepare(folder, expected_bytes, may_commit) if first else "")
    if problem := str(dist.broadcast(problem)):
        log.warning("checkpoint of step %d not saved: %s", step, problem)
        return False

    def finish() -> str:
        if not may_commit():
            return REPLACED
        _commit(folder, state, {name: entry for files in written for name, entry in files.items()})
        return ""

    try:
        written = dist.gather(dist.together(lambda: _hash(folder, write(folder))))
        problem = str(dist.broadcast(dist.together(lambda: finish() if first else "")))
    except dist.RanksFailed as e:
        problem = str(e)
        if first:  # where it was replaced, the folder may be the newer attempt's by now
            shutil.rmtree(folder, ignore_errors=True)
    if problem:
        log.warning("checkpoint of step %d not saved: %s", step, problem)
    return not problem


def commit(folder: Path, state: dict[str, Any], hashed: Mapping[str, list] | None = None) -> None:
    """Commit what this process alone has written into ``folder``; size and SHA-256 of some files may be known."""
    known = dict(hashed or {})
    _commit(folder, state, known | _hash(folder, [name for name in _names(folder) if name not in known]))


def retire(root: Path, keep: int, *, saved: int, ranks: Ranks) -> None:
    """Remove what is older than the ``keep`` newest checkpoints, and what older attempts left half-written.

    The newest is the step just ``saved``. What lies beyond it was found damaged and passed over: it must not
    count, or a good one would go in its place; it is replaced when training gets there.
    """
    if ranks.rank != 0:
        return
    keeping = {folder_of(root, s) for s in [s for s in committed(root) if s <= saved][:keep]}
    for folder in root.glob("step-*"):
        match = NAME.fullmatch(folder.name)
        if match and folder not in keeping and int(match[1]) <= saved:
            try:
                (folder / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(folder)
            except OSError as e:
                log.warning("old checkpoint `%s` stays: %s", folder, e)


def newest(root: Path, *, ranks: Ranks) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose every file is whole, with its ``state``; None where there is none at all.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    steps: list[int] = dist.broadcast(committed(root))  # type: ignore[assignment]
    for step in steps:
        folder = folder_of(root, step)
        problems = [d for d in dist.gather(damage(folder, ranks)) if d]
        if not problems:
            return folder, read_json(folder / STATE)
        log.warning("checkpoint `%s` is damaged and is passed over: %s", folder, "; ".join(problems))
    if steps:
        raise CheckpointError(
            f"all {len(steps)} checkpoints in `{root}` are damaged",
            hint="restore one from a backup, or remove the folder `checkpoints` to start from step 0",
        )
    return None


def identity_of(folder: Path) -> dict[str, Any]:
    """What the checkpoint in ``folder``, or around it, says it is of. Raises CheckpointError where that is broken."""
    file = folder / STATE if (folder / STATE).exists() else folder.parent / STATE
    try:
        return dict(read_json(file, {}).get("identity", {}))
    except (ValueError, TypeError, AttributeError) as e:
        raise CheckpointError(
            f"`{file}` cannot be read: {e}",
            hint="restore it, or remove this folder: the one before it counts",
        ) from e


def check_identity(folder: Path, saved: dict[str, Any], mine: dict[str, Any], *, free: tuple[str, ...] = ()) -> None:
    """Refuse a checkpoint of another model, tokenizer or data.

    Args:
        saved, mine: ``identity`` of the checkpoint and of this run: nested dicts of plain values.
        free: dotted keys that may differ.

    Raises:
        CheckpointError: names every key that differs, with both values.
    """
    a, b = _flat(saved), _flat(mine)
    differ = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k) and k not in free]
    if differ:
        lines = "; ".join(f"`{k}` is {a.get(k)!r} there and {b.get(k)!r} here" for k in differ)
        raise CheckpointError(
            f"checkpoint `{folder}` does not belong to this run: {lines}",
            hint="give this run another `name`, or use the model, tokenizer and data the checkpoint was saved with",
        )


def _prepare(folder: Path, expected_bytes: int, may_commit: Callable[[], bool]) -> str:
    """Make an empty folder; say why not where the disk is too full or refuses, or the folder is another's."""
    try:
        if not may_commit():
            return REPLACED
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        if free < expected_bytes:
            folder.rmdir()
            return f"it takes {expected_bytes / 1e9:.3f} GB and `{folder.parent}` has {free / 1e9:.3f} GB free"
    except OSError as e:
        return f"rank 0: {e}"
    return ""


def _names(folder: Path) -> list[str]:
    """Every file below ``folder``, relative to it."""
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]


def _hash(folder: Path, names: Sequence[str]) -> dict[str, list]:
    """Size and SHA-256 of the files ``names``, each seen on disk first."""
    found = {}
    for name in names:
        path = folder / name
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        found[name] = [path.stat().st_size, file_sha256(path)]
    return found


def _commit(folder: Path, state: dict[str, Any], files: dict[str, list]) -> None:
    write_json(folder / STATE, state)
    files[STATE] = [(folder / STATE).stat().st_size, file_sha256(folder / STATE)]
    write_json(folder / MANIFEST, {"files": dict(sorted(files.items()))})


def damage(folder: Path, ranks: Ranks, *, hashes: bool = True) -> str:
    """What is wrong with this rank's share of the files that the manifest of ``folder`` lists.

    Without ``hashes``, what takes no reading: whether they are there, and their sizes.
    """
    try:
        listed = read_json(folder / MANIFEST)["files"]
        for name, (size, digest) in list(listed.items())[ranks.rank :: ranks.world]:
            path = folder / name
            if not path.is_file():
                return f"`{name}` is missing"
            if path.stat().st_size != size:
                return f"`{name}` has {path.stat().st_size} bytes, not {size}"
            if hashes and file_sha256(path) != digest:
                return f"`{name}` does not match its SHA-256"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"`{MANIFEST}` cannot be read: {e}"
    return ""


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for k, v in value.items():
        flat |= _flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return flat
