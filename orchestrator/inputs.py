"""The files an experiment reads: where they are, and whether they are there."""

import dataclasses
import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from orchestrator.errors import DataError
from orchestrator.registry import find
from orchestrator.spec import DataSpec, Experiment, SourceSpec

PREPARE = "prepare"  # the kind that reads text and writes the shards that every other kind reads
PRETRAIN = "pretrain"  # the kind that reads those shards, as PPO does for what it mixes in
COMPARE = "compare"  # the kind that makes examples
IMPORT = "import_hf"  # the kind that reads a folder of transformers
BUILTIN = "builtin:"  # text that comes with Python
PARTS = [(split, end) for split in ("train", "val") for end in (".idx", ".bin")]  # of what is prepared of a source


class Unnamed(DataError):
    """A preset that is still to be filled in: it names no data, and no stage makes any."""


def with_absolute_paths(experiment: Experiment) -> Experiment:
    """``experiment`` with the paths of its data as seen from here, so that it may be resumed from anywhere."""

    def here(path: str) -> str:
        return path if path.startswith(BUILTIN) else os.path.abspath(Path(path).expanduser())  # noqa: PTH100

    data = experiment.data
    sources = {
        name: dataclasses.replace(
            source,
            text=[here(p) for p in source.text],
            shards=[here(p) for p in source.shards],
            val_shards=[here(p) for p in source.val_shards],
        )
        for name, source in data.sources.items()
    }
    examples = {
        name: dataclasses.replace(e, train=[here(p) for p in e.train], val=[here(p) for p in e.val])
        for name, e in data.examples.items()
    }
    tokenizer = here(data.tokenizer) if data.tokenizer else None
    data = dataclasses.replace(data, folder=here(data.folder), tokenizer=tokenizer, sources=sources, examples=examples)
    stages = {
        name: dataclasses.replace(stage, options=stage.options | {"folder": here(stage.options["folder"])})
        if stage.kind == IMPORT
        else stage
        for name, stage in experiment.stages.items()
    }
    return dataclasses.replace(experiment, data=data, stages=stages)


def check(experiment: Experiment, stage: str, before: Iterable[str]) -> None:
    """Raise DataError unless what ``stage`` reads exists, or is made by one of the stages ``before`` it."""
    spec, data, earlier = experiment.stages[stage], experiment.data, [experiment.stages[name] for name in before]
    options = find("jobs", spec.kind).Options(**spec.options)
    if spec.kind == PREPARE:
        _check_text(data)
    elif spec.kind == IMPORT:
        from jobs.runtime.hf import check_config

        check_config(Path(options.folder), experiment.model)
    elif not any(other.kind == PREPARE for other in earlier):
        reads_text = spec.kind == PRETRAIN or bool(getattr(options, "ptx_coef", 0))
        prepare = [name for name, other in experiment.stages.items() if other.kind == PREPARE]
        _check_prepared(data, stage, prepare, reads_text=reads_text)
    if (entry := getattr(options, "examples", None)) in data.examples:
        made = [str(other.options.get("out", "preferences")) for other in earlier if other.kind == COMPARE]
        _check_examples(data, entry, made)


def _check_text(data: DataSpec) -> None:
    """What `prepare` reads."""
    for name, source in data.sources.items():
        _check_named(name, source)
        for path in source.text:
            if not path.startswith(BUILTIN) and not Path(path).exists() and not glob.glob(path, recursive=True):  # noqa: PTH207
                raise DataError(f"no text at `{path}`", hint=f"set `data.sources.{name}.text`")
        _check_shards(name, source)
    _check_tokenizer(data)


def _check_prepared(data: DataSpec, stage: str, prepare: Sequence[str], *, reads_text: bool) -> None:
    """What the other stages read: a tokenizer, and some the shards."""
    _check_tokenizer(data)
    sources = {name: source for name, source in data.sources.items() if reads_text and source.weight != 0}
    for name, source in sources.items():
        _check_named(name, source)
        _check_shards(name, source)
    if data.tokenizer and all(source.shards for source in sources.values()):
        return
    made = [Path(data.folder) / f"{name}-{part}{end}" for name, s in sources.items() if s.text for part, end in PARTS]
    missing = [path for path in [*made, Path(data.folder) / "dataset.json"] if not path.exists()]
    if missing and not (data.tokenizer or prepare or any(source.text for source in data.sources.values())):
        raise Unnamed(f"stage `{stage}` has no tokenizer", hint="set `data.tokenizer` to that of the shards")
    if missing:
        hint = "add a stage of kind `prepare`, or set `data.tokenizer` where the text is shards already"
        if prepare:
            hint = f"prepare it: `--stage {prepare[0]} --stage {stage}`; if that was done before, with a new `name=...`"
        raise DataError(f"stage `{stage}` reads `{missing[0]}`, which does not exist", hint=hint)


def _check_named(name: str, source: SourceSpec) -> None:
    if not (source.text or source.shards):
        raise Unnamed(
            f"source `{name}` has neither `text` nor `shards`",
            hint=f"set `data.sources.{name}.shards` and `val_shards`, or `text` for a stage of kind `prepare`",
        )


def _check_shards(name: str, source: SourceSpec) -> None:
    for split in ("shards", "val_shards"):
        for prefix in getattr(source, split):
            for end in (".idx", ".bin"):
                if not Path(prefix + end).exists():
                    raise DataError(f"no shard at `{prefix}{end}`", hint=f"set `data.sources.{name}.{split}`")


def _check_tokenizer(data: DataSpec) -> None:
    if data.tokenizer and not Path(data.tokenizer).exists():
        raise DataError(f"no tokenizer at `{data.tokenizer}`", hint="set `data.tokenizer`, or null to train one")


def _check_examples(data: DataSpec, name: str, made: Sequence[str]) -> None:
    """The files of the examples ``name``, but those that a stage has ``made`` by then."""
    for split in ("train", "val"):
        given = getattr(data.examples[name], split)
        if not given and name in made:
            continue
        for path in given or [str(Path(data.folder) / f"{name}-{split}.jsonl")]:
            if not path.startswith(BUILTIN) and not Path(path).is_file():
                raise (DataError if given else Unnamed)(
                    f"no examples at `{path}`", hint=f"set `data.examples.{name}.{split}`"
                )
