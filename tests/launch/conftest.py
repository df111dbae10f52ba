"""The box and the reference curve that the tests of this folder share."""

from slurm_cluster import cluster, unbroken

__all__ = ["cluster", "unbroken"]
