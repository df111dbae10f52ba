"""Orders computed point by point: no table grows with the data, and any point costs the same.

A permutation of [0, n) is a Feistel network (Luby and Rackoff 1988, "How to construct pseudorandom
permutations") on the next power of two, walked until it falls inside (Black and Rogaway 2002, "Ciphers
with arbitrary finite domains", section 3: at most two steps are expected). NumPy's own generators are not
used, because their streams may change between versions (NEP 19).
"""

import hashlib
import json

import numpy as np

from orchestrator.errors import DataError

MIX = 10_000  # samples in a block of the mix: weights are exact to 1 in 10,000
ROUNDS = 16  # even, so that both halves come home; with 8, a permutation of 5 is measurably uneven (test_order.py)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the step of splitmix64


def mix_bits(x: np.ndarray) -> np.ndarray:
    """Hash each of ``x`` (uint64): the finalizer of splitmix64 (Steele, Lea and Flood 2014, figure 16)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(x: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where the permutation of [0, n) with each key (uint64) sends each x (uint64)."""
    x = x.copy()
    outside = np.arange(len(x))
    while len(outside):
        x[outside] = _feistel(x[outside], max(1, (n - 1).bit_length()), keys[outside])
        outside = outside[x[outside] >= n]
    return x


def _feistel(x: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of [0, 2^bits); with an odd number of bits the halves are unequal and trade places."""
    low_bits, high_bits = np.uint64(bits - bits // 2), np.uint64(bits // 2)
    one = np.uint64(1)
    high, low = x >> low_bits, x & ((one << low_bits) - one)
    for _ in range(ROUNDS):
        keys = keys + GOLDEN
        high, low = low, high ^ (mix_bits(low ^ mix_bits(keys)) & ((one << high_bits) - one))
        high_bits, low_bits = low_bits, high_bits
    return (high << low_bits) | low


def key(*parts: object) -> np.ndarray:
    """A key (uint64, shape (1,)) that says which permutation is meant."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return np.frombuffer(digest, "<u8")


def mix_counts(weights: dict[str, float]) -> dict[str, int]:
    """How many of each block's samples come from each source: largest remainders, MIX in all.

    Sources of weight 0 are left out. Raises DataError for a weight that cannot be kept.
    """
    total = sum(weights.values())
    if min(weights.values(), default=0) < 0 or not 0 < total < float("inf"):
        raise DataError(f"the weights {weights} make no mix", hint="`data.sources` needs a source of positive weight")
    quotas = {name: MIX * w / total for name, w in weights.items() if w > 0}
    counts = {name: int(q) for name, q in quotas.items()}
    by_remainder = sorted(quotas, key=lambda name: counts[name] - quotas[name])
    for name in by_remainder[: MIX - sum(counts.values())]:
        counts[name] += 1
    for name, count in counts.items():
        if count == 0:
            raise DataError(
                f"source `{name}`: weight {weights[name]:g} of {total:g} is less than 1 in {MIX:,} samples",
                hint="raise its weight, or set it to 0 to leave the source out",
            )
    return counts
