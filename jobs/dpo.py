"""Stage `dpo`: preferences without a reward model (Rafailov et al. 2023, arXiv:2305.18290).

The model of `init_from` is the reference. It stays frozen beside the one that learns, and reads every batch first.

Metrics, on held-out pairs: `val/loss` is equation 7 in nats, log 2 before the first step; `val/accuracy` the share of
pairs whose margin is above 0; `val/margin` the mean margin, beta times the difference of the log-ratios; and
`val/calibration_error` as in stage `reward`.
"""

# R responses, T tokens, P pairs

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from jobs.data.preferences import Preferences
from jobs.runtime.job import Job

if TYPE_CHECKING:
    import torch

    from jobs.data.chat import Chat
    from jobs.data.examples import Files
    from jobs.engines import Batch, Engine
    from jobs.engines.torch import Frozen

PER_GPU = True
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `stages.<name>.options` may say."""

    examples: str = "preferences"  # of `data.examples`
    epochs: float | None = None  # passes over the prompts at which to end, if that is before `steps`
    responses: int = 2  # to one prompt, at most: the plan makes room for as many, and more are an error
    beta: float = 0.1  # how dear it is to leave the reference (section 6: 0.1, for summaries 0.5)


def run(job: Job) -> dict[str, float]:
    """Train on the preferences."""
    from jobs.data.chat import Chat
    from jobs.data.examples import files_of
    from jobs.nn.gpt import GPT
    from jobs.runtime import loop, pairs, start

    data, options, source = job.experiment.data, job.options, job.stage.init_from
    assert source, "orchestrator/contracts.py asks for it"
    chat = Chat.open(data)
    reference = start.frozen(job, GPT, source, chat.tokenizer_sha256)
    version = job.record.loaded[source]["manifest_sha256"]
    seq_len = job.experiment.model.seq_len
    referenced = partial(Referenced, reference, version, chat=chat, seq_len=seq_len, responses=options.responses)
    train = referenced(files_of(data, options.examples, "train"), seed=data.seed)
    held_out = referenced(files_of(data, options.examples, "val"), seed=0)
    log.info("%d prompts", train.samples_per_epoch)
    log.info("left out: %s; of what is held out: %s", dict(train.left_out), dict(held_out.left_out))
    job = start.limited_to(job, train.samples_per_epoch, options.epochs)
    engine = start.build(job, GPT, partial(loss, beta=options.beta))

    def judge(_: object, samples: int) -> dict[str, float]:
        told = pairs.told(job, held_out, samples, partial(margins, engine, beta=options.beta))
        return pairs.measured(told) | {"val/margin": sum(p.difference for p in told) / len(told)}

    loop.train(job, engine, train, held_out, judge=judge)
    return {}


class Referenced(Preferences):
    """Preferences with `reference` (R,) in each batch: the log-probability of each response in a frozen model."""

    def __init__(self, reference: Frozen, version: str, files: Files, chat: Chat, **sizes: int) -> None:
        super().__init__(files, chat, **sizes)
        self.reference = reference
        self.fingerprint = hashlib.sha256(f"{self.fingerprint}/{version}".encode()).hexdigest()

    def batch(self, first: int, count: int) -> Batch:
        """As of Preferences. Collective."""
        batch = super().batch(first, count)
        return batch | {"reference": log_probs(self.reference.forward(batch).cpu(), batch)}


def loss(nll_RT: torch.Tensor, batch: Batch, *, beta: float) -> torch.Tensor:
    """Equation 7: the mean over the prompts of the mean over their pairs."""
    loss_P, _ = compared(nll_RT, batch, beta)
    weight_P = batch["pair_weight"].to(loss_P.device)
    return (loss_P * weight_P).sum() / weight_P.sum()


def margins(engine: Engine, batch: Batch, *, beta: float) -> torch.Tensor:
    """The margin of each pair, (P,). Collective."""
    return compared(engine.forward(batch).cpu(), batch, beta)[1]


def compared(nll_RT: torch.Tensor, batch: Batch, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and margin of each pair, (P,) each."""
    from jobs.nn.rl import dpo_loss

    logp_R = log_probs(nll_RT, batch)
    reference_R, (better_P, worse_P) = batch["reference"].to(logp_R.device), batch["pairs"].to(logp_R.device).T
    return dpo_loss(logp_R[better_P], logp_R[worse_P], reference_R[better_P], reference_R[worse_P], beta)


def log_probs(nll_RT: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probability of each response, end token included, (R,)."""
    return -(nll_RT * batch["learn"].to(nll_RT.device)).sum(1)
