"""`orch status` and `orch logs -f` against a real Slurm: why jobs wait, requeues, and daemons that do not answer.

The jobs sleep; the run folders are made here, with the project's own classes and the ids of those jobs.
"""

import json
import re
import threading
import time
from contextlib import contextmanager

import pytest
from clock import slowness, wait
from slurm_cluster import NODES, ORCH
from tracked import make_chain

from orchestrator.run import Attempt, Run, Submission

pytestmark = pytest.mark.slurm


class Place:
    """A runs folder on the cluster, and the jobs of its runs."""

    def __init__(self, cluster, root):
        self.cluster, self.root, self.jobs = cluster, root, []

    def queue(self, name, *options, command="sleep 600"):
        """A run `<name>/pretrain` whose job sleeps."""
        run = make_chain(self.root, name=name)[0]
        words = ["--parsable", f"--job-name={run.name}", "--output=/dev/null", "--time=30", "--mem=1G", *options]
        job_id = self.cluster("sbatch", *words, f"--wrap={command}").strip()
        self.jobs.append(job_id)
        run.submissions = [Submission(number=1, launcher="slurm", job_id=job_id, submitted_at=time.time())]
        run.save()
        return run

    def orch(self, *words, ok=0):
        return self.cluster(ORCH, "--runs", self.root, *words, ok=ok)

    def rows(self):
        rows = json.loads(self.orch("status", "--json"))
        return {row["run"].partition("/")[0]: row for row in rows if row["run"].endswith("/pretrain")}

    def pid(self, daemon):
        return self.cluster("pidof", daemon).split()[0]

    @contextmanager
    def stopped(self, daemon):
        """``daemon`` takes connections and says nothing."""
        pid = self.pid(daemon)
        self.cluster("kill", "-STOP", pid)
        try:
            yield
        finally:
            self.cluster("kill", "-CONT", pid)


@pytest.fixture
def place(cluster, request):
    made = Place(cluster, cluster.folder / request.node.name)
    try:
        yield made
    finally:
        if made.jobs:
            cluster("scancel", *made.jobs)
            wait(
                lambda: (
                    not cluster("squeue", "--noheader", f"--jobs={','.join(made.jobs)}", "--states=PD,R,CG").strip()
                ),
                "the end of the jobs",
            )


def began(place, run, name):
    """Write the attempt as rank 0 would, once its job runs."""
    wait(lambda: place.cluster.job(run) == "RUNNING", f"the start of {run.name}", 300)
    attempt = Attempt(name=name, job_id=run.submissions[-1].job_id, world=2, host="node1", started_at=time.time())
    run.save_attempt(attempt)
    (run.folder / "logs").mkdir(exist_ok=True)
    (run.folder / "logs" / f"{name}-0.log").write_text(f"hello from {name}\n")
    return attempt


def test_why_jobs_wait_and_when_they_may_start(place):
    place.queue("held", "--hold")
    later = place.queue("later", "--begin=now+3600")
    running = place.queue("running")
    wait(lambda: place.cluster.job(running) == "RUNNING", "the start")
    assert re.search(r"^running/pretrain +running .* starting$", place.orch("status"), re.MULTILINE)
    began(place, running, "1")
    place.queue("wide", f"--nodes={NODES}", "--exclusive")
    place.queue("behind", f"--dependency=afterok:{running.submissions[-1].job_id}")
    place.jobs.append(place.cluster("sbatch", "--parsable", "--job-name=a|b|c", "--hold", "--wrap=true").strip())
    wait(lambda: "None" not in place.cluster("squeue", "--noheader", "--states=PENDING", "--format=%r"), "the reasons")
    rows = place.rows()
    assert {name: row["state"] for name, row in rows.items()} == {
        "held": "queued", "later": "queued", "running": "running", "wide": "queued", "behind": "queued"
    }  # fmt: skip
    assert (rows["held"]["reason"], rows["later"]["reason"]) == ("JobHeldUser", "BeginTime")
    assert (rows["behind"]["reason"], rows["behind"]["why"]) == ("Dependency", "the stage before it is not done")
    assert rows["wide"]["reason"] in ("Resources", "Priority") and rows["wide"]["why"]
    assert abs(rows["later"]["starts_at"] - later.submissions[-1].submitted_at - 3600) < 60
    assert rows["running"]["nodes"] == place.cluster.job(running, "%N") != ""
    assert all(row["sure"] for row in rows.values())
    told = place.orch("status")
    assert re.search(
        r"^later/pretrain +queued .*may not start yet \(BeginTime\), starts in about [56]\d.* min", told, re.MULTILINE
    )


def test_requeued_cancelled_and_followed(place):
    """A job that waits for its next start is queued; its log is followed across; accounting says how both ended."""
    run = place.queue("requeued")
    began(place, run, "1")
    said = []
    follower = threading.Thread(target=lambda: said.append(place.orch("logs", "-f", "requeued/pretrain")))
    follower.start()
    place.cluster("scontrol", "requeue", run.submissions[-1].job_id)
    place.cluster("scontrol", "hold", run.submissions[-1].job_id)  # so that there is time to look
    wait(lambda: place.cluster.job(run) == "PENDING", "the requeue")
    row = place.rows()["requeued"]
    assert (row["state"], row["attempts"], row["scheduler_state"]) == ("queued", 1, "PENDING")
    assert f"job {row['job_id']} PENDING" in place.orch("status", "requeued/pretrain")
    place.cluster("scontrol", "release", run.submissions[-1].job_id)
    began(place, run, "1r1")
    assert place.rows()["requeued"]["state"] == "running"
    assert "was killed" in place.orch("cancel", "requeued/pretrain", "--now")
    follower.join(60 * slowness())
    assert "hello from 1\n" in said[0] and "hello from 1r1\n" in said[0]

    def ends():
        (row,) = json.loads(place.orch("status", "requeued/pretrain", "--json"))
        return [e["cause"] for e in row["logbook"]]

    whole = ["requeued before it could save (REQUEUED)", "ended by scancel (CANCELLED)"]
    wait(lambda: ends() == whole, f"accounting, which lags, to say {whole}", 300)
    page = place.orch("status", "requeued/pretrain", "--markdown")
    assert page.startswith("## Logbook of requeued/pretrain") and whole[1] in page
    with place.stopped("slurmdbd"):
        assert ends() == ["killed without a word"] * 2


def test_a_controller_that_does_not_answer_is_said_and_the_folders_are_shown(place):
    run = place.queue("orphan")
    began(place, run, "1")
    with place.stopped("slurmctld"):
        told = place.orch("status")
        assert "this is what the run folders say: `squeue` did not answer within 10 s" in told
        assert re.search(r"^orphan/pretrain +running\? ", told, re.MULTILINE)
        assert len(re.findall("^this is", told, re.MULTILINE)) == 1
    assert wait(lambda: place.rows()["orphan"]["sure"], "an answer")
    assert Run.load(run.folder).submissions == run.submissions
