"""One GPU, bf16, real training steps of GPT-3 125M to 6.7B through our engines.

For each engine and model: tokens/s, MFU, peak memory beside the plan's, the loss of the first step against the
same weights and batch in fp32, and the losses of all steps against the torch engine's. Runs under whatever Python and
torch the machine has: it needs jobs.nn, jobs.engines, jobs.runtime, orchestrator.spec and orchestrator.memory, and no
other package of the project but DeepSpeed and ColossalAI, for those engines; an engine that cannot be imported is
reported so. Each case is a process of its own, so that its memory is its own and running out of it ends nothing else.

    python benchmarks/gpu_check.py --json gpu.json
    python benchmarks/gpu_check.py --every-setup --models gpt3-1.3b     # recompute, offload, FSDP2, ZeRO-3, Gemini
    python benchmarks/gpu_check.py --engines torch --models gpt3-6.7b --micro-batch 2 --recompute none
    python benchmarks/gpu_check.py --mini        # the same path at toy sizes, on a CPU too

What fits: AdamW with fp32 master weights is 16 bytes a parameter in both engines (torch: fp32 weights,
gradients and moments, under autocast; DeepSpeed: bf16 weights and gradients, fp32 master and moments;
arXiv:1910.02054, section 3.1), so 6.7B is 107 GB of states, and the default micro-batch of 2 leaves
room on 141 GB without recompute, which would cost a third of the speed. MFU counts model flops
(ModelSpec.flops_per_token), not what is recomputed, against the dense bf16 peak.
"""

import argparse
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from orchestrator.spec import ModelSpec, OptimizerSpec, ParallelPlan, StageSpec  # noqa: E402

MODELS = {  # Brown et al. 2020, table 2.1; its 24 heads of 128 at 1.3B are 16, or they would not make 2048
    "gpt3-125m": (ModelSpec(layers=12, hidden=768, heads=12), 8),
    "gpt3-1.3b": (ModelSpec(layers=24, hidden=2048, heads=16), 8),
    "gpt3-2.7b": (ModelSpec(layers=32, hidden=2560, heads=32), 4),
    "gpt3-6.7b": (ModelSpec(layers=32, hidden=4096, heads=32), 2),
}  # name: sizes, and sequences in a micro-batch that fit 141 GB without recompute
MINI = {
    "mini-2x64": (ModelSpec(layers=2, hidden=64, heads=2, vocab=301, seq_len=64, window=16), 2),
    "mini-4x64": (ModelSpec(layers=4, hidden=64, heads=2, vocab=301, seq_len=64, window=16), 2),
}
PEAK_TFLOPS = (  # dense bf16, from NVIDIA's data sheets; the first name that is part of the device's counts
    ("H100 PCIe", 756),
    ("H100", 989),
    ("H200", 989),
    ("GH200", 989),
    ("B200", 2250),
    ("A100", 312),
    ("L40S", 362),
)
SETUPS = {  # of each engine, what one GPU allows; the first counts unless `--every-setup` is given
    "torch": {"ddp": {"zero": 0}, "recompute": {"zero": 0, "recompute": "full"}, "fsdp2": {"zero": 3}},
    "deepspeed": {  # at level 0 it takes an older optimizer than ZeRO's
        "zero-1": {"zero": 1},
        "zero-3": {"zero": 3},
        "offload": {"zero": 2, "offload": "optimizer"},
        "offload-all": {"zero": 3, "offload": "all"},
    },
    "colossalai": {"zero-1": {"zero": 1}, "gemini": {"zero": 3}},
}
NEAR = 2e-2  # nats between the losses of two engines in bf16; measured in miniature on a CPU: 1e-3 (2026-11-22)
LR = 1e-4
WARMUP = 2  # steps not timed: compilation, the optimizer's states


def peak_tflops(device_name):
    return next((peak for name, peak in PEAK_TFLOPS if name in device_name), None)


# ------------------------------------------------------------------ one case, in its own process


def run_case(case):
    """Measure one engine on one model; what went wrong is under ``error``."""
    try:
        engine_module = importlib.import_module(f"jobs.engines.{case['engine']}")
        if case["engine"] != "torch":
            importlib.import_module(case["engine"])
    except ImportError as e:
        return {"error": f"engine `{case['engine']}` cannot be imported here: {e}"}
    import torch

    try:
        return measure(case, engine_module)
    except torch.OutOfMemoryError as e:
        return {"error": "out of memory: " + str(e).split("\n")[0]}


