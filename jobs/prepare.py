"""The stage `prepare`: text becomes token shards, a pair of files for each source and split.

    <folder>/<source>-train.bin .idx   tokens, in Megatron's format (jobs/data/indexed.py)
    <folder>/<source>-val.bin .idx     the same, held out
    <folder>/tokenizer.json            byte-level BPE (Radford et al. 2019, section 2.2), trained or given
    <folder>/dataset.json              what there is, with hashes; written last, it makes the folder whole

The shards are the same to the last byte whatever the number of workers: the text is cut into tasks that
depend on the files only, and the tokens are written in the order of the tasks.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.data import bpe
from jobs.data.baselines import cross_entropies
from jobs.data.encode import Encoder, Rules, Split, block_size, cut, encode_all, split_of, tasks
from jobs.data.indexed import ShardWriter, read_shard, token_type
from jobs.data.order import mix_counts
from jobs.data.packed import open_shards, read_dataset
from jobs.data.text import Part, list_parts, read
from jobs.runtime.faults import Stopped
from orchestrator.errors import DataError
from orchestrator.run import check_name, write_atomic, write_json
from orchestrator.spec import DataSpec, SourceSpec

if TYPE_CHECKING:
    from jobs.runtime.job import Job

PER_GPU = False
FORMAT = 1  # of what is written; a folder of another one is not reused
SPLITS: tuple[Split, ...] = ("train", "val")
GZ_RATIO = 4  # text shrinks to about a quarter under gzip
LOG_EVERY_S = 10
log = logging.getLogger(__name__)

Parts = dict[str, list[Part]]  # of each source of text


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the stage."""

    workers: int | None = None  # processes; None: one per core
    seed: int = 0  # of which text is held out
    end_of_text: str = "<|endoftext|>"  # the token behind each document
    tokenizer_mb: float = 256  # text that a new tokenizer learns from, at most
    baselines: bool = True  # measure the cross-entropy of unigram and bigram models


def run(job: Job) -> dict[str, float]:
    """Fill ``data.folder``, or find that it is whole. Returns what to log, named by its unit."""
    data, options, vocab = job.experiment.data, job.options, job.experiment.model.vocab
    folder = Path(data.folder)
    began = time.monotonic()
    parts = collect(data)
    inputs = describe_inputs(data, parts, options, vocab)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder), disk_full_is_an_error(folder):
        found = finished(folder, data, inputs)
        record = found or build(job, folder, parts) | {"inputs": inputs}
        if options.baselines:
            measure(folder, record, data)
        record["baselines"] = mixed_baselines(record, data)
        write_json(folder / "dataset.json", record)
    log.info("data %s in `%s`", "found whole" if found else "ready", folder)
    return summary(record, time.monotonic() - began, reused=bool(found))


def build(job: Job, folder: Path, parts: Parts) -> dict[str, Any]:
    """Write tokenizer and shards, and return what to record of them; what an earlier attempt left is replaced."""
    data, options = job.experiment.data, job.options
    record = save_tokenizer(data, parts, options, job.experiment.model.vocab, folder)
    rules = {name: rules_for(folder, record, data, options, listed) for name, listed in parts.items()}
    require_space(folder, expected_bytes(parts, rules))
    workers = options.workers or len(os.sched_getaffinity(0))
    progress = Progress(job, sum(part.size for listed in parts.values() for part in listed))
    sources = {name: encode(folder / name, parts[name], rules[name], workers, progress) for name in parts}
    record["encode_s"] = time.monotonic() - progress.began
    return record | {"sources": {name: sources.get(name) or adopt(s) for name, s in data.sources.items()}}


def collect(data: DataSpec) -> Parts:
    """List the text of all sources. Raises DataError for what cannot be a source."""
    if not data.sources:
        raise DataError("`data.sources` is empty", hint="name a source: `data.sources.python.text=[builtin:python]`")
    if not 0 <= data.val_fraction < 1:
        raise DataError(f"`data.val_fraction` is {data.val_fraction}", hint="0.05 holds out a twentieth of the text")
    for name, source in data.sources.items():
        check_name(name, "source")
        if bool(source.text) == bool(source.shards):
            has = "both `text` and `shards`" if source.text else "neither `text` nor `shards`"
            raise DataError(f"source `{name}` has {has}", hint="give it `text` to prepare, or `shards` that exist")
        if source.shards and not data.tokenizer:
            raise DataError(
                f"source `{name}` comes as shards, and a new tokenizer would not fit them",
                hint="name the tokenizer they were written with as `data.tokenizer`",
            )
    mix_counts({name: source.weight for name, source in data.sources.items()})
    return {name: list_parts(name, source) for name, source in data.sources.items() if source.text}


