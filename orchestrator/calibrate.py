"""What a run took, beside what was planned; and a cluster file that plans with what was measured.

The file is a group like any in configs/cluster/: `cluster=measured` selects it.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import LaunchError
from orchestrator.plan import estimate
from orchestrator.run import Run, write_atomic
from orchestrator.spec import ClusterSpec

WARM_UP_STEPS = 2  # compilation, first allocations


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One quantity, planned and measured."""

    what: str
    unit: str
    planned: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over planned."""
        return self.measured / self.planned


def compare(run: Run) -> list[Compared]:
    """Step, speed, memory and GPU-hours of ``run``, planned now from its spec, and measured.

    Raises:
        LaunchError: it has not trained long enough to tell.
    """
    experiment = run.spec()
    stage = experiment.stages[run.stage]
    lines = [line for line in run.metrics().values() if "perf/step_s" in line]
    full = stage.global_batch * experiment.model.seq_len
    whole = [line for line in lines[WARM_UP_STEPS:] if _tokens(line) >= 0.999 * full]
    if not whole:
        raise LaunchError(
            f"run `{run.name}` has {len(lines)} measured steps, and none of the full batch after the first "
            f"{WARM_UP_STEPS}",
            hint=f"`orch status {run.name}` says how far it is",
        )
    e = estimate(experiment, run.stage)
    step_s = statistics.median(line["perf/step_s"] for line in whole)
    found = [
        Compared(what="step", unit="s", planned=e.step_s, measured=step_s),
        Compared(what="speed", unit="tokens/s", planned=e.tokens_per_s, measured=full / step_s),
    ]
    memory = max((line.get("perf/peak_memory_gb", 0.0) for line in lines), default=0.0)
    if memory:
        found.append(Compared(what="memory", unit="GB", planned=e.memory_gb["total"], measured=memory))
    took_s = sum(line["perf/step_s"] for line in lines)
    share = len(lines) / stage.steps
    found.append(
        Compared(what="GPU-hours", unit="h", planned=e.gpu_hours * share, measured=took_s / 3600 * e.world)
    )  # of the steps done so far
    return found


def _tokens(line: Mapping[str, Any]) -> float:
    """Tokens of one step: its speed times its time."""
    return float(line.get("perf/tokens_per_s", 0)) * float(line["perf/step_s"])


def calibrated(cluster: ClusterSpec, compared: Sequence[Compared]) -> ClusterSpec:
    """``cluster`` with the factors that would have made the plan right, upon those it had."""
    ratios = {c.what: c.ratio for c in compared}
    return dataclasses.replace(
        cluster,
        step_factor=round(cluster.step_factor * ratios["step"], 4),
        memory_factor=round(cluster.memory_factor * ratios.get("memory", 1.0), 4),
    )


def write_cluster(path: Path, cluster: ClusterSpec, run: Run) -> None:
    """Write ``cluster`` as a group that a config can name."""
    from omegaconf import OmegaConf

    body = OmegaConf.to_yaml(OmegaConf.create({"cluster": dataclasses.asdict(cluster)}))
    head = f"# `{cluster.gpu}` by run `{run.name}`: `step_factor` and `memory_factor` are measured over planned.\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, head + body)