def measure(case, engine_module):
    import torch

    from jobs.nn.gpt import GPT, init_weights
    from jobs.runtime.job import Ranks

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    spec = ModelSpec(**case["spec"])
    stage = stage_of(case)
    generator = torch.Generator().manual_seed(1)
    shape = (case["micro_batches"], case["micro_batch"], spec.seq_len + 1)
    batches = [
        {"tokens": t[:, :-1].contiguous(), "targets": t[:, 1:].contiguous()}
        for t in torch.randint(spec.vocab, shape, generator=generator)
    ]

    def make():
        return GPT(spec, recompute=case["recompute"])

    with torch.device(device):
        reference = init_weights(make(), stage.seed)
    loss_fp32 = reference_loss(reference, batches, device)
    del reference
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    engine = engine_module.build(make, stage, Ranks(), lambda nll, batch: nll.mean())
    losses, seconds = [], []
    for _ in range(WARMUP + case["steps"]):
        start = time.perf_counter()
        losses.append(engine.train_step(batches, lr=LR).loss)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    step_s = statistics.median(seconds[WARMUP:])
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    peak = peak_tflops(name) if on_gpu else None
    tokens_per_s = stage.global_batch * spec.seq_len / step_s
    return {
        "device": name,
        "params": spec.params,
        "step_s": step_s,
        "first_step_s": seconds[0],
        "tokens_per_s": tokens_per_s,
        "model_tflops": tokens_per_s * spec.flops_per_token / 1e12,
        "mfu": tokens_per_s * spec.flops_per_token / (peak * 1e12) if peak else None,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "planned_memory_gb": planned_gb(case, on_gpu=on_gpu),
        "reserved_memory_gb": torch.cuda.max_memory_reserved() / 1e9 if on_gpu else None,
        "loss_fp32": loss_fp32,
        "losses": losses,
    }


def stage_of(case):
    keys = ("zero", "offload", "micro_batch", "recompute")
    return StageSpec(
        kind="pretrain",
        engine=case["engine"],
        precision="bf16",
        compile=case["compile"],
        parallel=ParallelPlan(**{key: case[key] for key in keys}),
        global_batch=case["micro_batch"] * case["micro_batches"],
        optimizer=OptimizerSpec(lr=LR),
    )


def planned_gb(case, *, on_gpu):
    """What the plan says of the memory of this case."""
    from orchestrator.memory import fullest

    _, parts = fullest(ModelSpec(**case["spec"]), stage_of(case), 1, case["micro_batches"], on_gpu=on_gpu)
    return sum(parts.values()) / 1e9


def reference_loss(model, batches, device):
    """Mean loss over the batches in fp32, without TF32, before any step."""
    import torch

    torch.set_float32_matmul_precision("highest")
    with torch.no_grad():
        means = [model(b["tokens"].to(device), b["targets"].to(device)).mean().item() for b in batches]
    return statistics.fmean(means)


# ------------------------------------------------------------------ all cases


def cases(args, on_gpu):
    models = MINI if args.mini else MODELS
    for name in args.models or models:
        spec, micro_batch = models[name]
        for engine in args.engines:
            setups = SETUPS[engine] if args.every_setup else dict(list(SETUPS[engine].items())[:1])
            for setup, settings in setups.items():
                case = {
                    "engine": engine,
                    "setup": setup,
                    "model": name,
                    "spec": vars(replace(spec, attention=args.attention)),
                    "offload": "none",
                    "micro_batch": args.micro_batch or micro_batch,
                    "micro_batches": args.micro_batches,
                    "steps": args.steps,
                    "recompute": args.recompute,
                    **settings,
                    "compile": on_gpu if args.compile is None else args.compile,
                }
                if args.zero is not None:
                    case |= {"zero": args.zero, "setup": f"zero-{args.zero}"}
                limits = importlib.import_module(f"jobs.engines.{engine}").LIMITS
                if args.compile is None and limits.refusals(stage_of(case)):
                    case["compile"] = False
                if refused := limits.refusals(stage_of(case)):
                    print(f"{engine} {case['setup']}: left out: {refused[0].why}", file=sys.stderr)
                    continue
                yield case


