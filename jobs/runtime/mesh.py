"""Where a rank stands: world = pipeline x data x tensor, pipeline outermost, tensor innermost.

Tensor peers exchange activations several times a layer, so they are neighbours inside a node; pipeline
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
    tensor: int
    data_size: int
    pipeline_size: int
    tensor_size: int


def place(rank: int, world: int, parallel: ParallelPlan) -> Place:
    """Coordinates of ``rank`` among ``world`` under ``parallel``.

    Raises:
        TrainingError: tensor x pipeline does not divide the world.
    """
    model = parallel.tensor * parallel.pipeline
    data_size, left = divmod(world, model)
    if left or not data_size:
        raise TrainingError(
            f"{world} ranks do not split into tensor {parallel.tensor} x pipeline {parallel.pipeline} = {model}",
            hint="start as many ranks as the plan has",
        )
    rest, tensor = divmod(rank, parallel.tensor)
    pipeline, data = divmod(rest, data_size)
    return Place(
        data=data,
        pipeline=pipeline,
        tensor=tensor,
        data_size=data_size,
        pipeline_size=parallel.pipeline,
        tensor_size=parallel.tensor,
    )


def peers(world: int, parallel: ParallelPlan, *axes: str) -> list[list[int]]:
    """All ranks in groups that differ along ``axes`` (data, pipeline, tensor) only, each in the order of its ranks."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(world):
        at = place(rank, world, parallel)
        key = tuple(getattr(at, axis) for axis in ("pipeline", "data", "tensor") if axis not in axes)
        found.setdefault(key, []).append(rank)
    return list(found.values())
