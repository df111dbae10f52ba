"""How long a step takes: a roofline over the kernels of one layer, then communication and the pipeline around it.

No constant of "MFU": matrix products run at the rate measured for the chip, less what their shape wastes
(`hardware.py`); all else in a layer moves bytes; what ranks exchange goes through links of known rate. Sources:

[N] Narayanan et al. 2021, arXiv:2104.04473: flops, schedule of the pipeline, volumes of communication
[K] Korthikanti et al. 2022, arXiv:2205.05198: what each operation reads and keeps, sequence parallel
[R] Rajbhandari et al. 2020, arXiv:1910.02054, section 7: volumes of ZeRO
[U] Jacobs et al. 2023, arXiv:2309.14509: volumes of Ulysses

Letters as in the papers: s seq_len, b micro_batch, h hidden, t tensor, p pipeline, v interleave, m micro-batches.
"""

import math
from dataclasses import dataclass
from functools import cache

from orchestrator.hardware import Chip, attention_s, matmul_s
from orchestrator.spec import ModelSpec, ParallelPlan, StageSpec

FORWARD_KERNELS, BACKWARD_KERNELS = 20, 45  # of a layer, counted in jobs/nn/gpt.py; Megatron's are as many
COLLECTIVE_S = 20e-6  # a collective of few bytes inside a node, or a message between two
# Collectives that run beside arithmetic hold some 10 of 108 multiprocessors (NCCL's channels), so that hiding a
# second of them costs a tenth of a second.
HIDING_COSTS = 0.1
HIDDEN_SHARE = 0.8  # of the last backward pass, beside which gradients can be reduced: the first bucket must fill
# Parameters gathered piece by piece across nodes reach 0.8 of what a port does in a steady ring: ZeRO-3 on Selene
# moves 6 bytes a parameter in 66 s at 768 and at 1,536 GPUs ([N] table 2), that is 16 of 25 GB/s.
GATHER_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class Software:
    """What the training software does, beside what the plan says. The defaults are this project's engines'."""

    flash: bool = True  # attention keeps no s x s matrix in memory
    flash_share: float = 1.0  # of the rate of FlashAttention-2, where a run had another kernel of the kind
    causal: bool = True  # and leaves its masked half out
    lean_loss: bool = True  # no fp32 logits in memory (jobs/nn/losses.py)
    grad_bytes: int = 2  # an element of the gradient that is accumulated and reduced
    kernel_s: float = 4e-6  # from the end of a kernel to the start of the next
    hides_tensor: str = "none"  # collectives of the tensor ranks run beside arithmetic: none, backward, all
    hides_data: bool = False  # gradients are reduced beside the last backward pass
    reduces_each: bool = True  # at ZeRO-2, gradients of every micro-batch, not of their sum
    gathers_each: bool = False  # at ZeRO-2, weights for every micro-batch, not for every step
    gathers_by_all_ports: bool = False  # at ZeRO-3, as NCCL's rings can; DeepSpeed's reached less than one of them
    fused_sum: bool = False  # the product that makes a weight's gradient adds it to the sum


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of one optimizer step, by use; they add up to ``total_s``."""

    compute_s: float  # of the slowest pipeline stage, recompute and the tensor ranks' collectives left out
    tensor_s: float  # collectives of the tensor and ulysses ranks that nothing hides
    bubble_s: float
    pipeline_s: float  # messages between stages
    data_s: float  # gradients and weights between data ranks, as far as nothing hides them
    optimizer_s: float
    recompute_s: float

    @property
    def total_s(self) -> float:
        """The whole step."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer and micro-batch on one rank."""

    forward_s: float
    backward_s: float
    attention_s: float  # the part of forward_s that selective recompute does again
    tensor_forward_s: float
    tensor_backward_s: float


