"""The packed data set: which tokens the i-th sample of a training run holds, as a function of (seed, i) alone.

Nothing is drawn one after the other, so a run can resume at any sample, on any number of ranks, and no
table grows with the data:

- a source is one stream of tokens, its shards back to back; window w is tokens [w T, w T + T], so that
  each token but the first is a target once. Documents are packed without a mask between them, only an
  end-of-text token (Brown et al. 2020, arXiv:2005.14165, section 2.2 and appendix B);
- sources are mixed in blocks of 10,000 samples, each with the counts that the weights ask for, in an
  order shuffled anew for each block;
- the n-th sample of a source is in epoch n // W, where its W windows are shuffled: sampling without
  replacement until an epoch is over (same appendix).
"""

# B samples, T tokens

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from jobs.data.bpe import file_sha256, load, vocab_size
from jobs.data.indexed import Shard, read_shard
from jobs.data.order import GOLDEN, MIX, key, mix_bits, mix_counts, permute
from orchestrator.errors import DataError
from orchestrator.spec import DataSpec, SourceSpec

if TYPE_CHECKING:
    import torch

ORDER = 1  # version of the order below; part of the fingerprint
PREPARE = "run the `prepare` stage of this experiment first: `orch submit CONFIG --stage prepare`"

Split = Literal["train", "val"]


