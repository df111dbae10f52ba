"""`make bench`: one benchmark after the other, each in a process of its own, in about five minutes."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BENCHMARKS = (
    ("train_step.py", "--sizes", "demo,small"),
    ("rollout.py", "--turns", "5"),
    ("data.py", "--repeats", "3"),
    ("control.py",),
)


def main() -> None:
    for name, *options in BENCHMARKS:
        print("\n== " + " ".join([name, *options]), flush=True)
        subprocess.run([sys.executable, str(HERE / name), *options], check=True)


if __name__ == "__main__":
    main()
