"""Is this Slurm ready, and for one experiment: what its own commands say, each finding with its remedy.

Takes no allocation: `sbatch --test-only` asks the controller whether it would accept a job. Words and defaults of
the settings: man slurm.conf (22.05).
"""

import os
import pwd
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from launch import _slurm_queue as queue
from launch._slurm_script import Options, limit_s, options, sbatch_text
from orchestrator.doctor import Finding, Level, finding
from orchestrator.errors import LaunchError, OrchError
from orchestrator.plan import plan
from orchestrator.registry import find
from orchestrator.run import Run
from orchestrator.spec import Experiment

OLDEST = (22, 5)  # the version of the tests; srun takes its CPUs otherwise before
CRED_EXPIRE_S = 120  # AuthInfo's default: what a requeued job waits at least
LONG_S = 300
DEFAULT_QOS = "normal"  # slurmdbd makes it, and gives it to all who have no other
NONE = ("preempt/none", "(null)", "")  # the second since 23.11, which has no such plug-in any more
ASK_S = 20

ADVICE: dict[str, tuple[Level, str]] = {
    "no-controller": ("problem", "`scontrol ping`, and ask those who run the cluster; queued runs go on by themselves"),
    "old-slurm": ("warning", "tested with 22.05 and later: try a small run over two nodes first"),
    "no-preempt-signal": (
        "warning",
        "ask for `SlurmctldParameters=preempt_send_user_signal` in slurm.conf: a preempted run goes back to its newest "
        "checkpoint without; or lower `save_every`",
    ),
    "no-grace": (
        "warning",
        "ask for a `GraceTime` on {whose}: a preempted run has no time to save without; or lower `save_every`",
    ),
    "short-grace": (
        "warning",
        "ask for a `GraceTime` of {seconds} s on {whose}, or a file system that is written faster",
    ),
    "suspends": ("warning", "ask for `PreemptMode=REQUEUE`: ranks that are stopped together look like frozen ones"),
    "no-part-limits": (
        "warning",
        "ask for `EnforcePartLimits=ALL`: an impossible job waits for ever without; `orch status` shows the reason",
    ),
    "long-requeue": (
        "warning",
        "ask for a smaller `cred_expire` in `AuthInfo`: each requeue waits that long, with the GPUs given away",
    ),
    "no-accounting": (
        "warning",
        "ask for slurmdbd: how a start ended that left no word, such as a node's failure, is not known without",
    ),
    "no-partition": ("problem", "set `cluster.slurm.partition` to one of: {names}"),
    "partition-down": ("problem", "wait, or set `cluster.slurm.partition` to another: `sinfo -s`"),
    "few-nodes": ("problem", "plan with fewer `parallel.nodes`, or set another `cluster.slurm.partition`"),
    "few-gpus": ("problem", "set `cluster.gpus_per_node`, or `cluster.slurm.gres`, to what `sinfo -o '%P %G'` shows"),
    "long-time": ("problem", "set `cluster.slurm.time` to {limit} or less: the run goes on over many starts"),
    "no-account": ("problem", "set `cluster.slurm.account` to one of: {names}"),
    "no-qos": ("problem", "set `cluster.slurm.qos` to one of: {names}"),
    "refused": ("problem", "change `cluster.slurm` until `orch doctor` finds it accepted"),
    "sick-nodes": ("problem", "`orch submit --preflight` goes without them; tell those who run the cluster"),
}


def findings(experiment: Experiment | None, root: Path) -> Iterator[Finding]:
    """All that Slurm says of itself, and with ``experiment``, of its stages. Ends early where there is no answer."""
    try:
        settings = _settings()
    except LaunchError as e:
        yield _finding("slurm", str(e), "no-controller") if experiment else finding("slurm", str(e), "no-slurm")
        return
    version = settings.get("SLURM_VERSION", "")
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    yield _finding("slurm", f"{version}, slurmctld answers", "old-slurm" if numbers < OLDEST else "")
    chosen = Options()
    try:
        chosen = options(experiment) if experiment else chosen
        partitions = _partitions()
        name = chosen.partition or next((n for n, p in partitions.items() if p["Default"] == "YES"), "")
        partition = partitions.get(name, {})
        estimates = _estimates(experiment)
        ends_s = max((e["step_s"] + e["save_s"] for e in estimates or ()), default=0.0)
        yield from _preemption(settings, name, partition, ends_s, qos=_qos(settings, chosen.qos or DEFAULT_QOS))
        yield from _queueing(settings)
        yield _accounting(settings)
        if experiment:
            yield from _partition(experiment, chosen, name, partitions)
            yield from _rights(settings, chosen)
            yield from _accepted(experiment, root) if estimates is not None else ()
    except OrchError as e:
        yield _finding("cluster.slurm", str(e), "refused")


