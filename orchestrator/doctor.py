"""Is this machine ready, and the cluster: each check is a function, each finding ends in a remedy.

Packages are looked up by their metadata, so that it takes no seconds of import; ``deep`` imports them too,
in a process of its own. What Slurm says is in `launch/_slurm_doctor.py`.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.compose import Composed
from orchestrator.errors import OrchError
from orchestrator.run import nearest
from orchestrator.spec import Experiment

MIN_PYTHON = (3, 11)
MIN_DISK_GB = 5.0  # the demo, its checkpoints and MLflow's database, with room to spare
NEEDED = ("torch", "mlflow", "submitit", "omegaconf", "tokenizers", "safetensors")
ENGINES = ("deepspeed", "colossalai")
IMPORT_S = 300
Level = Literal["ok", "warning", "problem"]  # problem: nothing runs so; warning: something will not, or not well
STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}
# All that may be found here, and the way out; docs/slurm.md has the same list.
ADVICE: dict[str, tuple[Level, str]] = {
    "old-python": ("problem", "install Python 3.11 or later"),
    "no-package": ("problem", "`pip install {name}`"),
    "no-engine": ("warning", "for engine `{name}`: `pip install --no-deps`, as `make install` does"),
    "bad-package": ("problem", "`python -c 'import {name}'` says why"),
    "bad-engine": ("warning", "`python -c 'import {name}'` says why"),
    "no-compiler": ("warning", "install gcc, for DeepSpeed's operators"),
    "no-room": ("warning", "make room, or name another folder with `--runs`: a checkpoint takes 12 bytes a parameter"),
    "not-writable": ("problem", "name another folder with `--runs` or ORCH_RUNS"),
    "no-gpu": ("warning", "train on a cluster, or on the CPUs with `cluster=local`"),
    "bad-gpu": ("warning", "look at the driver: `nvidia-smi`"),
    "no-nccl": ("warning", "install a build of torch for GPUs: `python -c 'import torch; torch.cuda.nccl.version()'`"),
    "no-mlflow": ("warning", "training goes on without; `orch sync` sends the metrics later"),
    "no-data": ("problem", "{hint}"),
    "no-plan": ("problem", "{hint}"),
    "no-slurm": ("warning", "log in to the cluster, or submit with `--launcher local`"),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found; ``code`` names its remedy in the list."""

    check: str
    level: Level
    found: str
    remedy: str = ""
    code: str = ""


def finding(
    check: str, found: str, code: str = "", advice: Mapping[str, tuple[Level, str]] = ADVICE, **words: str
) -> Finding:
    """A finding that is ok, or has the level and the remedy of ``code``."""
    if not code:
        return Finding(check=check, level="ok", found=found)
    level, remedy = advice[code]
    return Finding(check=check, level=level, found=found, remedy=remedy.format(**words), code=code)


def examine(
    root: Path, *, uri: str | None = None, deep: bool = False, experiment: Experiment | None = None
) -> list[Finding]:
    """All findings for this machine, with runs in ``root`` and MLflow at ``uri``; with ``experiment``, for that."""
    from launch import _slurm_doctor

    for_slurm = experiment if experiment and experiment.cluster.launcher == "slurm" else None
    return [
        python(),
        *packages(deep=deep),
        compiler(),
        disk(root, _room_gb(experiment)),
        memory(),
        gpus(deep=deep),
        tracking(root, uri or (experiment.tracking.uri if experiment else None)),
        finding("launcher local", "this machine"),
        *_slurm_doctor.findings(for_slurm, root),
        *(ready(experiment) if experiment else []),
    ]


def ready(experiment: Experiment) -> Iterator[Finding]:
    """The plan holds, and each stage finds its data, or has it made by one before it."""
    from orchestrator import inputs
    from orchestrator.plan import plan
    from orchestrator.spec import in_order

    try:
        plan(experiment)
        yield finding("plan", "can run and fits")
    except OrchError as e:
        yield finding("plan", str(e), "no-plan", hint=e.hint or f"`orch plan` of `{experiment.name}` says more")
    names = in_order(experiment)
    try:
        for i, name in enumerate(names):
            inputs.check(experiment, name, names[:i])
        yield finding("data", f"all there, or made first; {_free(Path(experiment.data.folder))}")
    except OrchError as e:
        yield finding("data", str(e), "no-data", hint=e.hint)


def nodes(composed: Composed, root: Path) -> list[Finding]:
    """What a preflight of the largest stage finds, in a job of its own that nothing waits for."""
    from launch import _slurm_doctor, _slurm_preflight
    from orchestrator.preflight import await_report
    from orchestrator.submit import submit

    place = root / ".doctor"
    shutil.rmtree(place / composed.experiment.name, ignore_errors=True)
    try:
        runs = submit(composed, root=place, launcher="slurm", force=True, dry_run=True)
        report = await_report(_slurm_preflight.look(runs))
    except OrchError as e:
        return [finding("nodes", str(e), "no-plan", hint=e.hint)]
    return list(_slurm_doctor.nodes({name: node["problems"] for name, node in report["nodes"].items()}))


