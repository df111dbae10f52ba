"""Run folders made with the real classes, and what MLflow's database really holds of them."""

import json
import secrets
import socket
import sqlite3
import time
from pathlib import Path

from omegaconf import OmegaConf

from orchestrator.run import Attempt, Run, Submission
from orchestrator.spec import ClusterSpec, DataSpec, Experiment, ModelSpec, StageSpec, TrackingSpec

Point = tuple[int, float, int]  # step, value, milliseconds


def make_chain(root: Path, *, name: str = "demo", uri: str | None = None, options: dict | None = None) -> list[Run]:
    """The runs of a chain `pretrain`, `sft`, submitted and not started."""
    experiment = Experiment(
        name=name,
        model=ModelSpec(layers=2, hidden=64, heads=2),
        cluster=ClusterSpec(gpu="cpu", gpus_per_node=2, gpu_memory_gb=4, gpu_tflops=0.1),
        data=DataSpec(folder=str(root / "data")),
        tracking=TrackingSpec(uri=uri),
        stages={
            "pretrain": StageSpec(kind="pretrain", steps=100, options=options or {}),
            "sft": StageSpec(kind="sft", steps=100, init_from="pretrain"),
        },
    )
    runs = []
    for index, stage in enumerate(experiment.stages, 1):
        folder = root / name / stage
        (folder / "attempts").mkdir(parents=True)
        (folder / "spec.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(experiment)))
        submission = Submission(number=1, launcher="local", job_id="1", submitted_at=time.time())
        run = Run(
            folder=folder,
            experiment=name,
            stage=stage,
            index=index,
            key=secrets.token_hex(8),
            submissions=[submission],
        )
        run.save()
        runs.append(run)
    return runs


def start(run: Run, name: str = "1") -> Attempt:
    """An attempt that has just begun."""
    attempt = Attempt(name=name, job_id="1", world=1, host="here", started_at=time.time())
    run.save_attempt(attempt)
    return attempt


def end(run: Run, attempt: Attempt, cause: str) -> None:
    attempt.cause, attempt.ended_at = cause, time.time()
    run.save_attempt(attempt)


def stored(database: Path, run: Run) -> dict[str, list[Point]]:
    """Every point of a line in MLflow's own table, by metric: no client, no paging, no removal of duplicates."""
    run_id = json.loads((run.folder / "tracking.json").read_text())["run_id"]
    query = (
        "select key, step, value, timestamp, is_nan from metrics "
        "where run_uuid = ? and key != 'perf/goodput' order by key, step"  # of the whole run, not of a line
    )
    with sqlite3.connect(database) as connection:
        rows = connection.execute(query, (run_id,)).fetchall()
    points: dict[str, list[Point]] = {}
    for key, step, value, timestamp, is_nan in rows:
        points.setdefault(key, []).append((step, float("nan") if is_nan else value, timestamp))
    return points


def written(run: Run) -> dict[str, list[Point]]:
    """What must be stored: of each step the first line there is, read without the code under test."""
    first: dict[int, dict] = {}
    for raw in (run.folder / "metrics.jsonl").read_text().splitlines():
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if line["step"] > max(first, default=-1):
            first[line["step"]] = line
    points: dict[str, list[Point]] = {}
    for step, line in sorted(first.items()):
        values = {k: v for k, v in line.items() if k not in ("step", "time", "attempt", "tokens")}
        for key, value in (values | {"train/tokens": line["tokens"]}).items():
            points.setdefault(key, []).append((step, value, int(line["time"] * 1000)))
    return points


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
