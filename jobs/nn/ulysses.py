"""Ulysses (Jacobs et al. 2023, arXiv:2309.14509, section 3): ranks with all weights, and each with some of the tokens.

Everything in a model but attention and positions looks at one token at a time. Around attention DeepSpeed's
``DistributedAttention`` exchanges tokens for heads, so that each rank attends with its heads over whole rows.
Dims are named as in gpt.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jobs.nn import parallel
from orchestrator.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.nn.parallel import TensorGroup


def spread(model: Any, tokens: TensorGroup) -> None:
    """From now on ``model``, a GPT, takes this rank's tokens alone, and exchanges heads with its peers.

    Raises:
        ConfigError: the ranks do not divide the heads.
    """
    from deepspeed.sequence.layer import DistributedAttention

    heads = model.spec.kv_heads or model.spec.heads
    if heads % tokens.size:
        raise ConfigError(
            f"model: {heads} heads of keys and values do not split over {tokens.size} ulysses ranks",
            hint="`parallel.ulysses` divides `heads` and `kv_heads`",
        )
    model.tokens = tokens
    for block in model.blocks:
        exchange: Any = DistributedAttention(block.attn.attend, tokens.group, scatter_idx=2, gather_idx=1)
        block.attn.across = lambda q, k, v, mask, run=exchange: run(q, k, v, 0, None, mask)  # dim 0 is the batch


@contextmanager
def alone(model: Any) -> Iterator[None]:
    """Inside, ``model`` takes whole rows, and waits for no other rank."""
    tokens = getattr(model, "tokens", None)
    if tokens is None:
        yield
        return
    model.tokens = None
    for block in model.blocks:
        block.attn.across = None
    try:
        yield
    finally:
        spread(model, tokens)


def own(batch: dict[str, Tensor], tokens: TensorGroup) -> dict[str, Tensor]:
    """``batch`` with this rank's part of tokens and targets.

    Raises:
        DataError: the ranks do not divide the tokens.
    """
    width, left = divmod(batch["tokens"].shape[1], tokens.size)
    if left:
        raise DataError(
            f"{batch['tokens'].shape[1]} tokens do not split over {tokens.size} ulysses ranks",
            hint="pad the sequence, or `parallel.ulysses: 1`",
        )
    mine = slice(tokens.rank * width, (tokens.rank + 1) * width)
    return batch | {name: batch[name][:, mine] for name in ("tokens", "targets") if name in batch}


def joined(x_BT: Tensor, tokens: TensorGroup) -> Tensor:
    """Whole rows of what each rank has for its own tokens, on every rank.

    So all of them compute one loss, and the gradient of each is that of its own tokens times their number. Data
    parallelism, as whose ranks they are summed, takes the mean, which is then the gradient of the loss.
    """
    return parallel.enter(x_BT, tokens)
