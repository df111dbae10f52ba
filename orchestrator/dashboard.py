"""What a person looks at: the saved chart view, the server behind `orch ui`, its addresses, the pictures.

MLflow opens an experiment on a page without curves. The curves of all its runs stand on the chart page of
"compare runs", and which charts it draws is a *shared view*: JSON of the page's own state in a tag of the
experiment, selected by a key in the address. That JSON is internal to MLflow and was read off version 3.17.2;
the browser test in tests/orchestrator/test_dashboard.py says when it no longer holds.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import TrackingError
from orchestrator.run import Run, list_runs, read_json
from orchestrator.store import connect, mask, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

VIEW = "orch"  # key of the shared view
CHARTS = (  # those without points are not shown
    *("train/loss", "val/loss", "train/lr", "train/grad_norm", "perf/tokens_per_s", "perf/mfu"),
    *("val/accuracy", "val/calibration_error"),  # of a reward model
    *("train/reward", "val/reward", "train/kl", "train/entropy", "train/length", "val/kl"),  # of a policy
)
START_S = 90.0  # measured: 10 s on two idle cores; more on busy ones
# The defaults of `mlflow server` are 10 processes and 2.1 GB; so it is 2 and 0.48 GB (measured, 3.17.2).
SMALL = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def save_view(client: "MlflowClient", experiment_id: str) -> None:
    """Tell the page of this experiment to draw ``CHARTS``, over the global step, for all its runs."""
    section = {"uuid": "s0", "name": "Stages", "display": True, "isReordered": True, "columns": 2, "cardHeight": 360}
    view = {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "compareRunCharts": [_line_chart(f"c{i}", metric) for i, metric in enumerate(CHARTS)],
        "compareRunSections": [section],
        "isAccordionReordered": True,
        "runListHidden": True,
        "viewMaximized": True,
        "hideEmptyCharts": True,
        "runsHiddenMode": "FIRST_20_RUNS",
        "groupBy": None,
    }
    text = json.dumps(view, separators=(",", ":"))
    client.set_experiment_tag(experiment_id, f"mlflow.sharedViewState.{VIEW}", text)


def _line_chart(uuid: str, metric: str) -> dict[str, Any]:
    return {
        "type": "LINE",
        "uuid": uuid,
        "deleted": False,
        "isGenerated": False,
        "metricSectionId": "s0",
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "lineSmoothness": 0,
        "selectedXAxisMetricKey": "",
        "useGlobalLineChartConfig": True,
        "useGlobalXaxisKey": True,
        "runsCountToCompare": 10,
    }


def address(base: str, experiment_id: str) -> str:
    """The page that shows the curves of an experiment at once, on the server ``base``."""
    query = f"compareRunsMode=CHART&workflowType=machine_learning&viewStateShareKey={VIEW}"
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs?{query}"


def dashboard_url(run: Run, base: str) -> str | None:
    """The page with the curves of this run's chain; None while MLflow has not heard of the run."""
    experiment_id = read_json(run.folder / "tracking.json", {}).get("experiment_id")
    return address(base, experiment_id) if experiment_id else None


def addresses(root: Path, uri: str | None, base: str) -> list[tuple[str, str]]:
    """(experiment, page) of everything below ``root`` that is tracked at ``uri``, the newest submission first.

    Without ``uri``, runs that are tracked by a server elsewhere are there too, with their page on that server.
    """
    newest: dict[tuple[str, str], float] = {}
    for run in list_runs(root):
        sent = read_json(run.folder / "tracking.json", {})
        at = sent.get("uri", "")
        server = base if at == mask(tracking_uri(root, uri)) else at if uri is None and at.startswith("http") else ""
        if server and sent.get("experiment_id"):
            key = (run.experiment, address(server, sent["experiment_id"]))
            submitted_at = max((s.submitted_at for s in run.submissions), default=0.0)
            newest[key] = max(newest.get(key, 0.0), submitted_at)
    return sorted(newest, key=lambda key: newest[key], reverse=True)


@contextmanager
def serve(root: Path, uri: str | None = None, port: int = 5000) -> Iterator[str]:
    """Yield the address of a dashboard of ``uri``; one that is a server already needs no other.

    Otherwise `mlflow server` runs on 127.0.0.1 as long as the context lasts, at ``port``, or at a free one
    where that is taken; what it prints goes to ``mlflow-server.log`` in ``root``.

    Raises:
        TrackingError: the server did not come up.
    """
    store = tracking_uri(root, uri)
    if store.startswith(("http://", "https://")):
        yield mask(store).replace("***@", "")
        return
    port = _free_port(port)
    base = f"http://127.0.0.1:{port}"
    root.mkdir(parents=True, exist_ok=True)
    if store.startswith("sqlite:"):
        with connect(store):  # else the server makes the tables, beside a submit that does
            pass
    log = root / "mlflow-server.log"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--default-artifact-root", (root.resolve() / "mlartifacts").as_uri()]
    # The store goes by the environment: a password in it would show in `ps`.
    environment = os.environ | SMALL | {"MLFLOW_BACKEND_STORE_URI": store}
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        with _leaving_on_signals():
            _wait(server, base, log)
            yield base
    finally:
        _end(server)


