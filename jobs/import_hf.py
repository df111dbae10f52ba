"""Stage `import_hf`: a GPT-2 as transformers saves it becomes the checkpoint of step 0, from which any stage starts.

`config.json` must be of the experiment's model, and `tokenizer.json` the tokenizer of its data. Only safetensors are
read: a pickle runs the code of whoever wrote it.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.runtime.job import Job
from orchestrator.errors import CheckpointError
from orchestrator.run import file_sha256, read_json
from orchestrator.spec import ModelSpec

if TYPE_CHECKING:
    import numpy as np

PER_GPU = False
NAME = re.compile(r"[\w-][\w.-]*\.safetensors")
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers that older versions of transformers saved
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `stages.<name>.options` may say."""

    folder: str  # with config.json, tokenizer.json and model.safetensors


def run(job: Job) -> dict[str, float]:
    """Check and convert. Raises ConfigError, DataError or CheckpointError for another model or tokenizer."""
    from jobs.data.chat import Chat, require_rows
    from jobs.runtime import checkpoint, hf, whole

    began, folder, data, spec = time.time(), Path(job.options.folder), job.experiment.data, job.experiment.model
    hf.check_config(folder, spec)
    chat = Chat.open(data)
    require_rows(chat.tokenizer, hf.tokenizer_of(data), spec.vocab)
    same = hf.same_tokenizer(folder / hf.TOKENIZER, hf.tokenizer_of(data))
    log.info("the tokenizer of `%s` is that of the data: the same %s", folder, same)
    target = checkpoint.folder_of(job.run.checkpoints, 0)
    (target / checkpoint.MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    shapes = {p.name: p.shape for p in hf.parameters(spec)}
    files = whole.grouped("model", [("weight", name, shape) for name, shape in shapes.items()])
    with Weights(folder, spec) as weights:
        for name, parts in files.items():
            _write(target / name, {ours: weights.read(ours) for _, ours, _ in parts})
    state: dict[str, Any] = {
        "identity": hf.identity(spec, chat) | {"data": "imported"},
        "layout": {"engine": "import_hf", "precision": "fp32", **whole.ALONE},
        "position": {"step": 0, "samples": 0, "tokens": 0},
        "probe": {"data": None, "loss": None},  # nothing was measured
        "attempt": job.attempt,
        "time": time.time(),
    }
    whole.commit(target, files, state)
    job.note(read={str(file): file_sha256(file) for file in sources(folder)})
    log.info("%d parameters of `%s` are in `%s`", spec.params, folder, target)
    return {"import/params": spec.params, "import/s": time.time() - began}


class Weights:
    """The tensors of a folder, by our names and in our shapes. Raises CheckpointError where one is missing."""

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        from safetensors import safe_open

        from jobs.runtime import hf

        self.folder, self.stack = folder, ExitStack()
        self.ours = {p.name: p for p in hf.parameters(spec)}
        self.files: dict[str, Any] = {}  # each tensor's, by its name with `transformer.`
        for name in files_of(folder):
            file = self.stack.enter_context(safe_open(folder / name, "pt"))  # numpy has no bf16
            for key in file.keys():  # noqa: SIM118 - it is no dict
                bare = key.removeprefix("transformer.")
                self.files[key if key == "lm_head.weight" else f"transformer.{bare}"] = (file, key)
        wanted = {p.theirs for p in self.ours.values()}
        spare = {"lm_head.weight"} if spec.tie_embeddings else set()  # the same tensor again
        strange = {k for k in self.files.keys() - wanted - spare if not k.endswith(MASKS)}
        for what, names in (("lacks", wanted - self.files.keys()), ("has besides", strange)):
            if names:
                raise CheckpointError(
                    f"`{folder}` {what} {', '.join(f'`{n}`' for n in sorted(names)[:5])}: {len(names)} in all",
                    hint="it must be saved by a `GPT2LMHeadModel`",
                )

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stack.close()

    def read(self, name: str) -> np.ndarray:
        """One tensor, in fp32. Raises CheckpointError where its shape is another."""
        p = self.ours[name]
        file, key = self.files[p.theirs]
        array: np.ndarray = file.get_tensor(key).float().numpy()
        array = array.T if p.transposed else array
        if array.shape != p.shape:
            raise CheckpointError(f"`{self.folder}`: `{key}` has shape {array.shape}, and `{name}` has {p.shape}")
        return array


def sources(folder: Path) -> list[Path]:
    """What is read of ``folder``: the config, the index where there is one, the weights."""
    from jobs.runtime import hf

    index = [hf.INDEX] if (folder / hf.INDEX).exists() else []
    return [folder / name for name in [hf.CONFIG, *index, *files_of(folder)]]


def files_of(folder: Path) -> list[str]:
    """The names of the files that hold the weights. Raises CheckpointError where there is none to trust."""
    from jobs.runtime import hf

    index = read_json(folder / hf.INDEX)
    names = sorted({*index["weight_map"].values()}) if index else [hf.WEIGHTS]
    if strange := [name for name in names if not NAME.fullmatch(name)]:
        raise CheckpointError(f"`{folder / hf.INDEX}` names `{strange[0]}`, which is no file of this folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        pickled = any(folder.glob("pytorch_model*.bin"))
        raise CheckpointError(
            f"no `{missing[0]}` in `{folder}`" + (", only a pickle, which may run any code" if pickled else ""),
            hint="where you trust it: `GPT2LMHeadModel.from_pretrained(FOLDER).save_pretrained(FOLDER)`"
            if pickled
            else "name a folder that `save_pretrained` has written",
        )
    return names


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, metadata={"format": "pt"})
