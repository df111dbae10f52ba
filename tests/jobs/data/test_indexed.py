"""Shards, held against Megatron's layout built by hand."""

import hashlib
import struct

import numpy as np
import pytest

from jobs.data.indexed import ShardWriter, read_shard, token_type
from orchestrator.errors import DataError

DOCUMENTS = [[5, 6, 7], [], [65_499], [1, 2]]


def by_hand(documents: list[list[int]], code: int, letter: str) -> tuple[bytes, bytes]:
    """(.bin, .idx) as Megatron-LM's `_IndexWriter` and `IndexedDatasetBuilder` write them, field by field."""
    width = struct.calcsize("<" + letter)
    tokens = [t for d in documents for t in d]
    bin_ = struct.pack(f"<{len(tokens)}{letter}", *tokens)
    idx = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    idx += struct.pack("<Q", len(documents)) + struct.pack("<Q", len(documents) + 1)
    idx += b"".join(struct.pack("<i", len(d)) for d in documents)
    position = 0
    for d in documents:
        idx += struct.pack("<q", position)
        position += len(d) * width
    return bin_, idx + b"".join(struct.pack("<q", i) for i in range(len(documents) + 1))


def write(prefix, documents, dtype):
    with ShardWriter(prefix, dtype) as writer:
        for d in documents:
            writer.add(np.array(d, dtype), np.array([len(d)]))
    return writer


@pytest.mark.parametrize(("vocab", "code", "letter"), [(65_499, 8, "H"), (65_500, 4, "i")])
def test_bytes_are_megatrons_both_ways(tmp_path, vocab, code, letter):
    bin_, idx = by_hand(DOCUMENTS, code, letter)
    writer = write(tmp_path / "ours", DOCUMENTS, token_type(vocab))
    assert (tmp_path / "ours.bin").read_bytes() == bin_
    assert (tmp_path / "ours.idx").read_bytes() == idx
    assert writer.bin_sha256.hexdigest() == hashlib.sha256(bin_).hexdigest()
    assert writer.idx_sha256.hexdigest() == hashlib.sha256(idx).hexdigest()
    (tmp_path / "theirs.bin").write_bytes(bin_)
    (tmp_path / "theirs.idx").write_bytes(idx)
    shard = read_shard(tmp_path / "theirs")
    assert shard.tokens.tolist() == [t for d in DOCUMENTS for t in d]
    assert shard.sizes.tolist() == [3, 0, 1, 2]
    assert shard.documents == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.bin", "ours.idx", "theirs.bin", "theirs.idx"]


def test_documents_of_several_sequences_are_read(tmp_path):
    """Megatron may cut a document in sequences; then there are fewer marks than sequences."""
    idx = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 5, 3, 2)
    idx += struct.pack("<3i3q2q", 2, 1, 1, 0, 16, 24, 0, 3)
    (tmp_path / "s.bin").write_bytes(struct.pack("<4q", 9, 8, 7, 6))
    (tmp_path / "s.idx").write_bytes(idx)
    shard = read_shard(tmp_path / "s")
    assert (shard.tokens.tolist(), shard.documents, shard.marks.tolist()) == ([9, 8, 7, 6], 1, [0, 3])


def test_empty_shard(tmp_path):
    write(tmp_path / "s", [], np.dtype("<u2"))
    shard = read_shard(tmp_path / "s")
    assert (len(shard.tokens), shard.documents) == (0, 0)
    assert len(shard.identity()) == 64


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path / "s", "<u2") as writer:
        writer.add(np.array([1], "<u2"), np.array([1]))
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_identity_follows_the_tokens(tmp_path):
    many = np.arange(300_000, dtype="<u2") % 997
    identities = []
    for name, tokens in {"a": many, "b": many, "first": np.r_[1, many[1:]], "last": np.r_[many[:-1], 1]}.items():
        write(tmp_path / name, [tokens], "<u2")
        identities.append(read_shard(tmp_path / name).identity())
    assert identities[0] == identities[1]
    assert len(set(identities)) == 3


def broken(folder, name):
    bin_, idx = by_hand(DOCUMENTS, 8, "H")
    files = {
        "no magic": (bin_, b"TNTIDX\x00\x00" + idx[8:]),
        "short header": (bin_, idx[:20]),
        "version": (bin_, idx[:9] + struct.pack("<Q", 2) + idx[17:]),
        "float tokens": (bin_, idx[:17] + b"\x07" + idx[18:]),
        "idx cut": (bin_, idx[:-1]),
        "bin cut": (bin_[:-1], idx),
        "bin too long": (bin_ + b"\0\0", idx),
        "no bin": (None, idx),
        "no idx": (bin_, None),
    }[name]
    for ending, raw in zip(("bin", "idx"), files, strict=True):
        if raw is not None:
            (folder / f"s.{ending}").write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no magic", r"s\.idx`: expected to begin with b'MMIDIDX.*found b'TNTIDX"),
        ("short header", r"expected a header of 34 bytes, found 20"),
        ("version", r"expected version 1, found 2"),
        ("float tokens", r"expected integer tokens .*, found type 7"),
        ("idx cut", r"s\.idx`: expected 122 bytes for 4 sequences and 5 marks, found 121"),
        ("bin cut", r"s\.bin`: expected 12 bytes by its index, found 11"),
        ("bin too long", r"s\.bin`: expected 12 bytes by its index, found 14"),
        ("no bin", r"there is no file `.*s\.bin`"),
        ("no idx", r"there is no file `.*s\.idx`"),
    ],
)
def test_broken_shards_are_refused_with_both_numbers(tmp_path, name, says):
    broken(tmp_path, name)
    with pytest.raises(DataError, match=says) as e:
        read_shard(tmp_path / "s")
    assert e.value.hint
