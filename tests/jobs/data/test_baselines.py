"""The n-gram baselines, against the formulas written out over dictionaries."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from jobs.data import baselines
from jobs.data.baselines import ALPHA, count_pairs, cross_entropies


def by_hand(train, val, vocab):
    pairs = Counter(p for s in train for p in pairwise(s))
    after, context = Counter(), Counter()
    for (a, b), n in pairs.items():
        after[b] += n
        context[a] += n
    total = sum(pairs.values())
    unigram = {b: (after[b] + 1) / (total + vocab) for b in range(vocab)}
    asked = [p for s in val for p in pairwise(s)]
    bigram = [(pairs[a, b] + ALPHA * unigram[b]) / (context[a] + ALPHA) for a, b in asked]
    return -sum(math.log(unigram[b]) for _, b in asked) / len(asked), -sum(map(math.log, bigram)) / len(asked)


@pytest.mark.parametrize("vocab", [7, 70_000])
def test_against_brute_force(vocab, monkeypatch):
    monkeypatch.setattr(baselines, "CHUNK", 100)
    rng = np.random.default_rng(0)
    train = [rng.integers(0, min(vocab, 30), n) for n in (1000, 1, 333)]
    val = [rng.integers(0, min(vocab, 40), n) for n in (200, 50)]  # with tokens that train has not
    found = cross_entropies([s.astype("<i4") for s in train], [s.astype("<i4") for s in val], vocab)
    unigram, bigram = by_hand([s.tolist() for s in train], [s.tolist() for s in val], vocab)
    assert found["unigram"] == pytest.approx(unigram, rel=1e-12)
    assert found["bigram"] == pytest.approx(bigram, rel=1e-12)
    assert found["fitted_tokens"] == 999 + 0 + 332


def test_limits_of_what_text_can_be():
    """Uniform noise costs ln V under both; a cycle costs nothing under the bigram, ln V under the unigram."""
    vocab = 16
    noise = np.random.default_rng(0).integers(0, vocab, 400_000).astype("<u2")
    found = cross_entropies([noise[:300_000]], [noise[300_000:]], vocab)
    assert found["unigram"] == pytest.approx(math.log(vocab), abs=2e-3)
    assert found["bigram"] == pytest.approx(math.log(vocab), abs=2e-3)
    cycle = (np.arange(400_000) % vocab).astype("<u2")
    found = cross_entropies([cycle[:300_000]], [cycle[300_000:]], vocab)
    assert found["unigram"] == pytest.approx(math.log(vocab), abs=1e-3)
    assert found["bigram"] < 3e-3


def test_no_more_than_fit_is_counted(monkeypatch):
    monkeypatch.setattr(baselines, "FIT", 250)
    monkeypatch.setattr(baselines, "CHUNK", 100)
    stream = np.arange(1000, dtype="<u2")
    codes, counts = count_pairs([stream[:201], stream], 1000)
    assert counts.sum() == 250
    assert codes.tolist() == sorted(codes)
