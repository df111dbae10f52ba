"""Stage `reward`: a model of human preferences (Ouyang et al. 2022, arXiv:2203.02155, section 3.5).

A number for each text, trained so that better responses score higher than worse ones to the same prompt. At the end
its scores are normalised: the best responses it was trained on score 0 in the mean, with standard deviation 1. That,
and how often it is right on held-out pairs, goes to `reward.json` in the run folder, for the stage that learns from it.

Metrics, on held-out pairs: `val/loss` is equation 1 in nats, `val/accuracy` the share of pairs in the right order, and
`val/calibration_error` how far the share that is right is from the sigmoid of the difference, which claims it (the mean
over ten bins of equal claims, weighted by pairs; Guo et al. 2017, arXiv:1706.04599).
"""

from __future__ import annotations

import logging
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.runtime.job import Job
from orchestrator.run import write_json

if TYPE_CHECKING:
    import torch

    from jobs.data.preferences import Preferences
    from jobs.engines import Engine
    from jobs.runtime.loop import Samples

PER_GPU = True
FILE = "reward.json"  # in the run folder
REFERENCE = 1024  # responses that the scores are normalised on, at most
BINS = 10
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `stages.<name>.options` may say."""

    examples: str = "preferences"  # of `data.examples`
    epochs: float | None = None  # passes over the prompts at which to end, if that is before `steps`


def run(job: Job) -> dict[str, float]:
    """Train on the preferences, then normalise."""
    from jobs.data.chat import Chat
    from jobs.data.examples import files_of
    from jobs.data.preferences import Preferences
    from jobs.nn.heads import Scorer
    from jobs.runtime import loop, start

    data, seq_len, name = job.experiment.data, job.experiment.model.seq_len, job.options.examples
    chat = Chat.open(data)
    train = Preferences(files_of(data, name, "train"), chat, seq_len=seq_len, seed=data.seed)
    held_out = Preferences(files_of(data, name, "val"), chat, seq_len=seq_len, seed=0)
    log.info("%d prompts; left out: %s", train.samples_per_epoch, dict(train.left_out))
    job = start.limited_to(job, train.samples_per_epoch, job.options.epochs)
    engine = start.build(job, Scorer, loss)
    loop.train(job, engine, train, held_out, judge=lambda *what: judge(job, engine, *what)[0])
    values, curve = judge(job, engine, held_out, held_out.samples_per_epoch)
    mean, std = reference_scores(job, engine, train)
    if job.ranks.rank == 0:
        facts = {"mean": mean, "std": std, "accuracy": values["val/accuracy"], "template": chat.sha256}
        write_json(job.run.folder / FILE, facts | {"step": job.stage.steps, "calibration": curve})
    return {}


def loss(scores_RT: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Equation 1: the mean over the prompts of the mean over their pairs."""
    from jobs.nn.rl import pairwise_loss

    better_P, worse_P, weight_P = compared(scores_RT, batch)
    return pairwise_loss(better_P, worse_P, weight_P) / weight_P.sum()


def compared(scores_RT: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Scores of the better and of the worse response of each pair, and its weight, (P,) each."""
    at = {name: batch[name].to(scores_RT.device) for name in ("last", "pairs", "pair_weight")}
    score_R = scores_RT.gather(1, at["last"][:, None])[:, 0]
    return score_R[at["pairs"][:, 0]], score_R[at["pairs"][:, 1]], at["pair_weight"]


def judge(job: Job, engine: Engine, data: Samples, samples: int) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The metrics over the first ``samples`` prompts, and what is in each bin of the calibration curve. Collective."""
    from jobs.runtime import dist, loop

    told: list[tuple[float, float, float]] = []  # of each pair: difference, weight, and 1 if it is right
    for batch, count in loop.in_turns(job, data, samples):
        better_P, worse_P, weight_P = compared(engine.forward(batch).cpu(), batch)
        if count:
            told += [
                (d, w, float(d > 0)) for d, w in zip((better_P - worse_P).tolist(), weight_P.tolist(), strict=True)
            ]
    mine = told if not (job.place.tensor or job.place.pipeline) else []  # peers say the same
    return measured([pair for of_rank in dist.gather(mine) for pair in of_rank])


def measured(pairs: list[tuple[float, float, float]]) -> tuple[dict[str, float], list[dict[str, float]]]:
    """What ``judge`` returns, from the difference, weight and rightness of each pair."""
    weight = sum(w for _, w, _ in pairs)
    nats = sum(w * math.log1p(math.exp(-abs(d))) + w * max(-d, 0.0) for d, w, _ in pairs) / weight
    curve = []
    for low in range(BINS):
        claims = [(1 / (1 + math.exp(-abs(d))), right) for d, _, right in pairs]  # from one half to one
        inside = [(c, right) for c, right in claims if low <= min((c - 0.5) * 2 * BINS, BINS - 0.5) < low + 1]
        if inside:
            claimed, right = (sum(x) / len(inside) for x in zip(*inside, strict=True))
            curve.append({"claimed": claimed, "right": right, "pairs": len(inside)})
    error = sum(abs(b["claimed"] - b["right"]) * b["pairs"] for b in curve) / len(pairs)
    accuracy = sum(right for *_, right in pairs) / len(pairs)
    return {"val/loss": nats, "val/accuracy": accuracy, "val/calibration_error": error}, curve


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
