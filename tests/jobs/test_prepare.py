"""The stage `prepare`, on real text: modules of the standard library."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from clock import slowness
from tokenizers import Tokenizer

from jobs import prepare
from jobs.data import encode
from jobs.data.indexed import read_shard
from jobs.data.packed import PackedDataset, check_data
from jobs.runtime.faults import Stopped
from jobs.runtime.job import Job, Ranks
from orchestrator.errors import DataError, OrchError
from orchestrator.run import Attempt, Run
from orchestrator.spec import ClusterSpec, DataSpec, Experiment, ModelSpec, SourceSpec, StageSpec

LIBRARY = Path(sysconfig.get_path("stdlib"))
MODULES = ("argparse", "ast", "inspect", "pathlib", "pydoc", "random", "tarfile", "typing", "zipfile")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Real text as files, and as lines of JSON, one of which writes of end-of-text."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "code").mkdir()
    for name in MODULES:
        shutil.copy(LIBRARY / f"{name}.py", folder / "code")
    lines = [json.dumps({"text": (LIBRARY / f"{name}.py").read_text()}) for name in ("shutil", "socket", "uuid")]
    lines.append(json.dumps({"text": "A document ends in <|endoftext|>, they say.\n" * 5}))
    (folder / "lines.jsonl").write_text("\n".join(lines))
    return folder


def make_job(folder, sources, *, vocab=400, tokenizer=None, **changes) -> Job:
    options = {k: changes.pop(k) for k in ("workers", "seed", "end_of_text", "baselines") if k in changes}
    stage = StageSpec(kind="prepare")
    data = DataSpec(folder=str(folder), sources=sources, tokenizer=tokenizer and str(tokenizer), **changes)
    cluster = ClusterSpec(gpu="cpu", gpus_per_node=1, gpu_memory_gb=1, gpu_tflops=1)
    model = ModelSpec(layers=1, hidden=8, heads=1, vocab=vocab)
    experiment = Experiment(name="x", model=model, cluster=cluster, data=data, stages={"prepare": stage})
    return Job(
        run=Run(folder=Path(folder), experiment="x", stage="prepare", index=1, key="k"),
        experiment=experiment,
        stage=stage,
        options=prepare.Options(**({"workers": 1} | options)),
        ranks=Ranks(),
        attempt="1",
        record=Attempt(name="1", job_id="", world=1, host="here", started_at=0.0),
    )


def sources(text: Path) -> dict[str, SourceSpec]:
    return {
        "code": SourceSpec(text=[str(text / "code")], weight=3),
        "lines": SourceSpec(text=[str(text / "lines.jsonl")], weight=1),
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.*")) if p.suffix in (".bin", ".idx", ".json")}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("prepared")
    return folder, prepare.run(make_job(folder, sources(text)))


def test_everything_is_there_and_as_recorded(prepared):
    folder, summary = prepared
    record = json.loads((folder / "dataset.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert record["vocab"] == tokenizer.get_vocab_size() == 400
    assert record["end_of_text"] == tokenizer.token_to_id("<|endoftext|>")
    assert record["tokenizer_sha256"] == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    for name in ("code", "lines"):
        for split in ("train", "val"):
            shard, said = read_shard(folder / f"{name}-{split}"), record["sources"][name][split]
            assert (shard.documents, len(shard.tokens)) == (said["documents"], said["tokens"])
            for ending in ("bin", "idx"):
                raw = (folder / f"{name}-{split}.{ending}").read_bytes()
                assert hashlib.sha256(raw).hexdigest() == said[f"{ending}_sha256"]
    assert summary["prepare/train_tokens"] == sum(record["sources"][n]["train"]["tokens"] for n in ("code", "lines"))
    assert 3 < summary["prepare/bigram_nats"] < summary["prepare/unigram_nats"] < np.log(400)
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == [".prepare.lock"]


def test_every_byte_of_the_text_is_in_one_split_and_documents_end(prepared, text):
    folder, _ = prepared
    record = json.loads((folder / "dataset.json").read_text())
    tokenizer, end = Tokenizer.from_file(str(folder / "tokenizer.json")), record["end_of_text"]
    documents = {
        "code": [(text / "code" / f"{name}.py").read_text() for name in MODULES],
        "lines": [json.loads(line)["text"] for line in (text / "lines.jsonl").read_text().splitlines()],
    }
    for name, texts in documents.items():
        pieces = {}
        for split in ("train", "val"):
            shard = read_shard(folder / f"{name}-{split}")
            cuts = np.split(shard.tokens, np.cumsum(shard.sizes))[:-1]
            assert all(c[-1] == end and end not in c[:-1] for c in cuts)  # also where a text says <|endoftext|>
            pieces[split] = [tokenizer.decode(c[:-1].tolist(), skip_special_tokens=False) for c in cuts]
            assert record["sources"][name][split]["bytes"] == sum(len(p.encode()) for p in pieces[split])
        # Each document is a chain of train and val pieces, taken in their order.
        for document in texts:
            rest = document
            while rest:
                split = next(s for s in pieces if pieces[s] and rest.startswith(pieces[s][0]))
                rest = rest.removeprefix(pieces[split].pop(0))
        assert pieces == {"train": [], "val": []}
    code = record["sources"]["code"]
    assert 0.02 < code["val"]["bytes"] / (code["val"]["bytes"] + code["train"]["bytes"]) < 0.09


def test_shards_are_the_same_from_two_workers(prepared, text, tmp_path, monkeypatch):
    folder, _ = prepared
    monkeypatch.setattr(encode, "TASK", 100_000)  # so that there is work for two
    prepare.run(make_job(tmp_path, sources(text), workers=2))
    ours, theirs = contents(tmp_path), contents(folder)
    del ours["dataset.json"], theirs["dataset.json"]  # it has the time it took
    assert ours == theirs
    assert len(ours) == 9


def test_a_whole_folder_is_reused_and_another_refused(prepared, text, tmp_path):
    folder, first = prepared
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.suffix in (".bin", ".idx")}
    again = prepare.run(make_job(folder, sources(text), workers=2))
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.suffix in (".bin", ".idx")} == before
    assert "prepare/mb_per_s" not in again
    assert again["prepare/train_tokens"] == first["prepare/train_tokens"]
    heavier = {**sources(text), "lines": replace(sources(text)["lines"], weight=30)}
    assert prepare.run(make_job(folder, heavier))["prepare/bigram_nats"] != first["prepare/bigram_nats"]

    kept = contents(folder)
    for job, what in {
        "seed": (make_job(folder, sources(text), seed=1), "`seed`"),
        "vocab": (make_job(folder, sources(text), vocab=300), "`tokenizer`"),
        "fraction": (make_job(folder, sources(text), val_fraction=0.1), "`val_fraction`"),
        "text": (make_job(folder, {"code": sources(text)["code"]}), "`text`"),
    }.values():
        with pytest.raises(DataError, match=f"something else; changed: {what}$") as e:
            prepare.run(job)
        assert "data.folder" in e.value.hint
    assert contents(folder) == kept

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with open(copy / "code-train.bin", "ab") as f:
        f.truncate(10)
    with pytest.raises(DataError, match=r"code-train\.bin`: expected .* found 10"):
        prepare.run(make_job(copy, sources(text)))
    (copy / "dataset.json").unlink()  # as the message says: nothing is committed, so it is written again
    prepare.run(make_job(copy, sources(text)))
    assert {k: v for k, v in contents(copy).items() if k != "dataset.json"} == {
        k: v for k, v in kept.items() if k != "dataset.json"
    }


def test_the_data_set_reads_what_was_prepared(prepared, text):
    folder, _ = prepared
    data = make_job(folder, sources(text)).experiment.data
    check_data(data, seq_len=64, vocab=400)
    train = PackedDataset.open(data, seq_len=64, split="train", vocab=400)
    assert train.batch(0, 3)["tokens"].shape == (3, 64)
    shard = read_shard(folder / "code-train").tokens
    source, _, window = next(i for i in train.ids(0, 9) if i[0] == "code")
    at = train.ids(0, 9).index((source, 0, window))
    assert train.sample(at).tolist() == shard[window * 64 : window * 64 + 65].tolist()
    with pytest.raises(DataError, match="source `gone` is not in the data prepared"):
        PackedDataset.open(replace(data, sources={"gone": SourceSpec()}), seq_len=64, split="train", vocab=400)


def test_given_tokenizer_and_existing_shards(prepared, text, tmp_path):
    folder, _ = prepared
    tokenizer = folder / "tokenizer.json"
    mix = {
        "old": SourceSpec(shards=[str(folder / "code-train")], val_shards=[str(folder / "code-val")], weight=2),
        "new": SourceSpec(text=[str(text / "lines.jsonl")]),
    }
    job = make_job(tmp_path, mix, tokenizer=tokenizer, vocab=1000)  # larger than the tokenizer: fine
    summary = prepare.run(job)
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    assert not list(tmp_path.glob("old*"))
    record = json.loads((tmp_path / "dataset.json").read_text())
    assert record["sources"]["old"]["train"]["tokens"] == len(read_shard(folder / "code-train").tokens)
    nats = [record["sources"][name]["baselines"]["bigram"] for name in ("old", "new")]
    assert summary["prepare/bigram_nats"] == pytest.approx((2 * nats[0] + nats[1]) / 3)
    assert (tmp_path / "new-train.bin").read_bytes() == (folder / "lines-train.bin").read_bytes()
    moved = replace(mix["old"], shards=mix["old"].val_shards, val_shards=mix["old"].shards)
    refused(DataError, "changed: `shards`$", make_job(tmp_path, {**mix, "old": moved}, tokenizer=tokenizer, vocab=1000))
    train = PackedDataset.open(job.experiment.data, seq_len=32, split="train", vocab=1000)
    assert {source for source, _, _ in train.ids(0, 20)} == {"old", "new"}


def refused(error, says, job):
    with pytest.raises(error, match=says) as e:
        prepare.run(job)
    assert e.value.hint


def test_mistakes_are_refused_and_nothing_is_written(prepared, text, tmp_path):
    folder, _ = prepared
    given, out = folder / "tokenizer.json", tmp_path / "out"
    code = {"code": sources(text)["code"]}
    refused(DataError, "`data.sources` is empty", make_job(out, {}))
    refused(DataError, "val_fraction` is 1.5", make_job(out, code, val_fraction=1.5))
    refused(OrchError, "source `../up` cannot be a folder name", make_job(out, {"../up": code["code"]}))
    refused(DataError, "neither `text` nor `shards`", make_job(out, {"a": SourceSpec()}))
    refused(DataError, "both `text` and `shards`", make_job(out, {"a": SourceSpec(text=["x"], shards=["y"])}))
    refused(DataError, "a new tokenizer would not fit", make_job(out, {"a": SourceSpec(shards=["y"])}))
    refused(DataError, "`gone.txt` does not exist", make_job(out, {"a": SourceSpec(text=["gone.txt"])}))
    refused(DataError, "no file `.*gone.idx`", make_job(out, {"a": SourceSpec(shards=["gone"])}, tokenizer=given))
    refused(DataError, "has 400 tokens, the model only 300", make_job(out, code, tokenizer=given, vocab=300))
    refused(DataError, "has no token `</s>`", make_job(out, code, tokenizer=given, end_of_text="</s>"))
    refused(DataError, "gone.json", make_job(out, code, tokenizer="gone.json"))
    refused(DataError, r"`model.vocab` is 256; .* need 257", make_job(out, code, vocab=256))
    (tmp_path / "broken.json").write_text("{}")
    refused(DataError, "tokenizer `.*broken.json`", make_job(out, code, tokenizer=tmp_path / "broken.json"))
    (tmp_path / "short.txt").write_text("too short to be split")
    short = {"short": SourceSpec(text=[str(tmp_path / "short.txt")])}
    refused(DataError, "source `short`: of 21 bytes, none are in its `val` split", make_job(out, short))
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\nbad\n')
    bad = {"bad": SourceSpec(text=[str(tmp_path / "bad.jsonl")])}
    refused(DataError, r"bad.jsonl`, line 2", make_job(out, bad, tokenizer=given))
    assert {p.name for p in out.iterdir()} <= {".prepare.lock", "tokenizer.json"}


def test_a_broken_line_met_by_a_worker_reaches_the_user(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "TASK", 1)
    for name, line in {"a": '{"text": "good"}', "b": "bad"}.items():
        (tmp_path / f"{name}.jsonl").write_text(line)
    source = {"s": SourceSpec(text=[str(tmp_path)])}
    job = make_job(tmp_path / "out", source, workers=2, tokenizer=prepared[0] / "tokenizer.json")
    refused(DataError, r"b.jsonl`, line 1: no JSON", job)


def test_a_full_disk_is_an_error_with_a_hint(tmp_path):
    with pytest.raises(DataError, match=r"need 1,100,000,000.00 GB, [\d,.]+ GB are free") as e:
        prepare.require_space(tmp_path, 1e18)
    assert "data.folder" in e.value.hint
    prepare.require_space(tmp_path, 1)
    with pytest.raises(DataError, match="No space left on device"):
        with prepare.disk_full_is_an_error(tmp_path), open("/dev/full", "w") as f:
            f.write("x" * 100_000)


def test_expected_size_is_near_the_real_one(prepared, text):
    folder, _ = prepared
    job = make_job(folder, sources(text))
    parts = prepare.collect(job.experiment.data)
    record = json.loads((folder / "dataset.json").read_text())
    rules = {n: prepare.rules_for(folder, record, job.experiment.data, job.options, parts[n]) for n in parts}
    real = sum(p.stat().st_size for p in folder.glob("*.bin"))
    assert 0.8 < prepare.expected_bytes(parts, rules) / real < 1.25


def test_one_at_a_time_and_stopping(text, tmp_path):
    job = make_job(tmp_path, sources(text))
    with open(tmp_path / ".prepare.lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        refused(DataError, "another process prepares it", job)
    job.stop.cause = "preempted"
    with pytest.raises(Stopped, match="preempted"):
        prepare.run(job)
    assert not list(tmp_path.glob("*.bin")) and not (tmp_path / "dataset.json").exists()


KILLED = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from test_prepare import make_job
from jobs import prepare
from jobs.data import encode
from orchestrator.spec import SourceSpec
if __name__ == "__main__":
    encode.TASK = 50_000
    prepare.run(make_job({folder!r}, {{"code": SourceSpec(text=[{text!r}])}}, workers=2))
"""


