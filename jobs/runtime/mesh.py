"""Where a rank stands: world = pipeline x data x ulysses x tensor, pipeline outermost, tensor innermost.

Tensor and ulysses peers exchange activations several times a layer, so they are neighbours inside a node; pipeline
peers exchange the least, so they are the farthest apart (Narayanan et al. 2021, arXiv:2104.04473, section
3; the order of DeepSpeed's PipeModelDataParallelTopology). No torch here: a rehearsal asks too.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.errors import TrainingError
from orchestrator.spec import ParallelPlan


@dataclass(frozen=True, kw_only=True)
class Place:
    """Coordinates of one rank, and the size of each axis."""

    data: int
    pipeline: int
    ulysses: int
    tensor: int
    data_size: int
    pipeline_size: int
    ulysses_size: int
    tensor_size: int


def place(rank: int, world: int, parallel: ParallelPlan) -> Place:
    """Coordinates of ``rank`` among ``world`` under ``parallel``.

    Raises:
        TrainingError: the ranks of a replica do not divide the world.
    """
    data_size, left = divmod(world, parallel.replica)
    if left or not data_size:
        raise TrainingError(
            f"{world} ranks do not split into {parallel.replica_words}", hint="start as many ranks as the plan has"
        )
    rest, tensor = divmod(rank, parallel.tensor)
    rest, ulysses = divmod(rest, parallel.ulysses)
    pipeline, data = divmod(rest, data_size)
    return Place(
        data=data,
        pipeline=pipeline,
        ulysses=ulysses,
        tensor=tensor,
        data_size=data_size,
        pipeline_size=parallel.pipeline,
        ulysses_size=parallel.ulysses,
        tensor_size=parallel.tensor,
    )


def peers(world: int, parallel: ParallelPlan, *axes: str) -> list[list[int]]:
    """All ranks in groups that differ along ``axes`` (fields of Place) only, each in the order of its ranks."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(world):
        at = place(rank, world, parallel)
        key = tuple(getattr(at, axis) for axis in ("pipeline", "data", "ulysses", "tensor") if axis not in axes)
        found.setdefault(key, []).append(rank)
    return list(found.values())
