"""Where a run executes: one module per launcher, each with ``check``, ``submit``, ``alive`` and ``cancel``.

A launcher starts ``jobs.__main__.main(<run folder>)`` once per rank, and nothing else: whatever the
job needs to know lies in the run folder. Where it has more to say it has also ``advice(experiment)``, what it would
rather be told; ``preview(run)``, the script it would hand to its scheduler; ``seen(run)``, what that says of the job,
as a Seen; and ``ended(run)``, what it knows of attempts that left no word, by their names, as
orchestrator.logbook.Ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.run import Run
from orchestrator.spec import Experiment


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a scheduler says of a job."""

    state: str  # its word, such as PENDING
    waiting: bool  # it has not begun, or waits to begin again
    reason: str = ""  # its word for why it waits
    why: str = ""  # the same in ours; empty where we have none
    starts_at: float | None = None  # when it expects to start it
    nodes: str = ""  # such as node[1-4]


class Launcher(Protocol):
    """What every module of this package offers."""

    def check(self, experiment: Experiment, stage: str) -> None:
        """Raise LaunchError if ``stage`` cannot run here; called before anything is written."""
        ...

    def submit(self, runs: Sequence[Run]) -> None:
        """Queue ``runs``, each once the one before it has succeeded; record a Submission in each."""
        ...

    def alive(self, run: Run) -> bool:
        """Whether the newest submission of ``run`` is queued or runs."""
        ...

    def cancel(self, run: Run, *, now: bool = False) -> None:
        """Ask the job to save and leave; with ``now``, end it at once."""
        ...


def open_box(run: Run) -> int:
    """Make the folder of a new submission and return its number; one of a withdrawn submission is not reused."""
    number = run.submissions[-1].number + 1 if run.submissions else 1
    while (run.folder / "submitit" / str(number)).exists():
        number += 1
    (run.folder / "submitit" / str(number)).mkdir(parents=True)
    return number