def nodes(names: dict[str, list[str]]) -> Iterator[Finding]:
    """What a preflight found: ``names`` has the problems of each node."""
    sick = {name: problems for name, problems in names.items() if problems}
    for name, problems in sick.items():
        yield _finding(f"node {name}", "; ".join(problems), "sick-nodes")
    well = f"{len(names) - len(sick)} of {len(names)} are well: same folder, clocks, names, ports, packages, GPUs"
    yield _finding("nodes", well)


def _finding(check: str, found: str, code: str = "", **words: str) -> Finding:
    return finding(check, found, code, ADVICE, **words)


def _settings() -> dict[str, str]:
    """slurm.conf as the controller has it; empty for what this version does not have."""
    said = queue.call("scontrol", "show", "config", within_s=ASK_S)
    pairs = (line.split("=", 1) for line in said.splitlines() if "=" in line)
    return defaultdict(str, {key.strip(): value.strip() for key, value in pairs})


def _partitions() -> dict[str, dict[str, str]]:
    said = queue.call("scontrol", "--oneliner", "show", "partition", within_s=ASK_S)
    lines = (dict(w.split("=", 1) for w in line.split() if "=" in w) for line in said.splitlines() if line.strip())
    return {line["PartitionName"]: line for line in lines}


def _estimates(experiment: Experiment | None) -> list[dict[str, Any]] | None:
    """What the plan expects of each stage that trains; None if it cannot run, which is said elsewhere."""
    try:
        return [e.to_json() for e in plan(experiment, force=True)] if experiment else []
    except OrchError:
        return None


def _qos(settings: dict[str, str], name: str) -> tuple[str, int] | None:
    """A QOS, and its GraceTime in seconds; None where there is none by that name, or no database of them."""
    if settings["AccountingStorageType"] != "accounting_storage/slurmdbd":
        return None
    asked = "sacctmgr", "--noheader", "--parsable2", "show", "qos", "format=Name,GraceTime"
    times = dict(line.split("|", 1) for line in queue.call(*asked, within_s=ASK_S).splitlines())
    return (name, limit_s(Options(time=times[name])) or 0) if name in times else None


def _preemption(
    settings: dict[str, str], name: str, partition: dict[str, str], ends_s: float, *, qos: tuple[str, int] | None = None
) -> Iterator[Finding]:
    """What a preempted job is told, and how long before its end: by its QOS where that decides who is preempted.

    Args:
        ends_s: what ending a step and saving takes.
    """
    mode = partition.get("PreemptMode", settings["PreemptMode"])
    if settings["PreemptType"] in NONE or mode == "OFF":
        yield _finding("preemption", f"no job of partition `{name}` is preempted")
        return
    grace = partition.get("GraceTime", "0")
    grace_s, whose = int(grace) if grace.isdigit() else 0, f"partition `{name}`"
    found = f"{mode}, GraceTime of {whose} {grace_s} s"
    if qos:
        found += f", of QOS `{qos[0]}` {qos[1]} s"
    if settings["PreemptType"] == "preempt/qos":
        grace_s, whose = (qos[1], f"QOS `{qos[0]}`") if qos else (0, "your QOS")
        found += ", which counts"
    if "SUSPEND" in mode:
        yield _finding("preemption", found, "suspends")
    elif not grace_s:
        yield _finding("preemption", found, "no-grace", whose=whose)
    elif grace_s < ends_s:
        found += f", and a step and a save take {ends_s:.0f} s by the plan"
        yield _finding("preemption", found, "short-grace", whose=whose, seconds=f"{ends_s:.0f}")
    elif "preempt_send_user_signal" not in settings["SlurmctldParameters"]:
        yield _finding("preemption", found + ", no signal", "no-preempt-signal")
    else:
        yield _finding("preemption", found + ", with a signal")


def _queueing(settings: dict[str, str]) -> Iterator[Finding]:
    limits = settings["EnforcePartLimits"]
    yield _finding(
        "impossible jobs", f"EnforcePartLimits={limits}", "" if limits in ("ALL", "ANY") else "no-part-limits"
    )
    invalid = "kill_invalid_depend" in settings["DependencyParameters"]
    yield _finding("dependencies", "stages that can no longer run are cancelled, " + _whose(always=invalid))
    bad_exit = settings["KillOnBadExit"] == "1"
    yield _finding("failing ranks", "take their peers along, " + _whose(always=bad_exit))
    expire = re.search(r"cred_expire=(\d+)", settings["AuthInfo"])
    delay_s = int(expire[1]) if expire else CRED_EXPIRE_S
    requeue = "allowed by the cluster" if settings["JobRequeue"] == "1" else "asked for by each run"
    yield _finding("requeue", f"{requeue}, starts again after {delay_s} s", "long-requeue" if delay_s > LONG_S else "")


