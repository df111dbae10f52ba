"""How a run enters MLflow: the experiment, the run with its tags and parameters, the data set it reads.

One MLflow experiment per chain and a flat run per stage, `1-pretrain`, `2-sft`: nested runs are folded away
and draw no curves (seen in 3.17.2), so lineage stands in tags.
"""

import getpass
import hashlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import dashboard
from orchestrator.run import Run
from orchestrator.store import MAX_PARAM_CHARS, MAX_PARAMS, Sent, mask

if TYPE_CHECKING:
    from mlflow import MlflowClient

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


def log_dataset(client: "MlflowClient", run: Run, sent: Sent) -> str:
    """Name the data set this run reads as its input; once, and not before `prepare` has written it.

    Returns the digest of what MLflow knows as the input.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    described = dashboard.dataset(run)
    if not described or (digest := _digest(described)) == sent.dataset:
        return sent.dataset
    folder = Path(run.spec().data.folder).resolve()
    entry = Dataset(
        name=folder.name,
        digest=digest,
        source_type="local",
        source=json.dumps({"uri": str(folder)}),
        profile=json.dumps(described.get("sources")),
    )
    client.log_inputs(sent.run_id, datasets=[DatasetInput(entry, [InputTag("mlflow.data.context", "training")])])
    return digest


def _digest(described: dict[str, Any]) -> str:
    """One hash of all the hashes `prepare` noted, of tokenizer and shards; 32 characters, as MLflow takes 36."""
    sources = {
        name: {split: source.get(split) for split in ("train", "val")}
        for name, source in described.get("sources", {}).items()
    }
    content = json.dumps([described.get("tokenizer_sha256"), sources], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]
