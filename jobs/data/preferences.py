"""Ranked responses as batches: every response to a prompt in one element, with all pairs of better and worse.

All C(K, 2) comparisons of a prompt go into the same batch element: spread over batches they would be correlated, and
a reward model overfits within one epoch (Ouyang et al. 2022, arXiv:2203.02155, section 3.4).
"""

# R responses of all prompts of a batch, T tokens, P pairs

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from jobs.data.chat import Chat
from jobs.data.examples import Files, Ranked, fingerprint, ranked, shuffled
from orchestrator.errors import DataError

if TYPE_CHECKING:
    import torch


class Preferences:
    """Prompts with their ranked responses, in one global order."""

    def __init__(self, files: Files, chat: Chat, *, seq_len: int, seed: int, responses: int) -> None:
        self.left_out: Counter[str] = Counter()
        self.prompts: list[Ranked] = ranked(files, chat, longest=seq_len, left_out=self.left_out)
        most = max(len(p.responses) for p in self.prompts)
        if most > responses:
            raise DataError(
                f"a prompt of {', '.join(files.names)} has {most} responses, and `options.responses` is {responses}",
                hint=f"`options.responses={most}`, for which the plan makes room: they are in memory at once",
            )
        self.kinds = sorted({p.kind for p in self.prompts})
        self.end = chat.end
        self.tokenizer_sha256 = chat.tokenizer_sha256
        self.fingerprint = fingerprint(files, chat, "ranked", seq_len, seed)
        self._order = lru_cache(maxsize=2)(lambda epoch: shuffled(len(self.prompts), seed, epoch))
        self.first_response = np.cumsum([0, *(len(p.responses) for p in self.prompts)])  # of each prompt, over all

    @property
    def samples_per_epoch(self) -> int:
        """Prompts."""
        return len(self.prompts)

    def batch(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """The responses to ``count`` prompts from ``first``.

        ``tokens`` and ``targets``: (R, T) int64, padded on the right; ``learn``: (R, T) fp32, 1 where a target is the
        model's own to write; ``last``: (R,), the place of each response's last token; ``response``: (R,), its number
        over all; ``pairs``: (P, 2), rows of the better and the worse; ``pair_weight``: (P,) fp32, 1 / C(K, 2) each;
        ``kind``: (P,), places in ``kinds``.
        """
        import torch

        chosen = [self._prompt(n) for n in range(first, first + count)]
        rows = [(self.first_response[i] + k, r) for i in chosen for k, r in enumerate(self.prompts[i].responses)]
        width = max(len(r.ids) for _, r in rows)
        tokens = np.full((len(rows), width + 1), self.end, np.int64)
        learn = np.zeros((len(rows), width + 1), np.float32)
        for row, (_, response) in enumerate(rows):
            tokens[row, : len(response.ids)], learn[row, : len(response.ids)] = response.ids, response.learn
        pairs, weights, kinds, at = [], [], [], 0
        for i in chosen:
            k = len(self.prompts[i].responses)
            pairs += [(at + better, at + worse) for better, worse in combinations(range(k), 2)]
            weights += [2 / (k * (k - 1))] * (k * (k - 1) // 2)
            kinds += [self.kinds.index(self.prompts[i].kind)] * (k * (k - 1) // 2)
            at += k
        arrays = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "learn": learn[:, 1:],
            "last": np.array([len(r.ids) - 1 for _, r in rows]),
            "response": np.array([n for n, _ in rows], np.int64),
            "pairs": np.array(pairs),
            "pair_weight": np.array(weights, np.float32),
            "kind": np.array(kinds),
        }
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    def _prompt(self, n: int) -> int:
        """Which prompt the n-th sample of the run is."""
        epoch, place = divmod(n, len(self.prompts))
        return int(self._order(epoch)[place])
