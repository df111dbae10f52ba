"""One checkpoint format for every engine and layout: pieces of the model's tensors, by the tensors' own names.

An engine says which part of which tensor each rank holds (`Piece`). ``save`` writes every element once, shared out
over the ranks that hold it; ``load`` fills the pieces of any other engine, layout or number of ranks by the
intersection of ranges, one piece at a time. The idea is that of universal checkpoints (Lian et al. 2024,
arXiv:2406.18820), without their conversion: what is saved is universal.

    pieces-00003-of-00016.safetensors   what rank 3 wrote: fp32, flat; a whole tensor in its own shape
    pieces.json                         where each element lies: shape, cut, and for each slot the pieces

No torch in here but through the tensors handed in, so a login node can read checkpoints too.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jobs.nn.cut import Cut
from jobs.runtime import dist
from orchestrator.errors import CheckpointError
from orchestrator.run import write_atomic

if TYPE_CHECKING:
    import numpy as np
    import torch

    from jobs.engines import Engine
    from jobs.runtime.job import Ranks

INDEX = "pieces.json"
FORMAT = 1
FILE = re.compile(r"[a-z]+-\d+-of-\d+\.safetensors")  # of an index that may be a stranger's: no other folder's
GRAIN = 2**18  # elements below which replicas do not share the writing of a tensor
Slot = Literal["weight", "exp_avg", "exp_avg_sq", "step"]  # of AdamW (arXiv:1711.05101); step is a tensor of one


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one rank holds of one tensor: elements from ``start`` of its flattened local tensor of ``shape``."""

    name: str  # of the parameter in the whole model
    slot: Slot
    shape: tuple[int, ...]  # of this tensor rank's tensor, before data ranks share it out
    data: torch.Tensor  # fp32, one dim, contiguous; ``load`` writes into it
    start: int = 0
    cut: Cut | None = None  # None: the local tensor is the whole


class Extent(NamedTuple):
    """A Piece without its data: what the ranks tell each other."""

    name: str
    slot: str
    shape: tuple[int, ...]
    cut: Cut | None
    start: int
    stop: int


class Share(NamedTuple):
    """What one rank writes: elements ``start`` to ``stop`` of what tensor rank ``peer`` has of a tensor."""

    name: str
    slot: str
    peer: int
    start: int
    stop: int


class Box(NamedTuple):
    """A rectangle of a whole tensor taken as (rows, columns), and where it lies in a flat piece."""

    row: int
    rows: int  # behind the last
    col: int
    cols: int
    offset: int  # of the first element in the piece
    stride: int  # elements from one row to the next there


def save(folder: Path, engine: Engine, ranks: Ranks) -> None:
    """Write this rank's share of what ``engine`` holds into ``folder``. Collective."""
    from safetensors.numpy import save_file

    pieces = engine.pieces()
    everyone: list[list[Extent]] = dist.gather([_extent(p) for p in pieces])
    shares = share_out(everyone)
    held: dict[tuple[str, str, int], list[Piece]] = defaultdict(list)
    for p in pieces:
        held[p.name, p.slot, _peer(p.cut)].append(p)
    arrays = {}
    for share in shares[ranks.rank]:
        candidates = held[share.name, share.slot, share.peer]
        piece = next(p for p in candidates if p.start <= share.start and share.stop <= p.start + p.data.numel())
        array = _array(piece.data[share.start - piece.start : share.stop - piece.start])
        whole = piece.cut is None and share.stop - share.start == math.prod(piece.shape)
        arrays[_key(share, whole=whole)] = array.reshape(piece.shape) if whole else array
    save_file(arrays, folder / _file(ranks.rank, len(shares)))
    if ranks.rank == 0:
        write_atomic(folder / INDEX, json.dumps(_index_of(everyone, shares)))


