"""What a run took, beside what was planned; and a cluster file that plans with what was measured.

The file is a group like any in configs/cluster/: `cluster=measured` selects it.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import LaunchError
from orchestrator.plan import estimate, memory_of_rank_0
from orchestrator.run import Run, write_atomic
from orchestrator.schedule import batches
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

    Memory is that of rank 0: on a GPU what PyTorch's allocator handed out, which leaves `other` out; on a CPU all that
    the process held.

    Raises:
        LaunchError: it has not trained long enough to tell.
    """
    experiment = run.spec()
    stage = experiment.stages[run.stage]
    measured = {step: line for step, line in run.metrics().items() if "perf/step_s" in line}
    lines = list(measured.values())
    growing = stage.steps - batches(stage, experiment.model.seq_len).get(stage.global_batch, 0)
    whole = [line for step, line in list(measured.items())[WARM_UP_STEPS:] if step > growing]
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
        Compared(
            what="speed", unit="tokens/s", planned=e.tokens_per_s,
            measured=statistics.median(line.get("perf/tokens_per_s", 0.0) for line in whole),
        ),
    ]  # fmt: skip
    memory = max((line.get("perf/peak_memory_gb", 0.0) for line in lines), default=0.0)
    if memory:
        gb = memory_of_rank_0(experiment.model, stage, experiment.cluster)
        planned = gb["total"] - (0.0 if experiment.cluster.gpu == "cpu" else gb["other"])  # what PyTorch hands out
        found.append(Compared(what="memory", unit="GB", planned=planned, measured=memory))
    took_s = sum(line["perf/step_s"] for line in lines)
    share = len(lines) / stage.steps
    found.append(
        Compared(what="GPU-hours", unit="h", planned=e.gpu_hours * share, measured=took_s / 3600 * e.world)
    )  # of the steps done so far
    return found


def calibrated(cluster: ClusterSpec, compared: Sequence[Compared]) -> ClusterSpec:
    """``cluster`` with the factors that would have made the plan right, upon those it had.

    Memory only upwards, and not on a CPU: what a small run spares, or its interpreter takes, says nothing of a large
    one, and a plan that is short of memory costs more than one that is not.
    """
    ratios = {c.what: c.ratio for c in compared}
    memory = cluster.memory_factor * ratios.get("memory", 1.0)
    return dataclasses.replace(
        cluster,
        step_factor=round(cluster.step_factor * ratios["step"], 4),
        memory_factor=cluster.memory_factor if cluster.gpu == "cpu" else round(max(1.0, memory), 4),
    )


def write_cluster(path: Path, cluster: ClusterSpec, run: Run) -> None:
    """Write ``cluster`` as a group that a config can name."""
    from omegaconf import OmegaConf

    body = OmegaConf.to_yaml(OmegaConf.create({"cluster": dataclasses.asdict(cluster)}))
    head = (
        f"# `{cluster.gpu}` by run `{run.name}`: `step_factor` and `memory_factor` are measured over planned, of runs\n"
        "# like it.\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, head + body)
