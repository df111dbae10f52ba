"""From documents to tokens, one task at a time, in as many processes as there are cores.

What is held out is decided by a hash of the text itself, so that it depends neither on the order nor on
the workers, and copies of one text all land on the same side. A document much longer than the average
would make the split uneven, so it is decided for each block of it; neighbouring blocks on one side stay
one document.
"""

import hashlib
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, groupby
from multiprocessing import get_context, parent_process
from typing import Literal

import numpy as np

from jobs.data.text import Part, read
from jobs.runtime.faults import CAUSES

TASK = 1 << 20  # bytes of text that a process takes at a time, at least
Split = Literal["train", "val"]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """All that decides what a task becomes, but for its text."""

    tokenizer: str  # path of a tokenizer.json
    dtype: str
    end_of_text: int
    val_fraction: float
    seed: int
    block: int  # characters


@dataclass
class Encoded:
    """The documents of one split, as tokens."""

    tokens: np.ndarray  # all documents, back to back
    sizes: np.ndarray  # tokens of each
    text_bytes: int


def cut(text: str, block: int) -> list[str]:
    """``text`` in blocks of at most ``block`` characters, at ends of lines where there are any."""
    pieces, start = [], 0
    while len(text) - start > block:
        end = text.rfind("\n", start, start + block) + 1 or start + block
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def block_size(parts: Sequence[Part]) -> int:
    """A thousandth of a source, between 1 KiB and 1 MiB: then the split is even, and documents stay whole
    where there are many."""
    return min(max(sum(p.size for p in parts) // 1000, 1 << 10), 1 << 20)


def split_of(text: str, *, seed: int, val_fraction: float) -> Split:
    """On which side a block is, by a hash of its text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return "val" if int.from_bytes(digest) < val_fraction * 2**64 else "train"


def tasks(parts: Sequence[Part]) -> list[list[Part]]:
    """``parts`` in lists of TASK bytes or a little more."""
    lists: list[list[Part]] = []
    size = TASK
    for part in parts:
        if size >= TASK:
            lists.append([])
            size = 0
        lists[-1].append(part)
        size += part.size
    return lists


class Encoder:
    """A tokenizer at work under the rules."""

    def __init__(self, rules: Rules) -> None:
        from tokenizers import Tokenizer

        self.rules = rules
        self.tokenizer = Tokenizer.from_file(rules.tokenizer)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # an end-of-text written in a text is text

    def __call__(self, task: Sequence[Part]) -> dict[Split, Encoded]:
        """Read and encode the documents of ``task``, each ended by end-of-text."""
        rules = self.rules
        documents = [cut(text, rules.block) for part in task for text in read(part)]
        blocks = [block for document in documents for block in document]
        sides = iter([split_of(b, seed=rules.seed, val_fraction=rules.val_fraction) for b in blocks])
        encoded = iter(self.tokenizer.encode_batch_fast(blocks, add_special_tokens=False))
        found: dict[Split, _Documents] = {"train": _Documents(), "val": _Documents()}
        for document in documents:
            pieces = [(next(sides), block, next(encoded).ids) for block in document]
            for split, run in groupby(pieces, key=lambda piece: piece[0]):
                found[split].add(list(run), rules.end_of_text)
        return {split: documents.encoded(rules.dtype) for split, documents in found.items()}


@dataclass
class _Documents:
    ids: list[list[int]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    text_bytes: int = 0

    def add(self, pieces: list[tuple[Split, str, list[int]]], end_of_text: int) -> None:
        ids = [i for _, _, i in pieces]
        self.ids += [*ids, [end_of_text]]
        self.sizes.append(sum(map(len, ids)) + 1)
        self.text_bytes += sum(len(text.encode()) for _, text, _ in pieces)

    def encoded(self, dtype: str) -> Encoded:
        tokens = np.fromiter(chain.from_iterable(self.ids), dtype, count=sum(self.sizes))
        return Encoded(tokens, np.array(self.sizes, np.int64), self.text_bytes)


def encode_all(jobs: Sequence[Sequence[Part]], rules: Rules, workers: int) -> Iterator[dict[Split, Encoded]]:
    """The result of each task, in the order of the tasks; at most two per worker wait in memory."""
    workers = min(workers, len(jobs))
    if workers == 1:
        yield from map(Encoder(rules), jobs)
        return
    # Spawned, not forked: this process has threads (tokenizers', MLflow's), and a fork may inherit their locks.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start, initargs=(rules,))
    pending: deque[Future[dict[Split, Encoded]]] = deque()
    try:
        for task in jobs:
            pending.append(pool.submit(_encode, task))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None  # of this worker process


def _start(rules: Rules) -> None:
    global _encoder  # noqa: PLW0603 a pool has no other place for what its workers keep
    for number in CAUSES:  # a scheduler signals every process of the job; only the one that leads decides
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _encoder = Encoder(rules)


def _leave_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()  # a worker would else wait for ever for the tasks of a killed parent
    os._exit(1)


def _encode(task: Sequence[Part]) -> dict[Split, Encoded]:
    assert _encoder is not None
    return _encoder(task)
