"""One stage on disk: the folder that is all the control plane and the job share.

Every file has one writer, and is replaced at once, so that a reader never sees half of it:

    spec.yaml  plan.json  code/     the control plane, once, at submit
    run.json                        the control plane: every submission
    attempts/<attempt>.json         rank 0 of the job: from which step, to which, why it ended
    ends/<attempt>.json             the warden of a Slurm job, once the ranks are gone: why, and what comes next
    beats/<attempt>-<rank>.json     each rank, while it lives, under Slurm
    failures/<attempt>-<rank>.json  each rank that raised: what, when
    heartbeat.json  metrics.jsonl   rank 0, as it trains
    tracking.json                   whoever holds the tracking lock: MLflow ids, what was sent
    logs/<attempt>-<rank>.log       each rank; the forwarder's and the supervisor's beside them
    loss-curve.png, other pictures  the forwarder, at the end
    reward.json                     rank 0 of a stage `reward`, at the end
    samples/step-0000010.jsonl      rank 0 of a stage that writes text, as it trains
    submitit/<submission>/          the local launcher and submitit
    checkpoints/step-0000500/       all ranks; MANIFEST.json last
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from orchestrator.errors import ConfigError, LaunchError
from orchestrator.recover import by_blame
from orchestrator.spec import Experiment

# Why an attempt ended. Asked to leave: cancelled (by the user), preempted (told in time, or not, that the scheduler
# wants the nodes or that the time is up), requeued (by an administrator or Slurm, with no time to save). Not asked:
# error (of code, config or data: stops the run), hardware (a GPU, a network card), frozen (no progress), lost (a rank
# or a node vanished), fruitless (not begun: the attempts before it brought nothing).
Cause = Literal[
    "", "done", "cancelled", "preempted", "requeued", "error", "hardware", "frozen", "lost", "fruitless"
]  # fmt: skip
State = Literal["new", "queued", "running", "done", "stopped", "failed"]
ASKED: tuple[Cause, ...] = ("cancelled", "preempted", "requeued")
SHORT = 12  # digits of a hash, for people
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it may become a folder; raise ConfigError if it could lead elsewhere."""
    if not NAME.fullmatch(name) or ".." in name:
        raise ConfigError(
            f"{what} `{name}` cannot be a folder name",
            hint="use letters, digits, `.`, `_` and `-`, at most 100, beginning with a letter or digit",
        )
    return name


