"""What a run is saved as beside its pieces, and how it goes on: in the same layout bit for bit, in any other checked.

A checkpoint belongs to a model, a tokenizer and data. Engine, layout and number of ranks are how it came about, and
may differ where it is loaded; then a probe that was measured at the save is measured again, before training goes on.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.runtime import checkpoint, pieces
from jobs.runtime.faults import is_current
from jobs.runtime.job import Job
from orchestrator.errors import CheckpointError
from orchestrator.spec import checkpoint_gb, describe_layout, layout_of

if TYPE_CHECKING:
    from jobs.runtime.loop import Samples
    from jobs.runtime.pieces import Part

    Parts = Mapping[str, Part]  # by the folder below the checkpoint; "", the model that is handed on

log = logging.getLogger(__name__)

PROBE_SAMPLES = 4
# How far the loss on the probe may move where engine or layout change. Measured over all of them, tiny models on a
# CPU (tests/jobs/engines/test_layouts.py, 2026-11-22): 6e-8 in fp32, 2e-4 in bf16, where engines round in other places.
PROBE_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands. Samples are global: over all ranks."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A loss that no layout may change: of the first samples of a data set, without dropout."""

    data: str  # fingerprint of the data set
    measure: Callable[[], float]  # nats per token; collective


def identity(job: Job, data: Samples) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that loads it."""
    return {"model": _model(job), "tokenizer": data.tokenizer_sha256, "data": data.fingerprint}


def _model(job: Job) -> dict[str, Any]:
    """The shape of the model; dropout is no part of it."""
    model = asdict(job.experiment.model)
    del model["dropout"]
    return model


def _template(job: Job) -> dict[str, str] | None:
    """The template of a stage that learns conversations; the others know none."""
    return asdict(job.experiment.data.chat) if hasattr(job.options, "examples") else None


def layout(job: Job) -> dict[str, Any]:
    """How a checkpoint came about. Where it is the same, a run goes on bit for bit."""
    return layout_of(job.stage, job.ranks.world)


def save(job: Job, parts: Parts, data: Samples, at: Position, probe: Probe, more: dict[str, Any]) -> bool:
    """Write and commit a checkpoint, then retire old ones; on failure training goes on without. Collective.

    Args:
        more: what else the run is made of; plain values, the same on every rank.
    """

    def write(folder: Path) -> list[str]:
        files = []
        for name, part in parts.items():
            files += [str(Path(name, file)) for file in pieces.save(folder / name, part, job.ranks)]
        return [*files, save_rng(folder, job.ranks.rank)]

    state = {
        "identity": identity(job, data),
        "chat": _template(job),
        "layout": layout(job),
        "position": asdict(at),
        "probe": {"data": probe.data, "loss": probe.measure()},
        "more": more,
        "attempt": job.attempt,
        "time": time.time(),
    }
    done = checkpoint.save(
        job.run.checkpoints,
        at.step,
        state,
        write,
        ranks=job.ranks,
        expected_bytes=int(checkpoint_gb(job.experiment.model, job.stage) * 1.02e9) + 1_000_000,
        may_commit=lambda: is_current(job.run, job.attempt),
    )
    if done:
        checkpoint.retire(job.run.checkpoints, job.stage.keep, saved=at.step, ranks=job.ranks)
    return done


def resume(job: Job, parts: Parts, data: Samples, probe: Probe) -> tuple[Position, dict[str, Any]] | None:
    """Load the newest whole checkpoint; return where it stands, and its ``more``. None: there is none. Collective.

    Raises:
        CheckpointError: it is of another model, tokenizer or data, or its loss is not what it was when it was saved.
    """
    found = checkpoint.newest(job.run.checkpoints, ranks=job.ranks)
    if found is None:
        return None
    folder, state = found
    checkpoint.check_identity(folder, state["identity"], identity(job, data))
    for name, part in parts.items():
        pieces.load(folder / name, part)
    at = Position(**state["position"])
    if state["layout"] == layout(job):
        load_rng(folder, job.ranks.rank)
    else:
        _converted(job, folder, state, probe)
        new_rng(at.step)
    log.info("resumed `%s` at step %d, %d tokens", folder, at.step, at.tokens)
    return at, state.get("more", {})


def load_weights(job: Job, part: Part, stage: str, tokenizer: str, probe: Probe | None = None) -> None:
    """Load the weights that another ``stage`` of this experiment ended with. Collective.

    Args:
        tokenizer: SHA-256 of the tokenizer that they must have been trained with.
        probe: what they must compute here as they did there; None: it is not looked at.

    Raises:
        CheckpointError: there are none, they are of another model, tokenizer or chat template, or they compute
            something else here.
    """
    other = job.run.root / job.run.experiment / stage / "checkpoints"
    found = checkpoint.newest(other, ranks=job.ranks)
    if found is None:
        raise CheckpointError(f"stage `{stage}` has no checkpoint in `{other}`", hint=f"run stage `{stage}` first")
    folder, state = found
    mine = {"model": _model(job), "tokenizer": tokenizer}
    checkpoint.check_identity(folder, state["identity"], mine, free=("data",))
    if (there := state.get("chat")) and (here := _template(job)):
        checkpoint.check_identity(folder, {"data.chat": there}, {"data.chat": here})
    pieces.load(folder, part, weights_only=True)
    job.has_loaded(stage, folder)
    if probe and state["layout"] != layout(job):
        _converted(job, folder, state, probe)
    log.info("weights of `%s`", folder)


def _converted(job: Job, folder: Path, state: dict[str, Any], probe: Probe) -> None:
    """Raise CheckpointError unless the loss on the probe is what it was at the save, where it is the same probe."""
    there, here = describe_layout(state["layout"]), describe_layout(layout(job))
    if state["probe"]["data"] != probe.data:
        log.info("`%s`, saved by %s, converted to %s", folder, there, here)
        return
    tolerance = max(PROBE_TOLERANCE[state["layout"]["precision"]], PROBE_TOLERANCE[job.stage.precision])
    saved, loaded = state["probe"]["loss"], probe.measure()
    if not abs(saved - loaded) <= tolerance:
        raise CheckpointError(
            f"`{folder}`, saved by {there}, does not compute the same in {here}: the loss on its probe was "
            f"{saved:.6f} and is {loaded:.6f}, further apart than {tolerance:g}",
            hint="go on in the layout it was saved with; this is a defect of an engine, please report it",
        )
    log.info(
        "`%s`, saved by %s, converted to %s: the loss on its probe was %.6f and is %.6f",
        folder, there, here, saved, loaded,
    )  # fmt: skip


def save_rng(folder: Path, rank: int) -> str:
    """Write this rank's random numbers; return the file's name."""
    import torch
    from safetensors.torch import save_file

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    name = f"rng-{rank:05d}.safetensors"
    save_file(states, folder / name)
    return name


def load_rng(folder: Path, rank: int) -> None:
    """Go on with the random numbers of this rank."""
    import torch
    from safetensors.torch import load_file

    states = load_file(folder / f"rng-{rank:05d}.safetensors")
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def new_rng(step: int) -> None:
    """Begin other random numbers than those this rank's seed gave it at step 0: its part of the model is another.

    Ranks that were seeded alike, because they must drop the same activations, go on alike.
    """
    import torch

    digest = hashlib.sha256(f"{torch.initial_seed()}/{step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8]) >> 1)
