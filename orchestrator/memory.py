"""What one rank holds at its fullest moment, in bytes, by use.

Model states are counted exactly, per pipeline stage; activations tensor by tensor, as jobs/nn/gpt.py keeps them.
Every number was held against what the allocator says of small models (tests/jobs/test_memory_measured.py). Sources:

[R] Rajbhandari et al. 2020, arXiv:1910.02054: ZeRO, bytes per parameter
[K] Korthikanti et al. 2022, arXiv:2205.05198: activations, sequence parallel, recompute
[N] Narayanan et al. 2021, arXiv:2104.04473: 1F1B and its interleaved form
[D] Dao et al. 2022, arXiv:2205.14135: fused attention keeps no s x s matrix

Letters as in the papers: s seq_len, b micro_batch, h hidden, a heads, t tensor, p pipeline, v interleave.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.spec import BF16_SUMS, ModelSpec, StageSpec

CONTEXT_BYTES = {"gpu": 2.0e9, "cpu": 0.6e9}  # an assumption: runtime, libraries, communicators
# Of what is allocated, lost between blocks of a caching allocator: 3 to 8 % of activations in published runs' gap
# between reserved and allocated; an assumption.
FRAGMENTS = 0.05
LOGITS_BYTES = 2**31  # larger logits are computed in pieces (jobs/nn/losses.py)
PIECE_BYTES = {"gpu": 2**29, "cpu": 2**20}  # fp32 copies of logits in the loss (jobs/nn/losses.py)
HEAD_ROWS = 64  # on a GPU the vocabulary is padded to a multiple (jobs/nn/losses.py)
BUCKET_ELEMENTS = 5e8  # DeepSpeed's `reduce_bucket_size`, allocated whole
COLOSSAL_BUCKET = 12 * 2**20  # elements: `reduce_bucket_size_in_m` of ColossalAI's LowLevelZeroPlugin
LIVE_ELEMENTS = 1e9  # weights that its ZeRO-3 leaves gathered (`stage3_max_live_parameters`)
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "other")


@dataclass(frozen=True)
class States:
    """Bytes a parameter: what ZeRO shards, by its levels 1 (optimizer), 2 (gradients) and 3 (weights)."""

    weights: float
    gradients: float
    optimizer: float
    copies: float = 0.0  # of the weights, while the layers run


def states(stage: StageSpec, data: int, micro_batches: int) -> States:
    """What ``stage.engine`` keeps of a parameter before sharding.

    [R] section 3.1: 2 + 2 + 12 in bf16. PyTorch keeps fp32 weights, and under DDP bf16 copies while autocast is on,
    and gradients twice while they accumulate: beside its buckets until the last micro-batch.
    """
    zero, bf16 = stage.parallel.zero, stage.precision == "bf16"
    alone = stage.parallel.tensor == stage.parallel.pipeline == 1
    ddp = stage.engine == "torch" or (stage.engine == "colossalai" and alone)
    twice = 4.0 if ddp and zero == 0 and data > 1 and micro_batches > 1 else 0.0
    if stage.engine == "torch":
        return States(4, 4 + twice, 8, 2 if bf16 and zero == 0 else 0)
    if bf16:
        if stage.engine == "deepspeed" and stage.parallel.pipeline > 1:
            return States(2, 2 + 4, 12)  # micro-batches add up in fp32
        wide = zero == 0 or (zero >= 2 and micro_batches > BF16_SUMS)
        return States(2, 4 if wide and stage.engine == "deepspeed" else 2, 12)
    return States(4, 4 + twice, 8 if zero == 0 else 12)  # sharded, even fp32 weights are copied


def step_bytes(stage: StageSpec) -> float:
    """Bytes a parameter of a rank's own gradients in DeepSpeed's `step` of ZeRO-1 and 2, when activations are gone:
    what was summed, the same in one piece, and in bf16 that in fp32 (`stage_1_and_2.py`)."""
    p, bf16 = stage.parallel, stage.precision == "bf16"
    if stage.engine != "deepspeed" or p.zero not in (1, 2) or p.offload != "none" or (bf16 and p.pipeline > 1):
        return 0.0
    return 8.0  # 2 + 2 + 4 or 4 + 4


@dataclass(frozen=True)
class Slice:
    """The part of a model that one pipeline stage holds, over all its tensor ranks."""

    layers: int
    params: int
    first: bool
    last: bool
    in_flight: float  # micro-batches of all its layers that wait for their backward pass


def slice_of(model: ModelSpec, stage: StageSpec, index: int, micro_batches: int) -> Slice:
    """Pipeline stage ``index``: its layers, and the embeddings or the head at the ends."""
    p = stage.parallel
    first, last = index == 0, index == p.pipeline - 1
    h = model.hidden
    norm = h * (1 + int(model.bias and model.norm == "layernorm")) if model.norm_position == "pre" else 0
    positions = model.seq_len * h if model.position == "learned" else 0
    ends = (model.vocab * h + positions if first else 0) + (norm if last else 0)
    if last and (not first or not model.tie_embeddings):
        ends += model.vocab * h  # a tied table is held at both ends
    layers = math.ceil(model.layers / p.pipeline)
    behind = p.pipeline - index  # stages from here to the end, this one included
    chunks = 2 * (behind - 1) + (p.interleave - 1) * p.pipeline + 1  # [N] section 2.2.2; [K] section 4.2.3 for index 0
    in_flight = chunks / p.interleave if p.interleave > 1 else behind
    return Slice(layers, layers * model.layer_params + ends, first, last, min(in_flight, micro_batches))


def rank_bytes(
    model: ModelSpec, stage: StageSpec, index: int, data: int, micro_batches: int, *, on_gpu: bool = True,
    flash: bool = True,
) -> dict[str, float]:  # fmt: skip
    """Bytes of one rank of pipeline stage ``index``, by the names in PARTS."""
    p, part = stage.parallel, slice_of(model, stage, index, micro_batches)
    each = states(stage, data, micro_batches)
    mine = sharded_params(model, part, p.tensor)
    data *= p.ulysses
    # [R] figure 1: each level spreads one more part over the data ranks, and the ranks that share their rows.
    weights = each.weights * mine / (data if p.zero >= 3 or _torch_shards(stage) else 1)
    gradients = each.gradients * mine / (data if p.zero >= 2 else 1)
    optimizer = each.optimizer * mine / (data if p.zero >= 1 else 1)
    if p.offload != "none":  # ZeRO-Offload, arXiv:2101.06840: sharded gradients follow the optimizer
        optimizer = 0
        gradients = 0 if p.zero >= 2 else gradients
    if p.offload == "all":
        weights = 0
    logits = logit_bytes(model, stage, on_gpu=on_gpu) if part.last else 0.0
    spared = spared_bytes(model, stage)
    activations = activation_bytes(model, stage, part, flash=flash, at_head=logits - spared)
    buffers = each.copies * mine + buffer_bytes(model, stage, part, data) - spared
    buffers += max(0.0, step_bytes(stage) * mine / data - gradients - activations - logits)
    other = CONTEXT_BYTES["gpu" if on_gpu else "cpu"] + FRAGMENTS * (activations + logits)
    values = (weights, gradients, optimizer, activations, logits, buffers, other)
    return dict(zip(PARTS, values, strict=True))


def host_bytes(model: ModelSpec, stage: StageSpec, data: int) -> float:
    """What offload lays into the memory of the node, of one rank: fp32 weights, two moments and gradients; all: the
    weights that are gathered, too ([R], and DeepSpeed's `estimate_zero3_model_states_mem_needs`: 16 and 18)."""
    p = stage.parallel
    each = {"none": 0, "optimizer": 16, "all": 18}[p.offload]
    return each * model.params / p.tensor / p.pipeline / (data * p.ulysses)


def fullest(
    model: ModelSpec, stage: StageSpec, data: int, micro_batches: int, *, on_gpu: bool = True, flash: bool = True
) -> tuple[int, dict[str, float]]:
    """The pipeline stage that needs most, and its parts: the first (most in flight) or the last (the head)."""
    ends = sorted({0, stage.parallel.pipeline - 1})
    found = [
        (i, rank_bytes(model, stage, i, data, micro_batches, on_gpu=on_gpu, flash=flash)) for i in ends
    ]  # between them neither the micro-batches in flight nor the parameters are more
    return max(found, key=lambda item: sum(item[1].values()))


def sharded_params(model: ModelSpec, part: Slice, tensor: int) -> float:
    """Parameters of one tensor rank: matrices are split; norms, positions and biases behind a row split are not."""
    if tensor == 1:
        return part.params
    h = model.hidden
    norm = h * (1 + int(model.bias and model.norm == "layernorm"))
    whole = part.layers * ((1 if model.parallel_block else 2) * norm + (2 * h if model.bias else 0))
    whole += model.seq_len * h if part.first and model.position == "learned" else 0
    whole += norm if part.last and model.norm_position == "pre" else 0
    return whole + (part.params - whole) / tensor


def activation_bytes(
    model: ModelSpec, stage: StageSpec, part: Slice, *, flash: bool = True, at_head: float = 0.0
) -> float:
    """What waits for its backward pass, of all micro-batches in flight, and what one layer's backward pass works in.

    The last stage is fullest either in its head, ``at_head`` bytes, or in its last layer's backward pass. ``at_head``
    is less than the head's own where the layer has buffers besides.
    """
    p = stage.parallel
    width, stream = 2 if stage.precision == "bf16" else 4, _stream_bytes(stage)
    per_layer = layer_activation_bytes(model, stage, flash=flash)
    tokens = model.seq_len * p.micro_batch / p.ulysses
    rows = tokens * model.hidden / (p.tensor if p.sequence else 1)
    held = per_layer * part.layers * part.in_flight
    beside = model.ffn / p.tensor  # gradients of the feed-forward, and of the stream
    if p.sequence and p.micro_batch > 1:  # rows that are gathered arrive together, and are taken apart
        beside = max(beside, model.hidden)
    at_work = width * tokens * (beside + model.hidden)
    if p.sequence:  # this rank's tokens of the stream's gradient, beside all of them
        at_work += width * rows
    made = model.hidden * model.ffn  # the gradient of the last matrix, before it is added to what there is
    if part.last and p.pipeline == 1 and model.tie_embeddings:
        made += model.vocab * model.hidden  # the head's part of the table's gradient waits for the embedding's
    at_work += width * made / p.tensor
    if part.last and p.pipeline > 1 and stage.engine == "deepspeed":  # the outputs of this micro-batch and the last,
        at_work += 2 * width * rows  # which DeepSpeed keeps, with the graph behind them
    if p.recompute == "full":  # [K] section 5: the input of each layer, which the layer at work needs no second time
        held = stream * rows * part.layers * part.in_flight
        at_work += per_layer - stream * rows
    elif p.recompute == "selective" and not flash:
        at_work += score_bytes(model, stage)
    if stage.kind == "sft":  # the mask that keeps texts of a row apart, one for all layers
        held += width * model.seq_len**2 * p.micro_batch * part.in_flight
    if part.first and model.dropout:
        held += rows * part.in_flight  # the mask on the embeddings, [K] section 4.3
    if part.last and model.norm_position == "pre":  # what the last norm read; it is gone once a layer is at work
        held += stream * rows
        at_head += stream * rows
    return held + _between_stages(model, stage, part) + max(0.0, at_work - at_head)


def _between_stages(model: ModelSpec, stage: StageSpec, part: Slice) -> float:
    """Outputs until their gradient comes ([K] appendix B), and what is on its way."""
    p = stage.parallel
    if p.pipeline == 1:
        return 0.0
    width = 2 if stage.precision == "bf16" else 4
    rows = width * model.seq_len * p.micro_batch * model.hidden
    if stage.engine == "colossalai" and part.last and p.interleave == 1:  # the gradient that went back last; what it
        return rows  # reads is its first layer's to count, and nothing is on its way while it works
    if p.tensor == 1 or stage.engine != "deepspeed":
        return rows * (part.in_flight + (1 if part.first else 3))
    # DeepSpeed's tensor ranks keep and send a part each of what all of them hold (`pipe_partitioned`; in sequence
    # parallel they hold no more), and make outputs and their gradients whole for the backward pass.
    if p.sequence:
        return rows / p.tensor * (part.in_flight + (1 if part.first else 3))
    if part.last:
        return rows * (2 + 1 / p.tensor)
    return rows / p.tensor * (part.in_flight + (1 if part.first else 2)) + rows


def layer_activation_bytes(
    model: ModelSpec, stage: StageSpec, *, flash: bool = True, keeps_gathered: bool = True
) -> float:
    """What one layer keeps of one micro-batch for its backward pass.

    [K] section 4.1, term by term, s b h (10 + 24 / t) for GPT-3 in 16 bit with dropout; sequence parallel splits the
    10 too (equation 4), but for what products read where they keep it gathered (jobs/nn/parallel.py does, Megatron
    gathers again: ``keeps_gathered``). Its 5 a s / h, the scores, is left out where attention is fused [D], and where
    selective recompute does it again (equation 6).
    """
    p, h, f = stage.parallel, model.hidden, model.ffn
    width, stream = 2 if stage.precision == "bf16" else 4, _stream_bytes(stage)
    norms = 1 if model.parallel_block else 2
    gathered = h * width * (1 if model.parallel_block else 2)  # what the qkv and the up projection read
    whole = h * stream * norms + (h * norms if model.dropout else 0)  # inputs of the norms; masks, a byte each
    if not (p.sequence and keeps_gathered):
        whole, gathered = whole + gathered, 0
    queries: float = h + 2 * model.kv_hidden + h  # q, k, v and the attention's output
    if p.ulysses > 1:
        queries += h  # the output on either side of the exchange
    elif model.position == "rope":
        queries += h + model.kv_hidden  # q and k before the turn lie in the same memory as v, which is kept
    up = (4 if model.activation == "swiglu" else 2) * f  # before and behind the activation
    rows = model.seq_len * p.micro_batch / p.ulysses
    banded = _banded_share(model)
    if model.kv_hidden < h and p.recompute != "selective":  # a kernel with a mask takes no shared keys
        repeated = h - 3 * model.kv_hidden if model.position == "rope" and p.ulysses == 1 else 2 * h
        queries += (1 if stage.kind == "sft" else banded) * repeated
    split = width * (queries + up) / p.tensor
    scores = 0.0 if flash or p.recompute == "selective" else score_bytes(model, stage)
    if p.recompute != "selective":  # each banded layer makes a mask
        scores += banded * width * model.seq_len**2 * (p.micro_batch if stage.kind == "sft" else 1)
    return rows * (whole / (p.tensor if p.sequence else 1) + gathered + split) + scores


def _banded_share(model: ModelSpec) -> float:
    """Of the layers, those whose window is smaller than a row."""
    if model.window >= model.seq_len:
        return 0.0
    return {"dense": 0.0, "alternating": model.layers // 2 / model.layers, "banded": 1.0}[model.attention]


def score_bytes(model: ModelSpec, stage: StageSpec) -> float:
    """Softmax, and with dropout its mask and output: s b h x 5 a s / (h t) in 16 bit ([K] section 4.1)."""
    p = stage.parallel
    width = 2 if stage.precision == "bf16" else 4
    each = width + (width + 1 if model.dropout else 0)
    return each * model.heads * model.seq_len**2 * p.micro_batch / (p.tensor * p.ulysses)


def logit_bytes(model: ModelSpec, stage: StageSpec, *, on_gpu: bool) -> float:
    """Logits that the loss keeps, and the fp32 pieces it works in, or the gradient of the head (jobs/nn/losses.py)."""
    p = stage.parallel
    width = 2 if stage.precision == "bf16" else 4
    rows = model.seq_len * p.micro_batch / p.ulysses
    logits = min(LOGITS_BYTES, width * rows * model.vocab / p.tensor)
    piece = min(PIECE_BYTES["gpu" if on_gpu else "cpu"], 4 * rows * model.vocab / p.tensor)
    summed = 4 if logits == LOGITS_BYTES else 0  # chunks add up in fp32
    piece = max(piece, (width + summed) * model.vocab * model.hidden / p.tensor)  # then the table's gradient is made
    hidden = 3 * width + (4 if _stream_bytes(stage) > width else 0)  # what the head reads, its gradient, the norm's
    ragged = on_gpu and math.ceil(model.vocab / p.tensor) % HEAD_ROWS > 0  # then a padded copy of the head is made
    padded = width * model.vocab * model.hidden / p.tensor if ragged else 0.0
    return logits + piece + padded + hidden * rows * model.hidden


def buffer_bytes(model: ModelSpec, stage: StageSpec, part: Slice, data: int) -> float:
    """What engines hold beside: buckets of gradients, weights gathered for the layer at work and the next."""
    p = stage.parallel
    width = 2 if stage.precision == "bf16" else 4
    block = model.layer_params / p.tensor
    ends = model.embedding_params / p.tensor if p.pipeline == 1 else 0.0
    if stage.engine == "torch":
        if p.zero == 0:
            return 0.0
        if p.zero == 3:  # a block and the next one, gathered; gradients of the one before, being reduced
            return width * (2 * block + ends) + 4 * block
        return width * (sharded_params(model, part, p.tensor) + 3 * block)  # with a block's gradient and its buffer
    if p.zero == 3 or p.offload == "all":
        two = 2 * max(block, model.vocab * model.hidden / p.tensor)
        live = _elements(stage, "stage3_max_live_parameters", LIVE_ELEMENTS)
        kept = min(live, sharded_params(model, part, p.tensor))
        return width * (max(two, kept) + bucket(stage))
    if p.zero and stage.engine == "colossalai":  # flushed when full; that of a small model only when all is done
        return width * COLOSSAL_BUCKET if sharded_params(model, part, p.tensor) > COLOSSAL_BUCKET else 0.0
    return width * bucket(stage) if p.zero else 0.0


def spared_bytes(model: ModelSpec, stage: StageSpec) -> float:
    """What of ``buffer_bytes`` is not there while the head is at work: FSDP2's gradients under way, and blocks gathered
    for them; with ZeRO-3 the ends and one block are there, with ZeRO-2 all weights."""
    p = stage.parallel
    if stage.engine != "torch" or p.zero == 0:
        return 0.0
    width = 2 if stage.precision == "bf16" else 4
    return (width + 4 if p.zero == 3 else 3 * width) * model.layer_params / p.tensor


def zero_options(stage: StageSpec) -> Mapping[str, Any]:
    """`engine_config.zero_optimization`; empty where it is none."""
    section: Any = stage.engine_config.get("zero_optimization", {})
    return section if stage.engine == "deepspeed" and isinstance(section, Mapping) else {}


def bucket(stage: StageSpec) -> float:
    """Elements of DeepSpeed's reduce bucket; ZeRO-1 and 2 fill a second while the first is summed beside arithmetic."""
    twice = 2 if stage.parallel.zero in (1, 2) and zero_options(stage).get("overlap_comm") is True else 1
    return twice * _elements(stage, "reduce_bucket_size", BUCKET_ELEMENTS)


def _elements(stage: StageSpec, key: str, default: float) -> float:
    size = zero_options(stage).get(key, default)
    return float(size) if isinstance(size, int | float) else default


def _torch_shards(stage: StageSpec) -> bool:
    """FSDP2 keeps fp32 weights sharded at every level; what it gathers are buffers."""
    return stage.engine == "torch" and stage.parallel.zero > 0


def _stream_bytes(stage: StageSpec) -> int:
    """Bytes an element of the residual stream: under DDP, autocast leaves it in fp32."""
    return 4 if stage.precision == "fp32" or (stage.engine == "torch" and stage.parallel.zero == 0) else 2
