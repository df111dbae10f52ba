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
