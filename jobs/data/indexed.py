"""Token shards in Megatron's format: ``<prefix>.bin`` holds the tokens, ``<prefix>.idx`` says where they are cut.

The layout is that of Megatron-LM's ``megatron/core/datasets/indexed_dataset.py``, little-endian:

    .bin  the tokens of all sequences, back to back
    .idx  b"MMIDIDX\\0\\0", version (uint64, 1), type of a token (uint8), S sequences and D + 1 marks (uint64 each),
          length in tokens of each sequence (int32, S), its first byte in .bin (int64, S),
          the sequence each document begins with, and S at the end (int64, D + 1)
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from orchestrator.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # Megatron's codes; 6 and 7 are floats


def token_type(vocab: int) -> np.dtype:
    """The type Megatron gives tokens of a vocabulary of this size (``DType.optimal_dtype``)."""
    return np.dtype("<u2" if vocab < 65_500 else "<i4")


def bin_path(prefix: str | Path) -> Path:
    """The file of the tokens."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The file of the index."""
    return Path(f"{prefix}.idx")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard on disk, memory-mapped."""

    prefix: str
    tokens: np.ndarray  # (N,) every token, in the order of the file
    sizes: np.ndarray  # (S,) tokens of each sequence
    marks: np.ndarray  # (D + 1,) the first sequence of each document, then S

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.marks) - 1

    def identity(self, *, blocks: int = 16, block: int = 4096) -> str:
        """A hash of the size of ``.bin`` and of ``blocks`` parts spread evenly over it.

        Cheap enough for a shard of any size. It notices another shard or another tokenizer, but not a
        byte changed between the parts.
        """
        data = self.tokens.view(np.uint8)
        digest = hashlib.sha256(f"{self.tokens.dtype.str} {len(data)}".encode())
        for start in np.linspace(0, max(0, len(data) - block), blocks).astype(np.int64):
            digest.update(data[start : start + block].tobytes())
        return digest.hexdigest()


def read_shard(prefix: str | Path) -> Shard:
    """Map the shard ``prefix``. Raises DataError where a file is missing, damaged or does not fit the other."""
    idx, bin_ = idx_path(prefix), bin_path(prefix)
    for path in (idx, bin_):
        if not path.is_file():
            raise DataError(
                f"shard `{prefix}`: there is no file `{path}`",
                hint=f"a shard is two files, `{bin_.name}` and `{idx.name}`; it is named without their endings",
            )
    try:
        size = idx.stat().st_size
        with idx.open("rb") as f:
            dtype, sequences, marks = _read_header(f.read(HEADER.size), idx)
        expected = HEADER.size + 12 * sequences + 8 * marks
        if size != expected:
            raise _damaged(idx, f"{expected:,} bytes for {sequences:,} sequences and {marks:,} marks", f"{size:,}")
        lengths = _map(idx, "<i4", sequences, HEADER.size)
        pointers = _map(idx, "<i8", sequences, HEADER.size + 4 * sequences)
        documents = _map(idx, "<i8", marks, HEADER.size + 12 * sequences)
        expected = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize if sequences else 0
        size = bin_.stat().st_size
        if size != expected:
            raise _damaged(bin_, f"{expected:,} bytes by its index", f"{size:,}")
        tokens = _map(bin_, dtype.str, size // dtype.itemsize, 0)
    except OSError as e:
        raise DataError(f"shard `{prefix}`: {e.strerror or e}", hint="is it readable from this machine?") from e
    return Shard(prefix=str(prefix), tokens=tokens, sizes=lengths, marks=documents)


def _read_header(raw: bytes, path: Path) -> tuple[np.dtype, int, int]:
    """Type of a token, number of sequences, number of marks."""
    if raw[: len(MAGIC)] != MAGIC:
        raise _damaged(path, f"to begin with {MAGIC!r}", repr(raw[: len(MAGIC)]))
    if len(raw) < HEADER.size:
        raise _damaged(path, f"a header of {HEADER.size} bytes", str(len(raw)))
    _, version, code, sequences, marks = HEADER.unpack(raw)
    if version != 1:
        raise _damaged(path, "version 1", str(version))
    if code not in TYPES:
        raise _damaged(path, f"integer tokens (type {', '.join(map(str, TYPES))})", f"type {code}")
    return np.dtype(TYPES[code]), sequences, marks


def _damaged(path: Path, expected: str, found: str) -> DataError:
    return DataError(
        f"`{path}`: expected {expected}, found {found}",
        hint="the file is cut off, damaged, or no Megatron shard; write or copy `.bin` and `.idx` again",
    )


def _map(path: Path, dtype: str, count: int, offset: int) -> np.ndarray:
    if count == 0:
        return np.empty(0, dtype)  # an empty range cannot be mapped
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)))


class ShardWriter:
    """Writes a shard, document by document; on leaving the block, both files appear under their names.

    Each document is one sequence. If the block raises, nothing is left.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | str) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.bin_sha256 = hashlib.sha256()
        self.idx_sha256 = hashlib.sha256()
        self._sizes: list[np.ndarray] = []
        self._bin = _temporary(bin_path(prefix)).open("wb")

    @property
    def sizes(self) -> np.ndarray:
        """(D,) tokens of each document so far."""
        return np.concatenate([np.empty(0, "<i4"), *self._sizes])

    def add(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        """Append documents of ``sizes`` tokens each, which lie back to back in ``tokens``."""
        assert tokens.dtype == self.dtype and sizes.sum() == len(tokens)
        raw = tokens.tobytes()
        self._bin.write(raw)
        self.bin_sha256.update(raw)
        self._sizes.append(sizes.astype("<i4"))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        bin_, idx = bin_path(self.prefix), idx_path(self.prefix)
        try:
            if kind is None:
                with _temporary(idx).open("wb") as f:
                    for raw in self._index():
                        f.write(raw)
                        self.idx_sha256.update(raw)
                    _sync(f)
                _sync(self._bin)
                idx.unlink(missing_ok=True)  # an older index must not describe the new tokens
                _temporary(bin_).replace(bin_)
                _temporary(idx).replace(idx)
        finally:
            self._bin.close()
            _temporary(bin_).unlink(missing_ok=True)
            _temporary(idx).unlink(missing_ok=True)

    def _index(self) -> Iterator[bytes]:
        sizes = self.sizes
        code = next(code for code, name in TYPES.items() if np.dtype(name) == self.dtype)
        ends = np.cumsum(sizes, dtype="<i8") * self.dtype.itemsize
        yield HEADER.pack(MAGIC, 1, code, len(sizes), len(sizes) + 1)
        yield sizes.tobytes()
        yield (ends - sizes * self.dtype.itemsize).astype("<i8").tobytes()
        yield np.arange(len(sizes) + 1, dtype="<i8").tobytes()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _sync(f: BinaryIO) -> None:
    f.flush()
    os.fsync(f.fileno())