def _whose(*, always: bool) -> str:
    return "by the cluster" if always else "as each run asks for"


def _accounting(settings: dict[str, str]) -> Finding:
    kind = settings["AccountingStorageType"]
    try:
        queue.call("sacct", "--noheader", "--allocations", "--starttime=now-1minutes", within_s=ASK_S)
    except LaunchError as e:
        return _finding("accounting", str(e), "no-accounting")
    return _finding("accounting", kind, "" if kind == "accounting_storage/slurmdbd" else "no-accounting")


def _partition(
    experiment: Experiment, chosen: Options, name: str, partitions: dict[str, dict[str, str]]
) -> Iterator[Finding]:
    """The partition is there, up, large enough and long enough for every stage."""
    if name not in partitions:
        given = f"`{chosen.partition}`" if chosen.partition else "the cluster's default"
        yield _finding("partition", f"no {given}", "no-partition", names=", ".join(f"`{n}`" for n in partitions))
        return
    partition = partitions[name]
    if partition["State"] != "UP":
        yield _finding("partition", f"`{name}` is {partition['State']}", "partition-down")
        return
    trains = [stage for stage in experiment.stages.values() if find("jobs", stage.kind).PER_GPU]
    needed = max((stage.parallel.nodes for stage in trains), default=1)
    most = min(int(v) for v in (partition["TotalNodes"], partition["MaxNodes"]) if v.isdigit())
    found = f"`{name}` is up, {most} nodes for a job, {needed} needed"
    yield _finding("partition", found, "few-nodes" if most < needed else "")
    asked, longest = limit_s(chosen), limit_s(Options(time=_no_limit(partition["MaxTime"])))
    if asked and longest and asked > longest:
        text = f"`cluster.slurm.time` is {chosen.time}, the most is {partition['MaxTime']}"
        yield _finding("time", text, "long-time", limit=f'"{partition["MaxTime"]}"')
    if experiment.cluster.gpu != "cpu":
        said = queue.call("sinfo", "--noheader", f"--partition={name}", "--format=%G", within_s=ASK_S)
        gpus = max((_gpus(line) for line in said.splitlines()), default=0)
        wanted = experiment.cluster.gpus_per_node
        yield _finding("gpus a node", f"{gpus} in `{name}`, {wanted} wanted", "few-gpus" if gpus < wanted else "")


def _no_limit(time: str) -> str | None:
    return None if time == "UNLIMITED" else time


def _gpus(gres: str) -> int:
    """GPUs in such as `gpu:a100:4(S:0-1),gpu:8,shard:16`."""
    kinds = (re.fullmatch(r"gpu(?::[^:(]+)??(?::(\d+))?(?:\(.*\))?", kind) for kind in re.split(r",(?![^(]*\))", gres))
    return sum(int(kind[1] or 1) for kind in kinds if kind)


def _rights(settings: dict[str, str], chosen: Options) -> Iterator[Finding]:
    """The account and the QOS are the user's. Slurm refuses others only where it enforces that, and charges nobody."""
    if settings["AccountingStorageType"] != "accounting_storage/slurmdbd" or not (chosen.account or chosen.qos):
        return
    user = pwd.getpwuid(os.getuid()).pw_name
    asked = "sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={user}", "format=account,qos"
    rows = [line.split("|") for line in queue.call(*asked, within_s=ASK_S).splitlines()]
    accounts = sorted({row[0] for row in rows})
    levels = sorted({q for row in rows if chosen.account in (None, row[0]) for q in row[1].split(",") if q})
    for what, value, known in (("account", chosen.account, accounts), ("qos", chosen.qos, levels)):
        if value:
            names = ", ".join(f"`{n}`" for n in known) or "none"
            yield _finding(what, f"`{value}`, for user `{user}`", "" if value in known else f"no-{what}", names=names)


def _accepted(experiment: Experiment, root: Path) -> Iterator[Finding]:
    """The controller would take each stage's job as it is."""
    for i, stage in enumerate(experiment.stages, 1):
        folder = root / experiment.name / stage
        run = Run(folder=folder, experiment=experiment.name, stage=stage, index=i, key="")
        text = sbatch_text(run, experiment, folder=folder / "submitit" / "1", base=os.environ, python=sys.executable)
        with TemporaryDirectory() as temporary:
            script = Path(temporary) / "script.sh"
            script.write_text(text)
            try:
                queue.call("sbatch", "--test-only", str(script), within_s=ASK_S)
            except LaunchError as e:
                yield _finding(f"stage {stage}", str(e).rpartition(": ")[2], "refused")
            else:
                yield _finding(f"stage {stage}", "its job would be accepted")
