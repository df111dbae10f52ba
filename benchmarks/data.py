"""How fast the loader is, and how fast text becomes shards.

    python benchmarks/data.py [--json] [--workers N] [--repeats N]

Loader: one process, shuffled windows of 100M tokens in a memory map, as int64 tensors. It should give ten times what
a step eats; the table says what the hungriest preset of GPT-3's table 2.1, 125M, eats on one H200.

`prepare`: from files to shards on disk, processes and all, against `tokenizers` encoding the same documents, already
in memory, with as many threads of its own. They take turns in the same run.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs.data import bpe
from jobs.data.encode import Rules, block_size, encode_all, tasks
from jobs.data.indexed import ShardWriter
from jobs.data.packed import PackedDataset
from jobs.data.text import list_parts, read
from orchestrator.spec import DataSpec, ModelSpec, SourceSpec

LOADED = 100_000_000  # tokens in the shard that is read
BATCH = 16_384  # tokens in a batch
H200_FLOPS = 989e12  # dense bf16 peak in the vendor's data sheet
Table = dict[str, dict[str, float]]  # row -> median, min, max


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def loader(folder: Path, repeats: int) -> Table:
    """Million tokens/s of `PackedDataset.batch`, by sequence length."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "loaded", "<u2") as writer:
        for _ in range(LOADED // 1_000_000):
            writer.add(rng.integers(0, 512, 1_000_000).astype("<u2"), np.full(1000, 1000))
    bpe.train(["text"], vocab=512, end_of_text="<|endoftext|>").save(str(folder / "tokenizer.json"))
    source = SourceSpec(shards=[str(folder / "loaded")])
    data = DataSpec(sources={"loaded": source}, tokenizer=str(folder / "tokenizer.json"))
    found = {}
    for seq_len in (128, 1024, 2048):
        dataset = PackedDataset.open(data, seq_len=seq_len, split="train", vocab=512)
        speeds = [read_batches(dataset, turn) for turn in range(repeats + 1)]
        found[f"T={seq_len}"] = summary(speeds[1:])  # the first turn warms the page cache
    return found


def read_batches(dataset: PackedDataset, turn: int, batches: int = 200) -> float:
    """Million tokens/s, over batches that no other turn has read."""
    size = BATCH // dataset.seq_len
    firsts = range(turn * batches * size, (turn + 1) * batches * size, size)
    return batches * BATCH / timed(lambda: [dataset.batch(first, size) for first in firsts]) / 1e6


def prepare(folder: Path, repeats: int, workers: int) -> tuple[Table, Table]:
    """MB/s and MB per CPU second of text to shards, and of `tokenizers` alone, on `builtin:python`."""
    parts = list_parts("python", SourceSpec(text=["builtin:python"]))
    documents = [text for part in parts for text in read(part)]
    megabytes = sum(len(d.encode()) for d in documents) / 1e6
    tokenizer = bpe.train(documents, vocab=512, end_of_text="<|endoftext|>")
    path = str(folder / "tokenizer.json")
    tokenizer.save(path)
    rules = Rules(tokenizer=path, dtype="<u2", end_of_text=0, val_fraction=0.05, seed=0, block=block_size(parts))

    def ours() -> None:
        with ShardWriter(folder / "train", "<u2") as train, ShardWriter(folder / "val", "<u2") as val:
            for encoded in encode_all(tasks(parts), rules, workers):
                train.add(encoded["train"].tokens, encoded["train"].sizes)
                val.add(encoded["val"].tokens, encoded["val"].sizes)

    calls = {
        "prepare": ours,
        "encode_batch": lambda: tokenizer.encode_batch(documents),
        "encode_batch_fast": lambda: tokenizer.encode_batch_fast(documents),  # the same without offsets
    }
    speeds: dict[str, list[float]] = {name: [] for name in calls}
    work: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            before = cpu_seconds()
            speeds[name].append(megabytes / timed(call))
            work[name].append(megabytes / (cpu_seconds() - before))
    return {name: summary(s) for name, s in speeds.items()}, {name: summary(s) for name, s in work.items()}


def cpu_seconds() -> float:
    """Of this process and the children that have ended: other work on the machine disturbs it less."""
    return sum(os.times()[:4])


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)  # of tokenizers
    with tempfile.TemporaryDirectory() as folder:
        loaded = loader(Path(folder), args.repeats)
        speeds, work = prepare(Path(folder), args.repeats, args.workers)
    eaten = 0.6 * H200_FLOPS / ModelSpec(layers=12, hidden=768, heads=12).flops_per_token / 1e6
    if args.json:
        found = {"loader_mtokens_per_s": loaded, "eaten_mtokens_per_s": eaten, "mb_per_s": speeds, "mb_per_cpu_s": work}
        print(json.dumps(found, indent=2))
        return
    row = "{:<52}{:>10}{:>10}{:>10}".format
    print(row("", "median", "min", "max"))
    for name, s in loaded.items():
        print(row(f"loader, {name}, M tokens/s", *(f"{v:.1f}" for v in s.values())))
    print(row("GPT-3 125M on an H200 at 60 % MFU, M tokens/s", f"{eaten:.2f}", "", ""))
    for unit, table in (("MB/s", speeds), ("MB per CPU second", work)):
        for name, s in table.items():
            print(row(f"{name}, {args.workers} at work, {unit}", *(f"{v:.2f}" for v in s.values())))
        best = max(s["median"] for name, s in table.items() if name != "prepare")
        print(row(f"prepare / the faster of tokenizers, {unit}", f"{table['prepare']['median'] / best:.2f}", "", ""))


if __name__ == "__main__":
    main()
