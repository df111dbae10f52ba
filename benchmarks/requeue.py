"""From the end of an attempt to the first step of the next, on a real Slurm: what it takes above Slurm's own floor.

    python benchmarks/requeue.py [--repeats 5] [--engine deepspeed] [--json]

A run of two nodes with one CPU rank each, in a box of `launch/slurmbox`, is told to stop as before a time limit
(SIGUSR2), saves, and is requeued, again and again. Slurm's floor is the same for a job that only sleeps: from
`scontrol requeue` to the first line of its script. The model is tiny, so what is left is what every start costs.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.run import Run

HERE = Path(__file__).resolve()
SLURMBOX = HERE.parents[1] / "launch" / "slurmbox"
ORCH = Path(sys.executable).with_name("orch")
CONFIG = """
defaults: [cluster/local]
name: again
cluster:
  gpus_per_node: 1
  nodes: 2
  launcher: slurm
  slurm: {environment: {OMP_NUM_THREADS: "1"}, setup: ["date +%%s.%%N >> %(folder)s/starts"]}
model: {layers: 2, hidden: 64, heads: 4, vocab: 300, seq_len: 64}
data: {folder: %(folder)s/data, sources: {text: {text: [%(folder)s/text.txt]}}}
stages:
  prepare: {kind: prepare, options: {workers: 1}}
  pretrain: {kind: pretrain, after: [prepare], engine: %(engine)s, precision: fp32, global_batch: 64, steps: 100000,
             save_every: 100000, parallel: {nodes: 2, zero: %(zero)d, micro_batch: 8}}
"""
PARTS = {  # of the time from an attempt's end to the next one's first step, in order
    "leave and requeue": "the ranks leave, the warden requeues; Slurm's floor taken off",
    "launch": "batch script, warden, srun, Python, submitit",
    "import": "torch and ours",
    "meet": "the ranks' process group",
    "engine": "import of the engine, model, optimizer",
    "checkpoint": "find, hash, load",
    "first step": "",
}


def until(done: Callable[[], object], seconds: float = 300) -> None:
    """Wait for what is true sooner or later."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            sys.exit(f"waited {seconds:g} s in vain")
        time.sleep(0.05)


def call(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def stamps(path: Path) -> list[float]:
    """Times in a file, one a line."""
    return [float(line) for line in path.read_text().split()] if path.exists() else []


def floor(folder: Path, repeats: int) -> list[float]:
    """Seconds from `scontrol requeue` of a job that sleeps to its next start."""
    file = folder / "floor"
    job = call(
        "sbatch", "--parsable", "--requeue", "-N2", "--output=/dev/null", "--wrap", f"date +%s.%N >> {file}; sleep 600"
    )
    until(lambda: stamps(file))
    seconds = []
    for count in range(2, repeats + 2):
        time.sleep(2)
        asked = time.time()
        call("scontrol", "requeue", job)
        until(lambda count=count: len(stamps(file)) == count)
        seconds.append(stamps(file)[-1] - asked)
    call("scancel", job)
    return seconds


def measure(folder: Path, engine: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of each part, one for each requeue; runs inside the box."""
    (folder / "text.txt").write_text(
        "\n".join(p.read_text() for p in sorted((HERE.parents[1] / "orchestrator").glob("*.py")))
    )
    (folder / "config.yaml").write_text(CONFIG % {"folder": folder, "engine": engine, "zero": engine != "torch"})
    slurm_s = floor(folder, repeats)
    call(str(ORCH), "--runs", str(folder / "runs"), "submit", str(folder / "config.yaml"), "--detach")
    run = Run.load(folder / "runs" / "again" / "pretrain")
    for _ in range(repeats):
        begun = len(run.attempts())
        until(lambda begun=begun: len(run.attempts()) > begun or _steps(run) > 3)
        until(lambda: _steps(run) > 3)
        call("scancel", "--signal=USR2", run.submissions[-1].job_id)
        until(lambda: run.attempts()[-1].ended_at)
        count = len(run.attempts())
        until(lambda count=count: len(run.attempts()) > count)
    until(lambda: _steps(run) > 3)
    call(str(ORCH), "--runs", str(folder / "runs"), "cancel", "again/pretrain")
    until(lambda: run.attempts()[-1].ended_at)
    parts: dict[str, list[float]] = {"Slurm's floor": slurm_s} | {name: [] for name in PARTS}
    starts = stamps(folder / "starts")[-repeats:]
    for (before, attempt), script_at in zip(itertools.pairwise(run.attempts()), starts, strict=True):
        parts["leave and requeue"].append(script_at - before.ended_at - statistics.median(slurm_s))
        marks = [script_at - attempt.started_at, 0.0, *attempt.phases.values()]
        for name, (since, to) in zip(list(PARTS)[1:], itertools.pairwise(marks), strict=True):
            parts[name].append(to - since)
    return parts


def _steps(run: Run) -> int:
    """Steps that the newest attempt has taken."""
    newest = run.attempts()[-1:]
    return sum(line["attempt"] == newest[0].name for line in run.metrics().values()) if newest else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engine", default="deepspeed")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(measure(options.inside, options.engine, options.repeats)))
        return
    with tempfile.TemporaryDirectory() as folder:
        again = [
            sys.executable,
            str(HERE),
            "--inside",
            folder,
            "--engine",
            options.engine,
            "--repeats",
            str(options.repeats),
        ]
        ran = subprocess.run([str(SLURMBOX), "2", "--", *again], check=True, stdout=subprocess.PIPE, text=True)
    parts: dict[str, list[float]] = json.loads(ran.stdout)
    if options.json:
        print(json.dumps(parts, indent=2))
        return
    print(f"{'seconds':<20}{'median':>8}{'min':>8}{'max':>8}")
    for name, seconds in parts.items():
        columns = "".join(f"{f(seconds):>8.2f}" for f in (statistics.median, min, max))
        print(f"{name:<20}{columns}  {PARTS.get(name, '')}".rstrip())
    above = sum(statistics.median(seconds) for name, seconds in parts.items() if name in PARTS)
    print(f"{'above the floor':<20}{above:>8.2f}")


if __name__ == "__main__":
    main()
