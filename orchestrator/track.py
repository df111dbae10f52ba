"""What a run says of itself: a line of ``metrics.jsonl`` per step first, MLflow after.

The trainer only appends lines. A forwarder, a process of its own, reads them and sends them to MLflow, so
that neither its import (9 s, 163 MB, measured) nor its outages (a default client call blocks 247 s, measured)
reach the trainer. ``tracking.json`` says how far it got. Every point is sent exactly once:

- a step at or below the highest one sent is passed over, because an attempt that resumed from a checkpoint
  repeats steps, with the same loss and other timings;
- points that were sent but not yet noted when a forwarder died are sent again, made of the same line, and
  MLflow keeps equal points once.

The submitter, the forwarder and `orch sync` share this code, and take turns under the run's lock `tracking`.
"""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import dashboard, logbook
from orchestrator.enroll import enroll, log_inputs, register
from orchestrator.errors import LaunchError, TrackingError
from orchestrator.run import Attempt, Run, State, read_metrics, write_json
from orchestrator.store import MAX_METRICS, Sent, connect, mask, tracking_uri
from orchestrator.system import Sampler

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

log = logging.getLogger(__name__)
Forwarder = subprocess.Popen[bytes]

HEARTBEAT_S = 1.0
SYSTEM_S = 10.0
POLL_S = 1.0  # how often the forwarder looks for new lines
PATIENCE_S = 15.0  # the longest pause between two attempts to reach MLflow
REST, REST_S = 9, 5.0  # the pause after sending: this many times what it took, at most so long
SETTLED_S = 2.0  # a folder's time of change is coarse: two changes soon after each other may have the same
FAREWELL_S = 15.0  # how long a forwarder tries after the end of its job
LOCK_S = 90.0  # more than one slow call to MLflow takes
NOTE, MAX_NOTE = "mlflow.note.content", 5000  # MLflow's tag of a run's description; of at most 8000 characters
FILES = ("spec.yaml", "plan.json", "plan.html", "loss-curve.png", "reward-curve.png", "calibration.png")
SAMPLES, TABLES = "samples.json", "mlflow.loggedArtifacts"  # an artifact; MLflow's tag of the tables among them
MAX_ROWS = 2000  # of samples in the table; older ones are in the run folder
HEAD = ("step", "time", "attempt", "tokens")  # of a line; the rest are metrics
STATUS: dict[State, str] = {
    "new": "SCHEDULED",
    "queued": "SCHEDULED",
    "running": "RUNNING",
    "done": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
}


class Metrics:
    """Rank 0's record of one attempt. A step costs one `write`; nothing waits for MLflow, a GPU or a slow disk."""

    def __init__(self, run: Run, attempt: str) -> None:
        self._folder, self._attempt = run.folder, attempt
        self._file = (run.folder / "metrics.jsonl").open("a+b", buffering=0)
        end = self._file.seek(0, os.SEEK_END)
        self._cut = end > 0 and os.pread(self._file.fileno(), 1, end - 1) != b"\n"  # a kill in mid-line
        self._system: dict[str, float] = {}
        self._beat: dict[str, Any] = {}
        self._beat_written = self._beat
        self._stop = threading.Event()
        self._sampler = Sampler(run.folder)
        self._threads = [self._repeat(self._write_beat, HEARTBEAT_S), self._repeat(self._sample, SYSTEM_S)]

    def log(self, step: int, values: Mapping[str, float], *, tokens: int) -> None:
        """Append one line. ``tokens`` counts all that were trained on up to this step.

        Infinite and undefined values are written as Python's json does: ``NaN``, ``Infinity``. On a full
        disk the line is lost, with a warning, and training goes on.
        """
        system, self._system = self._system, {}
        head = {"step": step, "time": round(time.time(), 3), "attempt": self._attempt, "tokens": tokens}
        line = head | {name: float(value) for name, value in values.items()} | system
        data = b"\n" * self._cut + json.dumps(line).encode() + b"\n"
        try:
            self._cut = self._file.write(data) < len(data)
        except OSError as e:
            log.warning("step %d is missing in metrics.jsonl: %s", step, e)

    def heartbeat(
        self, *, step: int, steps: int, tokens: int, loss: float | None = None, tokens_per_s: float | None = None
    ) -> None:
        """Say that the job is alive; ``heartbeat.json`` follows within a second."""
        self._beat = {
            "attempt": self._attempt,
            "step": step,
            "steps": steps,
            "tokens": tokens,
            "loss": loss,
            "tokens_per_s": tokens_per_s,
            "time": time.time(),
        }

    def close(self) -> None:
        """Write the last heartbeat and close the file."""
        self._stop.set()
        self._threads[0].join(timeout=5)
        if not self._threads[0].is_alive():  # else the disk hangs
            with suppress(OSError):
                self._write_beat()
        self._file.close()

    def _write_beat(self) -> None:
        beat = self._beat
        if beat is not self._beat_written:
            write_json(self._folder / "heartbeat.json", beat)
            self._beat_written = beat

    def _sample(self) -> None:
        self._system = self._sampler()

    def _repeat(self, task: Callable[[], None], period_s: float) -> threading.Thread:
        """Do ``task`` after a second, then every ``period_s``, beside the training."""

        def work() -> None:
            wait_s = HEARTBEAT_S
            while not self._stop.wait(wait_s):
                try:
                    task()
                except OSError as e:
                    log.warning("%s: %s", task.__name__.strip("_"), e)
                wait_s = period_s

        thread = threading.Thread(target=work, name=task.__name__, daemon=True)
        thread.start()
        return thread


