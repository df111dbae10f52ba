"""Does the road to ChatGPT lead anywhere: what each stage of configs/chatgpt-demo.yaml learns, over several seeds.

    python benchmarks/study.py [--seeds 1 2 3] [--folder FOLDER] [--json]
    python benchmarks/study.py --of runs/chatgpt-demo        # what one run of the chain has learned

Every number is of held-out functions: no stage has seen their files, nor their prompts in any other. The last judge,
`quality`, is a rule that PPO is not given: it learns from the reward model, some of whose pairs are samples that this
rule has ranked, and the rule says what came through.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from orchestrator.run import Run

REPO = Path(__file__).resolve().parent.parent
ORCH = Path(sys.executable).with_name("orch")
CONFIG = REPO / "configs" / "chatgpt-demo.yaml"
STAGES = ("pretrain", "sft", "compare", "reward", "ppo")
# The gates of tests/test_demo.py: beyond the worst of three seeds by two deviations; the length by hand
# (benchmarks/notes/2026-11-28-study.md).
GATES = {
    "sft: drop of nats a token": (0.48, None),
    "reward: accuracy on pairs": (0.74, None),
    "ppo: gain of reward": (0.52, None),
    "ppo: gain of score": (0.58, None),
    "ppo: gain of quality, a rule it is not given": (0.03, None),
    "ppo: tokens of a response": (11, None),
    "ppo: KL, nats a response": (None, 4.6),
    "ppo: distinct responses": (0.93, None),
}


def learned(experiment: Path) -> dict[str, float]:
    """What the chain in the folder ``experiment`` has learned, by the words of GATES."""
    runs = {stage: Run.load(experiment / stage) for stage in STAGES}
    of = {stage: [line for _, line in sorted(run.metrics().items())] for stage, run in runs.items()}
    reward = json.loads((runs["reward"].folder / "reward.json").read_text())
    sft = [line["val/loss"] for line in of["sft"] if line.get("val/loss")]
    judged = [line for line in of["ppo"] if "val/reward" in line]
    first, last = judged[0], judged[-1]
    return {
        "sft: drop of nats a token": sft[0] - sft[-1],
        "reward: accuracy on pairs": reward["accuracy"],
        "ppo: gain of reward": last["val/reward"] - first["val/reward"],
        "ppo: gain of score": last["val/score"] - first["val/score"],
        "ppo: gain of quality, a rule it is not given": last["val/rule/quality"] - first["val/rule/quality"],
        "ppo: tokens of a response": last["val/length"],
        "ppo: KL, nats a response": last["val/kl"],
        "ppo: distinct responses": last["val/distinct"],
    }


def beyond(found: dict[str, float]) -> list[str]:
    """What is not within its gate, in words."""
    out = []
    for name, (low, high) in GATES.items():
        if (low is not None and not found[name] >= low) or (high is not None and not found[name] <= high):
            out.append(f"{name} is {found[name]:.3f}, and must be {_gate(name)}")
    return out


def minutes(experiment: Path) -> float:
    """From the start of the first stage to the end of the last."""
    attempts = [a for stage in ("prepare", *STAGES) for a in Run.load(experiment / stage).attempts()]
    return (max(a.ended_at or 0 for a in attempts) - min(a.started_at for a in attempts)) / 60


def shares(experiment: Path) -> dict[str, float]:
    """Of a step of PPO, by phase: medians over the steps, as parts of their sum."""
    lines = [line for step, line in Run.load(experiment / "ppo").metrics().items() if step]
    seconds = {p: statistics.median(line[f"perf/{p}_s"] for line in lines) for p in ("rollout", "score", "update")}
    return {f"ppo: share of {phase}": s / sum(seconds.values()) for phase, s in seconds.items()}


def study(seeds: list[int], folder: Path) -> dict[int, dict[str, float]]:
    """Run the chain for each of ``seeds``, one after the other; every stage and the data take the seed."""
    found = {}
    for seed in seeds:
        name = f"seed-{seed}"
        words = [f"name={name}", f"data.seed={seed}", f"data.folder={folder / 'data'}"]
        words += [f"stages.{stage}.seed={seed}" for stage in STAGES]
        subprocess.run([ORCH, "--runs", folder / "runs", "submit", CONFIG, *words], check=True, cwd=folder)
        found[seed] = told(folder / "runs" / name)
    return found


def told(experiment: Path) -> dict[str, float]:
    """Everything of one chain."""
    return learned(experiment) | shares(experiment) | {"minutes": minutes(experiment)}


def table(found: dict[str, dict[str, float]]) -> str:
    """Columns of ``found`` side by side; with several, their worst, mean and deviation."""
    lines = []
    names = list(next(iter(found.values())))
    several = ["worst", "mean", "std"] if len(found) > 1 else []
    lines.append(f"{'held-out functions':44}" + "".join(f"{head:>10}" for head in [*found, *several, "gate"]))
    for name in names:
        row = [of[name] for of in found.values()]
        cells = [f"{value:.3f}" for value in row]
        if several:
            worst = max(row) if name == "minutes" or GATES.get(name, (0, None))[1] is not None else min(row)
            cells += [f"{worst:.3f}", f"{statistics.fmean(row):.3f}", f"{statistics.stdev(row):.3f}"]
        lines.append(f"{name:44}" + "".join(f"{cell:>10}" for cell in [*cells, _gate(name)]))
    return "\n".join(lines)


def _gate(name: str) -> str:
    low, high = GATES.get(name, (None, None))
    return f">= {low:g}" if low is not None else f"<= {high:g}" if high is not None else ""


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, help="where data and runs go; else a temporary folder")
    parser.add_argument("--of", type=Path, help="look at a chain that was run, such as runs/chatgpt-demo")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if options.of:
            found = {options.of.name: told(options.of)}
        else:
            folder = (options.folder or Path(temporary)).resolve()
            folder.mkdir(exist_ok=True)
            found = {f"seed {seed}": row for seed, row in study(options.seeds, folder).items()}
    print(json.dumps(found) if options.json else table(found))
    problems = [problem for row in found.values() for problem in beyond(row)]
    sys.exit("\n".join(problems) or None)


if __name__ == "__main__":
    main()
