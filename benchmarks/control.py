"""How long the control plane takes, and what tracking costs a step.

    python benchmarks/control.py [--json]

`orch --help` and `orch plan` are whole processes, interpreter start included; a bare `python -c pass` stands beside
them. The cost of a step is read off a real run's own records: the time between two lines of `metrics.jsonl`, less
`perf/step_s`, the engine's step with the one collective that makes its loss known to all ranks. The steps take about
100 ms, neither evaluate nor save, and the forwarder runs beside them.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
ORCH = Path(sys.executable).with_name("orch")

# Steps of about 100 ms for two ranks on two CPU cores.
RUN = """
defaults: [cluster/local, data/python-docs]
name: overhead
model: {layers: 4, hidden: 128, heads: 4, vocab: 512, seq_len: 128}
data: {folder: %s}
stages:
  prepare: {kind: prepare}
  pretrain: {kind: pretrain, after: [prepare], precision: fp32, parallel: {micro_batch: 8}, global_batch: 16,
             steps: 200, save_every: 1000, eval_samples: 16, options: {final_eval_samples: 16}}
"""


def processes(repeats: int) -> dict[str, dict[str, float]]:
    """Median and spread of whole-process wall times, in seconds, the commands taking turns."""
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "orch --help": [str(ORCH), "--help"],
        "orch show configs/gpt3-175b.yaml": [str(ORCH), "show", "configs/gpt3-175b.yaml"],
        "orch plan configs/gpt3-175b.yaml": [str(ORCH), "plan", "configs/gpt3-175b.yaml"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, cwd=REPO, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - started)
    return {n: {"median_s": statistics.median(s), "min_s": min(s), "max_s": max(s)} for n, s in seconds.items()}


def step_overhead() -> dict[str, float]:
    """What the loop, `metrics.jsonl`, the heartbeat and the agreement to go on cost a step of a real run."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "overhead.yaml"
        config.write_text(RUN % (Path(folder) / "data"))
        env = dict(os.environ, ORCH_RUNS=str(Path(folder) / "runs"))
        subprocess.run([str(ORCH), "submit", str(config)], check=True, env=env, stdout=subprocess.DEVNULL)
        path = Path(folder) / "runs" / "overhead" / "pretrain" / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = list(itertools.pairwise(lines))[20:-1]  # the first steps warm up, the last one saves
    between = [b["time"] - a["time"] for a, b in pairs]
    engine = [b["perf/step_s"] - b["perf/data_wait_s"] for _, b in pairs]  # so the loader counts as overhead
    overhead = [w - e for w, e in zip(between, engine, strict=True)]
    return {
        "steps": len(pairs),
        "step_ms": 1e3 * statistics.median(between),
        "engine_ms": 1e3 * statistics.median(engine),
        "overhead_ms": 1e3 * statistics.median(overhead),
        "overhead_share": statistics.median(overhead) / statistics.median(between),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = {"processes": processes(options.repeats), "step": step_overhead()}
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{'whole process':<36}{'median ms':>10}{'min':>8}{'max':>8}")
    for name, s in result["processes"].items():
        print(f"{name:<36}{s['median_s'] * 1e3:>10.0f}{s['min_s'] * 1e3:>8.0f}{s['max_s'] * 1e3:>8.0f}")
    s = result["step"]
    print(
        f"\nover {s['steps']} steps of {s['step_ms']:.1f} ms: engine {s['engine_ms']:.1f} ms, "
        f"loop and tracking {s['overhead_ms']:.3f} ms ({100 * s['overhead_share']:.2f} %)"
    )


if __name__ == "__main__":
    main()