@pytest.mark.slow
def test_killed_half_way_it_leaves_no_worker_and_starts_again(text, tmp_path):
    big, folder = tmp_path / "big", tmp_path / "out"
    for i in range(3):
        shutil.copytree(text / "code", big / str(i))
    script = tmp_path / "run.py"
    script.write_text(KILLED.format(here=str(Path(__file__).parent), folder=str(folder), text=str(big)))
    environment = {**os.environ, "PYTHONPATH": str(Path(prepare.__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, str(script)], env=environment)
    try:
        part = folder / ".code-train.bin.tmp"
        deadline = time.monotonic() + 240 * slowness()
        while not (part.exists() and part.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert psutil.wait_procs(workers, timeout=120 * slowness())[1] == []
    assert not (folder / "dataset.json").exists()

    source = {"code": SourceSpec(text=[str(big)])}
    prepare.run(make_job(folder, source))
    prepare.run(make_job(tmp_path / "clean", source))
    ours, theirs = contents(folder), contents(tmp_path / "clean")
    del ours["dataset.json"], theirs["dataset.json"]
    assert ours == theirs
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))


@pytest.mark.slow
def test_the_builtin_corpus_end_to_end(tmp_path):
    """Measured beforehand by other code on 11.8 MB of Python 3.11's library, a vocabulary of 512, and 5 % held out:
    unigram 5.33, bigram 3.61 nats per token."""
    job = make_job(tmp_path, {"python": SourceSpec(text=["builtin:python"])}, vocab=512, workers=2)
    summary = prepare.run(job)
    assert summary["prepare/unigram_nats"] == pytest.approx(5.33, abs=0.1)
    assert summary["prepare/bigram_nats"] == pytest.approx(3.61, abs=0.1)
    held_out = summary["prepare/val_tokens"] / (summary["prepare/val_tokens"] + summary["prepare/train_tokens"])
    assert 0.035 < held_out < 0.065
    check_data(job.experiment.data, seq_len=128, vocab=512)
    again = time.monotonic()
    prepare.run(job)
    assert time.monotonic() - again < 5
