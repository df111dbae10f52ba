"""Published training runs: layout, hardware, and the measured time of a step. Nothing in here is ours.

Sources: [N] Narayanan et al. 2021, arXiv:2104.04473, tables 1 and 2, with micro-batches and chunks from the scripts
that repeat them (Megatron-LM, examples/sc21/run_table_1.sh); [K] Korthikanti et al. 2022, arXiv:2205.05198, table 5;
[H] Megatron-LM's README, weak scaling on H100 (micro-batches are not printed there: the best that fits is taken);
[B] bigscience, train/tr11-176B-ml/chronicles-prequel.md, on A100 with 4 x 100 Gb/s a node, kernels launched one at a
time (CUDA_LAUNCH_BLOCKING=1, section "dealing with JZ hanging"); [M] MegaScale, arXiv:2402.15627, table 2, its
Megatron-LM baseline, looked at only after everything else stood; [L] llm-foundry, scripts/train/benchmarking/README.md,
MPT under PyTorch's FSDP, which showed that it gathers through all ports of a node.
"""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.hardware import NETWORK_SHARE, chip
from orchestrator.spec import ClusterSpec, ModelSpec, ParallelPlan, StageSpec
from orchestrator.timing import Software, step

# Peaks, memory, links: data sheets; best product measured by mamf-finder (stas00/ml-engineering).
A100 = ClusterSpec(
    gpu="A100-SXM4-80GB", gpus_per_node=8, gpu_memory_gb=80, gpu_tflops=312, matmul_tflops=271.2, memory_gb_per_s=2039,
    link_gb_per_s=300, network_gb_per_s=25,
)  # fmt: skip
# Four Omni-Path ports of 100 Gb/s for eight GPUs. What NCCL gets out of one was measured there, on four nodes:
# 40.5 Gb/s of 100, by rings that leave a node through one port and enter it through another (bigscience,
# experiments/bandwidth/all_reduce_bench-a100-n4.txt, the median of 160). Two GPUs share that.
JEAN_ZAY = replace(A100, network_gb_per_s=40.5 / 8 / 2 / NETWORK_SHARE)
H100 = ClusterSpec(
    gpu="H100-SXM5-80GB", gpus_per_node=8, gpu_memory_gb=80, gpu_tflops=989, matmul_tflops=794.5, memory_gb_per_s=3350,
    link_gb_per_s=450, network_gb_per_s=50,
)  # fmt: skip

MEGATRON_2021 = Software(flash=False, lean_loss=False)
# Since February 2022 the products of the weights' gradients add to the fp32 sum themselves (Megatron-LM 83b1e42).
MEGATRON_2022 = Software(flash=False, lean_loss=False, grad_bytes=4, hides_tensor="backward", fused_sum=True)
MEGATRON_CORE = Software(lean_loss=False, grad_bytes=4, hides_tensor="all", hides_data=True, fused_sum=True)
# A hundred microseconds from kernel to kernel: issued by Python, launched, run, waited for.
MEGATRON_DEEPSPEED = Software(flash=False, lean_loss=False, kernel_s=100e-6)
# FlashAttention in Triton, which FlashAttention-2 is 1.3 to 2.5 times as fast as (arXiv:2307.08691, section 4.1): the
# middle. The loss is fused, and in place.
LLM_FOUNDRY = Software(flash_share=1 / 1.8, hides_data=True, gathers_by_all_ports=True)


@dataclass(frozen=True)
class Row:
    """One published measurement."""

    name: str
    step_s: float
    model: ModelSpec
    parallel: ParallelPlan
    gpus: int
    batch: int
    cluster: ClusterSpec
    software: Software

    def predicted_s(self) -> float:
        """What the plan's model says."""
        p = self.parallel
        data = self.gpus // (p.tensor * p.pipeline)
        stage = StageSpec(kind="pretrain", parallel=p, global_batch=self.batch)
        micro_batches = self.batch // (data * p.micro_batch)
        return step(self.model, stage, chip(self.cluster), data, micro_batches, self.software).total_s

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_s() / self.step_s - 1


def gpt(
    layers: int, hidden: int, heads: int, vocab: int = 51200, seq_len: int = 2048, dropout: float = 0.1
) -> ModelSpec:
    return ModelSpec(layers=layers, hidden=hidden, heads=heads, vocab=vocab, seq_len=seq_len, dropout=dropout)


def with_recompute_s(m: ModelSpec, batch: int, gpus: int, tflops: float) -> float:
    """[N] equation 3 over the printed rate."""
    s, h, layers = m.seq_len, m.hidden, m.layers
    flops = 96 * batch * s * layers * h**2 * (1 + s / (6 * h) + m.vocab / (16 * layers * h))
    return flops / (gpus * tflops * 1e12)


