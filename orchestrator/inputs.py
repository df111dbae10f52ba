"""The files an experiment reads: where they are, and whether they are there."""

import dataclasses
import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from orchestrator.errors import DataError
from orchestrator.spec import DataSpec, ExamplesSpec, Experiment

PREPARE = "prepare"  # the kind that reads text and writes the shards that every other kind reads
IMPORT = "import_hf"  # the kind that reads a folder of transformers
BUILTIN = "builtin:"  # text that comes with Python


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
    """Raise DataError unless what ``stage`` reads exists, or is prepared by one of the stages ``before`` it."""
    kinds = {name: spec.kind for name, spec in experiment.stages.items()}
    if kinds[stage] == PREPARE:
        _check_text(experiment.data)
    elif kinds[stage] == IMPORT:
        from jobs.runtime.hf import check_config

        check_config(Path(experiment.stages[stage].options["folder"]), experiment.model)
    elif PREPARE not in [kinds[name] for name in before]:
        _check_shards(experiment.data, stage, [name for name, kind in kinds.items() if kind == PREPARE])
    entry = experiment.data.examples.get(experiment.stages[stage].options.get("examples", ""))
    if entry:
        _check_examples(entry, experiment.stages[stage].options["examples"])


def _check_text(data: DataSpec) -> None:
    for name, source in data.sources.items():
        for path in source.text:
            if not path.startswith(BUILTIN) and not Path(path).exists() and not glob.glob(path, recursive=True):  # noqa: PTH207
                raise DataError(f"no text at `{path}`", hint=f"set `data.sources.{name}.text`")
    if data.tokenizer and not Path(data.tokenizer).exists():
        raise DataError(f"no tokenizer at `{data.tokenizer}`", hint="set `data.tokenizer`, or null to train one")


def _check_examples(given: ExamplesSpec, name: str) -> None:
    for split in ("train", "val"):
        for path in getattr(given, split):
            if not path.startswith(BUILTIN) and not Path(path).is_file():
                raise DataError(f"no examples at `{path}`", hint=f"set `data.examples.{name}.{split}`")


def _check_shards(data: DataSpec, stage: str, prepare: Sequence[str]) -> None:
    for name, source in data.sources.items():
        given = [*source.shards, *source.val_shards]
        made = [str(Path(data.folder) / f"{name}-{part}") for part in ("train", "val")] if source.text else []
        missing = [p + suffix for p in [*given, *made] for suffix in (".idx", ".bin") if not Path(p + suffix).exists()]
        if not missing:
            continue
        hint = f"set `data.sources.{name}.shards`"
        if source.text and prepare:
            hint = f"prepare it: `--stage {prepare[0]} --stage {stage}`; if that was done before, with a new `name=...`"
        elif source.text:
            hint = "add a stage of kind `prepare`"
        raise DataError(f"stage `{stage}` reads `{missing[0]}`, which does not exist", hint=hint)
