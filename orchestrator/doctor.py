"""Is this machine ready: each check is a function, each finding ends in a remedy.

Packages are looked up by their metadata, so that it takes no seconds of import; ``deep`` imports them too,
in a process of its own.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MIN_PYTHON = (3, 11)
MIN_DISK_GB = 5.0  # the demo, its checkpoints and MLflow's database, with room to spare
NEEDED = ("torch", "mlflow", "submitit", "omegaconf", "tokenizers", "safetensors")
USEFUL = {"deepspeed": "engine `deepspeed`", "colossalai": "engine `colossalai`"}
STYLES = {"ok": "green", "note": "yellow", "missing": "bold red"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found. ``missing``: nothing runs without it; ``note``: something will not."""

    check: str
    status: Literal["ok", "note", "missing"]
    found: str
    remedy: str = ""


def examine(root: Path, *, uri: str | None = None, deep: bool = False) -> list[Finding]:
    """All findings for this machine, with runs in ``root`` and MLflow at ``uri``."""
    return [
        python(),
        *packages(deep=deep),
        compiler(),
        disk(root),
        memory(),
        gpus(),
        tracking(root, uri),
        *launchers(),
    ]


def report(findings: list[Finding]) -> None:
    """Print ``findings`` as a table."""
    from rich.markup import escape
    from rich.table import Table

    from orchestrator.show import out

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("check", "status", "found", "remedy"):
        table.add_column(column, overflow="fold")
    for f in findings:
        table.add_row(f.check, f"[{STYLES[f.status]}]{f.status}[/]", escape(f.found), escape(f.remedy))
    out().print(table)


def python() -> Finding:
    """The interpreter is new enough."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < MIN_PYTHON:
        return Finding(check="python", status="missing", found=version, remedy="install Python 3.11 or later")
    return Finding(check="python", status="ok", found=f"{version}, {sys.executable}")


def packages(*, deep: bool) -> Iterator[Finding]:
    """The packages are installed, and with ``deep``, they import."""
    for name in (*NEEDED, *USEFUL):
        needed = name in NEEDED
        bad: Literal["missing", "note"] = "missing" if needed else "note"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            what = "" if needed else f", for {USEFUL[name]}"
            yield Finding(check=name, status=bad, found="not installed", remedy=f"`pip install {name}`{what}")
            continue
        problem = _import_problem(name) if deep else ""
        if problem:
            yield Finding(check=name, status=bad, found=f"{version} does not import", remedy=problem)
        else:
            yield Finding(check=name, status="ok", found=version)


def compiler() -> Finding:
    """DeepSpeed builds its operators on first use."""
    path = shutil.which(os.environ.get("CXX", "g++"))
    if path is None:
        return Finding(check="compiler", status="note", found="no g++", remedy="install gcc, for DeepSpeed's operators")
    return Finding(check="compiler", status="ok", found=path)


def disk(root: Path) -> Finding:
    """The runs folder can be written to and has room."""
    existing = next(p for p in (root, *root.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as e:
        found = f"cannot write to {existing}: {e.strerror}"
        return Finding(check="runs folder", status="missing", found=found, remedy="set `--runs` or ORCH_RUNS")
    free_gb = shutil.disk_usage(existing).free / 1e9
    found = f"{root}, {free_gb:.0f} GB free"
    if free_gb < MIN_DISK_GB:
        return Finding(
            check="runs folder", status="note", found=found, remedy="make room: a checkpoint takes 14 B/param"
        )
    return Finding(check="runs folder", status="ok", found=found)


def memory() -> Finding:
    """Memory and cores, for the record."""
    import psutil

    total, free = (x / 1e9 for x in psutil.virtual_memory()[:2])
    return Finding(check="memory", status="ok", found=f"{free:.0f} of {total:.0f} GB free, {os.cpu_count()} cores")


def gpus() -> Finding:
    """The GPUs that nvidia-smi lists."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except FileNotFoundError:
        return Finding(
            check="gpus", status="note", found="none (no `nvidia-smi`)", remedy="train here with `cluster=local`"
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as e:
        return Finding(check="gpus", status="note", found=f"nvidia-smi: {e}", remedy="look at the driver: `nvidia-smi`")
    return Finding(check="gpus", status="ok", found="; ".join(listed.splitlines()) or "none")


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
                return Finding(check="mlflow store", status="ok", found=shown)
        file = Path(target.removeprefix("sqlite:///"))
        if target.startswith("sqlite:") and file.exists():
            with sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True) as database:
                database.execute("SELECT count(*) FROM experiments")
            return Finding(check="mlflow store", status="ok", found=shown)
    except (urllib.error.URLError, OSError, sqlite3.Error, ValueError) as e:
        remedy = "training goes on without; `orch sync` sends the metrics later"
        return Finding(check="mlflow store", status="note", found=f"{shown}: {e}", remedy=remedy)
    return Finding(check="mlflow store", status="ok", found=f"{shown}, made when first used")


def launchers() -> Iterator[Finding]:
    """Where runs can be sent from here."""
    yield Finding(check="launcher local", status="ok", found="this machine")
    path = shutil.which("sbatch")
    if path:
        yield Finding(check="launcher slurm", status="ok", found=path)
    else:
        remedy = "log in to the cluster, or submit with `--launcher local`"
        yield Finding(check="launcher slurm", status="note", found="no `sbatch`", remedy=remedy)


def _import_problem(name: str) -> str:
    """The last line of what importing ``name`` raised, or nothing."""
    try:
        tried = subprocess.run(
            [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, timeout=300, check=False
        )
    except subprocess.TimeoutExpired:
        return "the import takes more than 300 s"
    return (tried.stderr.strip().splitlines() or ["it ended without a word"])[-1] if tried.returncode else ""
