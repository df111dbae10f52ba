"""Prompts in one order, and what a policy made of them as rows of tokens."""

# B rows, T tokens of prompt and response, R tokens of a response

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from jobs.data.examples import Prompt, fingerprint, prompts, shuffled

if TYPE_CHECKING:
    import torch

    from jobs.data.chat import Chat
    from jobs.data.examples import Files


class Prompts:
    """Prompts in one global order, which depends on the seed and the epoch alone."""

    def __init__(self, files: Files, chat: Chat, *, longest: int, seed: int) -> None:
        self.left_out: Counter[str] = Counter()
        self.prompts: list[Prompt] = prompts(files, chat, longest=longest, left_out=self.left_out)
        self.end = chat.end
        self.tokenizer_sha256 = chat.tokenizer_sha256
        self.fingerprint = fingerprint(files, chat, "prompts", longest, seed)
        self._order = lru_cache(maxsize=2)(lambda epoch: shuffled(len(self.prompts), seed, epoch))

    @property
    def samples_per_epoch(self) -> int:
        """Prompts."""
        return len(self.prompts)

    def take(self, first: int, count: int) -> list[Prompt]:
        """``count`` prompts from ``first``, over all epochs."""
        places = (divmod(n, len(self.prompts)) for n in range(first, first + count))
        return [self.prompts[self._order(epoch)[place]] for epoch, place in places]

    def batch(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """The prompts alone, to read behind an end token: ``tokens``, ``targets`` and ``weight``, (B, T)."""
        rows = Rows.of([[self.end]] * count, [p.ids for p in self.take(first, count)], self.end)
        ids, at = rows.ids_BT, rows.at_BR
        weight = rows.mask_BR.new_zeros(ids[:, 1:].shape).scatter_add_(1, at, rows.mask_BR)
        return {"tokens": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous(), "weight": weight}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Prompts and responses end to end, padded on the right, so that no mask is needed to read them."""

    ids_BT: torch.Tensor  # int64; the end token behind a response
    at_BR: torch.Tensor  # int64: the token before the r-th of the response, where that is predicted and valued
    mask_BR: torch.Tensor  # fp32; 1 where a response has a token, its end token included
    last_B: torch.Tensor  # int64: the last token of the response

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad: int) -> Rows:
        """Rows as wide as the longest."""
        import torch

        width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        longest = max(map(len, responses))
        ids = np.full((len(prompts), width), pad, np.int64)
        for row, (p, r) in enumerate(zip(prompts, responses, strict=True)):
            ids[row, : len(p) + len(r)] = [*p, *r]
        before = np.array([len(p) - 1 for p in prompts])
        count = np.array([len(r) for r in responses])
        inside = np.arange(longest) < count[:, None]
        at = np.where(inside, before[:, None] + np.arange(longest), before[:, None])
        return cls(
            ids_BT=torch.from_numpy(ids),
            at_BR=torch.from_numpy(at),
            mask_BR=torch.from_numpy(inside.astype(np.float32)),
            last_B=torch.from_numpy(before + count),
        )

    def take(self, rows: Sequence[int]) -> Rows:
        """Some of the rows, as wide as the longest of them; as many tokens of a response as ever."""
        last_B = self.last_B[rows]
        width = int(last_B.max()) + 1
        return Rows(
            ids_BT=self.ids_BT[rows][:, :width].contiguous(),
            at_BR=self.at_BR[rows],
            mask_BR=self.mask_BR[rows],
            last_B=last_B,
        )

    def pick(self, x_BT: torch.Tensor) -> torch.Tensor:
        """What ``x`` has for each token of the responses, (B, R) on the CPU; 0 behind them."""
        return x_BT.cpu().gather(1, self.at_BR) * self.mask_BR
