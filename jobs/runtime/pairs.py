"""How well the better response of a pair is told from the worse: what `reward` and `dpo` measure on held-out pairs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.runtime import dist, loop
from jobs.runtime.job import Job
from orchestrator.errors import DataError

if TYPE_CHECKING:
    import torch

    from jobs.data.preferences import Preferences
    from jobs.engines import Batch

BINS = 10


class Pair(NamedTuple):
    """A better and a worse response to one prompt, as a model sees them."""

    difference: float  # above 0 where it is right; its sigmoid is what it claims
    weight: float
    kind: str = ""  # of the line they came from


def told(job: Job, data: Preferences, samples: int, differences: Callable[[Batch], torch.Tensor]) -> list[Pair]:
    """The pairs of the first ``samples`` prompts, by rank. Collective.

    Args:
        differences: those of the pairs of a batch, (P,).
    """
    found: list[Pair] = []
    for batch, count in loop.in_turns(job, data, samples):
        difference_P = differences(batch).tolist()
        kinds = [data.kinds[k] for k in batch["kind"].tolist()]
        if count:
            found += map(Pair, difference_P, batch["pair_weight"].tolist(), kinds)
    mine = found if not (job.place.tensor or job.place.pipeline) else []  # peers say the same
    return [pair for of_rank in dist.gather(mine) for pair in of_rank]


def measured(pairs: list[Pair]) -> dict[str, float]:
    """The metrics of the stage's docstring. Raises DataError where there are no pairs."""
    if not pairs:
        raise DataError("no held-out pairs to judge by", hint="give the examples a `val` with ranked responses")
    nats = [math.log1p(math.exp(-abs(p.difference))) + max(-p.difference, 0.0) for p in pairs]  # -log sigmoid
    error = sum(abs(b["claimed"] - b["right"]) * b["pairs"] for b in calibration(pairs)) / len(pairs)
    return {
        "val/loss": sum(p.weight * x for p, x in zip(pairs, nats, strict=True)) / sum(p.weight for p in pairs),
        "val/accuracy": fmean(p.difference > 0 for p in pairs),
        "val/calibration_error": error,
    }


def calibration(pairs: list[Pair]) -> list[dict[str, float]]:
    """For each of ten equal ranges of claims from 1/2 to 1: the mean claim, the share that is right, how many."""
    bins: dict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        bins[min(int((_claim(pair) - 0.5) * 2 * BINS), BINS - 1)].append(pair)
    return [
        {"claimed": fmean(map(_claim, inside)), "right": fmean(p.difference > 0 for p in inside), "pairs": len(inside)}
        for _, inside in sorted(bins.items())
    ]


def by_kind(pairs: list[Pair]) -> dict[str, dict[str, Any]]:
    """Accuracy, and number of pairs, of each kind; empty where no line says its kind."""
    kinds = sorted({p.kind for p in pairs} - {""})
    right = {kind: [p.difference > 0 for p in pairs if p.kind == kind] for kind in kinds}
    return {kind: {"accuracy": fmean(of_kind), "pairs": len(of_kind)} for kind, of_kind in right.items()}


def _claim(pair: Pair) -> float:
    """How sure the model is of its order, right or wrong."""
    return 1 / (1 + math.exp(-abs(pair.difference)))
