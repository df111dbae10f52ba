"""Checkpoints of whole tensors, which one process writes: files of a bounded size, index, commit. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.runtime import checkpoint
from jobs.runtime.pieces import FORMAT, INDEX
from orchestrator.run import write_atomic

if TYPE_CHECKING:
    import numpy as np

FILE_BYTES = 5_000_000_000  # no file is larger, unless a tensor is
ALONE = {"tensor": 1, "pipeline": 1, "interleave": 1, "sequence": False, "zero": 0, "offload": "none", "world": 1}
Part = tuple[str, str, tuple[int, ...]]  # slot, name, shape


def grouped(kind: str, parts: Sequence[Part], file_bytes: int = FILE_BYTES) -> dict[str, list[Part]]:
    """``parts`` in order, in fp32 over files of at most ``file_bytes``, by the files' names."""
    groups: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        needs = 4 * math.prod(part[2])
        if groups[-1] and size + needs > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += needs
    return {f"{kind}-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def key(slot: str, name: str) -> str:
    """What a part is called in its file."""
    return name if slot == "weight" else f"{slot}/{name}"


def write(path: Path, parts: Sequence[Part], read: Callable[[Part], np.ndarray], wrote: Callable[[int], None]) -> list:
    """Write what ``read`` makes of ``parts`` as one file, one part in memory at a time; return its size and SHA-256.

    The format: https://github.com/huggingface/safetensors#format. The digest is taken on the way.

    Args:
        wrote: hears of the bytes of each part.
    """
    ends = list(accumulate(4 * math.prod(shape) for *_, shape in parts))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for (slot, name, shape), (start, end) in zip(parts, pairwise([0, *ends]), strict=True):
        header[key(slot, name)] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as f:
        for chunk in (len(text).to_bytes(8, "little"), text):
            f.write(chunk)
            digest.update(chunk)
        for part in parts:
            data = read(part).astype("<f4", copy=False).data
            f.write(data)
            digest.update(data)
            wrote(data.nbytes)
        f.flush()
        os.fsync(f.fileno())
        return [f.tell(), digest.hexdigest()]


def commit(
    folder: Path, files: Mapping[str, Sequence[Part]], state: dict[str, Any], hashed: Mapping[str, list] | None = None
) -> None:
    """Make ``folder`` a checkpoint, once each of ``files`` holds its parts in fp32; ``hashed``: what ``write`` said."""
    write_index(folder, files)
    checkpoint.commit(folder, state, hashed)


def write_index(folder: Path, files: Mapping[str, Sequence[Part]]) -> None:
    """Say in ``folder`` where each part is, once each of ``files`` holds its parts in fp32."""
    tensors: dict[str, Any] = {}
    for i, parts in enumerate(files.values()):
        for slot, name, shape in parts:
            if slot == "weight":
                tensors[name] = {"shape": shape, "cut": None, "pieces": {}}
            tensors[name]["pieces"][slot] = [[i, 0, 0, math.prod(shape)]]
    write_atomic(folder / INDEX, json.dumps({"format": FORMAT, "files": list(files), "tensors": tensors}))
