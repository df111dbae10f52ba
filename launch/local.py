"""Run on this machine, with one detached supervisor per submission.

`submit` starts `python -m launch._supervisor <run folder>...` in a session of its own and returns; from
then on every `orch` command talks to it through `<run>/submitit/<submission>/` alone:

    cancel   written by `cancel`: "save" or "now"
    ended    written by the supervisor when the last process of the submission is gone

The job id is `<host>:<pid>@<start>`: the supervisor's pid, which is also its session's id, and its
start in seconds after boot, which tells it from a later process of the same pid.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from launch import open_box
from orchestrator.errors import LaunchError
from orchestrator.registry import find
from orchestrator.run import Run, Submission, write_atomic
from orchestrator.spec import Experiment

if TYPE_CHECKING:
    import psutil

POLL_S = 0.5
NOW_S = 10.0  # for the supervisor to end its ranks, before it is ended with them
ELSEWHERE_S = 600.0  # silence after which a run on another host counts as gone
GO = b"go\n"
# Left by a surrounding Slurm job or torchrun, these would tell the ranks of another job.
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_RESTART_COUNT")


def check(experiment: Experiment, stage: str) -> None:
    """Raise LaunchError if this machine cannot hold ``stage``."""
    spec, cluster = experiment.stages[stage], experiment.cluster
    if spec.parallel.nodes != 1:
        raise LaunchError(
            f"stage `{stage}`: `parallel.nodes` is {spec.parallel.nodes}, and the local launcher has 1 node",
            hint=f"set `stages.{stage}.parallel.nodes=1`, or submit with `--launcher slurm`",
        )
    if cluster.gpu == "cpu" or not find("jobs", spec.kind).PER_GPU:
        return
    here = len(visible_gpus(os.environ))
    if here < cluster.gpus_per_node:
        raise LaunchError(
            f"stage `{stage}`: `{cluster.gpu}` has {cluster.gpus_per_node} GPUs a node, this machine {here}",
            hint="choose a cluster that describes this machine, such as `cluster=local`",
        )


def submit(runs: Sequence[Run]) -> None:
    """Start a supervisor for ``runs``, which runs each once the one before it is done.

    Nothing starts before every Submission is on disk: the supervisor waits for a word on its stdin,
    and leaves if there is none because this process was killed.
    """
    import psutil

    read, write = os.pipe()
    (runs[0].folder / "logs").mkdir(exist_ok=True)
    with open(runs[0].folder / "logs" / "supervisor.log", "a") as output:
        pid = subprocess.Popen(
            [sys.executable, "-m", "launch._supervisor", *(str(r.folder) for r in runs)],
            stdin=read,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=environment(runs[0], os.environ),
        ).pid
    os.close(read)
    with open(write, "wb") as word:
        job_id = f"{socket.gethostname()}:{pid}@{_start(psutil.Process(pid)):.2f}"
        for run in runs:
            number = open_box(run)
            run.submissions.append(Submission(number=number, launcher="local", job_id=job_id, submitted_at=time.time()))
            run.save()
        with suppress(BrokenPipeError):  # the supervisor is gone: `alive` will say so
            word.write(GO)
            word.flush()


def alive(run: Run) -> bool:
    """Whether the supervisor, or a rank that outlived it, has not finished the newest submission."""
    if not run.submissions or (box(run) / "ended").exists():
        return False
    if _host(run) != socket.gethostname():
        last = max(run.submissions[-1].submitted_at, run.heartbeat().get("time", 0.0))
        return time.time() - last < ELSEWHERE_S
    return any(session(run.submissions[-1].job_id))


def cancel(run: Run, *, now: bool = False) -> None:
    """Ask ``run`` to save and leave, and what is queued behind it not to start; with ``now``, kill it.

    Raises:
        LaunchError: the run is not alive, or is on another host.
    """
    if not alive(run):
        raise LaunchError(f"run `{run.name}` is not running", hint=f"`orch status {run.name}` says how it ended")
    if _host(run) != socket.gethostname():
        raise LaunchError(
            f"run `{run.name}` is on `{_host(run)}`, this is `{socket.gethostname()}`", hint="cancel it there"
        )
    write_atomic(box(run) / "cancel", "now" if now else "save")
    members = list(session(run.submissions[-1].job_id))
    supervised = any(p.pid == _parse(run.submissions[-1].job_id)[0] for p in members)
    if now:
        deadline = time.monotonic() + (NOW_S if supervised else 0)
        while alive(run) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if alive(run):
            kill(session(run.submissions[-1].job_id))
    elif not supervised:
        for process in members:  # the supervisor was killed: ask its ranks themselves
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)


def visible_gpus(base: Mapping[str, str]) -> list[int]:
    """Indices of this machine's GPUs that a job may use, by CUDA_VISIBLE_DEVICES and nvidia-smi.

    Raises:
        LaunchError: CUDA_VISIBLE_DEVICES names GPUs by anything but numbers, which submitit cannot pass on.
    """
    chosen = base.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        try:
            return [int(n) for n in chosen.split(",") if n.strip()]
        except ValueError:
            raise LaunchError(
                f"CUDA_VISIBLE_DEVICES is `{chosen}`; the local launcher needs numbers",
                hint="set it to indices such as `0,1`, or unset it",
            ) from None
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [int(n) for n in re.findall(r"^GPU (\d+):", listed, flags=re.MULTILINE)]


def environment(run: Run, base: Mapping[str, str]) -> dict[str, str]:
    """``base``, with the run's own copy of the code before any other, the working folder's included."""
    path = [str(run.folder / "code"), *filter(None, [base.get("PYTHONPATH")])]
    return {name: value for name, value in base.items() if name not in FOREIGN} | {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }


def box(run: Run) -> Path:
    """Folder of the newest submission: submitit's files, ``cancel`` and ``ended``."""
    return run.folder / "submitit" / str(run.submissions[-1].number)


def session(job_id: str) -> Iterator["psutil.Process"]:
    """Processes of the supervisor's session that live, itself included.

    A session keeps its id from being given to a new process, so none of them can be a stranger.
    """
    import psutil

    sid, start = _parse(job_id)
    with suppress(psutil.NoSuchProcess):
        if abs(_start(psutil.Process(sid)) - start) > 1:
            return  # the whole session is gone, and its id was given away
    for pid in sorted(psutil.pids(), key=lambda pid: pid != sid):  # itself first: most ask whether there is one
        with suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getsid(pid) == sid and (process := psutil.Process(pid)).status() != psutil.STATUS_ZOMBIE:
                yield process


def session_mates() -> list["psutil.Process"]:
    """Everything a supervisor, which calls this, has started, in whatever depth."""
    import psutil

    me = psutil.Process()
    return [p for p in session(f":{me.pid}@{_start(me)}") if p.pid != me.pid]


def kill(processes: Iterable["psutil.Process"]) -> None:
    """End ``processes`` without asking, and wait until they are gone."""
    import psutil

    ended = list(processes)
    for process in ended:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(ended, timeout=5)


def _start(process: "psutil.Process") -> float:
    """When ``process`` started, in seconds after boot: setting the clock does not move it."""
    import psutil

    return process.create_time() - psutil.boot_time()


def _host(run: Run) -> str:
    return run.submissions[-1].job_id.rpartition(":")[0]


def _parse(job_id: str) -> tuple[int, float]:
    pid, _, start = job_id.rpartition(":")[2].partition("@")
    return int(pid), float(start)
