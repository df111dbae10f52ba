"""Where MLflow is, how to reach it, and what it knows of a run."""

import fcntl
import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import TrackingError
from orchestrator.run import Run, read_json, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow refuses more per request, and cuts longer values without a word (validation.py, 3.17.2).
MAX_METRICS, MAX_PARAMS, MAX_PARAM_CHARS = 1000, 100, 6000
CLIENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds; a batch of 1000 points takes 0.84 s over HTTP (measured)
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def mask(text: str) -> str:
    """``text`` without the user and password of any address in it."""
    return re.sub(r"(?<=://)[^/\s\"']+@", "***@", text)


def tracking_uri(root: Path, uri: str | None) -> str:
    """Where MLflow is: ``uri``, or a sqlite file in the runs folder ``root``.

    A masked user and password are taken from MLFLOW_TRACKING_URI where it names the same place; else they
    are left to MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, which MLflow reads itself.
    """
    if uri is None:
        return f"sqlite:///{root.resolve() / 'mlflow.db'}"
    known = os.environ.get("MLFLOW_TRACKING_URI", "")
    return known if "***@" in uri and mask(known) == uri else uri.replace("***@", "")


@dataclass(kw_only=True)
class Sent:
    """``tracking.json``: what MLflow knows of a run. Read and written under the lock `tracking`."""

    uri: str = ""  # masked
    experiment_id: str = ""
    run_id: str = ""
    status: str = ""
    offset: int = 0  # bytes of metrics.jsonl behind us
    step: int = -1  # the highest one sent
    artifacts: dict[str, int] = field(default_factory=dict)  # file -> its st_mtime_ns, or checksum, when it was sent
    dataset: str = ""  # digest of what is named as inputs
    registered: str = ""  # hash of the manifest of the checkpoint that is a model version

    @classmethod
    def load(cls, run: Run) -> "Sent":
        """What was noted last; nothing yet for a new run."""
        return cls(**read_json(run.folder / "tracking.json", {}))

    def save(self, run: Run) -> None:
        """Note it."""
        write_json(run.folder / "tracking.json", asdict(self))


@contextmanager
def connect(uri: str) -> "Iterator[MlflowClient]":
    """A client of ``uri`` that gives up soon. What goes wrong with it is a TrackingError."""
    for name, value in CLIENT.items():
        os.environ.setdefault(name, value)
    hint = "training does not need it; `orch sync` sends the rest once it is back"
    try:
        if uri.startswith(("http://", "https://")):
            _knock(uri)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError
    except (OSError, ImportError) as e:
        raise TrackingError(f"no MLflow at `{mask(uri)}`: {mask(str(e))}", hint=hint) from e
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        if uri.startswith("sqlite:///"):
            make_database(Path(uri.removeprefix("sqlite:///")))
        yield MlflowClient(uri)
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as e:  # ImportError: of an artifact store's library
        reason = mask(str(e)).strip().partition("\n")[0]
        raise TrackingError(f"MLflow at `{mask(uri)}`: {reason}", hint=hint) from e


def make_database(path: Path) -> None:
    """Have MLflow make its tables in ``path``, unless it is there: by one process at a time, and all of them or none.

    Two that do it at once, or one that is killed meanwhile, leave tables that no later start can go on from
    ("table _alembic_tmp_tags already exists", seen in 3.17.2).
    """
    if path.exists():
        return
    from mlflow import MlflowClient

    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        for left in path.parent.glob(f".{path.name}.*.new"):
            left.unlink()
        made = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")  # MlflowClient keeps each it has opened
        MlflowClient(f"sqlite:///{made}")
        made.replace(path)


def _knock(uri: str) -> None:
    """Fail soon where nobody answers, before MLflow is imported. Any answer will do."""
    import http.client
    import urllib.error
    import urllib.request

    with suppress(urllib.error.HTTPError, http.client.HTTPException):
        bare = re.sub(r"(?<=://)[^/\s]+@", "", uri).rstrip("/")
        urllib.request.urlopen(f"{bare}/health", timeout=5).close()  # noqa: S310  (http or https, as `connect` looked)