def megatron_2021() -> list[Row]:
    rows = []
    for name, layers, hidden, heads, t, p, gpus, batch, tflops, b, v in [
        ("1.7B", 24, 2304, 24, 1, 1, 32, 512, 137, 16, 1),
        ("3.6B", 30, 3072, 32, 2, 1, 64, 512, 138, 16, 1),
        ("7.5B", 36, 4096, 32, 4, 1, 128, 512, 142, 16, 1),
        ("18.4B", 40, 6144, 48, 8, 1, 256, 1024, 135, 8, 1),
        ("39.1B", 48, 8192, 64, 8, 2, 512, 1536, 138, 4, 1),
        ("76.1B", 60, 10240, 80, 8, 4, 1024, 1792, 140, 2, 3),
        ("145.6B", 80, 12288, 96, 8, 8, 1536, 2304, 148, 2, 2),
        ("310.1B", 96, 16384, 128, 8, 16, 1920, 2160, 155, 1, 2),
        ("529.6B", 105, 20480, 128, 8, 35, 2520, 2520, 163, 1, 3),
        ("1008B", 128, 25600, 160, 8, 64, 3072, 3072, 163, 1, 1),
    ]:
        m = gpt(layers, hidden, heads)
        plan = ParallelPlan(tensor=t, pipeline=p, interleave=v, micro_batch=b, recompute="full")
        measured = with_recompute_s(m, batch, gpus, tflops)
        rows.append(Row(f"N table 1, {name}", measured, m, plan, gpus, batch, A100, MEGATRON_2021))
    m = gpt(96, 12288, 96)
    for gpus, tflops in [(384, 153), (768, 149), (1536, 141)]:
        plan = ParallelPlan(tensor=8, pipeline=12, micro_batch=1, recompute="full")
        measured = with_recompute_s(m, 1536, gpus, tflops)
        rows.append(Row(f"N table 2, PTD {gpus}", measured, m, plan, gpus, 1536, A100, MEGATRON_2021))
    for gpus, tflops, b in [(384, 144, 4), (768, 88, 2), (1536, 44, 1)]:
        plan = ParallelPlan(zero=3, micro_batch=b, recompute="full")
        measured = with_recompute_s(m, 1536, gpus, tflops)
        rows.append(Row(f"N table 2, ZeRO-3 {gpus}", measured, m, plan, gpus, 1536, A100, MEGATRON_2021))
    return rows


def megatron_2022() -> list[Row]:
    rows = []
    for name, layers, hidden, heads, p, v, gpus, b, full_s, present_s in [
        ("22B", 48, 6144, 64, 1, 1, 8, 4, 1.42, 1.10),
        ("175B", 96, 12288, 96, 8, 3, 64, 1, 18.13, 13.75),
        ("530B", 105, 20480, 128, 35, 3, 280, 1, 49.05, 37.83),
        ("1T", 128, 25600, 160, 64, 1, 512, 1, 94.42, 71.49),
    ]:
        batch = 4 if gpus == 8 else gpus
        m = gpt(layers, hidden, heads)
        full = ParallelPlan(tensor=8, pipeline=p, interleave=v, micro_batch=b, recompute="full")
        present = replace(full, recompute="selective", sequence=True)
        rows.append(Row(f"K table 5, {name}, full", full_s, m, full, gpus, batch, A100, MEGATRON_2022))
        rows.append(Row(f"K table 5, {name}, selective", present_s, m, present, gpus, batch, A100, MEGATRON_2022))
    return rows


def megatron_core() -> list[Row]:
    rows = []
    for name, layers, hidden, heads, t, p, gpus, batch, tflops, micro, chunks in [
        ("1.7B", 24, 2048, 16, 1, 1, 48, 192, 408.8, (4, 2, 1), (1,)),
        ("16B", 32, 6144, 48, 4, 1, 192, 192, 489.1, (4, 2, 1), (1,)),
        ("70B", 84, 8192, 64, 8, 2, 768, 384, 419.7, (4, 2, 1), (1, 2, 3, 7)),
        ("177B", 96, 12288, 96, 8, 6, 2304, 1152, 432.8, (2, 1), (1, 2, 4, 8)),
    ]:
        m = gpt(layers, hidden, heads, vocab=131072, seq_len=4096, dropout=0)
        measured = m.flops_per_token * batch * m.seq_len / (gpus * tflops * 1e12)
        data = gpus // (t * p)
        layouts = [
            ParallelPlan(tensor=t, pipeline=p, interleave=v, micro_batch=b, sequence=t > 1, zero=1)
            for b in micro
            for v in chunks
            if v == 1 or batch // (data * b) % p == 0
        ]
        candidates = [Row(f"H, {name}", measured, m, q, gpus, batch, H100, MEGATRON_CORE) for q in layouts]
        rows.append(min(candidates, key=Row.predicted_s))
    return rows


