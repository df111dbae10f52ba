"""One canonical set of safetensors from a checkpoint of any engine, layout and number of ranks.

Every tensor whole, in fp32, by the model's own name: weights in `model-*.safetensors`, AdamW's state in
`optimizer-*.safetensors` as `exp_avg/<name>`, `exp_avg_sq/<name>` and `step/<name>`. What lies below a checkpoint, such
as the critic of PPO and the average of its actor, comes likewise below. The folder is a checkpoint itself: any engine
and layout goes on from it. No torch; one tensor is held in memory at a time.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointError
from orchestrator.run import Run, read_json

Part = tuple[str, str, tuple[int, ...]]  # slot, name, shape


def checkpoint_of(run: Run, step: int | None) -> Path:
    """The folder of the checkpoint of ``step``, or the newest. Raises CheckpointError where there is none."""
    from jobs.runtime import checkpoint

    steps = checkpoint.committed(run.checkpoints)
    if not steps or (step is not None and step not in steps):
        there = f"it has those of steps {', '.join(map(str, sorted(steps)))}" if steps else "it has none yet"
        wanted = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        raise CheckpointError(f"`{run.name}` does not have {wanted}", hint=there)
    return checkpoint.folder_of(run.checkpoints, steps[0] if step is None else step)


def consolidate(
    folder: Path, to: Path, *, file_bytes: int = 5_000_000_000, wrote: Callable[[int], None] = lambda _: None
) -> list[Path]:
    """Write the checkpoint in ``folder`` anew into the folder ``to``, which must not exist; return the files.

    Until it is whole it is called `<to>.partial`; what a run that was broken off left there is removed.

    Args:
        wrote: hears of bytes as they are written; there will be ``size_bytes(folder)`` of them.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete, there is no room, or ``to`` exists.
    """
    import numpy as np

    from jobs.runtime import whole
    from jobs.runtime.checkpoint import MANIFEST, STATE, commit, damage
    from jobs.runtime.job import Ranks
    from jobs.runtime.pieces import Extent, Store

    if problem := damage(folder, Ranks()):
        raise CheckpointError(f"checkpoint `{folder}` is damaged: {problem}", hint="choose another with `--step`")
    partial = _begin(to, size_bytes(folder))
    hashed: dict[str, list] = {}
    for model in _models(folder):
        (partial / model).mkdir(exist_ok=True)
        with Store(folder / model) as store:

            def read(part: Part, store: Store = store) -> np.ndarray:
                slot, name, shape = part
                flat = np.empty(math.prod(shape), np.float32)
                store.read(Extent(slot=slot, name=name, shape=shape, cut=None, start=0, stop=flat.size), flat)
                return flat

            weights, state = _parts(store.index["tensors"])
            files = whole.grouped("model", weights, file_bytes)
            files |= whole.grouped("optimizer", state, file_bytes) if state else {}
            for name, parts in files.items():
                hashed[str(Path(model, name))] = whole.write(partial / model / name, parts, read, wrote)
        whole.write_index(partial / model, files)
    said = read_json(folder / STATE)
    layout = {"engine": "consolidated", "precision": said["layout"]["precision"], **whole.ALONE}
    commit(partial, {**said, "layout": layout}, hashed)
    partial.rename(to)
    return [*sorted(p for p in to.rglob("*") if p.is_file() and p.name != MANIFEST), to / MANIFEST]


def size_bytes(folder: Path) -> int:
    """Bytes of all tensors of the checkpoint in ``folder``."""
    from jobs.runtime.pieces import Store

    total = 0
    for model in _models(folder):
        with Store(folder / model) as store:
            weights, state = _parts(store.index["tensors"])
        total += sum(4 * math.prod(shape) for *_, shape in [*weights, *state])
    return total


def _models(folder: Path) -> list[str]:
    """The folders of models in a checkpoint, relative to it: itself, "", and of PPO the critic's and the average's."""
    from jobs.runtime.pieces import INDEX

    return ["", *sorted(index.parent.name for index in folder.glob(f"*/{INDEX}"))]


def _parts(entries: dict[str, Any]) -> tuple[list[Part], list[Part]]:
    """Weights, and what the optimizer keeps of them, in the order in which they are written."""
    weights = [("weight", name, tuple(e["shape"])) for name, e in entries.items()]
    state = [
        (slot, name, (1,) if slot == "step" else shape)
        for slot in ("exp_avg", "exp_avg_sq", "step")
        for _, name, shape in weights
        if slot in entries[name]["pieces"]
    ]
    return weights, state


def _begin(to: Path, needs: int) -> Path:
    """An empty `<to>.partial`; one that a run before left is removed, if it holds nothing else."""
    from jobs.runtime.checkpoint import MANIFEST, STATE
    from jobs.runtime.pieces import FILE, INDEX

    if to.exists():
        raise CheckpointError(f"`{to}` exists", hint="name a folder that does not, or remove it")
    partial = to.with_name(f"{to.name}.partial")
    for path in (p for p in partial.rglob("*") if not p.is_dir()):
        if path.name not in (INDEX, STATE, MANIFEST) and not FILE.fullmatch(path.name):
            raise CheckpointError(f"`{partial}` holds `{path.name}`, which is not of it", hint="move it elsewhere")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    if (free := shutil.disk_usage(partial).free) < needs:
        partial.rmdir()
        raise CheckpointError(
            f"it takes {needs / 1e9:.1f} GB, and `{to.parent}` has {free / 1e9:.1f} GB free", hint="make room"
        )
    return partial
