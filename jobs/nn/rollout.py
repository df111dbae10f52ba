"""Sampling from a model: batched, with keys and values cached, prompts padded on the left.

What is drawn is a function of (seed, number of the sample, token) alone, not of a stream of random numbers, so a
run that is killed in the middle of it samples the same text again, on any number of ranks.

Shape suffixes: B samples, P prompt tokens (padded), T response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jobs.data.order import GOLDEN, key, mix_bits
from jobs.nn.gpt import GPT, Cache
from orchestrator.errors import DataError

HELD_OUT = 2**40  # number of the first held-out sample: no step of training draws as it does
FINISHED = 0.5  # share of the rows that may be finished before they are left out of the batch


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    max_tokens: int = 256  # of a response, its end token included
    temperature: float = 1.0  # logits are divided by it; 0: the most likely token
    top_k: int = 0  # among so many most likely; 0: all
    top_p: float = 1.0  # among the most likely that together have this probability (arXiv:1904.09751)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Responses and what the model thought of them, at the temperature they were sampled with."""

    tokens_BT: Tensor  # int64; the end token where a response is over
    mask_BT: Tensor  # fp32; 1 where a response has a token, its end token included
    logp_BT: Tensor  # fp32; before top-k and top-p; 0 behind the end
    entropy_BT: Tensor  # fp32, nats; 0 behind the end

    def responses(self) -> list[list[int]]:
        """The tokens of each response."""
        lengths = self.mask_BT.sum(1).long().tolist()
        return [row[:n] for row, n in zip(self.tokens_BT.tolist(), lengths, strict=True)]


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    end: int,
    seed: int,
    first: int = 0,
    watch: Callable[[Tensor], None] | None = None,
) -> Rollout:
    """One response to each of ``prompts``, up to and with the token ``end``, or to ``max_tokens``.

    Args:
        model: the whole model; its dropout is off meanwhile.
        first: number of the first sample; the i-th has ``first + i``.
        watch: called with each next token of all samples (B,), the end token where one is over.

    Raises:
        DataError: prompt and response are longer than the model's context.
    """
    device = next(model.parameters()).device
    tokens_BP, segments_BS = left_padded(prompts, end, sampling.max_tokens)
    _check_room(model, tokens_BP.shape[1], sampling.max_tokens)
    shape = (len(prompts), sampling.max_tokens)
    out = Rollout(
        tokens_BT=torch.full(shape, end, device=device),
        mask_BT=torch.zeros(shape, device=device),
        logp_BT=torch.zeros(shape, device=device),
        entropy_BT=torch.zeros(shape, device=device),
    )
    caches = [Cache(segments_BS.shape[1] - 1) for _ in model.blocks]
    tokens_BP, segments_BS = tokens_BP.to(device), segments_BS.to(device)
    draws_BT = torch.from_numpy(uniform(seed, first, *shape)).to(device)
    rows = torch.arange(len(prompts), device=device)  # which samples the batch holds
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    training, now = model.training, tokens_BP
    model.eval()
    try:
        for t in range(sampling.max_tokens):
            seen_BS = segments_BS[rows, : tokens_BP.shape[1] + t]
            logits_BV = model.to_vocabulary(model.hidden(now, seen_BS, caches)[:, -1:])[:, 0].float()
            chosen, logp, spread = choose(logits_BV, sampling, draws_BT[rows, t])
            going = ~done[rows]
            out.tokens_BT[rows[going], t] = chosen[going]
            out.logp_BT[rows[going], t], out.entropy_BT[rows[going], t] = logp[going], spread[going]
            out.mask_BT[rows[going], t] = 1.0
            done[rows] |= chosen == end
            if watch:
                watch(out.tokens_BT[:, t])
            if done.all():
                break
            now = out.tokens_BT[rows, t : t + 1]
            left = ~done[rows]
            if left.sum() <= FINISHED * len(rows):
                rows, now = rows[left], now[left]
                for cache in caches:
                    cache.keep(left)
    finally:
        model.train(training)
    return out


def choose(logits_BV: Tensor, sampling: Sampling, draw_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Next tokens (B,), their log-probabilities and the entropies at the sampling temperature.

    Args:
        draw_B: numbers in [0, 1) that decide: the first token whose cumulated share is above it.
    """
    scaled_BV = logits_BV / sampling.temperature if sampling.temperature > 0 else logits_BV
    logp_BV = torch.log_softmax(scaled_BV, -1)
    p_BV = logp_BV.exp()
    entropy_B = -(p_BV * logp_BV).sum(-1)  # of logits that are finite
    if sampling.temperature == 0:
        chosen_B = logits_BV.argmax(-1)
    elif not sampling.top_k and sampling.top_p >= 1:
        share_BV = p_BV.cumsum(-1, dtype=torch.float64)
        at_B = torch.searchsorted(share_BV, (draw_B * share_BV[:, -1])[:, None], right=True)[:, 0]
        chosen_B = at_B.clamp(max=logits_BV.shape[1] - 1)
    else:
        p_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = p_BV.cumsum(-1) - p_BV
        out_BV = before_BV >= sampling.top_p
        if sampling.top_k:
            out_BV[:, sampling.top_k :] = True
        share_BV = p_BV.masked_fill(out_BV, 0.0).double().cumsum(-1)
        at_B = torch.searchsorted(share_BV, (draw_B * share_BV[:, -1])[:, None], right=True)[:, 0]
        last_B = (~out_BV).sum(-1) - 1
        chosen_B = order_BV.gather(1, at_B.minimum(last_B)[:, None])[:, 0]
    return chosen_B, logp_BV.gather(1, chosen_B[:, None])[:, 0], entropy_B


def left_padded(prompts: Sequence[Sequence[int]], pad: int, room: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, P), padded on the left, and segments (B, P + room): 0 for the padding, 1 for the rest."""
    longest = max(map(len, prompts))
    tokens_BP = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts])
    lengths_B1 = torch.tensor([[len(p)] for p in prompts])
    segments_BS = (torch.arange(longest + room) >= longest - lengths_B1).long()
    return tokens_BP, segments_BS


def uniform(seed: int, first: int, samples: int, tokens: int) -> np.ndarray:
    """Numbers in [0, 1), (samples, tokens) fp64: what decides each token of each sample."""
    start = key(seed, "rollout")
    sample = mix_bits(start + np.arange(first, first + samples, dtype=np.uint64) * GOLDEN)
    bits = mix_bits(sample[:, None] + np.arange(1, tokens + 1, dtype=np.uint64) * GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _check_room(model: GPT, prompt: int, response: int) -> None:
    if model.spec.position == "learned" and prompt + response - 1 > model.spec.seq_len:
        raise DataError(
            f"a prompt of {prompt} tokens and a response of up to {response} do not fit the model's "
            f"{model.spec.seq_len} positions",
            hint=f"ask for at most {max(model.spec.seq_len + 1 - prompt, 0)} tokens, or cut the prompt",
        )