# Hidden, layers, heads, tensor, pipeline, data, micro-batch, batch, seconds. Of the 25th of February and later: the
# day before, "A100s PCI-Express/NUMA was improved", and earlier rows are 1 to 5 % slower for it. From the 28th on,
# gradients are summed in fp32, and the embeddings take a layer's slot at either end.
BLOOM = [
    (14336, 72, 64, 8, 6, 8, 4, 2048, 114.11), (14336, 72, 64, 8, 12, 4, 4, 1568, 92.75),
    (14336, 72, 64, 8, 12, 4, 2, 1568, 99.93), (14336, 72, 64, 8, 8, 6, 4, 2016, 113.16),
    (14336, 72, 64, 8, 4, 12, 4, 2016, 114.81), (14336, 72, 64, 8, 2, 24, 2, 2016, 136.13),
    (14336, 72, 64, 4, 12, 8, 4, 2048, 111.89), (14336, 72, 64, 4, 12, 8, 2, 2048, 113.54),
    (14336, 72, 64, 4, 6, 16, 2, 2048, 111.71), (14336, 72, 64, 2, 24, 8, 1, 2048, 119.53),
    (14336, 72, 64, 4, 24, 4, 1, 2048, 130.60), (12288, 96, 64, 1, 48, 8, 1, 2048, 142.17),
    (13824, 78, 64, 4, 12, 8, 1, 2048, 148.24), (13824, 78, 96, 4, 12, 8, 2, 2048, 107.12),
    (13824, 78, 64, 4, 12, 8, 4, 2048, 106.72), (13824, 78, 128, 4, 12, 8, 4, 2048, 153.90),
    (13824, 78, 128, 8, 6, 8, 4, 2048, 156.84), (14336, 72, 128, 4, 12, 8, 2, 2048, 114.02),
    (14336, 72, 64, 8, 6, 8, 4, 2048, 113.95), (13312, 84, 64, 4, 12, 8, 2, 2048, 103.82),
    (13312, 84, 64, 8, 6, 8, 2, 2048, 129.61), (13824, 78, 96, 4, 12, 8, 2, 1024, 59.65),
    (13824, 78, 96, 8, 6, 8, 4, 2048, 118.24), (13824, 78, 96, 4, 6, 16, 4, 2048, 115.55),
    (12288, 106, 64, 4, 12, 8, 2, 2048, 110.96),
]  # fmt: skip
BLOOM_FP32_GRADIENTS = [
    (12288, 106, 64, 4, 12, 8, 2, 2048, 116.54), (12288, 106, 128, 4, 12, 8, 2, 2048, 121.42),
    (12288, 100, 64, 8, 6, 8, 4, 2048, 120.96), (13312, 82, 64, 8, 12, 4, 4, 2048, 111.79),
    (13312, 82, 104, 4, 12, 8, 2, 2048, 123.71), (13312, 82, 64, 4, 12, 8, 4, 2048, 104.82),
    (14336, 70, 64, 8, 12, 4, 2, 2048, 121.63), (14336, 70, 112, 4, 12, 8, 2, 2048, 104.50),
    (14336, 70, 64, 4, 12, 8, 4, 2048, 102.27),
]  # fmt: skip
# The other rows of the same pages, looked at only after everything else stood.
BLOOM_HELD_OUT = [
    (14336, 72, 64, 8, 6, 8, 4, 1568, 113.01), (14336, 72, 64, 8, 6, 8, 6, 2016, 123.57),
    (14336, 72, 64, 8, 12, 4, 4, 2048, 117.07), (14336, 72, 64, 8, 12, 4, 2, 2048, 128.82),
    (14336, 72, 64, 8, 4, 12, 2, 2016, 125.52), (14336, 72, 64, 8, 2, 24, 1, 2016, 145.45),
    (14336, 72, 64, 4, 12, 8, 2, 2048, 110.48), (14336, 72, 64, 4, 6, 16, 4, 2048, 117.11),
    (14336, 72, 64, 2, 12, 16, 2, 2048, 112.5), (14336, 72, 64, 2, 24, 8, 2, 2048, 122.75),
    (13824, 78, 64, 4, 12, 8, 2, 2048, 103.51), (13824, 78, 128, 4, 12, 8, 2, 2048, 147.41),
    (13824, 78, 96, 4, 12, 8, 4, 2048, 110.31), (13824, 78, 96, 8, 6, 8, 4, 2048, 118.12),
    (14336, 72, 64, 4, 12, 8, 2, 2048, 110.42), (14336, 72, 128, 4, 12, 8, 4, 2048, 137.53),
    (14336, 72, 128, 8, 6, 8, 4, 2048, 116.06), (13312, 84, 64, 4, 12, 8, 4, 2048, 113.21),
    (13824, 78, 96, 4, 12, 8, 2, 512, 35.77), (13824, 78, 96, 4, 12, 8, 2, 1536, 83.11),
    (13824, 78, 96, 8, 6, 8, 2, 2048, 133.57), (12288, 106, 96, 4, 12, 8, 2, 2048, 112.69),
]  # fmt: skip
BLOOM_FP32_GRADIENTS_HELD_OUT = [
    (12288, 106, 96, 4, 12, 8, 2, 2048, 118.79), (12288, 106, 96, 4, 12, 8, 4, 2048, 120.34),
    (12288, 100, 64, 8, 6, 8, 2, 2048, 139.72), (13312, 82, 64, 4, 12, 8, 2, 2048, 104.45),
    (13312, 82, 128, 4, 12, 8, 2, 2048, 108.78), (13312, 94, 128, 4, 12, 8, 2, 2048, 124.1),
    (14336, 70, 64, 4, 12, 8, 2, 2048, 102.03), (14336, 70, 128, 4, 12, 8, 2, 2048, 105.89),
]  # fmt: skip


