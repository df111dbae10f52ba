"""Stage `reward`: a model of human preferences (Ouyang et al. 2022, arXiv:2203.02155, section 3.5).

A number for each text, trained so that better responses score higher than worse ones to the same prompt. At the end
its scores are normalised: the best responses it was trained on score 0 in the mean, with standard deviation 1. That,
and how often it is right on held-out pairs, goes to `reward.json` in the run folder, for the stage that learns from it.

Metrics, on held-out pairs: `val/loss` is equation 1 in nats, `val/accuracy` the share of pairs in the right order, and
`val/calibration_error` how far the share that is right is from the sigmoid of the difference, which claims it (the mean
over ten bins of equal claims, weighted by pairs; Guo et al. 2017, arXiv:1706.04599). Where the lines of the examples
have a `kind`, `reward.json` has the accuracy of each.
"""

from __future__ import annotations

import logging
import statistics
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from jobs.runtime.job import Job
from orchestrator.run import write_json

if TYPE_CHECKING:
    import torch

    from jobs.data.preferences import Preferences
    from jobs.engines import Batch, Engine

PER_GPU = True
FILE = "reward.json"  # in the run folder
REFERENCE = 1024  # responses that the scores are normalised on, at most
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `stages.<name>.options` may say."""

    examples: str = "preferences"  # of `data.examples`
    epochs: float | None = None  # passes over the prompts at which to end, if that is before `steps`
    responses: int = 2  # to one prompt, at most: the plan makes room for as many, and more are an error


def run(job: Job) -> dict[str, float]:
    """Train on the preferences, then normalise."""
    from jobs.data.chat import Chat
    from jobs.data.examples import files_of
    from jobs.data.preferences import Preferences
    from jobs.nn.heads import Scorer
    from jobs.runtime import loop, pairs, start

    data, name = job.experiment.data, job.options.examples
    chat = Chat.open(data)
    ranked = partial(Preferences, chat=chat, seq_len=job.experiment.model.seq_len, responses=job.options.responses)
    train = ranked(files_of(data, name, "train"), seed=data.seed)
    held_out = ranked(files_of(data, name, "val"), seed=0)
    log.info("%d prompts", train.samples_per_epoch)
    log.info("left out: %s; of what is held out: %s", dict(train.left_out), dict(held_out.left_out))
    job = start.limited_to(job, train.samples_per_epoch, job.options.epochs)
    engine = start.build(job, Scorer, loss)

    def told(samples: int) -> list[pairs.Pair]:
        return pairs.told(job, held_out, samples, partial(differences, engine))

    loop.train(job, engine, train, held_out, judge=lambda _, samples: pairs.measured(told(samples)))
    every = told(held_out.samples_per_epoch)
    mean, std = reference_scores(job, engine, train)
    facts = {
        "mean": mean,
        "std": std,
        "accuracy": pairs.measured(every)["val/accuracy"],
        "kinds": pairs.by_kind(every),
        "template": chat.sha256,
        "step": job.stage.steps,
        "calibration": pairs.calibration(every),
    }
    if job.ranks.rank == 0:
        write_json(job.run.folder / FILE, facts)
    return {}


def loss(scores_RT: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Equation 1: the mean over the prompts of the mean over their pairs."""
    from jobs.nn.rl import pairwise_loss

    better_P, worse_P, weight_P = compared(scores_RT, batch)
    return pairwise_loss(better_P, worse_P, weight_P) / weight_P.sum()


def differences(engine: Engine, batch: Batch) -> torch.Tensor:
    """How much higher the better response of each pair scores, (P,). Collective."""
    better_P, worse_P, _ = compared(engine.forward(batch).cpu(), batch)
    return better_P - worse_P


def compared(scores_RT: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Scores of the better and of the worse response of each pair, and its weight, (P,) each."""
    at = {name: batch[name].to(scores_RT.device) for name in ("last", "pairs", "pair_weight")}
    score_R = scores_RT.gather(1, at["last"][:, None])[:, 0]
    return score_R[at["pairs"][:, 0]], score_R[at["pairs"][:, 1]], at["pair_weight"]


def reference_scores(job: Job, engine: Engine, data: Preferences) -> tuple[float, float]:
    """Mean and standard deviation of the scores of the best responses of the first prompts. Collective."""
    from jobs.runtime import dist, loop

    found: list[float] = []
    for batch, count in loop.in_turns(job, data, REFERENCE):
        scores_R = engine.forward(batch).cpu().gather(1, batch["last"][:, None])[:, 0]
        best = sorted(set(batch["pairs"][:, 0].tolist()) - set(batch["pairs"][:, 1].tolist()))
        found += [scores_R[row].item() for row in best] if count else []
    mine = found if not (job.place.tensor or job.place.pipeline) else []
    scores = [s for of_rank in dist.gather(mine) for s in of_rank]
    return statistics.fmean(scores), statistics.pstdev(scores)
