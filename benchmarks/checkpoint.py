"""Saving and loading pieces against the ways of before: one file of torch's safetensors, and DeepSpeed's own files.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py
    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py shares

One process, fp32, a GPT of 29 million parameters with AdamW's state: 350 MB. Each round takes every way in turn, so
that a busy machine is busy for all; medians over the rounds, and ratios, which is what counts.

`shares`: what rank 0 works out at the first save of GPT-3 175B on 1,024 ranks (configs/gpt3-175b.yaml); no tensors.
"""

import json
import math
import resource
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


WORLD, LAYOUT = 1024, {"tensor": 8, "pipeline": 16, "zero": 1}


def extents(parallel, rank):
    """What ``rank`` holds of GPT-3 175B: its own layers, cut over tensor ranks, and of them, laid end to end, an equal
    part (ZeRO-1)."""
    from jobs.nn.cut import Cut
    from jobs.runtime.mesh import place
    from jobs.runtime.pieces import SLOTS, Extent

    layers, hidden, vocab, at = 96, 12288, 50257, place(rank, WORLD, parallel)
    column = {"attention.qkv": [hidden] * 3, "feed_forward.up": [4 * hidden]}
    row = {"attention.proj": hidden, "feed_forward.down": 4 * hidden}
    tensors = {}
    if at.pipeline in (0, at.pipeline_size - 1):
        tensors["embed.weight"] = (vocab, hidden), (0, (vocab,))
    if at.pipeline == 0:
        tensors["positions.weight"] = (2048, hidden), None
    each = layers // at.pipeline_size
    for i in range(at.pipeline * each, (at.pipeline + 1) * each):
        for name, parts in column.items():
            tensors[f"blocks.{i}.{name}.weight"] = (sum(parts), hidden), (0, tuple(parts))
            tensors[f"blocks.{i}.{name}.bias"] = (sum(parts),), (0, tuple(parts))
        for name, width in row.items():
            tensors[f"blocks.{i}.{name}.weight"] = (hidden, width), (1, (width,))
            tensors[f"blocks.{i}.{name}.bias"] = (hidden,), None
        for norm in ("norm1", "norm2"):
            tensors |= {f"blocks.{i}.{norm}.{what}": ((hidden,), None) for what in ("weight", "bias")}

    def cut(of):
        return Cut(dim=of[0], parts=of[1], index=at.tensor, count=at.tensor_size) if of and at.tensor_size > 1 else None

    local = {}
    for name, (shape, of) in tensors.items():
        mine = cut(of)
        local[name] = (tuple(mine.local_shape(shape)) if mine else shape), mine
    sizes = {name: math.prod(shape) for name, (shape, _) in local.items()}
    total, begin, found = sum(sizes.values()), 0, []
    first, last = total * at.data // at.data_size, total * (at.data + 1) // at.data_size
    for name, (shape, mine) in local.items():
        n = sizes[name]
        start, stop = max(0, first - begin), min(n, last - begin)
        begin += n
        if start < stop:
            found += [Extent(name, slot, shape, mine, start, stop) for slot in SLOTS[:3]]
            found.append(Extent(name, "step", (1,), None, 0, 1))
    return found


def shares():
    """Times and memory, in this process."""
    from jobs.runtime import pieces
    from orchestrator.spec import ParallelPlan

    parallel = ParallelPlan(nodes=WORLD // 8, **LAYOUT)
    gathered = [pieces._packed(extents(parallel, rank)) for rank in range(WORLD)]
    sent = sum(rows.nbytes + len(repr(tensors)) for tensors, rows in gathered)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    everyone = [pieces._unpacked(*packed) for packed in gathered]
    made = pieces.share_out(everyone)
    index = json.dumps(pieces._index_of(everyone, made))
    took = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    started = time.perf_counter()
    pieces._check_index(json.loads(index))
    read = time.perf_counter() - started
    held, written = sum(map(len, everyone)), sum(map(len, made))
    print(f"{held:,} extents, {sent / WORLD / 1e3:.1f} kB sent by a rank, {written:,} shares")
    print(f"worked out in {took:.2f} s and {peak / 1e6:.3f} GB on rank 0")
    print(f"index of {len(index) / 1e6:.1f} MB, read and checked in {read:.2f} s")


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
    shares() if sys.argv[1:] == ["shares"] else main()
