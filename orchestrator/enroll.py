"""How a run enters MLflow: the experiment, the run with its tags and parameters, what it reads and leaves behind.

One MLflow experiment per chain and a flat run per stage, `1-pretrain`, `2-sft`: nested runs are folded away
and draw no curves (seen in 3.17.2), so lineage stands in tags.
"""

import getpass
import hashlib
import json
import logging
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import dashboard, lineage
from orchestrator.errors import CheckpointError
from orchestrator.run import Run
from orchestrator.store import MAX_PARAM_CHARS, MAX_PARAMS, Sent, mask

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

KEY = "orch.key"  # the tag by which a run is found again


def enroll(client: "MlflowClient", run: Run, uri: str) -> Sent:
    """Find or create the MLflow run of ``run``, and note it. Call it under the lock `tracking`.

    Can be broken off anywhere and called again: the run is found by its key, and equal parameters
    are accepted twice.
    """
    sent = Sent.load(run)
    if sent.run_id:
        return sent
    spec = run.spec()
    experiment_id = _experiment(client, spec.tracking.experiment or spec.name, run, embedded=spec.tracking.uri is None)
    dashboard.save_view(client, experiment_id)
    found = client.search_runs([experiment_id], f"tags.`{KEY}` = '{run.key}'", max_results=1)
    if found:
        run_id, status = found[0].info.run_id, found[0].info.status
    else:
        run_id = client.create_run(experiment_id, run_name=f"{run.index}-{run.stage}", tags=_tags(run)).info.run_id
        status = "SCHEDULED"
        client.update_run(run_id, status=status)
    params = _params(run)
    for i in range(0, len(params), MAX_PARAMS):
        client.log_batch(run_id, params=params[i : i + MAX_PARAMS])
    sent.uri, sent.experiment_id, sent.run_id, sent.status = mask(uri), experiment_id, run_id, status
    sent.save(run)
    return sent


def _experiment(client: "MlflowClient", name: str, run: Run, *, embedded: bool) -> str:
    """The id of experiment ``name``. With the embedded store its files go into the runs folder."""
    from mlflow.exceptions import MlflowException

    location = (run.root.resolve() / "mlartifacts" / run.experiment).as_uri() if embedded else None
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another submit was faster
            if found is None:
                raise
    return str(found.experiment_id)


def _tags(run: Run) -> dict[str, str]:
    """Who, where, from which code and from which stage."""
    stage = run.spec().stages[run.stage]
    tags = {
        KEY: run.key,
        "orch.run": run.name,
        "orch.folder": str(run.folder),
        "chain": run.experiment,
        "stage": run.stage,
        "stage_index": str(run.index),
        "init_from": stage.init_from or "",
        "mlflow.source.name": f"orch {stage.kind}",
        "mlflow.source.type": "JOB",
        "mlflow.source.git.commit": _commit(),
        "mlflow.user": _user(),
    }
    return {key: value for key, value in tags.items() if value}