def start_forwarder(run: Run) -> Forwarder:
    """Start the process that sends this run's lines while the caller lives, and the rest after it.

    It leaves by itself: soon after the caller's attempt has ended or the caller died.
    """
    logs = run.folder / "logs"
    logs.mkdir(exist_ok=True)
    code = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "orchestrator.track", str(run.folder), str(os.getpid()), str(time.time())]
    with (logs / "forwarder.log").open("ab") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )


def open_runs(runs: Sequence[Run], uri: str | None) -> list[str]:
    """Create the MLflow runs of a chain, or find them: one id per run, for life. Returns the ids.

    The run folders must hold their ``spec.yaml``. Whatever fails here is made up for by the forwarder.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses.
    """
    target = tracking_uri(runs[0].root, uri)
    with connect(target) as client:
        for run in runs:
            with run.lock("tracking", wait_s=LOCK_S):
                enroll(client, run, target)
        for run in runs:
            _send_files(client, run)
            _send_inputs(client, run, run.spec().data.folder)
    return [Sent.load(run).run_id for run in runs]


def sync(run: Run) -> int:
    """Send what MLflow has not seen yet, or has lost with its database. Returns the number of lines sent.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses.
    """
    _forget_if_lost(run)
    attempts = run.attempts()
    return _bring_up_to_date(run, alive=False if attempts and attempts[-1].ended_at else None)


def reconcile(run: Run, alive: bool) -> None:
    """Give the MLflow run the status that the folder says; ``alive`` as in ``Run.state``.

    Costs nothing where it has it already. Raises TrackingError where MLflow cannot be reached.
    """
    sent = Sent.load(run)
    if sent.run_id and sent.status != STATUS[run.state(alive=alive)]:
        with connect(tracking_uri(run.root, run.spec().tracking.uri)) as client:
            _set_status(client, run, alive=alive)
            if not alive:
                _send_logbook(client, run)


def _bring_up_to_date(run: Run, *, alive: bool | None) -> int:
    """Send lines, status and files; return the number of lines. ``alive`` None: the status is not ours to say."""
    spec = run.spec()
    uri = tracking_uri(run.root, spec.tracking.uri)
    with connect(uri) as client:
        with run.lock("tracking", wait_s=LOCK_S):
            enroll(client, run, uri)
        if alive:  # said first: a long backlog may follow
            _set_status(client, run, alive=True)
        lines = _send_new(client, run)
        _send_inputs(client, run, spec.data.folder)
        _send_samples(client, run)
        if alive is False:
            _set_status(client, run, alive=False)
    if alive:
        return lines
    dashboard.draw_loss(run)
    dashboard.draw_reward(run)
    dashboard.draw_calibration(run)
    with connect(uri) as client:
        _send_files(client, run)
        if alive is False:
            _send_logbook(client, run)
    return lines


def _forget_if_lost(run: Run) -> None:
    """Take ``run`` for a new one where MLflow has been emptied since."""
    with connect(tracking_uri(run.root, run.spec().tracking.uri)) as client, run.lock("tracking", wait_s=LOCK_S):
        from mlflow.exceptions import MlflowException

        sent = Sent.load(run)
        try:
            if sent.run_id:
                client.get_run(sent.run_id)
        except MlflowException as e:
            if e.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            log.warning("`%s` is not in MLflow any more: sending all of it again", run.name)
            Sent().save(run)