@contextmanager
def _leaving_on_signals() -> Iterator[None]:
    """Leave through every `finally` when told to end or when the terminal closes, so that no server is left."""

    def leave(number: int, _: Any) -> None:
        sys.exit(128 + number)

    defaults = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in defaults:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in defaults:
            signal.signal(number, signal.SIG_DFL)


def _free_port(wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(s.getsockname()[1])
    raise TrackingError("no free port on 127.0.0.1", hint="end a server that is no longer needed")


def _wait(server: subprocess.Popen[bytes], base: str, log: Path) -> None:
    import urllib.request

    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{base}/health", timeout=2):  # noqa: S310  (http, on this machine)
                return
        except OSError:
            time.sleep(0.2)
    how = f"did not answer within {START_S:g} s" if server.poll() is None else f"ended with status {server.poll()}"
    raise TrackingError(f"`mlflow server` {how}", hint=f"its last words are in `{log}`")


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and its worker."""
    import psutil

    family = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    for process in psutil.wait_procs(family, timeout=5)[1]:
        process.kill()


def draw_loss(run: Run) -> Path | None:
    """Draw ``loss-curve.png`` into the run folder: losses over tokens, and what n-grams reach on the same data.

    Left alone where it is newer than the metrics; None where there is no loss to draw.
    """
    kind = run.spec().stages[run.stage].kind
    label = "cross-entropy (nats per token)" if kind in ("pretrain", "sft") else "loss"
    return _draw(run, "loss-curve.png", ("train/loss", "val/loss"), label, baselines=kind == "pretrain")


def draw_reward(run: Run) -> Path | None:
    """Draw ``reward-curve.png`` of a policy, as ``draw_loss`` does."""
    return _draw(run, "reward-curve.png", ("train/reward", "val/reward"), "reward")


def _draw(run: Run, name: str, keys: tuple[str, str], label: str, *, baselines: bool = False) -> Path | None:
    path, metrics = run.folder / name, run.folder / "metrics.jsonl"
    if path.exists() and metrics.exists() and path.stat().st_mtime_ns >= metrics.stat().st_mtime_ns:
        return path
    lines = run.metrics().values()
    curves = {key: [(x["tokens"], x[key]) for x in lines if key in x] for key in keys}
    if not any(curves.values()):
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for key, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=key, marker="o" if key.startswith("val/") else "", ms=4, lw=1)
    known = dataset(run.spec().data.folder).get("baselines", {}) if baselines else {}
    for i, (model, loss) in enumerate(sorted(known.items())):
        axes.axhline(loss, ls="--", lw=1, color=f"C{i + 2}", label=f"{model} {loss:.2f}")
    axes.set(xlabel="tokens", ylabel=label, title=run.name)
    return _print(figure, path)


def draw_calibration(run: Run) -> Path | None:
    """Draw ``calibration.png`` of a reward model: how sure it was of held-out pairs, and how often it was right.

    None where there is no ``reward.json``. Left alone where the picture is newer.
    """
    path, facts = run.folder / "calibration.png", run.folder / "reward.json"
    curve = read_json(facts, {}).get("calibration")
    if not curve or (path.exists() and path.stat().st_mtime_ns >= facts.stat().st_mtime_ns):
        return path if curve else None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    most = max(b["pairs"] for b in curve)
    axes.plot([0.5, 1], [0.5, 1], ls="--", lw=1, color="gray", label="as sure as it should be")
    axes.plot([b["claimed"] for b in curve], [b["right"] for b in curve], lw=1, label="held-out pairs")
    sizes = [10 + 150 * b["pairs"] / most for b in curve]
    axes.scatter([b["claimed"] for b in curve], [b["right"] for b in curve], s=sizes)
    accuracy = read_json(facts)["accuracy"]
    title = f"{run.name}: right in {accuracy:.1%} of {sum(b['pairs'] for b in curve):,} pairs"
    axes.set(xlabel="sigmoid of the difference of scores", ylabel="share in the right order", title=title)
    return _print(figure, path)


def _print(figure: Any, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    FigureCanvasAgg(figure).print_png(temporary)
    temporary.replace(path)
    return path


def dataset(folder: str) -> dict[str, Any]:
    """What `prepare` says of the data in ``folder``; empty before it ran."""
    try:
        return dict(read_json(Path(folder) / "dataset.json", {}))
    except ValueError:  # damaged; the job itself says so
        return {}
