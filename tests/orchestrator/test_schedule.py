"""Schedules against closed forms and GPT-3's published recipe (Brown et al. 2020, appendix B)."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.schedule import batch_at, batches, learning_rate, total_tokens
from orchestrator.spec import OptimizerSpec, ScheduleSpec, StageSpec

GPT3 = StageSpec(
    kind="pretrain",
    global_batch=1536,
    steps=100,
    optimizer=OptimizerSpec(lr=0.6e-4),
    schedule=ScheduleSpec(warmup_tokens=375e6, decay_tokens=260e9, min_lr_ratio=0.1),
)


def _sizes(stage, seq_len):
    """Every step's batch, one after the other: what a run would train on."""
    sizes = []
    for _ in range(stage.steps):
        sizes.append(batch_at(stage, sum(sizes), seq_len))
    return sizes


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (187_500_000, 0.3e-4),  # half of the warm-up
        (375_000_000, 0.6e-4),  # its end
        ((375e6 + 260e9) / 2, 0.33e-4),  # half of the cosine: the mean of 0.6e-4 and 0.06e-4
        (260_000_000_000, 0.06e-4),  # 10 % of the peak
        (300_000_000_000, 0.06e-4),  # and constant from there on
    ],
)
def test_gpt3_learning_rate(tokens, rate):
    assert learning_rate(GPT3, int(tokens), 260e9) == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize(("shape", "rate"), [("linear", 0.55), ("constant", 1.0), ("cosine", 0.55)])
def test_half_way_down(shape, rate):
    stage = StageSpec(
        kind="pretrain", optimizer=OptimizerSpec(lr=1.0), schedule=ScheduleSpec(shape=shape, min_lr_ratio=0.1)
    )
    assert learning_rate(stage, 500, 1000) == pytest.approx(rate)


def test_ramp_grows_linearly_in_whole_steps():
    schedule = ScheduleSpec(ramp_from=16, ramp_step=16, ramp_tokens=2048 * 10_000)
    stage = StageSpec(kind="pretrain", global_batch=1616, steps=50, schedule=schedule)
    assert batch_at(stage, 0, 2048) == 16
    assert batch_at(stage, 5_000, 2048) == 816  # 16 + 1600 / 2
    assert batch_at(stage, 10_000, 2048) == batch_at(stage, 10**9, 2048) == 1616
    sizes = _sizes(stage, 2048)
    assert all(b % 16 == 0 and a <= b for a, b in itertools.pairwise(sizes))
    assert total_tokens(stage, 2048) == sum(sizes) * 2048


@given(
    st.integers(1, 40), st.integers(1, 200), st.integers(0, 120), st.floats(1, 1e6), st.one_of(st.none(), st.just(3))
)
def test_batches_are_counted_as_they_come(start, more, steps, ramp_tokens, by):
    schedule = ScheduleSpec(ramp_from=start, ramp_step=by, ramp_tokens=ramp_tokens)
    stage = StageSpec(kind="pretrain", global_batch=start + more, steps=steps, schedule=schedule)
    assert batches(stage, 16) == Counter(_sizes(stage, 16))


def test_without_a_ramp_every_batch_is_whole():
    assert set(_sizes(GPT3, 2048)) == {1536}
    assert total_tokens(GPT3, 2048) == 100 * 1536 * 2048


def test_cosine_never_rises():
    rates = [learning_rate(GPT3, int(t), 260e9) for t in range(375_000_000, 300_000_000_000, 10**9)]
    assert rates == sorted(rates, reverse=True)
    assert math.isclose(rates[-1], 0.06e-4)
