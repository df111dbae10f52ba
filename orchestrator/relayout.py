"""A run that goes on in another layout: what of its config may change, and what becomes of its newest checkpoint.

A checkpoint can be read by any engine, in any layout, on any number of ranks (jobs/runtime/pieces.py). So these
settings may differ from those a run began with, and what only says when it stops; whatever changes what it computes
may not.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.run import Run, read_json
from orchestrator.spec import Experiment, describe_layout, layout_of

# Settings of a stage that are layout, and one that only stops it
OF_STAGE = ("engine", "engine_config", "parallel", "compile", "skip_batches")
# Options that only stop a run (jobs/ppo.py; `responses`: jobs/data/preferences.py)
GATES = ("max_kl", "min_entropy", "min_length", "max_logp_gap", "patience", "hack_patience", "responses")


def what_counts(experiment: Experiment, stage: str) -> dict[str, Any]:
    """The settings that decide what ``stage`` computes, by dotted key: not the other stages, not how it is laid out."""
    whole = dataclasses.asdict(experiment)
    del whole["cluster"]
    whole["stages"] = {stage: whole["stages"].get(stage)}
    settings = whole["stages"][stage] or {}
    for key in OF_STAGE:
        settings.pop(key, None)
    for key in GATES:
        settings.get("options", {}).pop(key, None)
    return dict(_flat(whole))


def moved(run: Run, experiment: Experiment) -> bool:
    """Whether ``experiment`` lays ``run`` out otherwise than the spec it has, or stops it elsewhere."""
    old = run.spec()
    before, after = old.stages.get(run.stage), experiment.stages[run.stage]
    if old.cluster != experiment.cluster or any(getattr(before, k) != getattr(after, k) for k in OF_STAGE):
        return True
    return before is None or any(before.options.get(k) != after.options.get(k) for k in GATES)


def announcements(root: Path, experiment: Experiment, stages: Iterable[str]) -> list[str]:
    """What `orch submit` would go on from, a line for each of ``stages`` that does not begin at nothing."""
    runs = [
        Run(folder=root / experiment.name / s, experiment=experiment.name, stage=s, index=0, key="") for s in stages
    ]
    return [said for run in runs if (said := continues(run, experiment))]


def continues(run: Run, experiment: Experiment) -> str:
    """From where ``run`` would go on under ``experiment``, and what has to be converted; empty where it begins."""
    stage = experiment.stages[run.stage]
    found, what = newest(run), "continues from"
    if found is None and stage.init_from:
        folder = run.folder.parent / stage.init_from
        source = dataclasses.replace(run, folder=folder, stage=stage.init_from)
        found, what = newest(source), f"begins with the weights of `{source.name}` at"
    if found is None or (what == "continues from" and found[0] >= stage.steps):
        return ""
    step, there = found
    here = layout_of(stage, stage.parallel.nodes * experiment.cluster.gpus_per_node)
    said = f"`{run.name}` {what} step {step}"
    if there == here:
        return said
    return f"{said}, saved by {describe_layout(there)}; converts to {describe_layout(here)}"


def newest(run: Run) -> tuple[int, dict[str, Any]] | None:
    """Step and layout of the newest checkpoint that was committed. Whether it is whole, the job finds out."""
    for folder in sorted(run.checkpoints.glob("step-*"), key=lambda p: (len(p.name), p.name), reverse=True):
        if not (folder / "MANIFEST.json").exists():
            continue
        try:
            state = read_json(folder / "state.json", {})
            return state["position"]["step"], state["layout"]
        except (ValueError, KeyError):
            continue
    return None


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, below in value.items():
            yield from _flat(below, f"{key}.{name}" if key else str(name))
    else:
        yield key, value
