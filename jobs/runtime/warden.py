"""`python -m jobs.runtime.warden RUN -- srun ...`: what a batch script runs around the ranks.

It starts them, watches their signs of life, and once they are gone says what it was and does what is next: leave
with status 0 when the target step was reached (a later stage waits for that by `afterok`), put the job back into
the queue, or leave with 1. What is to be done is decided by `orchestrator.recover`, this only looks and acts. It
also keeps the forwarder to MLflow, which so neither holds up the ranks nor dies with them. Nothing heavy is
imported.

What Slurm does here, seen on 22.05: a requeue, a cancel or a time limit sends SIGTERM to every process of the
batch step, SIGKILL after `KillWait`. ExcNodeList can be changed only while a job is pending, and after `scontrol
requeue` it is, but does not start again before the last process of its batch step, this one, is gone: so excluding
a node then is no race.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from jobs.runtime import beat
from jobs.runtime.commands import AWAY_S, OVER, requeued, seconds, slurm
from jobs.runtime.faults import attempt_name, is_current
from orchestrator import recover, track
from orchestrator.recover import Decision, Evidence
from orchestrator.run import Attempt, Run
from orchestrator.watch import Frozen, Patience, Watch

log = logging.getLogger("warden")

KNOWN_S = 60.0  # for a new run.json to be seen from here; NFS may show the old one as long (acdirmax)
POLL_S = 0.25
STALL_S = 10.0  # longer this process does not stand still by itself
STACKS_S = 3.0  # for the ranks to write where they hang
KILLED_S = 90.0  # for Slurm to kill them; a process that hangs in the kernel may resist
FAREWELL_S = 60.0  # for the forwarder, which gives up by itself 15 s after it has read the last line


class Warden:
    """One start of the job, from before its ranks to after them."""

    def __init__(self, run: Run, patience: Patience) -> None:
        self.run, self.patience = run, patience
        self.job_id = os.environ["SLURM_JOB_ID"]
        self.name = attempt_name(run)
        self.world = int(os.environ["SLURM_JOB_NUM_NODES"]) * int(os.environ["SLURM_NTASKS_PER_NODE"])
        self.told = 0  # times: a job that is preempted hears it when its grace begins, and when it is over
        self.said: list[str] = []  # by srun, line by line
        self._forwarder: track.Forwarder | None = None
        self._began = time.time()
        signal.signal(signal.SIGTERM, self._tell)
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):  # the ranks', who are told themselves
            signal.signal(number, signal.SIG_IGN)

    def _tell(self, *_: object) -> None:
        self.told += 1

    def guard(self, command: Sequence[str]) -> int:
        """Run the ranks by ``command``; return the exit status of the job."""
        self._close_others()
        count = recover.fruitless(self._mine()[:-1])
        if count >= self.patience.attempts:  # Slurm itself may requeue, without asking
            self._save_end(cause="fruitless", next="stop", note=recover.fruitless_note(count))
            return 1
        self._forwarder = track.start_forwarder(self.run)
        try:
            frozen, status = self._run(command)
            if not is_current(self.run, self.name):
                log.warning("a newer attempt has taken over: nothing is done")
                return 1
            decision = recover.decide(self._evidence(frozen, status, wait_s=AWAY_S))
        except Exception as error:  # a disk, a word of Slurm's: many GPUs do not stop for it
            log.exception("the warden failed")
            following: Literal["requeue", "stop"] = "stop" if self.told else "requeue"  # else Slurm has decided
            decision = Decision(cause="lost", next=following, note=f"the warden failed: {error!r}")
        return self._act(decision)

    # Before

    def _mine(self) -> list[Attempt]:
        """The attempts of this submission, oldest first; the last one is this."""
        number = self.name.partition("r")[0]
        there = {a.name: a for a in self.run.attempts() if a.name.partition("r")[0] == number}
        here = there.pop(self.name, None) or Attempt(
            name=self.name,
            job_id=self.job_id,
            world=self.world,
            host=socket.gethostname(),
            started_at=self._began,
        )
        here.nodes = os.environ["SLURM_JOB_NODELIST"]
        return [*there.values(), here]

    def _close_others(self) -> None:
        """Say how earlier attempts ended whose warden could not; their signs of life are removed."""
        by_slurm = {str(s.number) for s in self.run.submissions if s.launcher == "slurm"}
        for attempt in self.run.attempts():
            number = attempt.name.partition("r")[0]
            closed = (self.run.folder / "ends" / f"{attempt.name}.json").exists()
            if attempt.name == self.name or closed or number not in by_slurm:
                continue
            if attempt.next:  # by a draft
                self.run.save_end(attempt)
                continue
            files = [*beat.beats(self.run).glob(f"{attempt.name}-*.json"), self.run.folder / "heartbeat.json"]
            seen = max((f.stat().st_mtime for f in files if f.exists()), default=attempt.started_at)
            if not attempt.cause:
                attempt.cause, attempt.note = "lost", "left no word: its first node died, or all of it at once"
            attempt.ended_at = attempt.ended_at or max(seen, attempt.started_at)
            attempt.next = "requeue" if number == self.name.partition("r")[0] else "stop"
            self.run.save_end(attempt)
        shutil.rmtree(beat.beats(self.run), ignore_errors=True)

    # While the ranks run

    def _run(self, command: Sequence[str]) -> tuple[Frozen | None, int]:
        """Start the ranks and watch them; return who froze, and srun's exit status."""
        env = os.environ | {beat.PERIOD: f"{self.patience.beat_s:g}"}
        srun = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace", env=env)
        reader = threading.Thread(target=self._listen, args=[srun], daemon=True)
        reader.start()
        watch = Watch(self.world, self.patience, now=0.0)
        frozen, look_at, heeded = None, 0.0, 0
        watched, last = 0.0, time.monotonic()  # a clock that stands still when this process does: `scontrol suspend`
        while srun.poll() is None:
            time.sleep(POLL_S)
            now = time.monotonic()
            watched, last = watched + min(now - last, STALL_S), now
            if self.told > heeded:
                heeded = self.told
                with suppress(OSError):  # of the disk; then the next start finds no word
                    self._write_draft()
            if watched >= look_at and not frozen:
                look_at = watched + self.patience.beat_s / 2
                frozen = watch.see(beat.read(self.run, self.name), now=watched)
                if frozen:
                    log.error("%s", frozen.why)
                    self._end_step(srun)
        reader.join(5)
        return frozen, srun.returncode

    def _listen(self, srun: subprocess.Popen[str]) -> None:
        assert srun.stderr
        for line in srun.stderr:
            self.said.append(line.rstrip("\n"))
            log.info("%s", self.said[-1])

    def _write_draft(self) -> None:
        """Note how this attempt seems to end: Slurm may kill this process before the last rank has left."""
        evidence = self._evidence(None, 0)
        if not evidence.told:
            return
        if self._forwarder:
            self._forwarder.kill()  # it does not leave for a signal; what it has not sent, the next one sends
        record, decision = self._mine()[-1], recover.decide(evidence)
        record.cause, record.note, record.ended_at = decision.cause, decision.note, time.time()
        record.next, record.culprits = decision.next, list(decision.nodes)
        self.run.save_end(record, draft=True)
        if evidence.told == "over" and decision.next == "requeue":  # the time is up
            slurm("scontrol", "requeue", self.job_id)

    def _end_step(self, srun: subprocess.Popen[str]) -> None:
        """Let every rank that can write where it is into its log, then end them all."""
        _, listed = slurm("squeue", "--noheader", "--steps", f"--jobs={self.job_id}", "--format=%i")
        steps = [step for step in listed.split() if step.rpartition(".")[2].isdigit()]
        for number in ("QUIT", "KILL"):
            for step in steps:
                slurm("scancel", f"--signal={number}", step)
            with suppress(subprocess.TimeoutExpired):
                srun.wait(STACKS_S if number == "QUIT" else KILLED_S)
        srun.kill()

    # After

    def _evidence(self, frozen: Frozen | None, status: int, wait_s: float = 0.0) -> Evidence:
        record = self._mine()[-1]
        job = self._job(0.0 if record.cause == "done" else wait_s)
        node_of = {sign.rank: sign.node for sign in beat.read(self.run, self.name)}
        left = recover.exits(self.said)
        node_of |= {x.ranks[0]: x.node for x in left if len(x.ranks) == 1 and x.ranks[0] not in node_of}
        over = job["JobState"] in OVER if job else self.told
        limit_s, ran_s = seconds(job.get("TimeLimit", "")), seconds(job.get("RunTime", ""))
        return Evidence(
            world=self.world,
            noted=record.cause,
            note=record.note,
            told="requeued" if requeued(job) else "over" if over else "",
            time_is_up=limit_s is not None and ran_s is not None and ran_s >= limit_s - 2,
            preempting=job.get("PreemptTime", "None") not in ("None", "Unknown"),
            frozen=frozen,
            failures=self.run.failures(self.name),
            trained=self.run.heartbeat().get("attempt", "").partition("r")[0] == self.name.partition("r")[0],
            before=[found[0] for a in self._mine()[:-1] if (found := self.run.failures(a.name))],
            said=tuple(self.said),
            status=status,
            node_of=node_of,
            last_words=self._last_words([rank for x in left for rank in x.ranks]),
            fruitless=recover.fruitless(self._mine()),
            patience=self.patience,
        )

    def _last_words(self, ranks: Sequence[int]) -> str:
        number = self.name.partition("r")[0]
        for rank in ranks:
            for file in (
                self.run.folder / "logs" / f"{self.name}-{rank}.log",
                self.run.folder / "submitit" / number / f"{self.job_id}_{rank}_log.out",
            ):
                with suppress(OSError):
                    said = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
                    said = [line for line in said if not line.startswith(("srun:", "slurmstepd"))]
                    if said:
                        return said[-1].strip()
        return ""

    def _job(self, wait_s: float = 0.0) -> dict[str, str]:
        """What Slurm says of the job, by its own keys; nothing where it does not answer."""
        status, said = slurm("scontrol", "show", "job", self.job_id, wait_s=wait_s)
        pairs = (word.partition("=") for word in said.split()) if status == 0 else ()
        return {key: value for key, _, value in reversed([*pairs])}  # of two, the first

    def _act(self, decision: Decision) -> int:
        """Do what was decided; return the exit status of the job."""
        log.info("%s, %s: %s", decision.cause, decision.next, decision.note)
        note, before = decision.note, self._excluded()
        job = self._job(AWAY_S) if decision.next == "requeue" else {}
        excluded, exclude, said = self._without(before, decision.nodes, job)
        note += said
        end = {"cause": decision.cause, "ranks": list(decision.ranks), "culprits": list(decision.nodes)}
        self._save_end(**end, next=decision.next, note=note, excluded=excluded)
        if decision.next == "stop":
            if self._forwarder:
                with suppress(subprocess.TimeoutExpired):
                    self._forwarder.wait(FAREWELL_S)
            return 0 if decision.cause == "done" else 1

        status, said = (0, "") if requeued(job) else slurm("scontrol", "requeue", self.job_id, wait_s=AWAY_S)
        if status and not requeued(self._job()):
            self._save_end(**end, next="stop", note=f"{note}; not requeued: {said}", excluded=before)
            return 1
        if self._forwarder:
            self._forwarder.kill()
        if excluded != before:
            status, said = slurm("scontrol", "update", f"JobId={self.job_id}", f"ExcNodeList={exclude}")
            if status:
                self._save_end(**end, next="requeue", note=f"{note}; not excluded: {said}", excluded=before)
        return 0

    def _without(
        self, before: list[str], culprits: Sequence[str], job: Mapping[str, str]
    ) -> tuple[list[str], str, str]:
        """Nodes the next start does without, ``before`` among them; all Slurm is to exclude; and what to note of it.

        Where too few nodes would be left, those that were put down to first are taken again.
        """
        wanted = [*before, *(node for node in culprits if node not in before)]
        if not (job and wanted):  # without Slurm's word, those excluded so far are not known
            return before, "", ""
        listed = job.get("ExcNodeList", "(null)").replace("(null)", "")
        names = slurm("scontrol", "show", "hostnames", listed)[1].split() if listed else []  # asks no controller
        others = [node for node in names if node not in before]  # the user's, and a preflight's
        silent, nodes = slurm("sinfo", "--noheader", "--Node", f"--partition={job['Partition']}", "--format=%N|%T")
        up = recover.usable("" if silent else nodes, reserved="SLURM_JOB_RESERVATION" in os.environ).difference(others)
        needed = int(os.environ["SLURM_JOB_NUM_NODES"])
        kept = wanted if silent else recover.affordable(wanted, up, needed)
        again = [node for node in wanted if node not in kept]
        few = f"; not excluded any more: {', '.join(again)}: of {len(up)} nodes that are up, {needed} are needed"
        exclude = ",".join([*others, *kept])
        if not {*kept} <= {*before} and (problem := self._needs(exclude)):
            return before, "", f"; not excluded: {problem}"
        return kept, exclude, few if again else ""

    def _excluded(self) -> list[str]:
        """Nodes that earlier attempts of this submission were put down to."""
        return next((a.excluded for a in reversed(self._mine()[:-1]) if a.excluded), [])

    def _needs(self, nodes: str) -> str:
        """Why the job cannot do without ``nodes``, or nothing: Slurm is asked whether it could run it then."""
        script = next(self.run.folder.glob(f"submitit/{self.name.partition('r')[0]}/*_submission.sh"), None)
        status, said = slurm("sbatch", "--test-only", f"--exclude={nodes}", str(script))
        return "" if status == 0 else f"without {nodes}: {said or 'no answer'}"

    def _save_end(self, **changes: object) -> None:
        record = self._mine()[-1]
        record.ended_at = record.ended_at or time.time()
        for key, value in changes.items():
            setattr(record, key, value)
        self.run.save_end(record)


