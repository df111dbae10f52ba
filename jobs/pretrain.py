"""Stage `pretrain`: next-token prediction on packed text (Radford et al. 2019; Brown et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.runtime.job import Job

if TYPE_CHECKING:
    import torch

PER_GPU = True


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `stages.<name>.options` may say."""

    final_eval_samples: int | None = None  # sequences in the last evaluation; None: the whole held-out split


def run(job: Job) -> dict[str, float]:
    """Train the experiment's model on its data."""
    from jobs.data.packed import PackedDataset
    from jobs.nn.gpt import GPT
    from jobs.runtime import loop, start

    model, data = job.experiment.model, job.experiment.data
    train = PackedDataset.open(data, seq_len=model.seq_len, split="train", vocab=model.vocab)
    held_out = PackedDataset.open(data, seq_len=model.seq_len, split="val", vocab=model.vocab)

    engine = start.build(job, GPT, mean_loss)
    loop.train(job, engine, train, held_out, final_eval_samples=job.options.final_eval_samples)
    return {}


def mean_loss(nll_BT: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over all tokens: every target of packed text counts."""
    return nll_BT.mean()
