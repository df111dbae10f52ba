"""A decoder with one number for each token in place of the vocabulary: reward models and critics.

Ouyang et al. 2022, arXiv:2203.02155, section 3.4 ("the final unembedding layer removed"). The other parameters keep
the names they have in GPT, so that either starts from the checkpoint of the other.
"""

# B rows, T tokens, S tokens and those cached before them, H hidden

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.nn.gpt import GPT, Recompute
from jobs.nn.parallel import TensorGroup
from orchestrator.spec import ModelSpec


class Score(nn.Linear):
    """The product in fp32 whatever else computes in: differences of scores, and of values, are what is learned from."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) to (..., 1) in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class Scorer(GPT):
    """``score`` of each token's last hidden state, (B, T) in fp32: of the text up to that token."""

    inputs = ("tokens", "segments")
    new = ("score.",)  # parameters that a GPT's checkpoint has not

    def __init__(self, spec: ModelSpec, *, recompute: Recompute = "none", tensor: TensorGroup | None = None) -> None:
        super().__init__(spec, recompute=recompute, tensor=tensor)
        self.head = None
        self.score = Score(spec.hidden, 1)

    def forward(self, tokens_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Scores (B, T) in fp32; ``segments`` as in GPT."""
        return self.score(self.hidden(tokens_BT, segments_BT))[..., 0]
