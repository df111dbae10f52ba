"""Checkpoints of whole tensors, which one process writes: files of a bounded size, index, commit. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.runtime import checkpoint
from jobs.runtime.pieces import FORMAT, INDEX
from orchestrator.run import write_atomic

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


def commit(folder: Path, files: Mapping[str, Sequence[Part]], state: dict[str, Any]) -> None:
    """Make ``folder`` a checkpoint, once each of ``files`` holds its parts in fp32."""
    tensors: dict[str, Any] = {}
    for i, parts in enumerate(files.values()):
        for slot, name, shape in parts:
            if slot == "weight":
                tensors[name] = {"shape": shape, "cut": None, "pieces": {}}
            tensors[name]["pieces"][slot] = [[i, 0, 0, math.prod(shape)]]
    write_atomic(folder / INDEX, json.dumps({"format": FORMAT, "files": list(files), "tensors": tensors}))
    checkpoint.commit(folder, state)
