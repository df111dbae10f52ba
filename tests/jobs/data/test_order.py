"""Permutations are permutations, and fair; mixes have exact counts."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.data.order import MIX, key, mix_bits, mix_counts, permute
from orchestrator.errors import DataError


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_every_key_gives_a_bijection(n, k):
    image = permute(np.arange(n, dtype=np.uint64), n, np.full(n, k, np.uint64))
    assert np.array_equal(np.sort(image), np.arange(n))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 2**48), st.integers(0, 2**64 - 1))
def test_no_collision_in_domains_too_large_to_list(n, k):
    points = np.unique(np.linspace(0, n - 1, 2000).astype(np.uint64))
    image = permute(points, n, np.full(len(points), k, np.uint64))
    assert len(np.unique(image)) == len(points)
    assert image.max() < n


def test_a_point_does_not_depend_on_its_neighbours():
    x = np.arange(1000, dtype=np.uint64)
    keys = mix_bits(x)
    whole = permute(x, 1000, keys)
    assert [int(permute(x[i : i + 1], 1000, keys[i : i + 1])[0]) for i in range(0, 1000, 37)] == whole[::37].tolist()


@pytest.mark.parametrize("n", [2, 3, 5, 7, 24, 100])
def test_each_point_goes_everywhere_equally_often(n):
    """Over many keys each image is uniform: chi-square has mean n - 1 and variance 2 (n - 1)."""
    draws = 200_000  # enough to see the unevenness of 8 rounds
    keys = mix_bits(np.arange(draws, dtype=np.uint64))
    for point in {0, 1, n - 1}:
        found = np.bincount(permute(np.full(draws, point, np.uint64), n, keys).astype(int), minlength=n)
        chi_square = ((found - draws / n) ** 2 / (draws / n)).sum()
        assert chi_square < n - 1 + 6 * (2 * (n - 1)) ** 0.5


def test_neighbours_are_torn_apart():
    """In a fair order of n the mean distance of neighbours is (n + 1) / 3."""
    n = 30_000
    image = permute(np.arange(n, dtype=np.uint64), n, np.repeat(key(7, "x"), n)).astype(np.int64)
    assert abs(np.abs(np.diff(image)).mean() / ((n + 1) / 3) - 1) < 0.02


def test_mix_bits_is_splitmix64():
    """First outputs of splitmix64 with seed 1234567, as published with its reference code (Vigna, prng.di.unimi.it)."""
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + golden * i) % 2**64 for i in (1, 2, 3)], np.uint64)
    assert mix_bits(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=12))
def test_counts_are_within_one_of_the_weights_and_add_up(weights):
    counts = mix_counts({str(i): w for i, w in enumerate(weights)})
    assert sum(counts.values()) == MIX
    for i, w in enumerate(weights):
        assert abs(counts[str(i)] - Fraction(MIX * w, sum(weights))) < 1


def test_gpt3_mix_of_table_2_2():
    weights = {"CommonCrawl": 60, "WebText2": 22, "Books1": 8, "Books2": 8, "Wikipedia": 3}  # adds up to 101
    assert list(mix_counts(weights).values()) == [5941, 2178, 792, 792, 297]
    assert mix_counts({"a": 3, "none": 0, "b": 1}) == {"a": 7500, "b": 2500}


def test_weights_that_cannot_be_kept():
    for weights in ({}, {"a": 0.0}, {"a": 1, "b": -1}, {"a": float("inf")}, {"a": float("nan")}):
        with pytest.raises(DataError, match="make no mix"):
            mix_counts(weights)
    with pytest.raises(DataError, match=r"source `b`: weight 1e-05 of 1.00001 is less than 1 in 10,000"):
        mix_counts({"a": 1, "b": 1e-5})
