"""Conversations packed into rows of one length, each of which sees only itself.

Rows are filled in the shuffled order of an epoch, a conversation going into the open row where it fits, or
else opening the next (next-fit: Johnson 1973, "Near-optimal bin packing algorithms"). Every token keeps the
number of its conversation, so that attention stays inside (`segments`) and positions count from its start.
"""

# B rows, T tokens

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from jobs.data.chat import Chat, Encoded
from jobs.data.examples import Files, demonstrations, fingerprint, shuffled

if TYPE_CHECKING:
    import torch


class Demonstrations:
    """Rows of packed conversations in one global order, which depends on the seed and the epoch alone."""

    def __init__(self, files: Files, chat: Chat, *, seq_len: int, seed: int) -> None:
        self.left_out: Counter[str] = Counter()
        self.examples: list[Encoded] = demonstrations(files, chat, longest=seq_len + 1, left_out=self.left_out)
        self.seq_len, self.seed, self.end = seq_len, seed, chat.end
        self.tokenizer_sha256 = chat.tokenizer_sha256
        self.fingerprint = fingerprint(files, chat, "next-fit", seq_len, seed)
        self._rows = lru_cache(maxsize=2)(self._pack)
        self._starts = [0]  # row at which each epoch begins

    @property
    def samples_per_epoch(self) -> int:
        """Rows of the first epoch; others differ by a few."""
        return len(self._rows(0))

    def batch(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """``count`` rows from ``first``.

        ``tokens``, ``targets`` and ``segments``: (B, T) int64; ``weight``: (B, T) fp32, 1 where the target is
        the model's own to write. What is left of a row is a segment of end tokens of weight 0.
        """
        import torch

        shape = (count, self.seq_len)
        tokens, targets = np.full(shape, self.end, np.int64), np.full(shape, self.end, np.int64)
        segments, weight = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        for b in range(count):
            at = 0
            for number, i in enumerate(self._row(first + b), 1):
                example = self.examples[i]
                part = slice(at, at + len(example.ids) - 1)
                tokens[b, part], targets[b, part] = example.ids[:-1], example.ids[1:]
                segments[b, part], weight[b, part] = number, example.learn[1:]
                at = part.stop
        arrays = {"tokens": tokens, "targets": targets, "segments": segments, "weight": weight}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _row(self, n: int) -> list[int]:
        """Which conversations the n-th row of the run holds."""
        while self._starts[-1] <= n:
            self._starts.append(self._starts[-1] + len(self._rows(len(self._starts) - 1)))
        epoch = next(e for e in range(len(self._starts) - 2, -1, -1) if self._starts[e] <= n)
        return self._rows(epoch)[n - self._starts[epoch]]

    def _pack(self, epoch: int) -> list[list[int]]:
        rows: list[list[int]] = []
        room = 0
        for i in shuffled(len(self.examples), self.seed, epoch).tolist():
            size = len(self.examples[i].ids) - 1
            if size > room:
                rows.append([])
                room = self.seq_len
            rows[-1].append(i)
            room -= size
        return rows
