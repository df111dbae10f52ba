"""What the local launcher leaves behind: runs the stages of a submission one after the other.

Each goes through submitit's LocalExecutor, the same entry that a Slurm job has. The supervisor adds
what that executor lacks: no time limit, ranks that do not outlive a peer that failed (as with
`srun --kill-on-bad-exit`), a stage that starts only when the one before it is done, and no process
left behind. Whether a run is done, its folder says; submitit's result files are not read.
"""

import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.local import GO, POLL_S, box, environment, kill, session_mates, visible_gpus
from orchestrator.registry import find
from orchestrator.run import Attempt, Run, write_atomic

log = logging.getLogger("launch.supervisor")

GRACE_S = 15.0  # between one rank's bad end and that of its peers, who write down their own failure
SETTLE_S = 3.0  # from the first rank's begin until all have their signal handlers
ASK_AGAIN_S = 5.0  # a signal that meets a rank before its handler is in place is lost
TIMEOUT_MIN = 10 * 365 * 24 * 60  # submitit's own default ends a job after two minutes


class Told:
    """Set by SIGTERM or SIGINT: the machine shuts down, or someone ends the supervisor itself."""

    def __init__(self) -> None:
        self.to_stop = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._set)

    def _set(self, *_: object) -> None:
        self.to_stop = True


def supervise(runs: Sequence[Run]) -> None:
    """Run each of ``runs`` once the one before it is done; withdraw those that never started."""
    told = Told()
    queue = list(runs)
    while queue and not told.to_stop and not cancelled(queue[0]):
        run = queue.pop(0)
        try:
            execute(run, queue, told)
        except Exception:
            log.exception("`%s`", run.name)
        kill(session_mates())
        if not attempt(run) and (told.to_stop or cancelled(run)):
            withdraw([run])  # cancelled before its job began
        write_atomic(box(run) / "ended", "")
        state = run.state(alive=False)
        log.info("`%s` is %s", run.name, state)
        if state != "done":
            break
    withdraw(queue)


def execute(run: Run, queue: list[Run], told: Told) -> None:
    """Start the ranks of ``run`` and return when all are gone; drop from ``queue`` what is cancelled meanwhile."""
    import psutil

    job, ranks = start(run)
    log.info("`%s`: ranks: %d, under process %s", run.name, ranks, job.job_id)
    controller = psutil.Process(int(job.job_id))
    most, broken_at, asked_at = 0, 0.0, 0.0
    while not job.done():
        time.sleep(POLL_S)
        now = time.monotonic()
        first = next((i for i, queued in enumerate(queue) if cancelled(queued)), len(queue))
        withdraw(queue[first:])  # each waits for the one before it
        del queue[first:]

        order = cancelled(run) or ("save" if told.to_stop else "")
        begun = attempt(run)
        if order == "now" or (order and not begun):  # before its attempt is on disk, there is nothing to save
            kill(session_mates())
        elif order and begun and time.time() > begun.started_at + SETTLE_S and now > asked_at + ASK_AGAIN_S:
            log.info("`%s`: asking the ranks to save and leave", run.name)
            with suppress(psutil.NoSuchProcess):
                controller.terminate()  # it hands SIGTERM on to the ranks
            asked_at = now

        left = children(controller)
        most = max(most, left)
        if left and not broken_at and ended_badly(run, gone=most - left):
            log.info("`%s`: a rank ended badly; peers, which have %g s: %d", run.name, GRACE_S, left)
            broken_at = now
        if broken_at and now > broken_at + GRACE_S:
            kill(session_mates())
    keep_first_words(run, ranks)


def start(run: Run) -> tuple[Any, int]:
    """Hand ``run`` to submitit; return its job and the number of ranks."""
    import submitit

    from jobs.__main__ import main as job_main

    experiment = run.spec()
    per_gpu = find("jobs", experiment.stages[run.stage].kind).PER_GPU
    ranks = experiment.cluster.gpus_per_node if per_gpu else 1
    gpus = visible_gpus(os.environ)[:ranks] if per_gpu and experiment.cluster.gpu != "cpu" else []
    executor = submitit.LocalExecutor(box(run))
    executor.update_parameters(
        tasks_per_node=ranks,
        gpus_per_node=len(gpus),
        visible_gpus=gpus,
        timeout_min=TIMEOUT_MIN,
        stderr_to_stdout=True,
    )
    before = dict(os.environ)
    os.environ.update(environment(run, before))  # submitit hands on its own
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // ranks)))
    if not gpus:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        return executor.submit(job_main, str(run.folder)), ranks
    finally:
        os.environ.clear()
        os.environ.update(before)


def ended_badly(run: Run, *, gone: int) -> bool:
    """Whether a rank raised, or is among the ``gone`` without a word while its attempt goes on.

    A rank that returned left submitit's result file; that there is one is all that counts.
    """
    if run.failures(str(run.submissions[-1].number)):
        return True
    last = attempt(run)
    if last and last.cause:
        return False
    return gone > len(list(box(run).glob("*_result.pkl")))


def withdraw(runs: Sequence[Run]) -> None:
    """Take back the submission of runs that never started: as if it had not been made."""
    for run in runs:
        with run.lock("run"):
            on_disk = Run.load(run.folder)
            if on_disk.submissions and on_disk.submissions[-1] == run.submissions[-1]:
                on_disk.submissions.pop()
                on_disk.save()
        write_atomic(box(run) / "ended", "")
        log.info("`%s` was not started", run.name)


def keep_first_words(run: Run, ranks: int) -> None:
    """Give a rank that died before it had a log of its own what it said until then."""
    number = run.submissions[-1].number
    (run.folder / "logs").mkdir(exist_ok=True)
    for rank in range(ranks):
        target = run.folder / "logs" / f"{number}-{rank}.log"
        for said in box(run).glob(f"*_{rank}_log.out"):
            if not target.exists() and said.stat().st_size:
                shutil.copyfile(said, target)


def cancelled(run: Run) -> str:
    """What ``cancel`` asked for: ``save``, ``now``, or nothing."""
    try:
        return (box(run) / "cancel").read_text()
    except FileNotFoundError:
        return ""


def attempt(run: Run) -> Attempt | None:
    """The attempt of the newest submission, once its rank 0 has begun."""
    number = str(run.submissions[-1].number)
    return next((a for a in run.attempts() if a.name == number), None)


def children(process: Any) -> int:
    """How many children ``process`` has; none if it is gone."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        return len(process.children())
    return 0


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(folders: Sequence[str]) -> None:
    """Supervise the runs in ``folders``, once the process that started this one says so."""
    if sys.stdin.buffer.readline() != GO:
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    supervise([Run.load(Path(folder)) for folder in folders])


if __name__ == "__main__":
    main(sys.argv[1:])
