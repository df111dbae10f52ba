"""When a policy has gone astray: bounds on what it does, and a reward that rises where nobody looks.

A step or an evaluation beyond a bound is a warning; after so many on end the run is saved and stops.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from orchestrator.errors import TrainingError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

HELD_OUT = "held-out "  # before the name of what evaluations count


class Gates:
    """The bounds of ``options``: ``max_kl`` to ``max_logp_gap`` for ``patience`` steps, ``hack_patience`` evaluations.

    Args:
        more: the part of a run's state that is kept here; plain values.
        watched: what is judged on held-out prompts and not learned from.
        evidence: the folder to look at where it stops.
    """

    def __init__(self, options: Any, more: dict[str, Any], watched: Sequence[str], *, evidence: Path) -> None:
        self.o, self.more, self.watched, self.evidence = options, more, ["reward", *watched], evidence

    def step(self, facts: dict[str, float]) -> None:
        """Look at the metrics of a step."""
        self.more.setdefault("rewards", []).append(facts["reward"])  # since the evaluation before
        for name, bound, sign in self._bounds():
            self._count(name, bound, sign * (facts[name] - bound) > 0, f"{facts[name]:.4g}, beyond {bound:g}")

    def evaluation(self, judged: dict[str, torch.Tensor]) -> None:
        """Look for reward hacking: up in training, while on held-out prompts it has fallen, or a watched rule has.

        Up is a mean over the steps since the evaluation before that is above the first such mean. Fallen is what is
        two standard errors below the first evaluation (Gao et al. 2022, arXiv:2210.10760, show how a learned reward
        goes on rising while what it stands for falls).
        """
        first, rewards = self.more.setdefault("first", {}), self.more.pop("rewards", [])
        up = bool(rewards) and fmean(rewards) > self.more.setdefault("first_reward", fmean(rewards))
        for name in self.watched:
            mean, error = judged[name].mean().item(), judged[name].std(correction=0).item() / len(judged[name]) ** 0.5
            began = first.setdefault(name, mean)
            fallen = mean < began - 2 * error
            said = f"{mean:.4g} on held-out prompts and was {began:.4g}, while the reward in training rose"
            self._count(HELD_OUT + name, began, up and fallen, said)

    def astray(self) -> TrainingError | None:
        """Why the run should not go on: a bound that was passed too often on end."""
        bounds = {name: bound for name, bound, _ in self._bounds()}
        for name, (bound, times) in self.more.get("beyond", {}).items():
            if times >= self._patience(name) and bound == bounds.get(name, bound):
                other = "a larger `hack_patience`" if name.startswith(HELD_OUT) else "another bound or `patience`"
                return TrainingError(
                    f"{name} was out of bounds {times} times on end",
                    hint=f"the curves and `{self.evidence}` show how; `orch resume` with {other} goes on, and under "
                    "another `name` a lower `optimizer.lr` or a higher `kl_coef` may help",
                )
        return None

    def _bounds(self) -> list[tuple[str, float, int]]:
        """What is bounded, by what, and on which side: 1 from above, -1 from below."""
        o = self.o
        return [
            ("kl", o.max_kl, 1),
            ("entropy", o.min_entropy, -1),
            ("length", o.min_length, -1),
            ("logp_gap", o.max_logp_gap, 1),
        ]

    def _patience(self, name: str) -> int:
        return int(self.o.hack_patience if name.startswith(HELD_OUT) else self.o.patience)

    def _count(self, name: str, bound: float, beyond: bool, said: str) -> None:
        """Count for how many times on end ``name`` has been beyond ``bound``; a changed bound begins anew."""
        counts = self.more.setdefault("beyond", {})
        before, times = counts.get(name, (bound, 0))
        counts[name] = [bound, (times if before == bound else 0) + 1 if beyond else 0]
        if beyond:
            log.warning("%s is %s: %d of %d times on end", name, said, counts[name][1], self._patience(name))
