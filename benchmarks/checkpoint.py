"""Saving and loading pieces against the ways of before: one file of torch's safetensors, and DeepSpeed's own files.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py

One process, fp32, a GPT of 29 million parameters with AdamW's state: 350 MB. Each round takes every way in turn, so
that a busy machine is busy for all; medians over the rounds, and ratios, which is what counts.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ROUNDS = 5


def ways(name, engine, ranks):
    """Save and load, the engine's old way and by pieces."""
    from safetensors.torch import load_file, save_file

    from jobs.runtime import pieces

    held = {f"{p.slot}/{p.name}": p.data for p in engine.pieces()}

    def old_save(folder):
        if name == "deepspeed":
            engine.engine.save_checkpoint(str(folder), tag="t", save_latest=False)
        else:
            save_file({key: data.clone() for key, data in held.items()}, folder / "all.safetensors")

    def old_load(folder):
        if name == "deepspeed":
            engine.engine.load_checkpoint(str(folder), tag="t")
        else:
            for key, data in load_file(folder / "all.safetensors").items():
                held[key].copy_(data)

    return {
        "save": (old_save, lambda folder: pieces.save(folder, engine, ranks)),
        "load": (old_load, lambda folder: pieces.load(folder, engine)),
    }


def main():
    import torch

    from jobs.nn.gpt import GPT
    from jobs.runtime import dist
    from jobs.runtime.job import Ranks
    from orchestrator import registry
    from orchestrator.spec import ModelSpec, ParallelPlan, StageSpec

    spec, ranks = ModelSpec(layers=8, hidden=512, heads=8, vocab=8192, seq_len=64), Ranks()
    batch = {key: torch.zeros(1, 64, dtype=torch.int64) for key in ("tokens", "targets")}
    print(f"{spec.params / 1e6:.0f} million parameters, {spec.params * 12 / 1e6:.0f} MB")
    for name, zero in (("torch", 0), ("deepspeed", 1)):
        stage = StageSpec(kind="pretrain", engine=name, precision="fp32", parallel=ParallelPlan(zero=zero))
        engine = registry.find("jobs.engines", name).build(lambda: GPT(spec), stage, ranks, lambda nll, _: nll.mean())
        engine.train_step([batch], lr=1e-4)
        timed = {(what, i): [] for what in ("save", "load") for i in range(2)}
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory() as folder:
                for what, both in ways(name, engine, ranks).items():
                    for i, way in enumerate(both):
                        place = Path(folder, str(i))
                        place.mkdir(exist_ok=True)
                        started = time.perf_counter()
                        with torch.no_grad():
                            way(place)
                        timed[what, i].append(time.perf_counter() - started)
        for what in ("save", "load"):
            before, now = (statistics.median(timed[what, i]) for i in range(2))
            print(f"{name:<10} {what}  before {before:6.2f} s  pieces {now:6.2f} s  {now / before:.2f} x")
    dist.close()


if __name__ == "__main__":
    main()
