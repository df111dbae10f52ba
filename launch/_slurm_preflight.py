"""Look before the leap: a job in front of a chain that looks at its nodes, or light ranks in place of training.

`orch submit --preflight` queues one job more, of the largest stage's shape, before the first stage. On each node one
task (`jobs/runtime/probe.py`) says what it sees; then the job's script, which is this file's `main`, judges, names
the sick in the ExcNodeList of the jobs behind it, and lets these go by its exit status (`afterok`), or takes
them along. So it needs no login session, and `orch submit` may return at once.

`orch submit --rehearse` gives the stages' own jobs ranks that only say where they stand, and judges these.

    <folder>/request.json  nonce     what is asked, and of which jobs; by `orch submit`
    <folder>/nodes/<node>.json       what a node saw;  ranks/<rank>  what a rank was told
    <folder>/report.json             the verdict
"""

import os
import secrets
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from launch import _slurm_queue as queue
from launch._slurm_container import folders, srun_options
from launch._slurm_script import carried, interpreter, limit_s, options, parameters
from orchestrator.recover import usable
from orchestrator.registry import find
from orchestrator.run import Run, read_json, write_atomic, write_json
from orchestrator.spec import Experiment, ParallelPlan

LIMIT_S = 1200  # of a preflight's job
STEP_S = 900  # of its step; beyond it, what has not answered counts as sick
CLOCK_S = 5.0  # clocks further apart order the attempts of a run wrongly
SLOW = 0.8  # of the median; an assumption: GPUs of one kind differ by a few per cent
PACKAGES = ("torch", "mlflow", "omegaconf", "submitit")
RATES = {"copy_gb_per_s": "GPU memory", "all_reduce_gb_per_s": "all-reduce over its GPUs"}


# Asking


def queue_preflight(runs: Sequence[Run]) -> tuple[str, Path]:
    """Queue, held, the job that looks at the nodes of the largest of ``runs``; return its id and folder."""
    run = max(runs, key=lambda r: _nodes(r.spec(), r.stage))
    folder = run.folder / "preflight" / str(len(run.submissions) + 1)
    while folder.exists():  # of a submission that was taken back
        folder = folder.with_name(str(int(folder.name) + 1))
    return _queue(run, folder, "node", None), folder


def look(runs: Sequence[Run]) -> Path:
    """Look at the nodes for their own sake; return the folder in which the report will be."""
    job_id, folder = queue_preflight(runs)
    arm(folder, job_id, [])
    queue.call("scontrol", "release", job_id)
    return folder


def queue_rehearsal(run: Run, behind: str | None) -> str:
    """Queue, held, the job of ``run`` with light ranks; return its id."""
    folder = run.folder / "rehearsal"
    job_id = _queue(run, folder, "rank", behind)
    arm(folder, job_id, [])
    return job_id


def arm(folder: Path, job_id: str, behind: Sequence[str]) -> None:
    """Tell the held job in ``folder`` its own id and those of the jobs it decides about."""
    request = read_json(folder / "request.json")
    write_json(folder / "request.json", request | {"job": job_id, "behind": list(behind)})


def _queue(run: Run, folder: Path, what: str, behind: str | None) -> str:
    experiment = run.spec()
    stage = experiment.stages[run.stage]
    (folder / f"{what}s").mkdir(parents=True)
    nonce = secrets.token_hex(8)
    on_gpu = find("jobs", stage.kind).PER_GPU and experiment.cluster.gpu != "cpu"
    request = {
        "what": what,
        "nonce": nonce,
        "nodes": _nodes(experiment, run.stage),
        "per_node": parameters(run, experiment, {})["ntasks_per_node"],
        "gpus": experiment.cluster.gpus_per_node if on_gpu else 0,
        "paths": [path for path in folders(run, experiment.data) if Path(path).exists()],
        "packages": [*PACKAGES, *({stage.engine} - {*PACKAGES})],
        "parallel": asdict(stage.parallel),
        "asked_at": time.time(),
    }
    write_json(folder / "request.json", request)
    write_atomic(folder / "nonce", nonce)
    text = script(run, experiment, what, folder=folder, base=os.environ, python=sys.executable)
    write_atomic(folder / "script.sh", text)
    after = [f"--dependency=afterok:{behind}", "--kill-on-invalid-dep=yes"] if behind else []
    return queue.call("sbatch", "--hold", "--parsable", *after, str(folder / "script.sh")).strip().partition(";")[0]


def _nodes(experiment: Experiment, stage: str) -> int:
    spec = experiment.stages[stage]
    return spec.parallel.nodes if find("jobs", spec.kind).PER_GPU else 1


