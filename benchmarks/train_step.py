"""Tokens per second of our training step against transformers' GPT2LMHeadModel in a plain PyTorch loop.

Ours is the whole step of the `torch` engine: forward, backward, clip, fused AdamW, fp32 on one process.
Theirs is the loop of most tutorials (`model(tokens, labels=tokens).loss.backward()`, clip_grad_norm_,
torch.optim.AdamW as it comes), and the same with fused AdamW, to tell the optimizer's share from the
model's. Same sizes, same run; the three take turns, one step each, and which begins alternates, so that
what else runs on the machine hits them alike. The ratio is the median over the turns.

    python benchmarks/train_step.py [--sizes small,gpt2-124m] [--turns 15] [--threads N] [--json FILE]
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from jobs.engines import torch as engine_torch
from jobs.nn.gpt import GPT
from jobs.runtime import dist
from jobs.runtime.job import Ranks
from orchestrator.spec import ModelSpec, ParallelPlan, StageSpec


@dataclass(frozen=True, kw_only=True)
class Size:
    model: ModelSpec
    batch: int


SIZES = {
    "demo": Size(model=ModelSpec(layers=4, hidden=128, heads=4, vocab=512, seq_len=128), batch=16),
    "small": Size(model=ModelSpec(layers=4, hidden=256, heads=4, vocab=8192, seq_len=256), batch=4),
    "medium": Size(model=ModelSpec(layers=6, hidden=512, heads=8, vocab=16384, seq_len=256), batch=4),
    "gpt2-124m": Size(model=ModelSpec(layers=12, hidden=768, heads=12, seq_len=256), batch=2),
}
LR = 1e-4


def ours(size):
    stage = StageSpec(
        kind="pretrain", precision="fp32", parallel=ParallelPlan(micro_batch=size.batch), global_batch=size.batch
    )
    engine = engine_torch.build(lambda: GPT(size.model), stage, Ranks(), lambda nll, batch: nll.mean())

    def step(tokens):
        batch = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
        return engine.train_step([batch], lr=LR).loss

    return step


def theirs(size, *, fused):
    from transformers import GPT2Config, GPT2LMHeadModel

    s = size.model
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=s.vocab, n_positions=s.seq_len, n_embd=s.hidden, n_layer=s.layers, n_head=s.heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa",
        )
    ).train()  # fmt: skip
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True if fused else None
    )

    def step(tokens):
        tokens = tokens[:, :-1].contiguous()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(name, turns):
    """One row: seconds per step of each, and the ratios' median and quartiles."""
    size = SIZES[name]
    steps = {"ours": ours(size), "transformers": theirs(size, fused=False), "fused": theirs(size, fused=True)}
    tokens = torch.randint(size.model.vocab, (size.batch, size.model.seq_len + 1))
    seconds = {key: [] for key in steps}
    for turn in range(-2, turns):  # two to warm up
        for key in list(steps)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            loss = steps[key](tokens)
            if turn >= 0:
                seconds[key].append(time.perf_counter() - start)
            assert loss < 20, f"{key} diverges: loss {loss}"
    row = {"size": name, "params": size.model.params, "tokens_per_step": size.batch * size.model.seq_len}
    for key, values in seconds.items():
        row[f"{key}_tokens_per_s"] = row["tokens_per_step"] / statistics.median(values)
        if key != "ours":
            ratios = [theirs / ours for theirs, ours in zip(values, seconds["ours"], strict=True)]
            row[f"ratio_{key}"] = statistics.quantiles(ratios, n=4)
    del steps
    gc.collect()
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(SIZES), help="of " + ", ".join(SIZES))
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    import transformers

    transformers.logging.set_verbosity_error()
    machine = {
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(), "threads": args.threads,
    }  # fmt: skip
    print("  ".join(f"{k} {v}" for k, v in machine.items()))
    print(
        f"{'size':<10} {'params':>12} {'ours':>9} {'transf.':>9} {'+fused':>9}   ratio (quartiles)      against +fused"
    )
    rows = []
    for name in args.sizes.split(","):
        row = measure(name, args.turns)
        rows.append(row)
        speeds = " ".join(f"{row[f'{key}_tokens_per_s']:>9,.0f}" for key in ("ours", "transformers", "fused"))
        ratios = "    ".join(
            f"{m:.2f} ({a:.2f} .. {b:.2f})" for a, m, b in (row["ratio_transformers"], row["ratio_fused"])
        )
        print(f"{name:<10} {row['params']:>12,} {speeds}   {ratios}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    dist.close()


if __name__ == "__main__":
    main()
