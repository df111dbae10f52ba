"""`orch export`: a trained model in the layout of transformers' GPT-2, with tokenizer and template. No torch."""

import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError
from orchestrator.run import Run, write_json

log = logging.getLogger(__name__)

FILE_BYTES = 5_000_000_000  # no file is larger, unless a tensor is
DTYPES = {"fp32": "float32", "fp16": "float16"}  # numpy has no bf16


def export(run: Run, checkpoint: Path, to: Path, *, dtype: str = "fp32", file_bytes: int = FILE_BYTES) -> list[Path]:
    """Write the weights of ``checkpoint`` to the folder ``to``, which appears when it is whole; return its files.

    Raises:
        ConfigError: GPT-2's layout cannot express the model; it names each setting.
        CheckpointError: ``to`` exists, or ``checkpoint`` is not of the run's model and tokenizer.
    """
    from jobs.runtime import hf
    from jobs.runtime.serve import RAW

    experiment = run.spec()
    spec, raw = experiment.model, experiment.stages[run.stage].kind in RAW
    hf.refuse_other_models(spec)
    chat = hf.identified(checkpoint, experiment)
    if to.exists():
        raise CheckpointError(f"`{to}` exists", hint="name a folder that does not, or remove it")
    part = to.with_name(f".{to.name}.{os.getpid()}")
    part.mkdir(parents=True)
    try:
        _write_weights(checkpoint, part, hf.parameters(spec), dtype, file_bytes)
        write_json(part / hf.CONFIG, hf.config_of(spec, end=chat.end, dtype=DTYPES[dtype]))
        write_json(part / "generation_config.json", dict.fromkeys(("eos_token_id", "pad_token_id"), chat.end))
        shutil.copyfile(hf.tokenizer_of(experiment.data), part / hf.TOKENIZER)
        write_json(part / "tokenizer_config.json", hf.tokenizer_config(chat, spec.seq_len, template=not raw))
        part.rename(to)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if not raw and not hf.joins_alike(chat):
        log.warning(
            "transformers splits a rendered conversation into tokens as one text, and text may join where turns meet; "
            "for the tokens of the training, encode what `data.chat` puts around a turn apart from it"
        )
    return sorted(to.iterdir())


def _write_weights(checkpoint: Path, to: Path, parameters: Iterable[Any], dtype: str, file_bytes: int) -> None:
    """Write one file, or several and their index, by the names and in the shapes of GPT2LMHeadModel."""
    import numpy as np
    from safetensors.numpy import save_file

    from jobs.runtime import hf, whole
    from jobs.runtime.pieces import Extent, Store

    ours = {p.name: p for p in parameters}
    files = whole.grouped("model", [("weight", p.name, p.shape) for p in ours.values()], file_bytes)
    with Store(checkpoint) as store:
        for file, parts in files.items():
            arrays = {}
            for _, name, shape in parts:
                flat = np.empty(np.prod(shape), np.float32)
                store.read(Extent(name, "weight", shape, None, 0, flat.size), flat)
                array = flat.reshape(shape).T if ours[name].transposed else flat.reshape(shape)
                arrays[ours[name].theirs] = np.ascontiguousarray(array, DTYPES[dtype])
            save_file(arrays, to / (file if len(files) > 1 else hf.WEIGHTS), metadata={"format": "pt"})
    if len(files) > 1:
        where = {ours[name].theirs: file for file, parts in files.items() for _, name, _ in parts}
        (to / hf.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}, indent=2))