def write_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` at once, and see it on disk before returning."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def nearest(folder: Path) -> Path:
    """``folder``, or the nearest above it that exists: they share a disk."""
    folder = folder.expanduser().absolute()
    return next(p for p in (folder, *folder.parents) if p.exists())


def file_sha256(path: Path) -> str:
    """SHA-256 of the content of ``path``, in hexadecimal digits."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as JSON."""
    write_atomic(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path, default: Any = None) -> Any:
    """The JSON in ``path``, or ``default`` where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default


class Checkpoint(TypedDict):
    """Which checkpoint was loaded. The manifest has the hashes of all its files."""

    step: int
    manifest_sha256: str


@dataclass(kw_only=True)
class Submission:
    """One hand-over of the run to a launcher; a requeue by the scheduler is not a new one."""

    number: int
    launcher: str
    job_id: str
    submitted_at: float  # seconds since the epoch


@dataclass(kw_only=True)
class Attempt:
    """One start of the job. Written by its rank 0; from ``next`` on, and over its end, by the warden of a Slurm job."""

    name: str  # the submission's number, with `r<n>` after it for the n-th requeue
    job_id: str
    world: int
    host: str
    started_at: float
    from_step: int = 0
    to_step: int = 0
    ended_at: float | None = None
    cause: Cause = ""  # empty while it runs, and for ever if it was killed
    checkpoint_step: int = 0  # of the last checkpoint committed
    phases: dict[str, float] = field(default_factory=dict)  # seconds from started_at to: imports, ranks, engine, ...
    read: dict[str, str] = field(default_factory=dict)  # files of examples, with their SHA-256
    loaded: dict[str, Checkpoint] = field(default_factory=dict)  # of other stages, by name
    passed_over: list[tuple[int, int]] = field(default_factory=list)  # samples, first and behind, of steps undone
    note: str = ""  # why it ended, in a sentence
    next: Literal["", "requeue", "stop"] = ""  # what the warden did about it
    nodes: str = ""  # it ran on, as Slurm lists them: `node[1-4]`
    ranks: list[int] = field(default_factory=list)  # those the end is put down to, where they can be named
    culprits: list[str] = field(default_factory=list)  # their nodes
    excluded: list[str] = field(default_factory=list)  # nodes that the attempts after it stay away from


SAID = ("cause", "ended_at", "note")  # by rank 0 of its end,
ENDS = (*SAID, "next", "nodes", "ranks", "culprits", "excluded")  # and over that by the warden


@dataclass(kw_only=True)
class Run:
    """``<root>/<experiment>/<stage>``, on a file system that every node sees."""

    folder: Path
    experiment: str
    stage: str
    index: int  # of the stage in its chain, from 1
    key: str  # a random word that names this run in MLflow for life
    submissions: list[Submission] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As the user types it: ``experiment/stage``."""
        return f"{self.experiment}/{self.stage}"

    @property
    def root(self) -> Path:
        """The runs folder."""
        return self.folder.parent.parent

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie, one folder each."""
        return self.folder / "checkpoints"

    def spec(self) -> Experiment:
        """The experiment, as it was resolved at submit (``spec.yaml``)."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        file = self.folder / "spec.yaml"
        try:
            merged = OmegaConf.merge(OmegaConf.structured(Experiment), OmegaConf.load(file))
            return cast(Experiment, OmegaConf.to_object(merged))
        except (OSError, YAMLError, OmegaConfBaseException) as e:
            raise _unreadable(file, e) from e

    def steps(self) -> int:
        """How many the stage is to train. Read from ``spec.yaml`` alone: `orch status` has a thousand to ask."""
        import yaml

        file = self.folder / "spec.yaml"
        try:
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            with file.open(encoding="utf-8") as f:
                return int(yaml.load(f, loader)["stages"][self.stage]["steps"])  # noqa: S506  (both are safe)
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as e:
            raise _unreadable(file, e) from e

    def save(self) -> None:
        """Replace ``run.json``. Only the control plane may, under ``lock("run")``."""
        value = asdict(self)
        del value["folder"]
        write_json(self.folder / "run.json", value)

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """Read ``run.json`` in ``folder``. Raises LaunchError where there is none, or none that can be read."""
        file = folder / "run.json"
        try:
            value = read_json(file)
            if value is None:
                raise LaunchError(f"no run in `{folder}`", hint="`orch status` lists the runs there are")
            value["submissions"] = [Submission(**s) for s in value["submissions"]]
            return cls(folder=folder, **value)
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise _unreadable(file, e) from e

    def attempts(self) -> list[Attempt]:
        """Every start of the job so far, oldest first."""
        begun = {f.stem: read_json(f) for f in (self.folder / "attempts").glob("*.json")}
        ended = {f.stem: read_json(f) for f in (self.folder / "ends").glob("*.json")}
        for file in (self.folder / "ends").glob("*.draft"):  # Slurm is ending the job, and its warden, for good
            draft = read_json(file)
            said = begun.get(file.stem, {})
            ended.setdefault(file.stem, draft | ({key: said[key] for key in SAID} if said.get("cause") else {}))
        for name, end in ended.items():  # one that died before it had a rank 0 has only that
            begun[name] = {**end, **begun.get(name, {}), **{key: end[key] for key in ENDS}}
        made = (Attempt(**value) for value in begun.values())
        return sorted(made, key=lambda a: order(a.name))  # not by time: their nodes' clocks may differ

    def save_attempt(self, attempt: Attempt) -> None:
        """Replace the file of ``attempt``. Only rank 0 of that attempt may."""
        write_json(self.folder / "attempts" / f"{attempt.name}.json", asdict(attempt))

    def save_end(self, attempt: Attempt, *, draft: bool = False) -> None:
        """Write how ``attempt`` ended. Only the warden may; a rank that is alive still leaves when it sees it.

        Of a ``draft`` ranks take no notice: they may be saving, and what they say of their end counts.
        """
        (self.folder / "ends").mkdir(exist_ok=True)
        write_json(self.folder / "ends" / f"{attempt.name}.{'draft' if draft else 'json'}", asdict(attempt))

    def state(self, *, alive: bool, attempts: Sequence[Attempt] | None = None) -> State:
        """What the folder says of the run, given whether its launcher still knows the job.

        ``done`` means that the target step was reached; ``stopped``, that it saved and left when told to.
        """
        attempts = self.attempts() if attempts is None else attempts
        last = attempts[-1] if attempts else None
        if last and last.cause == "done":
            return "done"
        if not self.submissions:
            return "new"
        started = last is not None and last.name.partition("r")[0] == str(self.submissions[-1].number)
        if alive and not (started and last and last.next == "stop"):
            return "running" if started and last and not last.next else "queued"
        return "stopped" if started and last and last.cause in ASKED else "failed"

    @property
    def over(self) -> bool:
        """Whether the folder alone says that the newest submission has ended for good: nobody else need be asked.

        A scheduler may know the job for some seconds more, or not answer.
        """
        last = next(reversed(self.attempts()), None)
        if last is None or not self.submissions or last.name.partition("r")[0] != str(self.submissions[-1].number):
            return False
        return last.next == "stop"

    def failures(self, attempt: str) -> list[dict[str, Any]]:
        """What the ranks of ``attempt`` raised, the first to fail first; behind it those it took along.

        Each has ``rank``, ``time``, ``type``, ``message``, ``hint`` and ``traceback``.
        """
        files = (self.folder / "failures").glob(f"{attempt}-*.json")
        return by_blame([read_json(f) for f in files])

    def heartbeat(self) -> dict[str, Any]:
        """The last sign of life: ``attempt, step, steps, tokens, loss, tokens_per_s, time``; or empty."""
        return read_json(self.folder / "heartbeat.json", {})

    def metrics(self) -> dict[int, dict[str, Any]]:
        """Lines of ``metrics.jsonl`` by step; where attempts overlap, the newest one counts."""
        lines: dict[int, dict[str, Any]] = {}
        for _, line in read_metrics(self.folder / "metrics.jsonl"):
            there = lines.get(line["step"], line)
            if order(line["attempt"]) >= order(there["attempt"]):  # else of one that was replaced and lives on
                lines[line["step"]] = line
        return dict(sorted(lines.items()))

    @contextmanager
    def lock(self, what: str, *, wait_s: float = 10.0) -> Iterator[None]:
        """Hold ``.<what>.lock`` in the run folder. Raises LaunchError after ``wait_s`` seconds."""
        with open(self.folder / f".{what}.lock", "w") as f:
            deadline = time.monotonic() + wait_s
            while True:
                try:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise LaunchError(
                            f"run `{self.name}`: another process has held `.{what}.lock` for {wait_s:g} s",
                            hint="wait for the other `orch` command to end",
                        ) from None
                    time.sleep(0.05)
            yield


def _unreadable(file: Path, error: Exception) -> LaunchError:
    reason = str(error).strip().partition("\n")[0]
    return LaunchError(
        f"cannot read `{file}`: {type(error).__name__}: {reason}",
        hint=f"restore it, or move `{file.parent}` out of the runs folder: the other runs do not need it",
    )


def order(attempt: str) -> tuple[int, int]:
    """The numbers in an attempt's name, to tell which of two is newer: `1r10` than `1r9`, `2` than both."""
    number, _, restarts = attempt.partition("r")
    return int(number), int(restarts or 0)


def read_metrics(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Whole lines of a ``metrics.jsonl`` from byte ``offset``, each with the offset behind it.

    A line cut off by a kill is not whole, and is passed over once another follows it.
    """
    if not path.exists():
        return
    with path.open("rb") as f:
        f.seek(offset)
        for raw in f:
            if not raw.endswith(b"\n"):
                return
            offset += len(raw)
            try:
                line = json.loads(raw)
            except ValueError:
                continue
            if isinstance(line, dict) and "step" in line:
                yield offset, line


def list_runs(root: Path) -> list[Run]:
    """Every run below the runs folder ``root``, by experiment and place in the chain."""
    runs = [Run.load(f.parent) for f in root.glob("*/*/run.json")]
    return sorted(runs, key=lambda r: (r.experiment, r.index))


def find_runs(root: Path, name: str) -> list[Run]:
    """The run ``experiment/stage``, or all runs of ``experiment``. Raises LaunchError for none."""
    experiment, _, stage = name.strip("/").partition("/")
    runs = [r for r in list_runs(root) if r.experiment == experiment and stage in ("", r.stage)]
    if not runs:
        raise LaunchError(f"no run `{name}` in `{root}`", hint="`orch status` lists the runs there are")
    return runs
