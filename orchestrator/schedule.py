"""Learning rate and batch size as pure functions of the tokens seen. GPT-3's recipe: Brown et al. 2020, appendix B.

Both sides use them: the plan to count the tokens of a run, the job to train. Nothing of a schedule is
stored in a checkpoint but the number of tokens seen.
"""

import math
from bisect import bisect_left
from functools import partial

from orchestrator.spec import OptimizerSpec, StageSpec


def batch_at(stage: StageSpec, seen: int, seq_len: int) -> int:
    """Sequences in the step that begins after ``seen`` sequences.

    The batch grows linearly in tokens from ``ramp_from`` to ``global_batch``, in whole ``ramp_step``s.
    """
    s = stage.schedule
    tokens = seen * seq_len
    if s.ramp_from is None or tokens >= s.ramp_tokens:
        return stage.global_batch
    step = s.ramp_step or s.ramp_from
    grown = (stage.global_batch - s.ramp_from) * tokens / s.ramp_tokens
    return min(stage.global_batch, s.ramp_from + int(grown // step) * step)


def batches(stage: StageSpec, seq_len: int) -> dict[int, int]:
    """How many of the stage's steps train on each size of batch, in order."""
    found: dict[int, int] = {}
    seen, left = 0, stage.steps
    while left > 0:
        size = batch_at(stage, seen, seq_len)
        grows = partial(_grows, stage, seq_len, seen, size)
        steps = left if size == stage.global_batch else 1 + bisect_left(range(1, left), True, key=grows)
        found[size] = steps
        seen, left = seen + steps * size, left - steps
    return found


def _grows(stage: StageSpec, seq_len: int, seen: int, size: int, steps: int) -> bool:
    """Whether the batch is larger than ``size`` after ``steps`` of it."""
    return batch_at(stage, seen + steps * size, seq_len) > size


def total_tokens(stage: StageSpec, seq_len: int) -> int:
    """Tokens the whole stage trains on."""
    return seq_len * sum(size * steps for size, steps in batches(stage, seq_len).items())


def learning_rate(stage: StageSpec, tokens: int, decay_tokens: float) -> float:
    """Learning rate of the step that ends after ``tokens`` tokens.

    Linear warm-up to ``lr`` over ``warmup_tokens``, then down to ``lr * min_lr_ratio`` at
    ``decay_tokens``, and constant from there on.
    """
    s, peak = stage.schedule, stage.optimizer.lr
    if tokens < s.warmup_tokens:
        return peak * tokens / s.warmup_tokens
    if s.shape == "constant":
        return peak
    progress = min(1.0, (tokens - s.warmup_tokens) / max(1.0, decay_tokens - s.warmup_tokens))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if s.shape == "cosine" else 1 - progress
    return peak * (s.min_lr_ratio + (1 - s.min_lr_ratio) * left)


def adam_eps(optimizer: OptimizerSpec, update: int) -> float:
    """Epsilon for the ``update``-th update, the first being 1, of an AdamW that adds it to the corrected sqrt(v).

    TensorFlow 1 adds it to the uncorrected one: eps / sqrt(1 - b2^t) does the same (Kingma and Ba 2014,
    arXiv:1412.6980, the note before section 2.1). It is larger early on, so that the first steps are shorter.
    """
    if optimizer.eps_beside == "corrected":
        return optimizer.eps
    return optimizer.eps / math.sqrt(1 - optimizer.betas[1] ** update)
