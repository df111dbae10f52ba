"""Stage `sft`: supervised fine-tuning on demonstrations (Ouyang et al. 2022, arXiv:2203.02155, section 3.5).

The loss is on what the model is to write, not on what it reads. Conversations are packed into rows of the model's
context, where none sees another. `val/loss` is in nats per token of the held-out responses.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.runtime.job import Job

if TYPE_CHECKING:
    import torch

PER_GPU = True
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `stages.<name>.options` may say."""

    examples: str = "demonstrations"  # of `data.examples`
    epochs: float | None = None  # passes over the examples at which to end, if that is before `steps`


def run(job: Job) -> dict[str, float]:
    """Train on the demonstrations."""
    from jobs.data.chat import Chat
    from jobs.data.examples import files_of
    from jobs.data.packing import Demonstrations
    from jobs.nn.gpt import GPT
    from jobs.runtime import loop, start

    data, seq_len = job.experiment.data, job.experiment.model.seq_len
    chat = Chat.open(data)
    train = Demonstrations(files_of(data, job.options.examples, "train"), chat, seq_len=seq_len, seed=data.seed)
    held_out = Demonstrations(files_of(data, job.options.examples, "val"), chat, seq_len=seq_len, seed=0)
    log.info("%d conversations in %d rows", len(train.examples), train.samples_per_epoch)
    log.info("left out: %s; of what is held out: %s", dict(train.left_out), dict(held_out.left_out))
    job = start.limited_to(job, train.samples_per_epoch, job.options.epochs)
    loop.train(job, start.build(job, GPT, loss), train, held_out)
    return {}


def loss(nll_BT: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over the tokens of the responses, all of the step's alike; the loop has scaled ``weight`` for that."""
    return (nll_BT * batch["weight"].to(nll_BT.device)).sum()