def bloom() -> list[Row]:
    return _bloom(BLOOM, 2) + _bloom(BLOOM_FP32_GRADIENTS, 4)


def bloom_held_out() -> list[Row]:
    return _bloom(BLOOM_HELD_OUT, 2) + _bloom(BLOOM_FP32_GRADIENTS_HELD_OUT, 4)


def _bloom(table: list[tuple[int | float, ...]], grad_bytes: int) -> list[Row]:
    rows = []
    for hidden, layers, heads, t, p, data, b, batch, seconds in table:
        m = gpt(layers, hidden, heads, vocab=250880)
        plan = ParallelPlan(tensor=t, pipeline=p, micro_batch=b, recompute="full", zero=1)
        layout = f"t{t} p{p} d{data} b{b}, batch {batch}, {8 * grad_bytes} bit sums"
        name = f"B, {hidden} x {layers}, {heads} heads, {layout}"
        software = replace(MEGATRON_DEEPSPEED, grad_bytes=grad_bytes)
        rows.append(Row(name, seconds, m, plan, t * p * data, batch, JEAN_ZAY, software))
    return rows


def megascale() -> list[Row]:
    m = gpt(96, 12288, 128, vocab=64000, dropout=0)
    plan = ParallelPlan(tensor=8, pipeline=8, interleave=6, recompute="selective", sequence=True, zero=1)
    return [  # hiding what data ranks exchange is MegaScale's own (section 3.2), not the baseline's
        Row(f"M table 2, Megatron-LM on {gpus}", seconds, m, plan, gpus, batch, A100, MEGATRON_2022)
        for gpus, batch, seconds in [(256, 768, 40.0), (1024, 768, 11.9), (6144, 6144, 14.78)]
    ]


MPT_ON = {"h100_80gb": H100, "a100_80gb": A100, "a100_40gb": replace(A100, memory_gb_per_s=1555)}
MPT = {"1b": (24, 2048, 16), "7b": (32, 4096, 32), "30b": (48, 7168, 56)}  # layers, hidden, heads


def mpt() -> list[Row]:
    """All rows in bf16. Those of more than 4,096 tokens hang on an attention kernel that is not ours."""
    rows = []
    with (Path(__file__).parent / "published_mpt.csv").open() as f:
        for row in csv.DictReader(f):
            seq_len, gpus, micro = int(row["seq_len"]), int(row["gpus"]), int(row["micro_batch"])
            m = gpt(*MPT[row["model"]], vocab=50368, seq_len=seq_len, dropout=0)
            assert m.params == int(row["params"])
            zero = 3 if row["sharding"] == "FULL_SHARD" else 2
            plan = ParallelPlan(zero=zero, micro_batch=micro, recompute=row["recompute"])
            batch = micro * int(row["turns"]) * gpus
            measured = batch * seq_len / (gpus * int(row["tokens_per_s_per_gpu"]))
            cluster = MPT_ON[row["gpu"]]
            # Composer's DEFAULT sums gradients in fp32, its PURE in bf16
            software = replace(LLM_FOUNDRY, grad_bytes=4 if row["mixed"] == "DEFAULT" else 2)
            name = f"L, {row['model']}, {seq_len} tokens, {gpus} {row['gpu']}, micro-batch {micro}"
            rows.append(Row(name, measured, m, plan, gpus, batch, cluster, software))
    return rows