def step(model: ModelSpec, stage: StageSpec, c: Chip, data: int, micro_batches: int, software: Software) -> Step:
    """The time of a step of ``micro_batches`` per pipeline, on ``data`` replicas.

    The pipeline is [N] section 2.2: one micro-batch passes all stages, the others follow at the pace of the slowest;
    with v chunks a rank the first pass takes a v-th of the time. Where layers do not split evenly, the ends of the
    pipeline have fewer of them.
    """
    p = stage.parallel
    data *= p.ulysses  # each of these ranks has a part of a row's tokens, and of its heads, as if it had fewer rows
    one = layer(model, c, p.micro_batch / p.ulysses, p.tensor, p.sequence, stage.precision, software)
    exchange = _exchange_s(model, stage, c)
    again = {"none": 0.0, "selective": one.attention_s, "full": one.forward_s}[p.recompute]
    comm = (one.tensor_forward_s + exchange) * (2 if p.recompute == "full" else 1) + one.tensor_backward_s + exchange
    a_layer = one.forward_s + one.backward_s + again + comm
    layers = math.ceil(model.layers / p.pipeline)
    ends = _embedding_s(model, stage, c, software), _head_s(model, stage, c, software)

    uneven = model.layers % p.pipeline > 0
    slowest = layers * a_layer + (sum(ends) if p.pipeline == 1 else 0.0 if uneven else max(ends))
    whole = model.layers * a_layer + sum(ends)
    fill = (whole - slowest) / p.interleave if p.pipeline > 1 else 0.0
    message = _message_s(model, stage, c, data)
    busy = micro_batches * slowest
    data_s = _data_s(model, stage, c, data, micro_batches, software, hide=layers * one.backward_s, busy=busy)
    return Step(
        compute_s=busy - micro_batches * layers * (comm + again),
        tensor_s=micro_batches * layers * comm,
        recompute_s=micro_batches * layers * again,
        bubble_s=fill,
        pipeline_s=message * (micro_batches * p.interleave + p.pipeline - 1),
        data_s=data_s,
        optimizer_s=_optimizer_s(model, stage, c, data, software),
    )


