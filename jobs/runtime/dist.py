"""The process group of a job: started once, by a file of the run folder or by torchrun's address.

A rendezvous through a file needs no free port and cannot meet a stranger's job; it serves one machine.
Several machines set ``MASTER_ADDR`` and ``MASTER_PORT``. Every function here is collective.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jobs.runtime.job import Ranks
from jobs.runtime.mesh import peers, place

if TYPE_CHECKING:
    import torch

    from jobs.nn.parallel import TensorGroup
    from orchestrator.spec import ParallelPlan

T = TypeVar("T")


def start(ranks: Ranks, rendezvous: Path | None = None) -> torch.device:
    """Join the process group, unless this process has; return the device of this rank.

    gloo carries CPU tensors; NCCL, GPU tensors where there are GPUs. ``rendezvous`` is a file that does
    not exist yet, the same for all ranks; without one, and without ``MASTER_ADDR``, there is one rank.
    """
    import torch
    import torch.distributed as td

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if td.is_initialized():
        return device
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if "MASTER_ADDR" in os.environ:
        td.init_process_group(backend, rank=ranks.rank, world_size=ranks.world)
    elif rendezvous is not None:
        td.init_process_group(backend, f"file://{rendezvous}", rank=ranks.rank, world_size=ranks.world)
    else:
        assert ranks.world == 1, "several ranks need a rendezvous"
        td.init_process_group(backend, store=td.HashStore(), rank=0, world_size=1)
    return device


def group(ranks: Ranks, parallel: ParallelPlan, *axes: str) -> Any:
    """The process group of the ranks that differ from this one along ``axes`` (fields of Place) only."""
    import torch.distributed as td

    mine = None
    for members in peers(ranks.world, parallel, *axes):  # every rank takes part in making every group
        made = td.new_group(members)
        mine = made if ranks.rank in members else mine
    return mine


def tensor_group(ranks: Ranks, parallel: ParallelPlan) -> TensorGroup | None:
    """The ranks that share each layer with this one; None where none does."""
    from jobs.nn.parallel import TensorGroup

    if parallel.tensor == 1:
        return None
    made = group(ranks, parallel, "tensor")
    return TensorGroup(group=made, rank=ranks.rank % parallel.tensor, size=parallel.tensor, sequence=parallel.sequence)


def token_group(ranks: Ranks, parallel: ParallelPlan) -> TensorGroup | None:
    """The ranks that share each row of tokens with this one; None where none does."""
    from jobs.nn.parallel import TensorGroup

    if parallel.ulysses == 1:
        return None
    made = group(ranks, parallel, "ulysses")
    index = place(ranks.rank, ranks.world, parallel).ulysses
    return TensorGroup(group=made, rank=index, size=parallel.ulysses, sequence=True)


def seed(value: int, ranks: Ranks, parallel: ParallelPlan) -> None:
    """Seed torch's random numbers, of which training takes dropout only.

    Tensor ranks begin alike: they hold the same activations and must drop the same of them; where they hold
    other ones, ``jobs.nn.parallel.apart`` sees to it. Any other two ranks differ.
    """
    import torch

    torch.manual_seed(value * 100_003 + ranks.rank // parallel.tensor)


def mean_and_any(value: float, flag: bool) -> tuple[float, bool]:
    """Mean of ``value`` over the ranks, and whether ``flag`` is set on any of them: one collective for both."""
    import torch
    import torch.distributed as td

    t = torch.tensor([value, float(flag)], dtype=torch.float64)
    td.all_reduce(t)
    return t[0].item() / td.get_world_size(), t[1].item() > 0


def total(value: float) -> float:
    """Sum of ``value`` over the ranks, in fp64, on the CPU."""
    import torch
    import torch.distributed as td

    t = torch.tensor(value, dtype=torch.float64)
    td.all_reduce(t)
    return t.item()


def totals(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over the ranks, each by its name; all ranks have the same names in the same order."""
    import torch
    import torch.distributed as td

    t = torch.tensor([*values.values()], dtype=torch.float64)
    td.all_reduce(t)
    return dict(zip(values, t.tolist(), strict=True))


def broadcast(value: object) -> object:
    """Rank 0's ``value``, on every rank. Python objects: for small things, now and then."""
    import torch.distributed as td

    box = [value]
    td.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: object) -> list:
    """Every rank's ``value``, by rank, on every rank."""
    import torch.distributed as td

    box: list = [None] * td.get_world_size()
    td.all_gather_object(box, value)
    return box


def to_first(value: object) -> list | None:
    """Every rank's ``value``, by rank, on rank 0; None on the others."""
    import torch.distributed as td

    box: list | None = [None] * td.get_world_size() if td.get_rank() == 0 else None
    td.gather_object(value, box)
    return box


def from_first(values: list | None) -> Any:
    """This rank's of the ``values``, one for each rank, that rank 0 has."""
    import torch.distributed as td

    box: list = [None]
    td.scatter_object_list(box, values)
    return box[0]


class RanksFailed(Exception):
    """A disk was full, memory ran out: what was tried together failed, and every rank knows."""


class PeerBug(Exception):
    """Another rank raised what no disk and no memory is to blame for."""


def together(do: Callable[[], T]) -> T:
    """``do()``, unless it raises on any rank: then every rank raises, and none waits for one that has left.

    Raises:
        RanksFailed: on every rank, where it was the machine's fault.
        PeerBug: where it was a bug on another rank; that rank raises what it was.
    """
    import torch.distributed as td
    from safetensors import SafetensorError

    value, error = None, None
    try:
        value = do()
    except Exception as e:  # noqa: BLE001 - the others must hear of it
        error = e
    bug = not isinstance(error, OSError | MemoryError | RuntimeError | SafetensorError | RanksFailed)
    again = isinstance(error, RanksFailed | PeerBug)
    words = str(error) if again else f"rank {td.get_rank()}: {type(error).__name__}: {error}"
    said = [s for s in gather((bug, words) if error else None) if s]
    if error and bug:
        raise error
    if said:
        kind = PeerBug if any(bug for bug, _ in said) else RanksFailed
        raise kind("; ".join(dict.fromkeys(words for _, words in said))) from error
    return value  # type: ignore[return-value]


def barrier() -> None:
    """Wait for every rank; on the CPU, so that no GPU work is waited for."""
    total(0.0)


def close() -> None:
    """Leave the process group."""
    import torch.distributed as td

    if td.is_initialized():
        td.destroy_process_group()
