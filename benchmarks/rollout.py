"""Tokens per second of our `generate` against transformers' `generate`: same weights, prompts and number of tokens.

GPT2LMHeadModel has our weights, by the names and settings of `orch export`; greedy texts must be equal. Both cache
keys and values; the prompts have several lengths and are padded on the left; a response is over at the end token, and
tokens count up to it. Greedy, and drawn from the whole distribution. Ours returns log-probabilities and entropies too,
which PPO needs; theirs only tokens. The two take turns, and which begins alternates; the ratio is the median over them.
With one thread, seconds are those of the CPU, so that what else runs on the machine counts less.

    python benchmarks/rollout.py [--sizes demo,small] [--turns 9] [--threads N] [--json FILE]
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from jobs.nn.gpt import GPT, init_weights
from jobs.nn.rollout import Sampling, generate, left_padded
from jobs.runtime import hf
from orchestrator.spec import ModelSpec

END = 0
# model, prompts, tokens of the longest prompt, tokens of each response
SIZES = {
    "demo": (ModelSpec(layers=4, hidden=128, heads=4, vocab=512, seq_len=256), 16, 64, 64),
    "small": (ModelSpec(layers=4, hidden=256, heads=4, vocab=8192, seq_len=512), 16, 128, 64),
    "gpt2-124m": (ModelSpec(layers=12, hidden=768, heads=12, seq_len=1024), 8, 64, 32),
}


def theirs(spec, model):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = hf.config_of(spec, end=END, dtype="float32")
    there = GPT2LMHeadModel(GPT2Config(**config, attn_implementation="sdpa")).eval()
    ours = model.state_dict()
    with torch.no_grad():
        for p in hf.parameters(spec):
            weight = ours[p.name].T if p.transposed else ours[p.name]
            there.get_parameter(p.theirs).copy_(weight)
    return there


def measure(name, turns, *, sampled):
    """One row: tokens per second of each, and the ratio's quartiles."""
    spec, count, longest, tokens = SIZES[name]
    model = init_weights(GPT(spec), 0).eval()
    there = theirs(spec, model)
    g = torch.Generator().manual_seed(1)
    lengths = [longest - i * longest // (2 * count) for i in range(count)]
    prompts = [torch.randint(1, spec.vocab, (n,), generator=g).tolist() for n in lengths]
    padded, segments = left_padded(prompts, END, 0)
    sampling = Sampling(max_tokens=tokens, temperature=1.0 if sampled else 0.0)
    draw = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0} if sampled else {"do_sample": False}

    def we():
        return generate(model, prompts, sampling, end=END, seed=0).tokens_BT

    def they():
        out = there.generate(
            padded, attention_mask=segments, max_new_tokens=tokens, use_cache=True, eos_token_id=END,
            pad_token_id=END, **draw,
        )  # fmt: skip
        return out[:, longest:]

    if not sampled:
        assert torch.equal(we(), they()), "not the same model"
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    speeds = {"ours": [], "transformers": []}
    for turn in range(-1, turns):  # one to warm up
        for key, run in (("ours", we), ("transformers", they))[:: 1 if turn % 2 else -1]:
            start = clock()
            responses = run()
            seconds = clock() - start
            if turn >= 0:
                speeds[key].append(written(responses) / seconds)
    ratios = [o / t for o, t in zip(speeds["ours"], speeds["transformers"], strict=True)]
    row = {"size": name, "params": spec.params, "sampled": sampled, "batch": count, "tokens": tokens}
    medians = {f"{key}_tokens_per_s": statistics.median(values) for key, values in speeds.items()}
    return {**row, **medians, "ratio": statistics.quantiles(ratios, n=4)}


def written(responses):
    """Tokens up to and with the end of each response."""
    ended = (responses == END).cumsum(1)
    return int((ended - (responses == END).long() == 0).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="demo,small", help="of " + ", ".join(SIZES))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    import transformers

    transformers.logging.set_verbosity_error()
    machine = {
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count(), "threads": args.threads,
    }  # fmt: skip
    print("  ".join(f"{k} {v}" for k, v in machine.items()))
    print(f"{'size':<10} {'params':>12} {'drawn':>7} {'ours':>9} {'transf.':>9}   ratio (quartiles)")
    rows = []
    for name in args.sizes.split(","):
        for sampled in (False, True):
            row = measure(name, args.turns, sampled=sampled)
            rows.append(row)
            speeds = " ".join(f"{row[f'{key}_tokens_per_s']:>9,.0f}" for key in ("ours", "transformers"))
            low, middle, high = row["ratio"]
            how = "sampled" if sampled else "greedy"
            shown = f"{middle:.2f} ({low:.2f} .. {high:.2f})"
            print(f"{name:<10} {row['params']:>12,} {how:>7} {speeds}   {shown}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
