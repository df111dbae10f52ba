"""How a tensor lies over tensor ranks: for the layers that are cut, and for the checkpoints that outlive the cut.

No torch at import: a login node reads checkpoints too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What a tensor rank holds of a whole tensor.

    Along ``dim`` the whole tensor is blocks of ``parts`` rows, one after the other (q, k and v, or gate and
    value). Each block is cut by itself into ``count`` slices, equal but for one row; rank ``index`` holds its
    slice of every block.
    """

    dim: int
    parts: tuple[int, ...]
    index: int
    count: int

    def spans(self, index: int | None = None) -> list[tuple[int, int]]:
        """Start and stop, along ``dim`` of the whole tensor, of what ``index`` (None: this rank) holds, in order."""
        i = self.index if index is None else index
        found, at = [], 0
        for part in self.parts:
            found.append((at + part * i // self.count, at + part * (i + 1) // self.count))
            at += part
        return found

    def width(self, index: int | None = None) -> int:
        """How many rows along ``dim`` a rank holds."""
        return sum(stop - start for start, stop in self.spans(index))

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the whole tensor, from the shape of a slice."""
        return (*shape[: self.dim], sum(self.parts), *shape[self.dim + 1 :])

    def local_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of this rank's slice, from the shape of the whole tensor."""
        return (*shape[: self.dim], self.width(), *shape[self.dim + 1 :])

    def take(self, whole: Tensor) -> Tensor:
        """This rank's slice of a whole tensor, a copy."""
        import torch

        return torch.cat([whole.narrow(self.dim, a, b - a) for a, b in self.spans()], self.dim)

    def join(self, slices: Sequence[Tensor]) -> Tensor:
        """The whole tensor, from the slices of all ranks in order."""
        import torch

        split = [t.split([stop - start for start, stop in self.spans(i)], self.dim) for i, t in enumerate(slices)]
        return torch.cat([t for block in zip(*split, strict=True) for t in block], self.dim)