def _commit() -> str:
    """The commit of the checkout this code runs from; empty where this file is not of one."""
    here = Path(__file__)
    command = ["git", "-C", str(here.parent), "rev-parse", "HEAD", f"HEAD:./{here.name}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError):
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return ""


def _params(run: Run) -> list[Any]:
    """The stage's keys as they stand in YAML, then those of model, data and cluster, dotted."""
    from mlflow.entities import Param

    spec = run.spec()
    tree = asdict(spec.stages[run.stage]) | {
        "model": asdict(spec.model) | {"params": spec.model.params},
        "data": asdict(spec.data),
        "cluster": asdict(spec.cluster),
    }
    return [Param(key, _fit(value)) for key, value in _flat(tree)]


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _fit(value: str) -> str:
    """``value``, or its beginning and how much is missing."""
    value = mask(value)
    if len(value) <= MAX_PARAM_CHARS:
        return value
    note = f" ... ({len(value)} characters, all in spec.yaml)"
    return value[: MAX_PARAM_CHARS - len(note)] + note


def log_inputs(client: "MlflowClient", run: Run, sent: Sent, folder: str) -> str:
    """Name what this run reads as its inputs, ``folder`` and examples, and tag it with the checkpoints it loaded.

    Can be repeated, as more becomes known: MLflow keeps equal inputs once. Returns a digest of what it has.
    """
    from mlflow.entities import DatasetInput, InputTag, RunTag

    read, loaded = lineage.noted(run)
    corpus = _corpus(folder)
    inputs = {"training": [corpus] if corpus else [], "examples": [_examples(*item) for item in read.items()]}
    tags = {f"from.{stage}": f"step {was['step']}, manifest {was['manifest_sha256']}" for stage, was in loaded.items()}
    known = [*tags.values(), *(entry.digest for entries in inputs.values() for entry in entries)]
    digest = hashlib.sha256("".join(known).encode()).hexdigest() if known else ""
    if digest == sent.dataset:
        return digest
    named = [
        DatasetInput(entry, [InputTag("mlflow.data.context", use)])
        for use, entries in inputs.items()
        for entry in entries
    ]
    client.log_inputs(sent.run_id, datasets=named)
    client.log_batch(sent.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    return digest


def _corpus(folder: str) -> Any:
    """The data set, once `prepare` has written it."""
    described, place = dashboard.dataset(folder), Path(folder).resolve()
    return described and _dataset(place.name, _digest(described), str(place), described.get("sources"))


def _examples(file: str, digest: str) -> Any:
    return _dataset(file if file.startswith("builtin:") else Path(file).name, digest, file)


def _dataset(name: str, digest: str, uri: str, profile: Any = None) -> Any:
    from mlflow.entities import Dataset

    source, shown = json.dumps({"uri": uri}), profile and json.dumps(profile)
    return Dataset(name=name, digest=digest[:32], source_type="local", source=source, profile=shown)  # of 36 at most


def register(client: "MlflowClient", run: Run, sent: Sent) -> str:
    """Make the newest checkpoint of ``run`` a version of the registered model `<experiment>-<stage>`, once.

    No weights are copied. Returns the hash of the checkpoint's manifest; nothing where there is no checkpoint. Where
    the registry refuses, that is logged, and the next call tries again.
    """
    from mlflow.exceptions import MlflowException

    try:
        saved = lineage.saved(run)
        if saved is not None and saved["manifest_sha256"] != sent.registered:
            _make_version(client, run, sent, saved)
            return saved["manifest_sha256"]
    except (MlflowException, CheckpointError) as e:
        log.warning("`%s` is no registered model: %s", run.name, mask(str(e)))
    return sent.registered


def _make_version(client: "MlflowClient", run: Run, sent: Sent, saved: lineage.Saved) -> None:
    from mlflow.exceptions import MlflowException

    name = f"{run.experiment}-{run.stage}"
    try:
        client.create_registered_model(name, tags={"chain": run.experiment, "stage": run.stage})
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    folder = run.checkpoints / f"step-{saved['step']:07d}"
    there = client.search_model_versions(f"name = '{name}' and run_id = '{sent.run_id}'")
    if saved["manifest_sha256"] not in [version.tags.get("manifest_sha256") for version in there]:
        tags = {"orch.run": run.name, "orch.folder": str(folder), **saved, **lineage.measured(run)}
        client.create_model_version(
            name,
            source=_source(client, sent, folder, saved),
            run_id=sent.run_id,
            tags={key: str(value) for key, value in tags.items()},
        )


def _source(client: "MlflowClient", sent: Sent, folder: Path, saved: lineage.Saved) -> str:
    """Where a model version lies. A server takes only what is among the run's artifacts (measured, 3.17.2)."""
    if not sent.uri.startswith("http"):
        return folder.resolve().as_uri()
    client.log_dict(sent.run_id, {"folder": str(folder), **saved}, "checkpoint/where.json")
    return f"runs:/{sent.run_id}/checkpoint"


def _digest(described: dict[str, Any]) -> str:
    """One hash of all the hashes `prepare` noted, of tokenizer and shards."""
    sources = {
        name: {split: source.get(split) for split in ("train", "val")}
        for name, source in described.get("sources", {}).items()
    }
    content = json.dumps([described.get("tokenizer_sha256"), sources], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
