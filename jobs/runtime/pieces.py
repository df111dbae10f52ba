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

import hashlib
import json
import math
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

from jobs.nn.cut import Cut
from jobs.runtime import dist
from orchestrator.errors import CheckpointError
from orchestrator.run import write_atomic

if TYPE_CHECKING:
    import numpy as np
    import torch

    from jobs.runtime.job import Ranks

INDEX = "pieces.json"
FORMAT = 1
FILE = re.compile(r"[a-z]+-\d+-of-\d+\.safetensors")  # of an index that may be a stranger's: no other folder's
GRAIN = 2**18  # elements below which replicas do not share the writing of a tensor
Slot = Literal["weight", "exp_avg", "exp_avg_sq", "step"]  # of AdamW (arXiv:1711.05101); step is a tensor of one
SLOTS = get_args(Slot)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one rank holds of one tensor: elements from ``start`` of its flattened local tensor of ``shape``."""

    name: str  # of the parameter in the whole model
    slot: Slot
    shape: tuple[int, ...]  # of this tensor rank's tensor, before data ranks share it out
    data: torch.Tensor  # fp32, one dim, contiguous; ``load`` writes into it
    start: int = 0
    cut: Cut | None = None  # None: the local tensor is the whole


class Part(Protocol):
    """What a checkpoint holds one set of pieces of: an engine, a frozen model, an average."""

    def pieces(self) -> list[Piece]:
        """All that this rank holds."""
        ...

    def filled(self) -> None:
        """Bring in line what is made of the pieces: they have just been replaced."""
        ...


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


def save(folder: Path, part: Part, ranks: Ranks) -> list[str]:
    """Write this rank's share of what ``part`` holds into ``folder``; return the files' names. Collective.

    Raises:
        RanksFailed, PeerBug: on every rank, where one cannot; see ``dist.together``.
    """
    from safetensors.numpy import save_file

    pieces = dist.together(part.pieces)
    mine = tuple(_extent(p) for p in pieces)
    everyones = hashlib.sha256(b"".join(dist.gather(hashlib.sha256(repr(mine).encode()).digest())))
    shares, index = _shared_out(mine, everyones.digest())

    def write() -> list[str]:
        folder.mkdir(exist_ok=True)
        files = [_file(ranks.rank, ranks.world)]
        save_file(_arrays(pieces, shares), folder / files[0])
        if ranks.rank == 0:
            write_atomic(folder / INDEX, index)
            files.append(INDEX)
        return files

    return dist.together(write)


def _arrays(pieces: Sequence[Piece], shares: Sequence[Share]) -> dict[str, np.ndarray]:
    """What this rank writes, by the names in its file."""
    held: dict[tuple[str, str, int], list[Piece]] = defaultdict(list)
    for p in pieces:
        held[p.name, p.slot, _peer(p.cut)].append(p)
    arrays = {}
    for share in shares:
        candidates = held[share.name, share.slot, share.peer]
        piece = next(p for p in candidates if p.start <= share.start and share.stop <= p.start + p.data.numel())
        array = _array(piece.data[share.start - piece.start : share.stop - piece.start])
        whole = piece.cut is None and share.stop - share.start == math.prod(piece.shape)
        arrays[_key(share, whole=whole)] = array.reshape(piece.shape) if whole else array
    return arrays


@lru_cache(maxsize=4)  # as many models as a run trains and averages
def _shared_out(mine: tuple[Extent, ...], everyones: bytes) -> tuple[list[Share], str]:
    """What this rank, which holds ``mine``, writes; on rank 0, the index too. Collective.

    Ranks hold the same at every save of a run: so rank 0 works it out at the first. ``everyones`` is a digest of what
    all ranks hold, so that all find it here or none does.
    """
    gathered = dist.to_first(_packed(mine))

    def work_out() -> tuple[list[Any], str]:
        if gathered is None:
            return [], ""
        everyone = [_unpacked(*packed) for packed in gathered]
        shares = share_out(everyone)
        return shares, json.dumps(_index_of(everyone, shares))

    shares, index = dist.together(work_out)
    return dist.from_first(shares or None), index


def _packed(extents: Sequence[Extent]) -> tuple[list[tuple[Any, ...]], np.ndarray]:
    """``extents`` in a few bytes each: tensors, and rows of which tensor, which slot, start, stop."""
    import numpy as np

    tensors = {key: i for i, key in enumerate(dict.fromkeys((e.name, e.shape, e.cut) for e in extents))}
    rows = [(tensors[e.name, e.shape, e.cut], SLOTS.index(e.slot), e.start, e.stop) for e in extents]
    return list(tensors), np.array(rows, np.int64).reshape(-1, 4)


def _unpacked(tensors: Sequence[tuple[Any, ...]], rows: np.ndarray) -> list[Extent]:
    found = []
    for i, slot, start, stop in rows.tolist():
        name, shape, cut = tensors[i]
        found.append(Extent(name, SLOTS[slot], shape, cut, start, stop))
    return found


def load(folder: Path, part: Part, *, weights_only: bool = False) -> None:
    """Fill all that ``part`` holds from ``folder``; with ``weights_only``, its optimizer starts anew. Collective.

    With ``weights_only``, what the checkpoint lacks of the parameters that ``module.new`` names stays as it is: a
    reward model begins with the weights of a language model, which has no head for scores.

    Raises:
        CheckpointError: a tensor, or a part of one, is not in there, or has another shape.
    """
    with Store(folder) as store:
        new: tuple[str, ...] = getattr(getattr(part, "module", None), "new", ()) if weights_only else ()
        for piece in part.pieces():
            if weights_only and piece.slot != "weight":
                piece.data.detach().zero_()
            elif piece.name.startswith(new) and piece.name not in store:
                continue
            else:
                store.fill(piece)
    part.filled()


class Store:
    """The pieces in a folder, read from any layout."""

    def __init__(self, folder: Path) -> None:
        try:
            self.index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            _check_index(self.index)
        except FileNotFoundError:
            raise CheckpointError(
                f"`{folder}` holds no `{INDEX}`", hint="only checkpoints that this version of orch wrote can be read"
            ) from None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as e:
            words = str(e) if type(e) is ValueError else f"{type(e).__name__}: {e}"
            raise CheckpointError(
                f"`{folder / INDEX}` cannot be used: {words}", hint="use the checkpoint before it"
            ) from e
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
        values = self._elements(file, share, whole, low - share.start, high - share.start)
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
                values = self._elements(file, share, whole, first, last)
                at = b.offset + (row - b.row) * b.stride + col - b.col
                _grid(into[at:], size, b.stride)[...] = _grid(values, size, a.stride)
                found += size[0] * size[1]
        return found

    def _elements(self, file: int, share: Share, whole: bool, first: int, last: int) -> np.ndarray:
        """Elements ``first`` to ``last`` of ``share``, flattened; no more is read than the rows they lie in."""
        from safetensors import SafetensorError, safe_open

        name, key, size = self.index["files"][file], _key(share, whole=whole), share.stop - share.start
        try:
            if name not in self.files:
                self.files[name] = self.open.enter_context(safe_open(self.folder / name, "np"))
            rows = self.files[name].get_slice(key)
            shape = rows.get_shape()
            if rows.get_dtype() != "F32" or math.prod(shape) != size:
                raise CheckpointError(
                    f"checkpoint `{self.folder}`: `{key}` in `{name}` is {rows.get_dtype()} of shape {shape}, and "
                    f"should be {size} elements of F32",
                    hint="use the checkpoint before it",
                )
            width = math.prod(shape[1:])
            row = first // width
            values: np.ndarray = rows[row : -(-last // width)].reshape(-1)
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"checkpoint `{self.folder}`: `{key}` in `{name}` cannot be read: {e}") from e
        return values[first - row * width : last - row * width]


def _check_index(index: Any) -> None:
    """Raise ValueError, or what an index of other types leads to, unless every element in it lies at one place."""
    if index["format"] != FORMAT:
        raise ValueError(f"it is of format {index['format']}, this orch reads {FORMAT}")
    if type(index["files"]) is not list:
        raise ValueError("its files are no list")
    for file in index["files"]:
        if not FILE.fullmatch(file):
            raise ValueError(f"it names `{file}`, which is no file of a checkpoint")
    for name, entry in index["tensors"].items():
        _check_ints(name, entry["shape"], least=1)
        cut = None
        if entry["cut"] is not None:
            dim, parts, count = entry["cut"]
            _check_ints(name, [dim, count, *parts])
            cut = Cut(dim=dim, parts=tuple(parts), index=0, count=count)
            if count < 1 or len(entry["shape"]) > 2 or sum(parts) != entry["shape"][dim]:
                raise ValueError(f"`{name}` of shape {entry['shape']} cannot be cut as {entry['cut']}")
        for slot, pieces in entry["pieces"].items():
            shape, of = ([1], None) if slot == "step" else (entry["shape"], cut)
            _check_pieces(f"`{slot}` of `{name}`", pieces, shape, of, len(index["files"]))


def _check_pieces(what: str, pieces: list[list[int]], shape: Sequence[int], cut: Cut | None, files: int) -> None:
    """Raise ValueError where ``pieces`` lie outside the tensor ranks' tensors, or one upon the other."""
    last, end, size = -1, 0, 0
    for file, peer, start, stop in sorted(pieces, key=lambda piece: piece[1:3]):
        _check_ints(what, [file, peer, start, stop])
        if peer != last:
            mine = shape if cut is None else replace(cut, index=peer).local_shape(shape)
            last, end, size = peer, 0, math.prod(mine)
        if file >= files or peer >= (cut.count if cut else 1) or not end <= start < stop <= size:
            raise ValueError(f"{what} has a piece from {start} to {stop} of {size} behind one to {end}, in file {file}")
        end = stop


def _check_ints(what: str, values: Sequence[Any], *, least: int = 0) -> None:
    if not values or any(type(value) is not int or value < least for value in values):
        raise ValueError(f"{what}: {values} are not whole numbers from {least}")


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
