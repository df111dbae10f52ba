"""What can go wrong for a user, each error with the way out.

OrchError
├── ConfigError      a YAML file or an override is wrong
├── PlanError        the plan cannot run: shapes do not divide, or memory does not fit
├── DataError        text, shards or tokenizer are missing, unreadable or do not match
├── CheckpointError  a checkpoint is missing, damaged, or of another model, tokenizer or layout
├── LaunchError      the launcher refused the job, or the run is in no state for the request
├── TrackingError    MLflow cannot be reached or refused
└── TrainingError    a running job cannot go on: the loss is not finite, the disk is full
"""

from collections.abc import Sequence
from typing import TypeVar


class OrchError(Exception):
    """Base of every error shown to the user as ``error:`` plus ``hint:``, exit status 1."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(OrchError):
    """A YAML file or an override is wrong."""


class PlanError(OrchError):
    """The plan cannot run on this cluster with this engine."""


class DataError(OrchError):
    """Text, shards or tokenizer are missing, unreadable or do not match."""


class CheckpointError(OrchError):
    """A checkpoint is missing, damaged, or does not belong to this run."""


class LaunchError(OrchError):
    """The launcher refused the job, or the run is in no state for the request."""


class TrackingError(OrchError):
    """MLflow cannot be reached, or refused what was sent."""


class TrainingError(OrchError):
    """A running job cannot go on."""


E = TypeVar("E", bound=OrchError)


def together(errors: Sequence[E]) -> E:
    """All ``errors``, of which there is at least one, as one of their kind, so that none is found after another."""
    if len(errors) == 1:
        return errors[0]
    lines = [f"{i}. {e}" + (f"\n   hint: {e.hint}" if e.hint else "") for i, e in enumerate(errors, 1)]
    return type(errors[0])("\n".join([f"{len(errors)} problems", *lines]))