def in_own_process(case, timeout_s):
    """The result of a case; the end of its output where it died without one."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, __file__, "--case", json.dumps(case), "--json", str(result)]
        allocator = "PYTORCH_CUDA_ALLOC_CONF"  # 6.7B has no room for fragments
        env = {allocator: "expandable_segments:True", **os.environ}
        try:
            done = subprocess.run(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {timeout_s} s"}
        if result.exists():
            return json.loads(result.read_text())
        return {"error": f"ended with {done.returncode}", "output": done.stdout[-2000:]}


def line(case, row):
    head = f"{case['engine']:<10} {case['setup']:<11} {case['model']:<10}"
    if "error" in row:
        return f"{head} {row['error']}\n{row.get('output', '')}".rstrip()
    mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
    memory = f"{row['peak_memory_gb']:.1f}" if row["peak_memory_gb"] else "-"
    first, last = row["losses"][0], row["losses"][-1]
    apart = f"{row['loss_difference']:.1e}" if row["loss_difference"] is not None else "-"
    return (
        f"{head} {row['tokens_per_s']:>9,.0f} {row['model_tflops']:>7.1f} {mfu:>6} {memory:>8} "
        f"{row['planned_memory_gb']:>8.1f}"
        f"   {row['loss_fp32']:.4f} {first - row['loss_fp32']:+.1e} {apart:>8}   {last:.4f}"
    )


def right(row):
    """Whether the case ran, its first loss is fp32's, the others are the torch engine's, and training lowered them."""
    if "error" in row:
        return False
    first, last = row["losses"][0], row["losses"][-1]
    near = abs(first - row["loss_fp32"]) < 1e-3 * row["loss_fp32"]  # bf16 rounds to 2^-9; a mean over tokens is nearer
    near = near and (row.get("loss_difference") or 0.0) < NEAR
    return near and all(map(math.isfinite, row["losses"])) and last < first


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=lambda s: s.split(","), default=[*SETUPS], help=", ".join(SETUPS))
    parser.add_argument("--every-setup", action="store_true", help="recompute, offload and more, not the first alone")
    parser.add_argument("--models", type=lambda s: s.split(","), help=", ".join(MODELS))
    parser.add_argument("--mini", action="store_true", help="toy sizes: " + ", ".join(MINI))
    parser.add_argument("--steps", type=int, default=8, help=f"timed steps, after {WARMUP} that are not")
    parser.add_argument("--micro-batch", type=int, help="sequences; default: what fits 141 GB")
    parser.add_argument("--micro-batches", type=int, default=8, help="per step; GPT-3's batches take hundreds")
    parser.add_argument("--zero", type=int, choices=range(4), help="default: the setup's")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--attention", choices=["dense", "alternating"], default="dense")
    parser.add_argument("--timeout-s", type=float, default=900, help="of one case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in set(args.engines) - set(SETUPS):
        parser.error(f"no engine `{name}`; one of: {', '.join(SETUPS)}")
    for name in set(args.models or ()) - set(MINI if args.mini else MODELS):
        parser.error(f"no model `{name}`; one of: {', '.join(MINI if args.mini else MODELS)}")
    return args


def main(argv=None):
    args = parse(argv)
    if args.case:
        args.json.write_text(json.dumps(run_case(args.case)))
        return 0
    import torch

    on_gpu = torch.cuda.is_available()
    machine = {"torch": torch.__version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    print("  ".join(f"{k} {v}" for k, v in machine.items()))
    head = f"{'engine':<10} {'setup':<11} {'model':<10} {'tokens/s':>9} {'TFLOP/s':>7} {'MFU':>6} {'peak GB':>8}"
    print(head + f" {'planned':>8}   loss: fp32, bf16 - fp32, - torch's, last")
    rows, reference = [], {}
    for case in cases(args, on_gpu):
        row = in_own_process(case, args.timeout_s)
        wanted = reference.get(case["model"])
        pairs = zip(row.get("losses", ()), wanted or (), strict=False)
        row["loss_difference"] = max((abs(a - b) for a, b in pairs), default=None)
        if case["engine"] == "torch" and "losses" in row:
            reference.setdefault(case["model"], row["losses"])
        rows.append({**case, **row, "right": right(row)})
        print(line(case, row) + ("" if right(row) or "error" in row else "   WRONG"), flush=True)
        if args.json:
            args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    return 0 if all(r["right"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
