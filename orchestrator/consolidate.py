"""One canonical set of safetensors from a checkpoint of any engine, layout and number of ranks.

Every tensor whole, in fp32, by the model's own name: weights in `model-*.safetensors`, AdamW's state in
`optimizer-*.safetensors` as `exp_avg/<name>`, `exp_avg_sq/<name>` and `step/<name>`. The folder is a checkpoint itself:
any engine and layout goes on from it. No torch; one file's tensors are held in memory at a time.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError
from orchestrator.run import Run, read_json


def checkpoint_of(run: Run, step: int | None) -> Path:
    """The folder of the checkpoint of ``step``, or the newest. Raises CheckpointError where there is none."""
    from jobs.runtime import checkpoint

    steps = checkpoint.committed(run.checkpoints)
    if not steps or (step is not None and step not in steps):
        there = f"it has those of steps {', '.join(map(str, sorted(steps)))}" if steps else "it has none yet"
        wanted = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        raise CheckpointError(f"`{run.name}` does not have {wanted}", hint=there)
    return checkpoint.folder_of(run.checkpoints, steps[0] if step is None else step)


def consolidate(folder: Path, to: Path, *, file_bytes: int = 5_000_000_000) -> list[Path]:
    """Write the checkpoint in ``folder`` anew into the folder ``to``, which must not exist; return the files.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete, or ``to`` exists.
    """
    from jobs.runtime.checkpoint import MANIFEST, STATE, damage
    from jobs.runtime.job import Ranks
    from jobs.runtime.pieces import INDEX, Store
    from jobs.runtime.whole import ALONE, commit, grouped

    if problem := damage(folder, Ranks()):
        raise CheckpointError(f"checkpoint `{folder}` is damaged: {problem}", hint="choose another with `--step`")
    if to.exists():
        raise CheckpointError(f"`{to}` exists", hint="name a folder that does not, or remove it")
    to.mkdir(parents=True)
    with Store(folder) as store:
        entries = store.index["tensors"]
        weights = [("weight", name, tuple(e["shape"])) for name, e in entries.items()]
        state = [(slot, name, shape) for slot in ("exp_avg", "exp_avg_sq") for _, name, shape in weights]
        state += [("step", name, (1,)) for name in entries]
        files = grouped("model", weights, file_bytes) | grouped("optimizer", state, file_bytes)
        for name, parts in files.items():
            _write(store, to / name, parts)
    said = read_json(folder / STATE)
    layout = {"engine": "consolidated", "precision": said["layout"]["precision"], **ALONE}
    commit(to, files, {**said, "layout": layout})
    return [to / name for name in sorted([*files, INDEX, STATE])] + [to / MANIFEST]


def _write(store: Any, path: Path, parts: Sequence[tuple[str, str, tuple[int, ...]]]) -> None:
    """Assemble ``parts`` and write them as one file."""
    import numpy as np
    from safetensors.numpy import save_file

    from jobs.runtime.pieces import Extent

    arrays = {}
    for slot, name, shape in parts:
        flat = np.empty(math.prod(shape), np.float32)
        store.read(Extent(name, slot, shape, None, 0, flat.size), flat)
        arrays[name if slot == "weight" else f"{slot}/{name}"] = flat.reshape(shape)
    save_file(arrays, path, metadata={"format": "pt"})
