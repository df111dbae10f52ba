"""One rank of a rehearsal: writes down what Slurm told it, and leaves.

    python -I -S here.py FOLDER

A thousand of these start at once, on a test machine on two cores, so it imports `os` and nothing else (8 ms; with the
modules that a rank trains with, 90 ms). What its place follows from is what it writes; the judge
(`launch/_slurm_preflight.py`) asks the training job's own functions what place that is.
"""

import os
import sys

TOLD = (
    *("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),  # as `Ranks.from_env` reads them
    *("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST"),  # as `jobs.runtime.slurm.rendezvous` does
    "SLURMD_NODENAME",
)


def main() -> None:
    """Write ranks/<rank>, a variable a line, at once."""
    name = os.path.join(sys.argv[1], "ranks", os.environ["SLURM_PROCID"])  # noqa: PTH118 - pathlib takes longer than all
    with open(name + ".tmp", "w") as f:
        f.writelines(f"{key}={os.environ[key]}\n" for key in TOLD if key in os.environ)
        f.write(f"torch={'torch' in sys.modules}\n")
    os.rename(name + ".tmp", name)  # noqa: PTH104


if __name__ == "__main__":
    main()