@cache
def layer(model: ModelSpec, c: Chip, b: float, t: int, sequence: bool, precision: str, software: Software) -> LayerTime:
    """One layer: four matrix products, attention, and the kernels between them, which move bytes."""
    width = 2 if precision == "bf16" else 4
    m, h, f, kv = int(model.seq_len * b), model.hidden, model.ffn, model.kv_hidden
    up = 2 if model.activation == "swiglu" else 1
    shapes = [(m, (h + 2 * kv) // t, h), (m, h, h // t), (m, up * f // t, h), (m, h, f // t)]
    forward = sum(matmul_s(c, *shape, width=width) for shape in shapes)
    backward = sum(matmul_s(c, m, k, n, width=width) + matmul_s(c, n, k, m, width=width) for m, n, k in shapes)
    core = _attention_s(model, c, b, t, width, software)

    whole = m * h / (t if sequence else 1)  # norms and residual branches, [K] section 4.2.2
    split = m * up * f / t  # behind the up projection
    mask = 1 if model.dropout else 0
    norms = 1 if model.parallel_block else 2
    # read and write of each norm, of each residual sum (with dropout and its mask), of the activation
    moved = width * (2 * norms + 3 * norms) * whole + mask * norms * whole + 2 * width * split
    # the same backwards; then the biases' gradients, which read what the products wrote
    moved_back = width * (3 * norms + 3 * norms) * whole + mask * (2 * width + 1) * norms * whole
    moved_back += 3 * width * split + (width * (m * (h + 2 * kv) / t + split + 2 * whole) if model.bias else 0)
    if model.position == "rope":
        moved, moved_back = (moved + 2 * width * m * (h + kv) / t), (moved_back + 2 * width * m * (h + kv) / t)
    weights = sum(n * k for _, n, k in shapes)
    # read and write the sum; and read the new gradient, or where that is fused not write it either
    accumulated = weights * (2 * software.grad_bytes + (-width if software.fused_sum else width))
    gap = 0.0 if c.cpu else software.kernel_s
    volume = _ring_s(2.0 * width * m * h, t, c.link) + COLLECTIVE_S + gap if t > 1 else 0.0
    tensor_forward, tensor_backward = _hide_tensor(2 * volume, forward, backward, software)
    return LayerTime(
        forward_s=forward + core[0] + moved / c.memory + FORWARD_KERNELS * gap,
        backward_s=backward + core[1] + (moved_back + accumulated) / c.memory + BACKWARD_KERNELS * gap,
        attention_s=core[0],
        tensor_forward_s=tensor_forward,
        tensor_backward_s=tensor_backward,
    )


def _hide_tensor(volume: float, forward: float, backward: float, software: Software) -> tuple[float, float]:
    """What is left of two all-reduces (or what they split into) each way, [K] section 4.2.2."""
    ways = {"none": (), "backward": (1,), "all": (0, 1)}[software.hides_tensor]
    beside = (HIDDEN_SHARE * forward, HIDDEN_SHARE * backward / 2)  # backward: the weights' gradients only
    left = [_hidden(volume, beside[i]) if i in ways else volume for i in (0, 1)]
    return left[0], left[1]


def _hidden(seconds: float, beside: float) -> float:
    """What ``seconds`` of communication cost where ``beside`` seconds of arithmetic can hide them."""
    return seconds - (1 - HIDING_COSTS) * min(seconds, beside)


def _attention_s(model: ModelSpec, c: Chip, b: float, t: int, width: int, software: Software) -> tuple[float, float]:
    """The attention core, forward and backward; a banded layer is masked, and computes every key all the same."""
    s, d, heads = model.seq_len, model.head_dim, model.heads // t
    if software.flash:
        banded = {"dense": 0.0, "alternating": 0.5, "banded": 1.0}[model.attention]
        parts = []
        for back in (False, True):
            dense = attention_s(c, s, d, heads * b, backward=back, causal=software.causal)
            masked = attention_s(c, s, d, heads * b, backward=back, causal=False)
            parts.append(((1 - banded) * dense + banded * masked) / software.flash_share)
        return parts[0], parts[1]
    scores, dropped = s * s * heads * b, bool(model.dropout)
    products = matmul_s(c, s, s, d, batch=heads * b, width=width) + matmul_s(c, s, d, s, batch=heads * b, width=width)
    forward = products + scores * (2 * width + (2 * width + 1 if dropped else 0)) / c.memory
    backward = 2 * products + scores * (3 * width + (2 * width + 1 if dropped else 0)) / c.memory
    return forward, backward


def _embedding_s(model: ModelSpec, stage: StageSpec, c: Chip, software: Software) -> float:
    """Look-up, positions and dropout, and the gradient of the table, per micro-batch."""
    p = stage.parallel
    width = 2 if stage.precision == "bf16" else 4
    rows = model.seq_len * p.micro_batch / p.ulysses * model.hidden
    table = model.vocab * model.hidden / p.tensor
    return (10 * width * rows + table * (width + 2 * software.grad_bytes)) / c.memory


def _head_s(model: ModelSpec, stage: StageSpec, c: Chip, software: Software) -> float:
    """Logits and cross-entropy, forward and backward, per micro-batch; [K] section 4.3 has the sizes."""
    p = stage.parallel
    width = 2 if stage.precision == "bf16" else 4
    m, h = model.seq_len // p.ulysses * p.micro_batch, model.hidden
    vocab = math.ceil(model.vocab / p.tensor / 64) * 64
    products = (matmul_s(c, m, vocab, h, width=width), matmul_s(c, m, h, vocab, width=width),
                matmul_s(c, vocab, h, m, width=width))  # fmt: skip
    passes = 24 if software.lean_loss else 44  # bytes a logit: ours works in place; plain PyTorch casts to fp32
    return sum(products) + m * vocab * passes / c.memory


def _exchange_s(model: ModelSpec, stage: StageSpec, c: Chip) -> float:
    """Tokens for heads and back in one layer: four all-to-alls, of q, k, v and the output ([U] section 3.2)."""
    p = stage.parallel
    if p.ulysses == 1:
        return 0.0
    width = 2 if stage.precision == "bf16" else 4
    moved = width * model.seq_len * p.micro_batch / p.ulysses * 2 * (model.hidden + model.kv_hidden)
    return _ring_s(moved, p.ulysses, c.link if p.ulysses <= c.per_node else c.network) + 4 * COLLECTIVE_S


def _message_s(model: ModelSpec, stage: StageSpec, c: Chip, data: int) -> float:
    """An activation to the next stage and a gradient back, split over the tensor ranks ([N] section 4.1)."""
    p = stage.parallel
    if p.pipeline == 1:
        return 0.0
    width = 2 if stage.precision == "bf16" else 4
    rate = c.link if data * p.tensor * p.pipeline <= c.per_node else c.network
    return 2 * (width * model.seq_len * p.micro_batch * model.hidden / p.tensor / rate + COLLECTIVE_S)


def _ring_s(moved: float, ranks: int, rate: float) -> float:
    """``moved`` bytes through a ring: each rank sends (n - 1) / n of them ([N] section 3.3.1)."""
    return moved * (ranks - 1) / ranks / rate


def rank_params(model: ModelSpec, p: ParallelPlan) -> float:
    """Parameters of the fullest rank: its layers, and one of the ends of the pipeline."""
    layers = math.ceil(model.layers / p.pipeline) * model.layer_params
    ends = model.embedding_params if p.pipeline == 1 else model.vocab * model.hidden
    return (layers + ends) / p.tensor


def _data_s(
    model: ModelSpec, stage: StageSpec, c: Chip, data: int, micro_batches: int, software: Software, *, hide: float,
    busy: float,
) -> float:  # fmt: skip
    """Gradients and weights between data ranks, [R] section 7: 2 volumes a step, with ZeRO-3 3 a micro-batch.

    ZeRO-2 keeps no whole gradient to add to, so that each micro-batch's is reduced when it is made.
    """
    p = stage.parallel
    mine = rank_params(model, p)
    width = 2 if stage.precision == "bf16" else 4
    tied = 0.0
    if p.pipeline > 1 and model.tie_embeddings:  # both ends sum the table's gradient ([N] section 4.1's baseline)
        tied = 2 * model.vocab * model.hidden / p.tensor * software.grad_bytes / c.network / 2
    if data == 1:
        return tied
    inside = data * p.tensor <= c.per_node  # the pipeline is outermost (jobs/runtime/mesh.py)
    ports = max(1, min(data, c.per_node // p.tensor))  # of a node's, that this group's ring may use
    rate = c.link if inside else min(c.link, c.network * ports)
    if p.zero == 3:
        rate = rate if inside or software.gathers_by_all_ports else c.network * GATHER_SHARE
        moved = _ring_s(micro_batches * (2 * width + software.grad_bytes) * mine, data, rate)
        return tied + _hidden(moved, busy)
    reduced = micro_batches if p.zero == 2 and software.reduces_each else 1
    gathered = micro_batches if p.zero == 2 and software.gathers_each else 1
    each = 2 * software.grad_bytes if p.zero == 0 else reduced * software.grad_bytes + gathered * width
    moved = _ring_s(each * mine, data, rate)
    return tied + (_hidden(moved, HIDDEN_SHARE * hide * reduced) if software.hides_data else moved)


def _optimizer_s(model: ModelSpec, stage: StageSpec, c: Chip, data: int, software: Software) -> float:
    """AdamW reads and writes weights and two moments in fp32, and reads gradients thrice (norm, clip, update)."""
    p = stage.parallel
    mine = rank_params(model, p)
    owned = mine / (data if p.zero else 1)
    rate = min(c.memory, 20e9) if p.offload != "none" and not c.cpu else c.memory  # ZeRO-Offload: a CPU's share
    return owned * (6 * 4 + 3 * software.grad_bytes + 2) / rate + mine * 4 / c.memory