def _known(folder: Path, job_id: str) -> Run:
    """The run in ``folder``, whose newest submission is this job's.

    Ranks of another job, such as one that was requeued by hand after its run was resumed, would take the name of the
    newer one's attempts, and so pass the fence. Raises SystemExit for it.
    """
    deadline = time.monotonic() + KNOWN_S
    while True:
        run = Run.load(folder)
        newest = run.submissions[-1].job_id if run.submissions else ""
        if newest == job_id:
            return run
        if time.monotonic() >= deadline:
            sys.exit(f"job {job_id} leaves: the run in `{folder}` is job {newest or 'nobody'}'s by now")
        time.sleep(1)


def main(argv: Sequence[str]) -> int:
    """Parse the command line, and guard what it says."""
    split = argv.index("--")
    parser = argparse.ArgumentParser(prog="python -m jobs.runtime.warden", description=__doc__)
    parser.add_argument("folder", type=Path)
    for f in dataclasses.fields(Patience):
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=float, default=f.default)
    given = vars(parser.parse_args(argv[:split]))
    run = _known(given.pop("folder").resolve(), os.environ["SLURM_JOB_ID"])
    (run.folder / "logs").mkdir(exist_ok=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(run.folder / "logs" / "warden.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    return Warden(run, Patience(**given)).guard(argv[split + 1 :])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