def load(folder: Path, engine: Engine, *, weights_only: bool = False) -> None:
    """Fill all that ``engine`` holds from ``folder``; with ``weights_only``, its optimizer starts anew. Collective.

    With ``weights_only``, what the checkpoint lacks of the parameters that ``module.new`` names stays as it is: a
    reward model begins with the weights of a language model, which has no head for scores.

    Raises:
        CheckpointError: a tensor, or a part of one, is not in there, or has another shape.
    """
    with Store(folder) as store:
        new: tuple[str, ...] = getattr(engine.module, "new", ()) if weights_only else ()
        for piece in engine.pieces():
            if weights_only and piece.slot != "weight":
                piece.data.detach().zero_()
            elif piece.name.startswith(new) and piece.name not in store:
                continue
            else:
                store.fill(piece)
    engine.filled()


class Store:
    """The pieces in a folder, read from any layout."""

    def __init__(self, folder: Path) -> None:
        try:
            self.index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"`{folder}` holds no `{INDEX}`", hint="only checkpoints that this version of orch wrote can be read"
            ) from None
        if self.index["format"] != FORMAT:
            raise CheckpointError(f"`{folder / INDEX}` is of format {self.index['format']}, this orch reads {FORMAT}")
        if strange := [name for name in self.index["files"] if not FILE.fullmatch(name)]:
            raise CheckpointError(
                f"`{folder / INDEX}` names `{strange[0]}`, which is no file of a checkpoint",
                hint="it was not written by orch; do not use it",
            )
        self.folder, self.open, self.files = folder, ExitStack(), dict[str, Any]()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.files.clear()
        self.open.close()

    def __contains__(self, name: str) -> bool:
        return name in self.index["tensors"]

    def fill(self, piece: Piece) -> None:
        """Copy into ``piece.data`` what the checkpoint has for it."""
        if piece.data.device.type == "cpu":
            self.read(_extent(piece), _array(piece.data))
            return
        import numpy as np
        import torch

        buffer = np.empty(piece.data.numel(), np.float32)
        self.read(_extent(piece), buffer)
        piece.data.detach().copy_(torch.from_numpy(buffer))

    def read(self, wanted: Extent, into: np.ndarray) -> None:
        """Copy the elements of ``wanted`` into the flat array ``into``."""
        shape, cut, pieces = self._entry(wanted)
        here = wanted.shape if wanted.cut is None else wanted.cut.whole_shape(wanted.shape)
        if tuple(shape) != tuple(here):
            raise CheckpointError(
                f"checkpoint `{self.folder}`: `{wanted.name}` has shape {tuple(shape)} there and {tuple(here)} here"
            )
        found = 0
        for file, peer, start, stop in pieces:
            theirs = Cut(dim=cut[0], parts=tuple(cut[1]), index=peer, count=cut[2]) if cut else None
            share = Share(wanted.name, wanted.slot, peer, start, stop)
            whole = theirs is None and stop - start == math.prod(shape)
            if theirs == wanted.cut:
                found += self._read_range(file, share, wanted, into, whole)
            else:
                found += self._read_boxes(file, share, theirs, wanted, into, whole)
        if found != wanted.stop - wanted.start:
            raise CheckpointError(
                f"checkpoint `{self.folder}` has {found} of the {wanted.stop - wanted.start} elements wanted of "
                f"`{wanted.slot}` of `{wanted.name}`",
                hint="it was not written by all ranks of one job; use the checkpoint before it",
            )

    def _entry(self, wanted: Extent) -> tuple[list[int], list[Any] | None, list[list[int]]]:
        try:
            entry = self.index["tensors"][wanted.name]
            pieces = entry["pieces"][wanted.slot]
        except KeyError:
            raise CheckpointError(
                f"checkpoint `{self.folder}` has no `{wanted.slot}` of `{wanted.name}`",
                hint="it is of another model, or of a run that does not train",
            ) from None
        return ([1], None, pieces) if wanted.slot == "step" else (entry["shape"], entry["cut"], pieces)

    def _read_range(self, file: int, share: Share, wanted: Extent, into: np.ndarray, whole: bool) -> int:
        """The part of ``share`` that is wanted, where both are cut alike."""
        low, high = max(share.start, wanted.start), min(share.stop, wanted.stop)
        if low >= high:
            return 0
        values = self._elements(file, _key(share, whole=whole), low - share.start, high - share.start)
        into[low - wanted.start : high - wanted.start] = values
        return high - low

    def _read_boxes(
        self, file: int, share: Share, cut: Cut | None, wanted: Extent, into: np.ndarray, whole: bool
    ) -> int:
        """The part of ``share`` that is wanted, where it was cut otherwise."""
        found = 0
        shape = wanted.shape if wanted.cut is None else wanted.cut.whole_shape(wanted.shape)
        local = shape if cut is None else cut.local_shape(shape)
        for a in boxes(local, cut, share.start, share.stop):
            for b in boxes(wanted.shape, wanted.cut, wanted.start, wanted.stop):
                row, rows = max(a.row, b.row), min(a.rows, b.rows)
                col, cols = max(a.col, b.col), min(a.cols, b.cols)
                if row >= rows or col >= cols:
                    continue
                size = rows - row, cols - col
                first = a.offset + (row - a.row) * a.stride + col - a.col
                last = first + (size[0] - 1) * a.stride + size[1]
                values = self._elements(file, _key(share, whole=whole), first, last)
                at = b.offset + (row - b.row) * b.stride + col - b.col
                _grid(into[at:], size, b.stride)[...] = _grid(values, size, a.stride)
                found += size[0] * size[1]
        return found

    def _elements(self, file: int, key: str, first: int, last: int) -> np.ndarray:
        """Elements ``first`` to ``last`` of a tensor, flattened; no more is read than the rows they lie in."""
        from safetensors import SafetensorError, safe_open

        name = self.index["files"][file]
        try:
            if name not in self.files:
                self.files[name] = self.open.enter_context(safe_open(self.folder / name, "np"))
            rows = self.files[name].get_slice(key)
            shape = rows.get_shape()
            width = math.prod(shape[1:])
            row = first // width
            values: np.ndarray = rows[row : -(-last // width)].reshape(-1)
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"checkpoint `{self.folder}`: `{key}` in `{name}` cannot be read: {e}") from e
        return values[first - row * width : last - row * width]


def share_out(everyone: Sequence[Sequence[Extent]]) -> list[list[Share]]:
    """What each rank writes, so that every element is written once and the work is even.

    Several ranks may hold the same elements (replicas; a tied embedding at both ends of a pipeline). They share
    them evenly; a small tensor is written by the one that has the least to write so far.
    """
    held: dict[tuple[str, str, int], list[tuple[int, int, int]]] = defaultdict(list)
    for rank, extents in enumerate(everyone):
        for e in extents:
            held[e.name, e.slot, _peer(e.cut)].append((e.start, e.stop, rank))
    shares: list[list[Share]] = [[] for _ in everyone]
    work = [0] * len(everyone)
    for key, holders in held.items():
        edges = sorted({edge for start, stop, _ in holders for edge in (start, stop)})
        over: list[list[int]] = [[] for _ in edges]  # the ranks that hold what lies between an edge and the next
        for start, stop, rank in holders:
            for i in range(bisect_left(edges, start), bisect_left(edges, stop)):
                over[i].append(rank)
        for (start, stop), holding in zip(pairwise(edges), over, strict=False):
            writers = sorted(set(holding), key=lambda rank: (work[rank], rank))[: -(-(stop - start) // GRAIN)]
            marks = [start + (stop - start) * k // len(writers) for k in range(len(writers))]
            for rank, (low, high) in zip(writers, pairwise([*marks, stop]), strict=True):
                shares[rank].append(Share(*key, low, high))
                work[rank] += high - low
    return shares


def boxes(shape: Sequence[int], cut: Cut | None, start: int, stop: int) -> Iterator[Box]:
    """Elements ``start`` to ``stop`` of a flattened local tensor, as rectangles of the whole tensor."""
    if start == stop:
        return
    width = math.prod(shape[1:])
    head, tail = -(-start // width), stop // width  # whole rows lie between these
    pieces = [(head, tail, 0, width)] if head < tail else []
    if start // width == (stop - 1) // width and (start % width or stop % width):
        pieces = [(start // width, start // width + 1, start % width, stop - start // width * width)]
    else:
        pieces += [(head - 1, head, start % width, width)] if start % width else []
        pieces += [(tail, tail + 1, 0, stop % width)] if stop % width else []
    for row, rows, col, cols in pieces:
        for low, high, shift in _sections(cut, 0, shape[0]):
            for left, right, aside in _sections(cut, 1, width):
                r0, r1, c0, c1 = max(row, low), min(rows, high), max(col, left), min(cols, right)
                if r0 < r1 and c0 < c1:
                    yield Box(r0 + shift, r1 + shift, c0 + aside, c1 + aside, r0 * width + c0 - start, width)


def _sections(cut: Cut | None, dim: int, size: int) -> Iterable[tuple[int, int, int]]:
    """Runs of a local tensor along ``dim``: from, to, and how far each is shifted in the whole."""
    if cut is None or cut.dim != dim:
        return [(0, size, 0)]
    spans = cut.spans()
    marks = accumulate((stop - start for start, stop in spans), initial=0)
    return [(at, to, start - at) for (at, to), (start, _) in zip(pairwise(marks), spans, strict=True)]


def _index_of(everyone: Sequence[Sequence[Extent]], shares: Sequence[Sequence[Share]]) -> dict[str, Any]:
    """The content of ``pieces.json``."""
    tensors: dict[str, Any] = {}
    for extents in everyone:
        for e in extents:
            if e.slot == "weight":
                cut = e.cut and [e.cut.dim, e.cut.parts, e.cut.count]
                shape = e.shape if e.cut is None else e.cut.whole_shape(e.shape)
                tensors.setdefault(e.name, {"shape": shape, "cut": cut, "pieces": {}})
    for file, mine in enumerate(shares):
        for share in mine:
            pieces = tensors[share.name]["pieces"].setdefault(share.slot, [])
            pieces.append([file, share.peer, share.start, share.stop])
    files = [_file(rank, len(shares)) for rank in range(len(shares))]
    return {"format": FORMAT, "files": files, "tensors": tensors}


def _extent(piece: Piece) -> Extent:
    return Extent(piece.name, piece.slot, tuple(piece.shape), piece.cut, piece.start, piece.start + piece.data.numel())


def _file(rank: int, world: int) -> str:
    return f"pieces-{rank:05d}-of-{world:05d}.safetensors"


def _key(share: Share, *, whole: bool) -> str:
    """Name in a file: the parameter's, after the slot unless that is its weight, and before where it starts."""
    name = share.name if share.slot == "weight" else f"{share.slot}/{share.name}"
    return name if whole else f"{name}@{share.peer}.{share.start}"


def _peer(cut: Cut | None) -> int:
    return cut.index if cut else 0


def _array(data: torch.Tensor) -> np.ndarray:
    """``data`` as numpy: the same memory where it lies on the CPU."""
    array: np.ndarray = data.detach().cpu().numpy()
    assert array.ndim == 1 and array.dtype == "float32", (array.shape, array.dtype)
    return array


def _grid(flat: np.ndarray, size: tuple[int, int], stride: int) -> np.ndarray:
    """The first ``size`` rows and columns of ``flat`` as rows of ``stride`` elements."""
    from numpy.lib.stride_tricks import as_strided

    item = flat.itemsize
    return as_strided(flat, size, (stride * item, item))