def _room_gb(experiment: Experiment | None) -> float:
    """What the run folders of ``experiment`` need: the checkpoints that are kept, and the one being written."""
    from orchestrator.plan import plan, room_gb

    if experiment is None:
        return MIN_DISK_GB
    with suppress(OrchError):
        return MIN_DISK_GB + room_gb(experiment, [e.stage for e in plan(experiment, force=True)])
    return MIN_DISK_GB


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(nearest(folder)).free / 1e9:.0f} GB free at {folder}"


def report(findings: list[Finding]) -> None:
    """Print ``findings`` as a table."""
    from rich.markup import escape
    from rich.table import Table

    from orchestrator.show import out

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("check", "level", "found", "remedy"):
        table.add_column(column, overflow="fold")
    for f in findings:
        table.add_row(f.check, f"[{STYLES[f.level]}]{f.level}[/]", escape(f.found), escape(f.remedy))
    out().print(table)


def python() -> Finding:
    """The interpreter is new enough."""
    version = ".".join(map(str, sys.version_info[:3]))
    return finding("python", f"{version}, {sys.executable}", "old-python" if sys.version_info < MIN_PYTHON else "")


def packages(*, deep: bool) -> Iterator[Finding]:
    """The packages are installed, and with ``deep``, they import."""
    for name in (*NEEDED, *ENGINES):
        what = "engine" if name in ENGINES else "package"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield finding(name, "not installed", f"no-{what}", name=name)
            continue
        problem = _import_problem(name) if deep else ""
        if problem:
            yield finding(name, f"{version} does not import: {problem}", f"bad-{what}", name=name)
        else:
            yield finding(name, version)


def compiler() -> Finding:
    """DeepSpeed builds its operators on first use."""
    path = shutil.which(os.environ.get("CXX", "g++"))
    return finding("compiler", path) if path else finding("compiler", "no g++", "no-compiler")


def disk(root: Path, needs_gb: float) -> Finding:
    """The runs folder can be written to and has room."""
    existing = nearest(root)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as e:
        return finding("runs folder", f"cannot write to {existing}: {e.strerror}", "not-writable")
    free_gb = shutil.disk_usage(existing).free / 1e9
    found = f"{root}, {free_gb:.0f} GB free of the {needs_gb:.0f} that it needs"
    return finding("runs folder", found, "no-room" if free_gb < needs_gb else "")


def memory() -> Finding:
    """Memory and cores, for the record."""
    import psutil

    total, free = (x / 1e9 for x in psutil.virtual_memory()[:2])
    return finding("memory", f"{free:.0f} of {total:.0f} GB free, {os.cpu_count()} cores")


def gpus(*, deep: bool) -> Finding:
    """The GPUs that nvidia-smi lists, and with ``deep``, torch's NCCL."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except FileNotFoundError:
        return finding("gpus", "none here (no `nvidia-smi`)", "no-gpu")
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as e:
        return finding("gpus", f"nvidia-smi: {e}", "bad-gpu")
    found = "; ".join(listed.splitlines()) or "none"
    if not deep:
        return finding("gpus", found)
    said = _run_python("import torch; print('.'.join(map(str, torch.cuda.nccl.version())))")
    nccl = said.stdout.strip() if said and not said.returncode else ""
    return finding("gpus", f"{found}; NCCL {nccl or 'does not answer'}", "" if nccl else "no-nccl")


def tracking(root: Path, uri: str | None) -> Finding:
    """MLflow's server answers, or its database can be opened."""
    import sqlite3
    import urllib.error
    import urllib.request

    from orchestrator.track import mask, tracking_uri

    target = tracking_uri(root, uri)
    shown = mask(target)
    try:
        if target.startswith(("http://", "https://")):
            with urllib.request.urlopen(f"{target.rstrip('/')}/health", timeout=5):  # noqa: S310 - the scheme is checked
                return finding("mlflow store", shown)
        file = Path(target.removeprefix("sqlite:///"))
        if target.startswith("sqlite:") and file.exists():
            with sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True) as database:
                database.execute("SELECT count(*) FROM experiments")
            return finding("mlflow store", shown)
    except (urllib.error.URLError, OSError, sqlite3.Error, ValueError) as e:
        return finding("mlflow store", f"{shown}: {e}", "no-mlflow")
    return finding("mlflow store", f"{shown}, made when first used")


def _import_problem(name: str) -> str:
    """The last line of what importing ``name`` raised, or nothing."""
    tried = _run_python(f"import {name}")
    if tried is None:
        return f"it takes more than {IMPORT_S} s"
    return (tried.stderr.strip().splitlines() or ["it ended without a word"])[-1] if tried.returncode else ""


def _run_python(code: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return None