def _send_new(client: "MlflowClient", run: Run) -> int:
    """Send all whole lines that were not sent, in batches; return how many."""
    total = 0
    while True:
        with run.lock("tracking", wait_s=LOCK_S):
            sent = Sent.load(run)
            before = sent.offset
            points: list[Metric] = []
            for offset, line in read_metrics(run.folder / "metrics.jsonl", before):
                new = _points(line) if line["step"] > sent.step else []
                if points and len(points) + len(new) > MAX_METRICS:
                    break
                points += new
                total += bool(new)
                sent.offset, sent.step = offset, max(sent.step, line["step"])
            if sent.offset == before:
                return total
            for i in range(0, len(points), MAX_METRICS):
                client.log_batch(sent.run_id, metrics=points[i : i + MAX_METRICS])
            sent.save(run)


def _points(line: Mapping[str, Any]) -> "list[Metric]":
    """Each number of a line as a point at its step and time; ``tokens`` becomes ``train/tokens``."""
    from mlflow.entities import Metric

    at = int(line["time"] * 1000), line["step"]
    values = {key: value for key, value in line.items() if key not in HEAD} | {"train/tokens": line["tokens"]}
    # MLflow turns an infinity into 1.8e308, which flattens the curve: say "undefined" instead.
    return [Metric(key, value if math.isfinite(value) else math.nan, *at) for key, value in values.items()]


def _set_status(client: "MlflowClient", run: Run, *, alive: bool) -> None:
    with run.lock("tracking", wait_s=LOCK_S):
        sent, status = Sent.load(run), STATUS[run.state(alive=alive)]
        if sent.status == status:
            return
        if status in ("RUNNING", "SCHEDULED"):
            client.update_run(sent.run_id, status=status)
        else:
            last = run.attempts()[-1:]
            ended_at = (last[0].ended_at if last else None) or run.heartbeat().get("time") or time.time()
            client.set_terminated(sent.run_id, status, int(ended_at * 1000))
        sent.status = status
        sent.save(run)


def _send_files(client: "MlflowClient", run: Run) -> None:
    """Send the spec, the plan and the pictures as they are now, each once; the last checkpoint as a model version."""
    with run.lock("tracking", wait_s=LOCK_S):
        sent = Sent.load(run)
        for name in FILES:
            path = run.folder / name
            if not path.exists() or path.stat().st_mtime_ns == sent.artifacts.get(name):
                continue
            if path.suffix in (".png", ".html"):
                client.log_artifact(sent.run_id, str(path))
            else:
                client.log_text(sent.run_id, mask(path.read_text(encoding="utf-8")), name)
            sent.artifacts[name] = path.stat().st_mtime_ns
        sent.save(run)
        if sent.status == STATUS["done"]:
            sent.registered = register(client, run, sent)
            sent.save(run)


def _send_inputs(client: "MlflowClient", run: Run, folder: str) -> None:
    """Name what the run reads, once it is known."""
    with run.lock("tracking", wait_s=LOCK_S):
        sent = Sent.load(run)
        if (digest := log_inputs(client, run, sent, folder)) != sent.dataset:
            sent.dataset = digest
            sent.save(run)


def _send_samples(client: "MlflowClient", run: Run) -> None:
    """Send what the run has written at its evaluations as one table, whole: the same however often it is sent."""
    files = sorted((run.folder / "samples").glob("step-*.jsonl"), key=lambda f: (len(f.name), f.name))
    if not files:
        return
    with run.lock("tracking", wait_s=LOCK_S):
        sent = Sent.load(run)
        newest = max(f.stat().st_mtime_ns for f in files)
        if newest == sent.artifacts.get(SAMPLES):
            return
        try:
            table = json.dumps(_table(files))
        except (ValueError, TypeError) as e:  # not ours to mend; metrics and status must go on
            log.warning("the samples of `%s` are no table: %s", run.name, e)
        else:
            client.log_text(sent.run_id, table, SAMPLES)
            client.set_tag(sent.run_id, TABLES, json.dumps([{"path": SAMPLES, "type": "table"}]))
        sent.artifacts[SAMPLES] = newest
        sent.save(run)


def _table(files: Sequence[Path]) -> dict[str, list[Any]]:
    """The lines of ``files`` as MLflow's tables are: `columns` and `data`; nested values, such as rules, as text."""
    rows: list[dict[str, Any]] = []
    for file in reversed(files):  # the newest are what fits
        step = int(file.stem.removeprefix("step-"))
        text = file.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.split("\n") if line]  # `splitlines` cuts at U+2028 too
        rows = [{"step": step, **line} for line in lines] + rows
        if len(rows) >= MAX_ROWS:
            break
    rows = rows[-MAX_ROWS:]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {"columns": columns, "data": [[_cell(row.get(key)) for key in columns] for row in rows]}


