"""How long `orch status` takes over 1,000 finished runs and 100 whose jobs a real Slurm runs or holds.

    python benchmarks/status.py [--json] [--finished 1000] [--living 100] [--repeats 7]

The folders are made with the project's own classes: two attempts each, heartbeats, 1,000 lines of metrics, MLflow up
to date. The living ones carry the ids of jobs in `launch/slurmbox`, two thirds running, the rest waiting. Whole
processes, interpreter start included, taking turns; nothing is cached between them.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from orchestrator.compose import compose
from orchestrator.run import Attempt, Run, Submission, write_json

REPO = Path(__file__).resolve().parent.parent
ORCH = Path(sys.executable).with_name("orch")
STEPS = 1000


def make(root: Path, number: int, job_id: str, *, name: str, done: bool, began: float, spec: str, lines: Path) -> None:
    """A run that has trained in two attempts; done, or in the middle of the second."""
    folder = root / name / "pretrain"
    for below in ("attempts", "logs"):
        (folder / below).mkdir(parents=True)
    run = Run(folder=folder, experiment=name, stage="pretrain", index=1, key=f"{number:016x}")
    run.submissions = [Submission(number=1, launcher="slurm", job_id=job_id, submitted_at=began - 60)]
    (folder / "spec.yaml").write_text(spec)
    (folder / "metrics.jsonl").hardlink_to(lines)
    at = {"job_id": job_id, "world": 16, "host": "node1", "nodes": "node[1-2]"}
    first = Attempt(name="1", started_at=began, ended_at=began + 3500, to_step=500, checkpoint_step=500, **at)
    first.cause = "preempted"
    second = Attempt(name="1r1", started_at=began + 3600, from_step=500, to_step=900, checkpoint_step=900, **at)
    if done:
        second.cause, second.ended_at, second.to_step, second.checkpoint_step = "done", began + 7100, STEPS, STEPS
    for attempt in (first, second):
        write_json(folder / "attempts" / f"{attempt.name}.json", asdict(attempt))
    beat = {"attempt": "1r1", "step": second.to_step, "steps": STEPS, "tokens": second.to_step * 524288, "loss": 2.9}
    write_json(folder / "heartbeat.json", beat | {"tokens_per_s": 74898.3, "time": time.time()})
    status = "FINISHED" if done else "RUNNING"
    write_json(folder / "tracking.json", {"run_id": f"{number:032x}", "status": status, "step": second.to_step})
    run.save()


def fill(root: Path, finished: int, jobs: list[tuple[str, str]]) -> None:
    """``finished`` runs that are done, and one for each of ``jobs``, (id, name)."""
    experiment = compose("gpt3-125m", [f"stages.pretrain.steps={STEPS}"]).experiment
    spec = OmegaConf.to_yaml(OmegaConf.structured(experiment))
    root.mkdir(parents=True)
    began = time.time() - 7200
    lines = root / "metrics.jsonl"
    values = {"train/loss": 2.9, "train/lr": 6e-4, "train/grad_norm": 0.4, "perf/step_s": 7.0, "perf/mfu": 0.41}
    with lines.open("w") as f:
        for step in range(1, STEPS + 1):
            head = {
                "step": step,
                "time": began + 3600 * (step > 500) + 7 * (step - 500 * (step > 500)),
                "attempt": "1" if step <= 500 else "1r1",
                "tokens": step,
            }
            f.write(json.dumps(head | values) + "\n")
    for number in range(finished):
        make(
            root,
            number,
            str(100_000 + number),
            name=f"done-{number:04}",
            done=True,
            began=began,
            spec=spec,
            lines=lines,
        )
    for number, (job_id, name) in enumerate(jobs, finished):
        make(root, number, job_id, name=name, done=False, began=began, spec=spec, lines=lines)


def queue(living: int) -> list[tuple[str, str]]:
    """Real jobs: two thirds run on one CPU each, the rest wait for two whole nodes. Returns their ids and names."""
    jobs = []
    for number in range(living):
        name, wide = f"live-{number:03}", number >= 2 * living // 3
        size = ["--nodes=2", "--exclusive"] if wide else ["--ntasks=1", "--mem=1G"]
        command = ["sbatch", "--parsable", f"--job-name={name}/pretrain", "--output=/dev/null", "--time=60", *size]
        said = subprocess.run([*command, "--wrap=sleep 3000"], check=True, capture_output=True, text=True).stdout
        jobs.append((said.strip(), name))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        states = subprocess.run(["squeue", "--noheader", "--format=%T"], check=True, capture_output=True, text=True)
        if states.stdout.split().count("RUNNING") == 2 * living // 3:
            return jobs
        time.sleep(0.5)
    raise SystemExit(f"the jobs do not start: {states.stdout}")


def inside(options: argparse.Namespace) -> None:
    """In the box: fill a runs folder, measure, print JSON."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "runs"
        fill(root, options.finished, queue(options.living))
        env = dict(os.environ, ORCH_RUNS=str(root))
        states: dict[str, int] = {}
        told = subprocess.run([str(ORCH), "status", "--json"], env=env, check=True, capture_output=True, text=True)
        for row in json.loads(told.stdout):
            states[row["state"]] = states.get(row["state"], 0) + 1
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "squeue": ["squeue", "--me", "--noheader"],
            "orch status": [str(ORCH), "status"],
            "orch status --json": [str(ORCH), "status", "--json"],
            "orch status live-000": [str(ORCH), "status", "live-000"],
            "orch list": [str(ORCH), "list"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        cpu: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.repeats):
            for name, command in commands.items():
                started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run(command, env=env, check=True, capture_output=True)
                seconds[name].append(time.perf_counter() - started)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                cpu[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    table = {
        n: {"median_s": statistics.median(s), "min_s": min(s), "max_s": max(s), "cpu_s": statistics.median(cpu[n])}
        for n, s in seconds.items()
    }
    print(json.dumps({"states": states, "processes": table}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--finished", type=int, default=1000)
    parser.add_argument("--living", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return inside(options)
    sizes = [f"--finished={options.finished}", f"--living={options.living}", f"--repeats={options.repeats}"]
    command = [str(REPO / "launch" / "slurmbox"), "2", "--", sys.executable, __file__, "--inside", *sizes]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    if options.json:
        print(json.dumps(result, indent=2))
        return None
    print("runs: " + ", ".join(f"{n} {state}" for state, n in sorted(result["states"].items())))
    print(f"\n{'whole process':<28}{'median ms':>10}{'min':>8}{'max':>8}{'cpu ms':>8}")
    for name, s in result["processes"].items():
        rest = "".join(f"{s[key] * 1e3:>8.0f}" for key in ("min_s", "max_s", "cpu_s"))
        print(f"{name:<28}{s['median_s'] * 1e3:>10.0f}{rest}")
    return None


if __name__ == "__main__":
    main()
