"""A rank's signs of life: a small file that changes every few seconds, from a thread of its own.

A frozen process (SIGSTOP, a kernel that hangs) gives none, and so can be told from its peers, which give theirs
while they wait for it in a collective for ever. `jobs/runtime/warden.py` reads them. The same thread notices when
the warden has declared the attempt over, which a rank that lost its network and was replaced would else not.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import statistics
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from jobs.runtime.job import Ranks
from orchestrator.run import Run
from orchestrator.watch import Phase, Sign

log = logging.getLogger(__name__)

PERIOD = "ORCH_BEAT_S"  # set by the warden; where it is not, nobody looks
RECENT = 21  # steps, of which the median counts
SIZE = 512  # bytes of a sign, blanks at its end


class Beat:
    """The signs of one rank. ``mark`` costs the training a few hundred nanoseconds; the disk is the thread's."""

    def __init__(self, run: Run, attempt: str, ranks: Ranks, every_s: float) -> None:
        self._file = beats(run) / f"{attempt}-{ranks.rank}.json"
        self._end = run.folder / "ends" / f"{attempt}.json"
        self._rank, self._every_s = ranks.rank, every_s
        self._node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._phase: Phase = "start"
        self._step = self._marks = self._beats = 0
        self._began: float | None = None  # the step that is under way
        self._steps_s: deque[float] = deque(maxlen=RECENT)
        self._file.parent.mkdir(exist_ok=True)
        threading.Thread(target=self._work, name="beat", daemon=True).start()

    def mark(self, phase: Phase | None, step: int | None) -> None:
        """Say that this rank has got on, to ``phase`` if given; with ``step``, that as many are done."""
        if step is not None:
            now = time.monotonic()
            if self._began is not None:
                self._steps_s.append(now - self._began)
            self._began, self._step = now, step
        self._phase = phase or self._phase
        self._marks += 1

    def _work(self) -> None:
        while True:
            try:
                self._write()
            except OSError as e:
                log.warning("no sign of life: %s", e)
            if self._end.exists():
                log.error("this attempt was declared over, and this rank is alive: leaving, nothing is committed")
                os._exit(1)
            time.sleep(self._every_s)

    def _write(self) -> None:
        """Opened each time, so that NFS shows it elsewhere (close-to-open); no fsync: it is for the living.

        Written over the one before, in place: so it needs no room on a disk that is full, where training goes on.
        """
        self._beats += 1
        sign = Sign(
            rank=self._rank,
            node=self._node,
            phase=self._phase,
            step=self._step,
            marks=self._marks,
            beats=self._beats,
            step_s=statistics.median(self._steps_s) if self._steps_s else 0.0,
        )
        fd = os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(fd, json.dumps(vars(sign)).encode().ljust(SIZE), 0)
        finally:
            os.close(fd)


def beats(run: Run) -> Path:
    """The folder of all signs."""
    return run.folder / "beats"


def start(run: Run, attempt: str, ranks: Ranks) -> Beat | None:
    """Begin to give signs of life, where a warden looks for them."""
    every_s = os.environ.get(PERIOD)
    return Beat(run, attempt, ranks, float(every_s)) if every_s else None


def read(run: Run, attempt: str) -> list[Sign]:
    """The signs of all ranks of ``attempt``; one that cannot be read, or is just being written, is left out."""
    signs = []
    with suppress(OSError):  # of the folder
        for file in beats(run).glob(f"{attempt}-*.json"):
            with suppress(OSError, ValueError, TypeError):
                signs.append(Sign(**json.loads(file.read_text())))
    return signs
