"""Memory against the formulas and tables of the papers."""

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.memory import (
    activation_bytes,
    fullest,
    layer_activation_bytes,
    logit_bytes,
    rank_bytes,
    sharded_params,
    slice_of,
)
from orchestrator.spec import ModelSpec, ParallelPlan, StageSpec

S, B, H, A = 2048, 2, 12288, 96
GPT3 = ModelSpec(layers=96, hidden=H, heads=A, vocab=51200, dropout=0.1)


def stage(engine: str = "deepspeed", **parallel: Any) -> StageSpec:
    plan = ParallelPlan(**{"micro_batch": B, **parallel})
    return StageSpec(kind="pretrain", engine=engine, parallel=plan, global_batch=1536)


@pytest.mark.parametrize(
    ("tensor", "sequence", "recompute", "factor"),
    [
        # Korthikanti et al. 2022, table 2, in units of s b h; 5 a s / h = 80
        (1, False, "none", 34 + 80),
        (8, False, "none", 10 + 24 / 8 + 80 / 8),
        (8, True, "none", 34 / 8 + 80 / 8),
        (8, False, "selective", 10 + 24 / 8),
        (8, True, "selective", 34 / 8),
    ],
)
def test_activations_of_a_layer_are_korthikantis(tensor: int, sequence: bool, recompute: Any, factor: float) -> None:
    s = stage(tensor=tensor, sequence=sequence, recompute=recompute)
    assert layer_activation_bytes(GPT3, s, flash=False, keeps_gathered=False) == pytest.approx(S * B * H * factor)


def test_fused_attention_keeps_no_scores() -> None:
    assert layer_activation_bytes(GPT3, stage()) == S * B * H * 34


def test_masks_are_kept() -> None:
    """A row of several texts has one for all layers; a banded layer makes its own; with one, keys are not shared."""
    dense = replace(GPT3, layers=4)
    plain, sft = (rank_bytes(dense, s, 0, 1, 1)["activations"] for s in (stage(), replace(stage(), kind="sft")))
    assert sft - plain == 2 * B * S**2
    banded = replace(dense, attention="alternating")
    assert rank_bytes(banded, stage(), 0, 1, 1)["activations"] - plain == 2 * (2 * S**2)
    for position, more in (("learned", 2 * H), ("rope", H - 3 * H // 8)):  # q alone, or v, keeps all three in memory
        shared = replace(dense, heads=96, kv_heads=12, position=position)
        one, other = (layer_activation_bytes(shared, replace(stage(), kind=kind)) for kind in ("pretrain", "sft"))
        assert other - one == 2 * S * B * more


def test_a_head_is_padded_on_gpus() -> None:
    ragged, even = (replace(GPT3, vocab=vocab) for vocab in (50257, 50304))
    for model, copies in ((ragged, 1), (even, 0)):
        on_gpu = logit_bytes(model, stage(tensor=1, micro_batch=64), on_gpu=True)
        on_cpu = logit_bytes(model, stage(tensor=1, micro_batch=64), on_gpu=False)
        assert on_gpu - on_cpu == copies * 2 * model.vocab * H


def test_deepspeeds_buckets() -> None:
    def buffers(zero: int, **options: object) -> float:
        s = replace(stage(zero=zero, engine="deepspeed"), engine_config={"zero_optimization": options})
        return rank_bytes(GPT3, s, 0, 8, 1)["buffers"]

    assert buffers(2, overlap_comm=True) - buffers(2, overlap_comm=False) == 2 * 5e8
    assert buffers(3, overlap_comm=True) == buffers(3)
    assert buffers(3, stage3_max_live_parameters=1e10) == 2 * (1e10 + 5e8)


def test_full_recompute_keeps_the_inputs_of_the_layers() -> None:
    s = stage(recompute="full", pipeline=4)
    part = slice_of(GPT3, s, 1, 100)
    one = layer_activation_bytes(GPT3, s)
    at_work = one + 2 * S * B * (4 + 1) * H + 2 * 4 * H**2
    held = activation_bytes(GPT3, s, part, at_head=at_work)
    outputs = 2 * S * B * H * (3 + 3)  # of three micro-batches, and three on their way
    assert held - outputs == 2 * S * B * H * 24 * 3  # section 5: 2 s b h a layer, three micro-batches of a fourth


def test_ranks_that_share_rows_keep_their_tokens_and_shards() -> None:
    """Jacobs et al. 2023, arXiv:2309.14509, sections 3.2 and 3.4: activations are divided, and ZeRO's shards too."""
    whole, shared = (rank_bytes(GPT3, stage(zero=3, ulysses=n), 0, 8 // n, 1) for n in (1, 8))
    assert [shared[key] for key in ("weights", "gradients", "optimizer")] == [
        whole[key] for key in ("weights", "gradients", "optimizer")
    ]
    one, eighth = (layer_activation_bytes(GPT3, stage(ulysses=n)) for n in (1, 8))
    assert eighth == one / 8 + 2 * S * B * H / 8  # the attention's output is kept on either side of the exchange


@pytest.mark.parametrize("pipeline", [2, 4, 8])
def test_the_first_stage_keeps_as_much_as_all_layers(pipeline: int) -> None:
    part = slice_of(GPT3, stage(pipeline=pipeline), 0, 1000)  # Korthikanti et al. 2022, section 4.2.3
    assert part.layers * part.in_flight == GPT3.layers


@pytest.mark.parametrize(("pipeline", "chunks"), [(8, 3), (8, 2), (35, 3), (4, 6)])
def test_interleaving_keeps_more(pipeline: int, chunks: int) -> None:
    model = replace(GPT3, layers=pipeline * chunks * 2)
    part = slice_of(model, stage(pipeline=pipeline, interleave=chunks), 0, 10_000)
    expected = model.layers * (1 + (pipeline - 1) / (pipeline * chunks))  # section 4.2.3
    assert part.layers * part.in_flight == pytest.approx(expected)


def test_no_more_is_in_flight_than_there_is() -> None:
    assert slice_of(GPT3, stage(pipeline=8), 0, 3).in_flight == 3
    assert [slice_of(GPT3, stage(pipeline=8), i, 100).in_flight for i in range(8)] == [8, 7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pipeline", [1, 2, 3, 8])
def test_stages_make_up_the_model(pipeline: int, tied: bool) -> None:
    model = replace(GPT3, tie_embeddings=tied, vocab=50257)
    held = sum(slice_of(model, stage(pipeline=pipeline), i, 8).params for i in range(pipeline))
    twice = model.vocab * H if tied and pipeline > 1 else 0
    assert held == model.params + twice


def test_tensor_ranks_repeat_what_is_not_split() -> None:
    model = ModelSpec(layers=2, hidden=64, heads=4, vocab=512, seq_len=128)
    part = slice_of(model, stage(), 0, 1)
    # by hand: two norms and two biases of `hidden` a layer, the positions, and the last norm
    whole = 2 * (2 * 2 * 64 + 2 * 64) + 128 * 64 + 2 * 64
    assert sharded_params(model, part, 4) == whole + (model.params - whole) / 4


def test_the_last_stage_is_fullest_where_the_head_is_large() -> None:
    model = ModelSpec(layers=4, hidden=512, heads=8, vocab=250_000)
    s = stage(pipeline=4, recompute="full", micro_batch=4)
    index, parts = fullest(model, s, 1, 4)
    assert index == 3
    assert parts["logits"] > 0
    assert rank_bytes(model, s, 0, 1, 4)["logits"] == 0
    assert fullest(GPT3, stage(pipeline=8, recompute="selective"), 1, 64)[0] == 0