def read_dataset(folder: str | Path) -> dict[str, Any]:
    """What `prepare` committed as ``dataset.json``. Raises DataError where it did not, or it is damaged."""
    path = Path(folder) / "dataset.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["sources"], record["tokenizer_sha256"], record["vocab"]
    except FileNotFoundError:
        raise DataError(f"no prepared data in `{folder}`: there is no `dataset.json`", hint=PREPARE) from None
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"`{path}` is damaged: {e}", hint=f"delete it, and {PREPARE}") from e
    found = file_sha256(Path(folder) / "tokenizer.json")
    if found != record["tokenizer_sha256"]:
        raise DataError(
            f"`{folder}/tokenizer.json`: sha256 {found[:12]}, but the data was prepared with "
            f"{record['tokenizer_sha256'][:12]}",
            hint=f"put the right tokenizer back; or delete `{path}`, and {PREPARE}",
        )
    return record


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The shards of one source, back to back."""

    name: str
    count: int  # samples in each block of the mix
    shards: Sequence[tuple[Shard, str]]  # each with its identity
    starts: Sequence[int]  # of each shard in the stream, in tokens
    tokens: int
    windows: int  # samples in one epoch

    @classmethod
    def of(cls, name: str, count: int, shards: Sequence[tuple[Shard, str]], seq_len: int) -> Stream:
        """Chain ``shards``. Raises DataError where they hold not even one sample."""
        *starts, tokens = np.cumsum([0, *(len(shard.tokens) for shard, _ in shards)]).tolist()
        if tokens <= seq_len:
            raise DataError(
                f"source `{name}`: one sample needs {seq_len + 1:,} tokens, `{shards[0][0].prefix}` has {tokens:,}",
                hint="give it more text or a larger `data.val_fraction`, or the model a shorter `seq_len`",
            )
        windows = (tokens - 1) // seq_len
        return cls(name=name, count=count, shards=shards, starts=starts, tokens=tokens, windows=windows)

    def read(self, start: int, out: np.ndarray) -> None:
        """Copy ``len(out)`` tokens from ``start`` into ``out``, over the ends of shards."""
        shard, done = bisect_right(self.starts, start) - 1, 0
        while done < len(out):
            offset = start + done - self.starts[shard]
            piece = self.shards[shard][0].tokens[offset : offset + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1


class PackedDataset:
    """Samples of seq_len + 1 tokens in one global order. A data rank asks for the ranges that are its own.

    ``train`` never ends. ``val`` is one epoch: each window at most once, in a shuffled order that does not
    depend on the seed, so that all runs are evaluated on the same samples, and the first of them are a
    fair choice of all.
    """

    def __init__(
        self, streams: Sequence[Stream], *, seq_len: int, split: Split, vocab: int, seed: int, tokenizer_sha256: str
    ) -> None:
        self.streams = streams
        self.seq_len = seq_len
        self.split = split
        self.vocab = vocab
        self.seed = seed if split == "train" else 0
        self.tokenizer_sha256 = tokenizer_sha256
        self._block = lru_cache(maxsize=4)(self._order)

    @classmethod
    def open(cls, data: DataSpec, *, seq_len: int, split: Split, vocab: int) -> PackedDataset:
        """Map what ``data`` names, for a model of ``vocab`` tokens.

        Raises DataError where something is missing, damaged, too short, or has a larger vocabulary.
        """
        named = {name: source for name, source in data.sources.items() if source.weight != 0}
        record: dict[str, Any]
        if named and data.tokenizer and all(s.shards for s in named.values()):
            path, record = Path(data.tokenizer), {}
            vocab_found, tokenizer = vocab_size(load(path)), file_sha256(path)
        else:
            record = read_dataset(data.folder)
            vocab_found, tokenizer = record["vocab"], record["tokenizer_sha256"]
        if vocab_found > vocab:
            raise DataError(
                f"the tokenizer of the data has {vocab_found:,} tokens, the model only {vocab:,}",
                hint=f"set `model.vocab` to {vocab_found} or more, or prepare the data for this model",
            )
        shards = {name: open_shards(data.folder, name, source, split, record) for name, source in named.items()}
        if not any(shards.values()):
            raise DataError(f"no source has a `{split}` split", hint="name `val_shards` beside `shards`")
        counts = mix_counts({name: named[name].weight for name in shards if shards[name]})
        streams = [Stream.of(name, count, shards[name], seq_len) for name, count in counts.items()]
        return cls(streams, seq_len=seq_len, split=split, vocab=vocab, seed=data.seed, tokenizer_sha256=tokenizer)

    @property
    def tokens(self) -> int:
        """Tokens of all sources."""
        return sum(s.tokens for s in self.streams)

    @property
    def samples_per_epoch(self) -> int:
        """Train: windows of all sources. Val: samples until the first source would begin again."""
        if self.split == "train":
            return sum(s.windows for s in self.streams)
        source, _, _ = self._block(0)
        places = [np.flatnonzero(source == k) for k in range(len(self.streams))]
        blocks = [divmod(s.windows, s.count) for s in self.streams]
        return min(whole * MIX + int(p[rest]) for (whole, rest), p in zip(blocks, places, strict=True))

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides what the i-th sample is: tokenizer, tokens, mix, seed, seq_len."""
        sources = [[s.name, s.count, [identity for _, identity in s.shards]] for s in self.streams]
        what = [ORDER, self.tokenizer_sha256, sources, self.seed, self.seq_len, self.split]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def ids(self, first: int, count: int) -> list[tuple[str, int, int]]:
        """(source, epoch, window) of ``count`` samples from ``first``: what a resumed run must repeat."""
        return [(self.streams[k].name, epoch, window) for k, epoch, window in self._places(first, count)]

    def sample(self, i: int) -> np.ndarray:
        """Tokens of the i-th sample, (T + 1,) int64."""
        return self._windows(i, 1)[0]

    def batch(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """``tokens`` and ``targets``, (B, T) int64 on the CPU, of ``count`` samples from ``first``."""
        import torch

        windows = self._windows(first, count)
        return {
            "tokens": torch.from_numpy(np.ascontiguousarray(windows[:, :-1])),
            "targets": torch.from_numpy(np.ascontiguousarray(windows[:, 1:])),
        }

    def _windows(self, first: int, count: int) -> np.ndarray:
        """(B, T + 1) int64. Raises DataError for a token that the model does not have."""
        windows = np.empty((count, self.seq_len + 1), np.int64)
        for row, (k, _, window) in zip(windows, self._places(first, count), strict=True):
            self.streams[k].read(window * self.seq_len, row)
        if count and not 0 <= windows.min() <= windows.max() < self.vocab:
            row, column = np.argwhere((windows < 0) | (windows >= self.vocab))[0]
            name, _, window = self.ids(first + int(row), 1)[0]
            raise DataError(
                f"source `{name}`, token {window * self.seq_len + column:,} is {windows[row, column]}, "
                f"but the model has {self.vocab:,} tokens",
                hint="the shards were written with another tokenizer; name theirs as `data.tokenizer`",
            )
        return windows

    def _places(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """(index of the source, epoch, window) of ``count`` samples from ``first``."""
        assert first >= 0 and count >= 0
        if self.split == "val" and first + count > self.samples_per_epoch:
            raise DataError(
                f"the held-out text has {self.samples_per_epoch:,} samples of {self.seq_len} tokens, "
                f"not {first + count:,}",
                hint="lower `eval_samples`, or raise `data.val_fraction` and prepare the data again",
            )
        places: list[tuple[int, int, int]] = []
        while len(places) < count:
            block, start = divmod(first + len(places), MIX)
            part = slice(start, start + count - len(places))
            source, epoch, window = (column[part].tolist() for column in self._block(block))
            places.extend(zip(source, epoch, window, strict=True))
        return places

    def _order(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Index of the source, epoch and window of the MIX samples from block * MIX."""
        counts = np.array([s.count for s in self.streams])
        if self.split == "train":
            keys = np.repeat(key(self.seed, "mix", block), MIX)
            slots = permute(np.arange(MIX, dtype=np.uint64), MIX, keys)
            source = np.searchsorted(np.cumsum(counts), slots.astype(np.int64), side="right")
        else:  # evenly spread, so that any first part of it has the mix too
            due = np.concatenate([(np.arange(c) + 0.5) / c for c in counts])
            source = np.repeat(np.arange(len(counts)), counts)[np.argsort(due, kind="stable")]
        epoch, window = np.empty(MIX, np.int64), np.empty(MIX, np.int64)
        for k, stream in enumerate(self.streams):
            mine = source == k
            n = block * stream.count + np.arange(stream.count)  # which sample of its source
            epoch[mine] = n // stream.windows
            keys = mix_bits(key(self.seed, "shuffle", stream.name) + epoch[mine].astype(np.uint64) * GOLDEN)
            window[mine] = permute((n % stream.windows).astype(np.uint64), stream.windows, keys)
        return source, epoch, window


def check_data(data: DataSpec, *, seq_len: int, vocab: int) -> None:
    """Raise DataError where a run would: maps both splits, reads no token, needs no torch."""
    for split in get_args(Split):
        PackedDataset.open(data, seq_len=seq_len, split=split, vocab=vocab)


def open_shards(
    folder: str, name: str, source: SourceSpec, split: Split, record: dict[str, Any]
) -> list[tuple[Shard, str]]:
    """The shards of one source, each with what identifies its tokens."""
    if source.shards:
        shards = [read_shard(prefix) for prefix in (source.shards if split == "train" else source.val_shards)]
        return [(shard, shard.identity()) for shard in shards]
    if name not in record["sources"]:
        raise DataError(
            f"source `{name}` is not in the data prepared in `{folder}`; there is {', '.join(record['sources'])}",
            hint="choose another `data.folder` and run the `prepare` stage",
        )
    expected = record["sources"][name][split]
    shard = read_shard(Path(folder) / f"{name}-{split}")
    if len(shard.tokens) != expected["tokens"]:
        raise DataError(
            f"shard `{shard.prefix}`: {len(shard.tokens):,} tokens, but {expected['tokens']:,} were prepared",
            hint=f"delete `{folder}/dataset.json`, and {PREPARE}",
        )
    return [(shard, expected["bin_sha256"])]