def _cell(value: Any) -> Any:
    """``value`` as a browser reads it: JSON has no NaN and no infinity."""
    plain = isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value))
    return value if plain else json.dumps(value)


def _send_logbook(client: "MlflowClient", run: Run) -> None:
    """Send it as a file and, unless a person has written there, as the run's description; the goodput as a metric."""
    book = logbook.of(run, running=False)
    page = logbook.markdown(run.name, book)
    checksum = zlib.crc32(page.encode())
    with run.lock("tracking", wait_s=LOCK_S):
        sent = Sent.load(run)
        if not book.entries or sent.artifacts.get("logbook.md") == checksum:
            return
        client.log_text(sent.run_id, page, "logbook.md")
        if book.goodput is not None:
            last = book.entries[-1]
            ended_at = int(1000 * (last.began_at + last.held_s))
            client.log_metric(sent.run_id, "perf/goodput", book.goodput, timestamp=ended_at, step=last.to_step)
        note = client.get_run(sent.run_id).data.tags.get(NOTE, "")
        if not note or note.startswith(logbook.HEADING):
            client.set_tag(sent.run_id, NOTE, logbook.markdown(run.name, book, newest=20)[:MAX_NOTE])
        sent.artifacts["logbook.md"] = checksum
        sent.save(run)


def follow(run: Run, parent: int | None = None, since: float = 0.0) -> None:
    """Forward lines until the job is over: ``parent`` is dead, or an attempt has ended after ``since``."""

    attempts = _attempts_of(run)

    def over() -> bool:
        ended = any((a.ended_at or 0.0) > since for a in attempts())
        return ended or (parent is not None and os.getppid() != parent)

    mine, pause_s, deadline = "", POLL_S, 0.0
    while True:
        ending = over()  # asked first: whatever was written before the end is read below
        newest = next((a.name for a in reversed(attempts())), "")
        if ending:
            deadline = deadline or time.monotonic() + FAREWELL_S
        else:
            mine = newest
        # Where another attempt has taken over, the status is its forwarder's to set.
        alive = not ending if mine in ("", newest) else None
        began = time.monotonic()
        try:
            if ending or _has_news(run, attempts()):
                lines = _bring_up_to_date(run, alive=alive)
                log.info("%d lines sent", lines)
            if ending:
                return
            pause_s = max(POLL_S, min(REST * (time.monotonic() - began), REST_S))
        except (TrackingError, LaunchError) as e:
            if ending and time.monotonic() > deadline:
                log.warning("%s; left to `orch sync %s`", e, run.name)
                return
            pause_s = POLL_S if ending else min(2 * pause_s, PATIENCE_S)
            log.warning("%s; trying again in %g s", e, pause_s)
        until = time.monotonic() + pause_s
        while time.monotonic() < until and (ending or not over()):
            time.sleep(POLL_S / 2)


def _attempts_of(run: Run) -> Callable[[], list[Attempt]]:
    """What gives the attempts of ``run``, and reads them again once one of their files was replaced."""
    folders, stamp, attempts = [run.folder / name for name in ("attempts", "ends")], [-1], list[Attempt]()

    def read() -> list[Attempt]:
        nonlocal stamp, attempts
        now = [folder.stat().st_mtime_ns if folder.exists() else 0 for folder in folders]
        if now != stamp or time.time() - max(now) / 1e9 < SETTLED_S:
            stamp, attempts = now, run.attempts()
        return attempts

    return read


def _has_news(run: Run, attempts: Sequence[Attempt]) -> bool:
    """Whether MLflow lacks a line or the status of this run, which is alive."""
    sent, metrics = Sent.load(run), run.folder / "metrics.jsonl"
    behind = metrics.exists() and metrics.stat().st_size > sent.offset
    return behind or sent.status != STATUS[run.state(alive=True, attempts=attempts)]


def main(folder: str, parent: str | None = None, since: str = "0") -> None:
    """`python -m orchestrator.track <run folder>`: the forwarder."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # Slurm sends the job's signals to us too; we leave after it
    os.nice(10)
    with suppress(OSError):  # where Linux groups by session, `nice` counts inside the group only (man 7 sched)
        Path("/proc/self/autogroup").write_text("10")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    follow(Run.load(Path(folder)), int(parent) if parent else None, float(since))


if __name__ == "__main__":
    main(*sys.argv[1:])
