"""When a policy has gone astray: bounds on what it does, and a reward that rises where nobody looks.

A step or an evaluation beyond a bound is a warning; so many on end stop the run, before its next step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import TrainingError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class Gates:
    """The bounds of ``options`` (``max_kl``, ``min_entropy``, ``min_length``, ``max_logp_gap``, ``patience``).

    Args:
        more: the part of a run's state that is kept here; plain values.
        watched: what is judged on held-out prompts and not learned from.
        evidence: the folder to look at where it stops.
    """

    def __init__(self, options: Any, more: dict[str, Any], watched: Sequence[str], *, evidence: Path) -> None:
        self.o, self.more, self.watched, self.evidence = options, more, ["reward", *watched], evidence

    def step(self, facts: dict[str, float]) -> None:
        """Look at the metrics of a step."""
        self.more.setdefault("first_reward", facts["reward"])
        self.more["last_reward"] = facts["reward"]
        for name, bound, sign in (
            ("kl", self.o.max_kl, 1),
            ("entropy", self.o.min_entropy, -1),
            ("length", self.o.min_length, -1),
            ("logp_gap", self.o.max_logp_gap, 1),
        ):
            self._count(name, sign * (facts[name] - bound) > 0, f"{facts[name]:.4g}, beyond {bound:g}")

    def evaluation(self, judged: dict[str, torch.Tensor]) -> None:
        """Look for reward hacking: up in training, while on held-out prompts it has fallen, or a watched rule has.

        Fallen is what is two standard errors below the first evaluation (Gao et al. 2022, arXiv:2210.10760, show how
        a learned reward goes on rising while what it stands for falls).
        """
        first = self.more.setdefault("first", {name: judged[name].mean().item() for name in self.watched})
        up = self.more.get("last_reward", 0.0) > self.more.get("first_reward", 0.0)
        for name in self.watched:
            mean, error = judged[name].mean().item(), judged[name].std(correction=0).item() / len(judged[name]) ** 0.5
            fallen = mean < first[name] - 2 * error
            said = f"{mean:.4g} on held-out prompts and was {first[name]:.4g}, while the reward in training rose"
            self._count(f"held-out {name}", up and fallen, said)

    def check(self) -> None:
        """Raise TrainingError where a bound was passed too often on end."""
        for name, times in self.more.get("beyond", {}).items():
            if times >= self.o.patience:
                raise TrainingError(
                    f"{name} was out of bounds {times} times on end",
                    hint=f"the curves and `{self.evidence}` show how; lower `optimizer.lr`, or raise "
                    "`options.kl_coef` or the bound, and `orch resume` with it",
                )

    def _count(self, name: str, beyond: bool, said: str) -> None:
        counts = self.more.setdefault("beyond", {})
        counts[name] = counts.get(name, 0) + 1 if beyond else 0
        if beyond:
            log.warning("%s is %s: %d of %d times on end", name, said, counts[name], self.o.patience)
