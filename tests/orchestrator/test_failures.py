"""Interruptions and saves against published numbers and against brute force."""

import math
import random

import pytest

from orchestrator.failures import DAY_S, goodput, limit_s, optimal_interval_s, storage_gb


def lost(interval_s: float, save_s: float, between_s: float) -> float:
    """Time over useful time with exponential failures (Daly 2006, equation 20, no restart time)."""
    return between_s / interval_s * (math.exp((interval_s + save_s) / between_s) - 1)


@pytest.mark.parametrize(("save_s", "between_s"), [(40, 3 * DAY_S), (100, 11_000), (600, 11_000), (30, 900)])
def test_the_optimal_interval_loses_least(save_s: float, between_s: float) -> None:
    best = optimal_interval_s(save_s, between_s)
    at_best = lost(best, save_s, between_s)
    assert at_best <= lost(1.1 * best, save_s, between_s) + 1e-9
    assert at_best <= lost(0.9 * best, save_s, between_s) + 1e-9


def test_youngs_interval_is_the_first_order() -> None:
    assert optimal_interval_s(1, 1e9) == pytest.approx(math.sqrt(2e9), rel=1e-4)
    assert optimal_interval_s(100, 40) == 40
    assert optimal_interval_s(100, math.inf) == math.inf


def test_llama_3_is_interrupted_every_three_hours() -> None:
    # arXiv:2407.21783, section 3.3.4: 419 unexpected interruptions in 54 days on 2,048 nodes, over 90 % useful
    g = goodput(
        run_s=54 * DAY_S, save_s=10, interval_s=1800, nodes=2048, per_node_day=419 / 54 / 2048, restart_s=480
    )  # fmt: skip
    assert g.days * 24 / g.interruptions == pytest.approx(3.09, rel=0.01)
    assert 0.86 < g.goodput < 0.95


def test_bloom_saves_cost_as_printed() -> None:
    # bigscience's notes: 40 s every 100 iterations of 105 s: 0.37 %
    g = goodput(run_s=1e6, save_s=40, interval_s=100 * 105, nodes=48, per_node_day=0, restart_s=0)
    assert 1 / g.goodput - 1 == pytest.approx(0.0037, rel=0.04)
    assert g.interruptions == 0


def test_a_time_limit_makes_more_jobs() -> None:
    kw = {"save_s": 60.0, "interval_s": 1e9, "nodes": 1, "per_node_day": 0.0, "restart_s": 120.0, "queue_s": 600.0}
    one = goodput(run_s=40 * 3600, **kw)
    assert (one.submissions, one.days * DAY_S) == (1, pytest.approx(40 * 3600 + 60 + 600, rel=1e-6))  # one save
    cut = goodput(run_s=40 * 3600, limit_s=20 * 3600, **kw)
    assert cut.submissions == 3  # 20 hours less a restart are too few twice, with a save
    assert cut.days > one.days
    assert goodput(run_s=40 * 3600, limit_s=20 * 3600, lead_s=4 * 3600, **kw).submissions == 3
    assert goodput(run_s=40 * 3600, limit_s=20 * 3600, lead_s=8 * 3600, **kw).submissions == 4


@pytest.mark.parametrize(("interval_s", "restart_s"), [(600, 60), (3000, 600), (10_000, 600)])
def test_time_lost_to_failures_is_what_happens(interval_s: float, restart_s: float) -> None:
    """Segments of training and a save that start again, restart and all, when an exponential failure comes first."""
    draw, between, save_s, segments = random.Random(1), 2274.0, 84.0, 4000
    took, failures = 0.0, 0
    for _ in range(segments):
        needs = interval_s + save_s
        while (until := draw.expovariate(1 / between)) < needs:
            took, failures, needs = took + until, failures + 1, restart_s + interval_s + save_s
        took += needs
    kw = {"save_s": save_s, "interval_s": interval_s, "restart_s": restart_s, "nodes": 10_000}
    g = goodput(run_s=segments * interval_s, per_node_day=0.0038, **kw)
    assert g.days * DAY_S == pytest.approx(took, rel=0.1)
    assert g.interruptions == pytest.approx(failures, rel=0.1)


def test_nothing_fails_in_the_queue() -> None:
    kw = {"run_s": 30 * DAY_S, "save_s": 60, "interval_s": 3600, "nodes": 128, "per_node_day": 0.0038, "restart_s": 600}
    at_once, queued = (goodput(**kw, queue_s=queue_s, limit_s=DAY_S) for queue_s in (0, DAY_S))
    assert queued.interruptions == at_once.interruptions == pytest.approx(15.5, rel=0.1)
    assert queued.days == pytest.approx(at_once.days + at_once.submissions + at_once.interruptions)


def test_what_always_fails_first_never_ends() -> None:
    g = goodput(run_s=1e7, save_s=60, interval_s=1e7, nodes=10_000, per_node_day=0.0038, restart_s=600)
    assert g.days > 1e9
    assert g.goodput < 1e-6


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("24:00:00", 86400), ("2-0", 172800), ("1-12:30", 131400), ("30:15", 1815), (None, 0), ("x", 0)],
)
def test_limits_are_read_as_slurm_reads_them(text: object, seconds: float) -> None:
    assert limit_s(text) == seconds


def test_storage_is_for_one_more_than_is_kept() -> None:
    assert storage_gb(100, 2) == 300