def script(run: Run, experiment: Experiment, what: str, *, folder: Path, base: Mapping[str, str], python: str) -> str:
    """The batch script of a preflight (``what`` is `node`) or a rehearsal (`rank`): a pure function."""
    from submitit.slurm.slurm import _make_sbatch_string

    asked, chosen = parameters(run, experiment, base), options(experiment)
    others = {k: v for k, v in asked["additional_parameters"].items() if k != "requeue"} | {"no-requeue": True}
    code = run.folder / "code"
    if what == "node":
        if asked["cpus_per_task"]:
            asked["cpus_per_task"] *= asked["ntasks_per_node"]
        asked["ntasks_per_node"] = 1
        others["time"] = str(min(LIMIT_S, limit_s(chosen) or LIMIT_S) // 60)
    container = srun_options(chosen.container, run, experiment.data, carried(asked["cpus_per_task"], chosen))
    srun = [  # light ranks are polite too, so that a machine that is many nodes gets them all started
        *("timeout", "--kill-after=30", str(STEP_S), "srun", "--export=ALL", "--wait=0"),
        f"--kill-on-bad-exit={int(what == 'rank')}",
        *(["--label"] if what == "node" else []),
        *container,
        *(["nice"] if what == "rank" else []),
    ]
    probe = code / "jobs" / "runtime"
    words = [str(probe / "probe.py")] if what == "node" else ["-I", "-S", str(probe / "here.py")]
    asked |= {
        "job_name": f"{run.name}/preflight" if what == "node" else run.name,
        "additional_parameters": others,
        "srun_args": None,
        "use_srun": False,
        # Compiled once, or each of a thousand ranks would do it.
        "setup": [*asked["setup"], f"{shlex.quote(python)} -m compileall -q {shlex.quote(str(code))}"],
        "teardown": [f"{shlex.quote(python)} -m launch._slurm_preflight {shlex.quote(str(folder))}"],
    }
    command = f"{shlex.join(srun)} {interpreter(run, experiment, python)} {shlex.join([*words, str(folder)])}"
    return _make_sbatch_string(command=command, folder=folder, **asked)


# Judging, in the job


def main() -> None:
    """Judge what lies in the folder that is named on the command line; exit with 0 if the jobs behind may start."""
    folder = Path(sys.argv[1])
    request = read_json(folder / "request.json")
    names = queue.call("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    if request["what"] == "rank":
        report = of_ranks(request, [_place(request, f) for f in (folder / "ranks").glob("*[0-9]")], names)
    else:
        report = _of_nodes(request, [read_json(f) for f in (folder / "nodes").glob("*.json")], names)
    write_json(folder / "report.json", report | {"took_s": time.time() - request["asked_at"]})
    sys.exit(not report["passed"])


def _of_nodes(request: dict[str, Any], found: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    reports = {report["node"]: report for report in found}
    problems = sick(request, reports, names)
    bad = [name for name in names if problems[name]]
    needed, left, why = request["nodes"], len(names), ""
    if bad:
        left = len(_usable(os.environ["SLURM_JOB_PARTITION"]) - {*bad} - _excluded(request["behind"]))
        if left < needed:
            why = f"{len(bad)} of {len(names)} nodes are sick, which leaves {left} of the {needed} that are needed"
        else:
            for job_id in request["behind"]:
                _exclude(job_id, bad)
    nodes = {name: {"problems": problems[name], **reports.get(name, {})} for name in names}
    return {"nodes": nodes, "sick": bad, "needed": needed, "left": left, "passed": not why, "why": why}


def _usable(partition: str) -> set[str]:
    """Nodes of ``partition`` that a job may get, now or when others have left."""
    said = queue.call("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N|%T")
    return usable(said, reserved="SLURM_JOB_RESERVATION" in os.environ)


def _excluded(jobs: Iterable[str]) -> set[str]:
    names = (_exclusions(job) for job in jobs)
    return {n for listed in names if listed for n in queue.call("scontrol", "show", "hostnames", listed).split()}


def _exclusions(job_id: str) -> str:
    said = queue.call("scontrol", "--oneliner", "show", "job", job_id).split()
    listed = next((word.partition("=")[2] for word in said if word.startswith("ExcNodeList=")), "")
    return listed.replace("(null)", "")


def _exclude(job_id: str, nodes: Sequence[str]) -> None:
    """Keep the pending job off ``nodes`` too."""
    before = _exclusions(job_id)
    queue.call(
        "scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join([*([before] if before else []), *nodes])}"
    )


def sick(request: Mapping[str, Any], reports: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[str]]:
    """What is wrong with each of the nodes ``names``, given what those that answered saw. Pure."""
    problems: dict[str, list[str]] = {name: [] for name in names}
    for name in names:
        if name not in reports:
            problems[name].append("no answer: it does not see the run folder, cannot start Python, or hangs")
            continue
        report = reports[name]
        if report["nonce"] != request["nonce"]:
            problems[name].append("reads an old version of a file in the run folder")
        problems[name] += [f"does not see `{path}`" for path in report["unseen"]]
        problems[name] += [f"`{package}` is not installed" for package, v in report["packages"].items() if v is None]
        given, driver = report.get("gpus", 0), report.get("driver")
        if given < request["gpus"]:
            problems[name].append(f"Slurm gave {given} GPUs, the plan has {request['gpus']}")
        if isinstance(driver, int) and driver < request["gpus"]:
            problems[name].append(f"the driver shows {driver} GPUs, the plan has {request['gpus']}")
        if "gpu_problem" in report:
            problems[name].append(f"its GPUs: {report['gpu_problem']}")
    for name, text in [*_unmet(reports, names), *_unlike(reports), *_late(reports), *_slow(reports)]:
        problems[name].append(text)
    return problems


def _unmet(reports: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, str]]:
    """Who did not reach the first node; or the first, where most did not."""
    failed = {name: report["problem"] for name, report in reports.items() if "problem" in report}
    first, others = names[0], [name for name in failed if name != names[0]]
    if len(others) > (len(reports) - 1) / 2:
        return [(first, f"{len(others)} nodes do not reach it: {failed[others[0]]}")]
    return list(failed.items())


def _unlike(reports: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Whose packages are of other versions than most nodes have, or whose GPU driver alone does not answer."""
    mute = [(name, report["driver"]) for name, report in reports.items() if isinstance(report.get("driver"), str)]
    found = mute if len(mute) < len(reports) / 2 else []
    for package in {p for report in reports.values() for p in report["packages"]}:
        usual, _ = Counter(report["packages"].get(package) for report in reports.values()).most_common(1)[0]
        for name, report in reports.items():
            version = report["packages"].get(package)
            if version not in (usual, None):
                found.append((name, f"`{package}` is {version}, on most nodes {usual or 'not installed'}"))
    return found


def _late(reports: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Whose clock is off; half a round trip is what a comparison may err by."""
    clocks = {name: report["clock_s"] for name, report in reports.items() if "clock_s" in report}
    if not clocks:
        return []
    usual = median(clocks.values())
    doubt = {name: reports[name].get("round_trip_s", 0) / 2 for name in clocks}
    return [
        (name, f"its clock is {abs(clock - usual):.1f} s {'behind' if clock > usual else 'ahead of'} the others'")
        for name, clock in clocks.items()
        if abs(clock - usual) > CLOCK_S + doubt[name]
    ]


def _slow(reports: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Who is slower than SLOW of the median."""
    found = []
    for key, what in RATES.items():
        rates = {name: report[key] for name, report in reports.items() if report.get(key)}
        usual = median(rates.values()) if rates else 0.0
        found += [
            (name, f"{what}: {rate:.0f} GB/s, the median is {usual:.0f}")
            for name, rate in rates.items()
            if rate < SLOW * usual
        ]
    return found


def _place(request: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Where a rank stands, by the training job's own functions and what the rank wrote."""
    from jobs.runtime.job import Ranks
    from jobs.runtime.mesh import place
    from jobs.runtime.slurm import rendezvous

    told = dict(line.split("=", 1) for line in file.read_text().splitlines())
    ranks = Ranks.from_env(told)
    at = place(ranks.rank, ranks.world, ParallelPlan(**request["parallel"]))
    return asdict(ranks) | {
        "place": (at.data * at.ulysses_size + at.ulysses, at.pipeline, at.tensor),  # data and ulysses as one axis
        "node": told["SLURMD_NODENAME"],
        "rendezvous": rendezvous(told),
        "torch": told["torch"] == "True",
    }


def of_ranks(request: Mapping[str, Any], found: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Whether the ranks of a rehearsal stand as the plan has them. Pure."""
    per_node, parallel = request["per_node"], request["parallel"]
    world = len(names) * per_node
    ranks = {report["rank"]: report for report in found}
    problems = [f"rank {rank} said nothing" for rank in range(world) if rank not in ranks]
    meetings = {report["rendezvous"] for report in found}
    if len(meetings) > 1 or any(host != names[0] for host, _ in meetings):
        problems.append(f"the ranks would meet at {sorted(meetings)}, the first node is {names[0]}")
    for rank, report in sorted(ranks.items()):
        node = names[rank // per_node] if rank < world else "nowhere"
        if (report["world"], report["node"], report["local_rank"]) != (world, node, rank % per_node):
            problems.append(f"rank {rank} of {report['world']} is on {report['node']}, not of {world} on {node}")
        if report["torch"]:
            problems.append(f"rank {rank} has imported torch")
    sizes = world // (parallel["tensor"] * parallel["pipeline"]), parallel["pipeline"], parallel["tensor"]
    taken = {report["place"] for report in found}
    every = {(d, p, t) for d in range(sizes[0]) for p in range(sizes[1]) for t in range(sizes[2])}
    if taken != every or len(taken) != len(found):
        problems.append(f"{len(found)} ranks have {len(taken & every)} of {len(every)} coordinates")
    peers: dict[tuple[int, int], set[str]] = {}
    for report in found:
        peers.setdefault(report["place"][:2], set()).add(report["node"])
    apart = [place for place, nodes in peers.items() if len(nodes) > -(-parallel["tensor"] // per_node)]
    if apart:
        problems.append(f"{len(apart)} groups of tensor peers are spread over more nodes than they need")
    meeting = next(iter(meetings), ("", 0))
    return {
        "ranks": len(found),
        "world": world,
        "nodes": len({report["node"] for report in found}),
        "sizes": dict(zip(("data", "pipeline", "tensor"), sizes, strict=True)),
        "rendezvous": f"{meeting[0]}:{meeting[1]}",
        "problems": problems,
        "passed": not problems,
    }


if __name__ == "__main__":
    main()
