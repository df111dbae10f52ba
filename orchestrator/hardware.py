"""What one GPU, its links and its kernels can do, from a ClusterSpec; and how long a matrix product takes.

Sources: [G] NVIDIA, Matrix Multiplication Background User's Guide (tiles, waves, alignment); [A] Anthony et al. 2024,
arXiv:2401.14489 (products of transformers by shape); [S] stas00/ml-engineering, accelerator tables (best product
measured by mamf-finder, memory and link rates).
"""

import math
from dataclasses import dataclass
from functools import cache

from orchestrator.spec import ClusterSpec

# Streaming multiprocessors: NVIDIA's data sheets.
SMS = {"V100": 80, "A100": 108, "H100": 132, "H200": 132, "GH200": 132, "B200": 148}
NO_BF16 = ("V100", "T4", "P100")  # NVIDIA before Ampere (CUDA C++ Programming Guide, section 20.1)
# fp32 peak over the 16 bit one, without TF32: V100 15.7 of 125; A100 19.5 of 312, H100 67 of 989 (data sheets).
FP32_SHARE = {"old": 1 / 8, "new": 1 / 16}

# Output tiles of a thread block and the rate they reach of the best: larger ones reuse more [G, figures 3 and 4].
TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.95), (128, 64, 0.8), (64, 64, 0.65))
# Rate by the largest power of 2 in the inner dims [A, figure 5; G, table 1]; below 8 elements (16 bytes) a batched
# product leaves the tensor cores, so that it falls to the fp32 rate of the data sheet.
ALIGNED = {64: 1.0, 32: 0.95, 16: 0.87, 8: 0.7, 4: 1 / 16, 2: 1 / 16, 1: 1 / 16}
# The best product measured [S] is that of the best shape alone on a cool chip. What large products hold through whole
# steps: A100 240 to 250 of 271 [A, figure 4]; a Hopper is held back by its 700 W too. See docs/plan.md, "Constants".
SUSTAINED = {"new": 0.90, "hopper": 0.80}
# Fused attention, forward and backward, of the best product: FlashAttention-2 reaches 50 to 73 % of an A100's peak
# (arXiv:2307.08691), and 35 % of a Hopper's, whose new instructions it does not use (arXiv:2407.08608).
FLASH = {"new": (0.60, 0.50), "hopper": (0.44, 0.36)}
MEMORY_SHARE = 0.80  # of the data sheet's rate, for kernels that read and write once: 75 to 85 %, by size
LINK_SHARE = 0.77  # of one direction of NVLink: all-reduce at 230 of 300 GB/s on 8 A100 (nccl-tests)
NETWORK_SHARE = 0.80  # of the port: rings over InfiniBand at 19 to 21 of 25 GB/s (nccl-tests)


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Rates of one rank, in flop/s and bytes/s, as kernels and collectives reach them."""

    peak: float  # of the data sheet, in bf16
    matmul: float
    flash: tuple[float, float]  # forward, backward
    memory: float
    link: float
    network: float
    sms: int
    per_node: int
    cpu: bool = False


def lacks_bf16(gpu: str) -> bool:
    """Whether ``gpu`` is too old for bf16."""
    return any(old in gpu.upper() for old in NO_BF16)


@cache
def _chip(
    gpu: str, rates: tuple[float | None, ...], per_node: int, precision: str
) -> Chip:  # a ClusterSpec holds a dict, and cannot be a key
    tflops, matmul, memory, link, network = rates
    assert tflops is not None  # noqa: S101
    peak = tflops * 1e12
    if gpu == "cpu":  # its peak is a measured fp32 product; memory and loopback: a few GB/s a core
        bytes_per_s = (memory or 8) * 1e9
        low = (link or 1) * 1e9
        return Chip(peak=peak, matmul=peak, flash=(peak / 3, peak / 3), memory=bytes_per_s, link=low,
                    network=(network or 1) * 1e9, sms=1, per_node=per_node, cpu=True)  # fmt: skip
    hopper = any(name in gpu.upper() for name in ("H100", "H200", "B200", "B100"))
    best = (matmul * 1e12 if matmul else 0.85 * peak) * SUSTAINED["hopper" if hopper else "new"]
    share = FP32_SHARE["old" if lacks_bf16(gpu) else "new"] if precision == "fp32" else 1.0
    forward, backward = FLASH["hopper" if hopper else "new"]
    return Chip(
        peak=peak,
        matmul=best * share,
        flash=(best * share * forward, best * share * backward),
        memory=(memory * 1e9 if memory else peak / 153) * MEMORY_SHARE,  # A100: 312 TFLOP/s and 2.04 TB/s
        link=(link or 300) * 1e9 * LINK_SHARE,
        network=(network or 25) * 1e9 * NETWORK_SHARE,
        sms=next((n for name, n in SMS.items() if name in gpu.upper()), 108),
        per_node=per_node,
    )


def chip(cluster: ClusterSpec, precision: str = "bf16") -> Chip:
    """The rates of one rank of ``cluster``."""
    c = cluster
    rates = (c.gpu_tflops, c.matmul_tflops, c.memory_gb_per_s, c.link_gb_per_s, c.network_gb_per_s)
    return _chip(c.gpu, rates, c.gpus_per_node, precision)


@cache
def matmul_s(c: Chip, m: int, n: int, k: int, *, batch: float = 1, width: int = 2) -> float:
    """Seconds of ``batch`` products (m, k) x (k, n): whole waves of tiles, then the result is written.

    The slowest of arithmetic and reading counts, for they overlap; the last tiles' writing does not [G].
    """
    if c.cpu:
        return 2.0 * m * n * k * batch / c.matmul
    waves = min(
        math.ceil(math.ceil(m / rows) * math.ceil(n / columns) * batch / c.sms) * rows * columns / rate
        for rows, columns, rate in TILES
    )
    busy = waves * c.sms * 2 * k / (c.matmul * _aligned(n, k))
    return max(busy, width * (n * k + m * k) * batch / c.memory) + width * m * n * batch / c.memory


def _aligned(*dims: int) -> float:
    return min(ALIGNED[min(64, d & -d)] for d in dims)


def attention_s(c: Chip, s: int, d: int, heads: float, *, backward: bool, causal: bool) -> float:
    """Seconds of fused attention over ``heads`` (times batch) of width ``d``: 4 s^2 d flops, backward 2.5 times."""
    flops = 4.0 * s * s * d * heads * (0.5 if causal else 1.0)
    return (2.5 if backward else 1.0) * flops / (c.flash[int(backward)] * (1.0 if c.cpu else _aligned(d)))
