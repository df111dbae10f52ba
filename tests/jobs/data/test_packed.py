"""The packed data set: the order is a function of (seed, i), whatever asks for it."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from jobs.data.indexed import ShardWriter
from jobs.data.packed import MIX, PackedDataset, check_data
from orchestrator.errors import DataError
from orchestrator.spec import DataSpec, SourceSpec

T = 8


def write(prefix, tokens):
    with ShardWriter(prefix, "<u2") as writer:
        writer.add(np.asarray(tokens, "<u2"), np.array([len(tokens)]))
    return str(prefix)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataSpec:
    """Two sources whose tokens say where they stand: `a` counts from 0 over three shards, `b` from 5000."""
    folder = tmp_path_factory.mktemp("data")
    Tokenizer(models.BPE(vocab={f"<{i}>": i for i in range(8000)}, merges=[])).save(str(folder / "tokenizer.json"))
    a = [write(folder / f"a{n}", range(*ends)) for n, ends in enumerate([(0, 5), (5, 6), (6, 6), (6, 4004)])]
    b = [write(folder / "b", range(5000, 6200))]
    val = [write(folder / "val-a", range(6200, 6800))], [write(folder / "val-b", range(7000, 7100))]
    return DataSpec(
        sources={
            "a": SourceSpec(weight=3, shards=a, val_shards=val[0]),
            "b": SourceSpec(weight=1, shards=b, val_shards=val[1]),
        },
        tokenizer=str(folder / "tokenizer.json"),
        seed=7,
    )


def train(data, **changes):
    return PackedDataset.open(replace(data, **changes), seq_len=T, split="train", vocab=8000)


def test_windows_cross_shards_and_overlap_by_one(data):
    d = train(data)
    assert d.streams[0].windows == (4004 - 1) // T
    assert d.tokens == 4004 + 1200
    for i in range(2000):
        (source, _, window), sample = d.ids(i, 1)[0], d.sample(i)
        first = {"a": 0, "b": 5000}[source] + window * T
        assert sample.tolist() == list(range(first, first + T + 1))


def test_each_window_once_an_epoch_and_each_epoch_in_another_order(data):
    d = train(data)
    ids = d.ids(0, 3 * MIX)
    for name, windows in (("a", 500), ("b", 149)):
        mine = [(epoch, window) for source, epoch, window in ids if source == name]
        assert [epoch for epoch, _ in mine] == sorted(epoch for epoch, _ in mine)
        epochs = [[w for _, w in mine[start : start + windows]] for start in range(0, len(mine) - windows, windows)]
        assert len(epochs) > 40
        assert all(sorted(e) == list(range(windows)) for e in epochs)
        assert len({tuple(e) for e in epochs}) == len(epochs)
    assert Counter(source for source, _, _ in ids[:MIX]) == {"a": 7500, "b": 2500}
    assert Counter(source for source, _, _ in ids[MIX : 2 * MIX]) == {"a": 7500, "b": 2500}
    assert [s for s, _, _ in ids[:MIX]] != [s for s, _, _ in ids[MIX : 2 * MIX]]
    assert abs(Counter(source for source, _, _ in ids[:400])["a"] - 300) < 50  # mixed from the start


def test_any_start_and_any_world_size_give_one_order(data):
    d, n = train(data), 240
    whole = d.batch(MIX - 100, n)  # over the end of a block of the mix
    rows = torch.cat([whole["tokens"], whole["targets"][:, -1:]], 1)
    assert rows.dtype == torch.int64
    assert whole["targets"].shape == (n, T)
    assert whole["tokens"].is_contiguous() and whole["targets"].is_contiguous()
    for i in (0, 57, 99, 100, 239):
        assert train(data).sample(MIX - 100 + i).tolist() == rows[i].tolist()  # opened anew: nothing remembered
    for world in (1, 2, 3, 8):
        share = n // world
        parts = [train(data).batch(MIX - 100 + rank * share, share)["tokens"] for rank in range(world)]
        assert torch.equal(torch.cat(parts), whole["tokens"])
    far = 10**12 + 3
    assert train(data).ids(far, 5) == train(data).ids(far - 2, 7)[2:]


def test_val_is_one_epoch_with_the_mix_from_its_start(data):
    d = PackedDataset.open(data, seq_len=T, split="val", vocab=8000)
    windows = {"a": (600 - 1) // T, "b": (100 - 1) // T}
    ids = d.ids(0, d.samples_per_epoch)
    assert len(set(ids)) == len(ids)
    assert {epoch for _, epoch, _ in ids} == {0}
    found = Counter(source for source, _, _ in ids)
    assert found["b"] == windows["b"] == 12  # the one that ends first, by its weight
    assert 34 <= found["a"] <= 38
    assert Counter(source for source, _, _ in ids[:8]) == {"a": 6, "b": 2}
    other_seed = PackedDataset.open(replace(data, seed=8), seq_len=T, split="val", vocab=8000)
    assert other_seed.ids(0, 20) == ids[:20]
    with pytest.raises(DataError, match=f"has {len(ids)} samples of 8 tokens, not {len(ids) + 1}"):
        d.batch(len(ids), 1)
    alone = replace(data, sources={"a": data.sources["a"]})
    one = PackedDataset.open(alone, seq_len=T, split="val", vocab=8000)
    assert sorted(w for _, _, w in one.ids(0, one.samples_per_epoch)) == list(range(windows["a"]))


def test_fingerprint_changes_with_the_order_and_with_nothing_else(data, tmp_path):
    base = train(data)
    a, b = data.sources["a"], data.sources["b"]
    assert train(data).fingerprint == base.fingerprint
    assert train(data, sources={"a": replace(a, weight=6), "b": replace(b, weight=2)}).fingerprint == base.fingerprint
    assert train(data, folder="elsewhere", val_fraction=0.5).fingerprint == base.fingerprint
    other = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE(vocab={"x": 0}, merges=[])).save(str(other))
    changed = [
        train(data, seed=8),
        train(data, tokenizer=str(other)),
        train(data, sources={"a": a}),
        train(data, sources={"a": replace(a, weight=2), "b": b}),
        train(data, sources={"a": replace(a, shards=a.shards[::-1]), "b": b}),
        train(data, sources={"a": replace(a, shards=[*a.shards, *b.shards]), "b": b}),
        PackedDataset.open(data, seq_len=T + 1, split="train", vocab=8000),
    ]
    assert len({d.fingerprint for d in [base, *changed]}) == 1 + len(changed)
    assert changed[1].tokenizer_sha256 != base.tokenizer_sha256
    assert all(d.ids(0, 300) != base.ids(0, 300) for d in (changed[0], changed[3]))


def refused(says, data, *, vocab=8000, seq_len=T):
    with pytest.raises(DataError, match=says) as e:
        check_data(data, seq_len=seq_len, vocab=vocab)
    assert e.value.hint


def test_what_cannot_be_read_is_refused(data, tmp_path):
    a, b = data.sources["a"], data.sources["b"]
    check_data(data, seq_len=T, vocab=8000)
    refused("tokenizer of the data has 8,000 tokens, the model only 7,999", data, vocab=7999)
    refused("one sample needs 101 tokens, `.*val-b` has 100", data, seq_len=100)
    refused("no file `.*gone.idx`", replace(data, sources={"a": replace(a, shards=["gone"])}))
    refused("no source has a `val` split", replace(data, sources={"a": replace(a, val_shards=[])}))
    refused("make no mix", replace(data, sources={"a": replace(a, weight=-1), "b": b}))
    refused("tokenizer `gone.json`", replace(data, tokenizer="gone.json"))
    refused("no prepared data in `.*`: there is no `dataset.json`", replace(data, tokenizer=None, folder=str(tmp_path)))
    refused("no prepared data", replace(data, sources={}, folder=str(tmp_path)))
    (tmp_path / "dataset.json").write_text("{")
    refused("dataset.json` is damaged", replace(data, tokenizer=None, folder=str(tmp_path)))
    (tmp_path / "dataset.json").write_text(json.dumps({"sources": {}, "vocab": 9, "tokenizer_sha256": "f" * 64}))
    (tmp_path / "tokenizer.json").write_text("{}")
    refused("sha256 44136fa355b3, but .* ffffffffffff", replace(data, tokenizer=None, folder=str(tmp_path)))


def test_tokens_the_model_does_not_have_are_named(data):
    other = replace(data, sources={"a": replace(data.sources["a"], shards=data.sources["b"].shards)})
    assert train(other).sample(0).max() >= 5000
    d = PackedDataset.open(other, seq_len=T, split="train", vocab=8000)
    d.vocab = 5003  # as if the tokenizer had been smaller than the shards' own
    with pytest.raises(DataError, match=r"source `a`, token [\d,]+ is 5\d\d\d, but the model has 5,003 tokens"):
        d.batch(0, 4)
