"""``python -m jobs <run folder>``: one process per rank, started by submitit, torchrun or a debugger.

Starting it again after a crash is how a run is resumed.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

from jobs.data.chat import Chat, require_rows
from jobs.data.examples import digests
from jobs.runtime import beat, faults, slurm
from jobs.runtime.hf import tokenizer_of
from jobs.runtime.job import Job, Ranks
from orchestrator import registry, track
from orchestrator.run import Attempt, Run

log = logging.getLogger("jobs")


def main(folder: str) -> None:
    """Run one rank of the stage in ``folder`` to its end.

    A user's mistake and a crash both end in ``failures/`` and exit status 1.
    """
    stop = faults.StopFlag().install()  # before anything slow, so that no early signal is lost
    run, ranks = Run.load(Path(folder).resolve()), Ranks.from_env()
    attempt = faults.attempt_name(run)
    _log_to(run.folder / "logs" / f"{attempt}-{ranks.rank}.log")
    for name in ("attempts", "failures"):
        (run.folder / name).mkdir(exist_ok=True)
    faulthandler.register(signal.SIGQUIT, all_threads=True)  # a warden asks where a frozen run hangs
    signs = beat.start(run, attempt, ranks)
    forwarder = None
    record = Attempt(
        name=attempt,
        job_id=run.submissions[-1].job_id if run.submissions else "",
        world=ranks.world,
        host=socket.gethostname(),
        started_at=time.time(),
    )
    metrics = track.Metrics(run, attempt) if ranks.rank == 0 else None
    if slurm.job_of(run):
        slurm.set_rendezvous(ranks)
    try:
        experiment = run.spec()
        stage = experiment.stages[run.stage]
        module = registry.find("jobs", stage.kind)
        job = Job(
            run=run,
            experiment=experiment,
            stage=stage,
            options=module.Options(**stage.options),
            ranks=ranks,
            attempt=attempt,
            stop=stop,
            metrics=metrics,
            record=record,
            beat=signs,
        )
        job.mark("start" if module.PER_GPU else "work")
        job.note(read=_read(job))
        if ranks.rank == 0 and not signs:  # else the warden has started it
            forwarder = track.start_forwarder(run)
        log.info("%s, attempt %s, rank %d of %d", run.name, attempt, ranks.rank, ranks.world)
        summary = module.run(job)
        if summary:
            job.report(1, summary, tokens=int(summary.get("prepare/train_tokens", 0)))
        job.note(cause="done", ended_at=time.time())
    except faults.Stopped as stopped:
        log.info("saved and left: %s", stopped)
        job.note(cause=stopped.cause, to_step=stopped.step, ended_at=time.time())
    except BaseException as error:  # noqa: BLE001 - whatever it is, the next one to look must find it
        try:
            faults.record_failure(run, attempt, ranks.rank, error)
            if ranks.rank == 0:
                record.cause, record.ended_at, record.note = "error", time.time(), str(error)
                run.save_attempt(record)
            _finish(metrics, forwarder)
            faults.let_the_first_go(error, told=bool(signs))
        finally:  # also where the disk is full
            os._exit(1)  # collectives of the lost peers would hang an orderly exit
    _finish(metrics, forwarder)
    if "torch" in sys.modules:  # not after a stage that had no use for it
        from jobs.runtime import dist

        dist.close()
    job.rendezvous.unlink(missing_ok=True)


def _read(job: Job) -> dict[str, str]:
    """The examples of a stage that tunes, with SHA-256, on rank 0. Raises DataError where the model lacks tokens."""
    if not hasattr(job.options, "examples"):
        return {}
    data = job.experiment.data
    require_rows(Chat.open(data).tokenizer, tokenizer_of(data), job.experiment.model.vocab)
    return digests(data, job.options.examples) if job.ranks.rank == 0 else {}


def _log_to(path: Path) -> None:
    """Send this process's output, its libraries' and its children's, to ``path``."""
    path.parent.mkdir(exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname).1s %(name)s: %(message)s", stream=sys.stderr, force=True
    )


def _finish(metrics: track.Metrics | None, forwarder: track.Forwarder | None) -> None:
    """Close the metrics. Under Slurm, which ends the forwarder with the step, let it send the rest first."""
    if metrics:
        metrics.close()
    if forwarder and "SLURM_JOB_ID" in os.environ:
        try:
            forwarder.wait(timeout=60)
        except Exception:  # noqa: BLE001 - tracking never decides how a run ends
            log.warning("MLflow has not everything yet: `orch sync` sends the rest")


if __name__ == "__main__":
    main(sys.argv[1])
