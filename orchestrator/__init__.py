"""The control plane of `orch`: compose, plan, submit, follow. Runs without torch."""

__version__ = "0.1.0"