def describe_inputs(data: DataSpec, parts: Parts, options: Options, vocab: int) -> dict[str, Any]:
    """Everything that decides what is written, so that two folders can be told apart."""
    files = {}
    for name, listed in parts.items():
        found = {path: Path(path).stat() for path in dict.fromkeys(part.path for part in listed)}
        files[name] = [data.sources[name].text_key, [[p, s.st_size, s.st_mtime_ns] for p, s in found.items()]]
    shards = {
        name: [[prefix, read_shard(prefix).identity()] for prefix in [*source.shards, *source.val_shards]]
        for name, source in data.sources.items()
        if source.shards
    }
    trained = {"vocab": vocab, "tokenizer_mb": options.tokenizer_mb}
    return {
        "format": FORMAT,
        "text": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
        "shards": shards,
        "tokenizer": bpe.file_sha256(Path(data.tokenizer)) if data.tokenizer else trained,
        "val_fraction": data.val_fraction,
        "seed": options.seed,
        "end_of_text": options.end_of_text,
    }


def finished(folder: Path, data: DataSpec, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """What is recorded in a whole folder of the same inputs; None where nothing was committed.

    Raises DataError if the folder holds other data, or has lost some.
    """
    if not (folder / "dataset.json").exists():
        return None
    record = read_dataset(folder)
    changed = [f"`{k}`" for k, v in inputs.items() if record.get("inputs", {}).get(k) != v]
    if changed:
        raise DataError(
            f"`{folder}` holds data prepared from something else; changed: {', '.join(changed)}",
            hint=f"choose another `data.folder`, or delete `{folder}` if nothing needs it any more",
        )
    for name, source in data.sources.items():
        for split in SPLITS:
            open_shards(str(folder), name, source, split, record)
    return record


def save_tokenizer(data: DataSpec, parts: Parts, options: Options, vocab: int, folder: Path) -> dict[str, Any]:
    """Put ``tokenizer.json`` into the folder: the one given, or one trained on the text that is not held out."""
    if data.tokenizer:
        tokenizer, text = bpe.load(Path(data.tokenizer)), Path(data.tokenizer).read_text(encoding="utf-8")
    else:
        tokenizer = bpe.train(training_text(data, parts, options), vocab=vocab, end_of_text=options.end_of_text)
        text = tokenizer.to_str(pretty=True)
    found, end_of_text = bpe.vocab_size(tokenizer), tokenizer.token_to_id(options.end_of_text)
    if found > vocab:
        raise DataError(
            f"tokenizer `{data.tokenizer}` has {found:,} tokens, the model only {vocab:,}",
            hint=f"set `model.vocab` to {found} or more",
        )
    if end_of_text is None:
        raise DataError(
            f"tokenizer `{data.tokenizer}` has no token `{options.end_of_text}`",
            hint="set the stage's `options.end_of_text` to the token it puts between documents",
        )
    path = folder / "tokenizer.json"
    write_atomic(path, text)
    return {"vocab": found, "end_of_text": end_of_text, "tokenizer_sha256": bpe.file_sha256(path)}


def training_text(data: DataSpec, parts: Parts, options: Options) -> Iterator[str]:
    """Blocks that are not held out, from all sources in a shuffled order, up to ``tokenizer_mb``."""
    left = options.tokenizer_mb * 1e6
    listed = [(part, block_size(parts[name])) for name in parts for part in parts[name]]
    random.Random(options.seed).shuffle(listed)
    for part, block in listed:
        for text in read(part):
            for piece in cut(text, block):
                if left <= 0:
                    return
                if split_of(piece, seed=options.seed, val_fraction=data.val_fraction) == "train":
                    left -= len(piece)
                    yield piece


def rules_for(folder: Path, record: dict[str, Any], data: DataSpec, options: Options, parts: list[Part]) -> Rules:
    """How the text of one source is encoded."""
    return Rules(
        tokenizer=str(folder / "tokenizer.json"),
        dtype=token_type(record["vocab"]).str,
        end_of_text=record["end_of_text"],
        val_fraction=data.val_fraction,
        seed=options.seed,
        block=block_size(parts),
    )


def encode(prefix: Path, parts: list[Part], rules: Rules, workers: int, progress: Progress) -> dict[str, Any]:
    """Write the shards of one source, and return what to record of them."""
    listed = tasks(parts)
    text_bytes = dict.fromkeys(SPLITS, 0)
    with ShardWriter(f"{prefix}-train", rules.dtype) as train, ShardWriter(f"{prefix}-val", rules.dtype) as val:
        writers = dict(zip(SPLITS, (train, val), strict=True))
        for task, encoded in zip(listed, encode_all(listed, rules, workers), strict=True):
            for split, found in encoded.items():
                writers[split].add(found.tokens, found.sizes)
                text_bytes[split] += found.text_bytes
            progress.advance(sum(part.size for part in task), sum(len(found.tokens) for found in encoded.values()))
        for split, writer in writers.items():
            if not len(writer.sizes) and (split == "train" or rules.val_fraction):
                raise DataError(
                    f"source `{prefix.name}`: of {sum(text_bytes.values()):,} bytes, none are in its `{split}` split "
                    f"(val_fraction {rules.val_fraction}, blocks of {rules.block:,} characters)",
                    hint="give it more text, or another `data.val_fraction`",
                )
    return {
        split: {
            "documents": len(writer.sizes),
            "tokens": int(writer.sizes.sum()),
            "bytes": text_bytes[split],
            "bin_sha256": writer.bin_sha256.hexdigest(),
            "idx_sha256": writer.idx_sha256.hexdigest(),
        }
        for split, writer in writers.items()
    }


def adopt(source: SourceSpec) -> dict[str, Any]:
    """What to record of shards that exist already; they stay where they are."""
    record: dict[str, Any] = {}
    for split, prefixes in zip(SPLITS, (source.shards, source.val_shards), strict=True):
        shards = [read_shard(prefix) for prefix in prefixes]
        record[split] = {
            "documents": sum(shard.documents for shard in shards),
            "tokens": sum(len(shard.tokens) for shard in shards),
        }
    return record


def measure(folder: Path, record: dict[str, Any], data: DataSpec) -> None:
    """Add to each source that lacks them the cross-entropies of n-gram models, from its train to its val split."""
    for name, source in data.sources.items():
        if "baselines" in record["sources"][name]:
            continue
        train, val = (
            [shard.tokens for shard, _ in open_shards(str(folder), name, source, split, record)] for split in SPLITS
        )
        if sum(map(len, train)) > 1 and sum(map(len, val)) > 1:
            record["sources"][name]["baselines"] = cross_entropies(train, val, record["vocab"])


def mixed_baselines(record: dict[str, Any], data: DataSpec) -> dict[str, float]:
    """The baselines of the sources, averaged by their weights, as the validation loss is."""
    found = {name: source["baselines"] for name, source in record["sources"].items() if "baselines" in source}
    weights = {name: data.sources[name].weight for name in found}
    total = sum(weights.values())
    if not total:
        return {}
    return {model: sum(weights[n] / total * found[n][model] for n in found) for model in ("unigram", "bigram")}


def summary(record: dict[str, Any], seconds: float, *, reused: bool) -> dict[str, float]:
    """Numbers for the log and the tracker. MB are 1e6 bytes of text."""
    splits = {split: [source[split] for source in record["sources"].values()] for split in SPLITS}
    text_bytes = sum(s.get("bytes", 0) for split in SPLITS for s in splits[split])
    found = {
        "prepare/vocab": record["vocab"],
        "prepare/train_tokens": sum(s["tokens"] for s in splits["train"]),
        "prepare/val_tokens": sum(s["tokens"] for s in splits["val"]),
        "prepare/documents": sum(s["documents"] for split in SPLITS for s in splits[split]),
        "prepare/text_mb": text_bytes / 1e6,
        "prepare/s": seconds,
    }
    found |= {f"prepare/{model}_nats": nats for model, nats in record["baselines"].items()}
    if not reused and text_bytes:
        found["prepare/mb_per_s"] = text_bytes / 1e6 / record["encode_s"]
    return found


def expected_bytes(parts: Parts, rules: dict[str, Rules]) -> float:
    """Size of the shards in bytes, from the first part of each source."""
    total = 0.0
    for name, listed in parts.items():
        sample = Encoder(rules[name])(listed[:1]).values()
        per_byte = sum(s.tokens.nbytes for s in sample) / max(1, sum(s.text_bytes for s in sample))
        total += per_byte * sum(part.size * (GZ_RATIO if part.path.endswith(".gz") else 1) for part in listed)
    return total


def require_space(folder: Path, needed: float) -> None:
    """Raise DataError unless ``needed`` bytes and a tenth more are free."""
    free = shutil.disk_usage(folder).free
    if free < 1.1 * needed:
        raise DataError(
            f"`{folder}`: the shards need {1.1 * needed / 1e9:,.2f} GB, {free / 1e9:,.2f} GB are free",
            hint="free some, or set `data.folder` to a larger disk",
        )


@contextmanager
def disk_full_is_an_error(folder: Path) -> Iterator[None]:
    """Turn the system's error for a full disk into ours: others write to the disk too."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"`{folder}`: {e.strerror}", hint="free some space and start the stage again; nothing was committed"
        ) from e


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against another `prepare`. Raises DataError where one is at work in it."""
    with open(folder / ".prepare.lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"`{folder}`: another process prepares it", hint="wait until it is done") from None
        yield


class Progress:
    """How much text is done: for the log, and for the heartbeat, from which `orch submit` draws its bar."""

    def __init__(self, job: Job, total: int) -> None:
        self.job = job
        self.total = total  # bytes on disk
        self.done = self.tokens = 0
        self.began = self.shown = time.monotonic()

    def advance(self, size: int, tokens: int) -> None:
        """Count one task of ``size`` bytes. Raises Stopped if the job was told to stop meanwhile."""
        self.done += size
        self.tokens += tokens
        now = time.monotonic()
        if self.job.metrics:  # in MB, which are the steps of this stage
            step, steps = int(self.done / 1e6), int(self.total / 1e6)
            speed = self.tokens / (now - self.began)
            self.job.metrics.heartbeat(step=step, steps=steps, tokens=self.tokens, tokens_per_s=speed)
        if now - self.shown > LOG_EVERY_S or self.done == self.total:
            self.shown = now
            log.info("encoded %.1f of %.1f MB, %d tokens", self.done / 1e6, self.total / 1e6, self.tokens)
        if self.job.stop.cause:
            raise Stopped(self.job.stop.cause, 0)
