"""The logbook: what attempts lost and the goodput, against sums done by hand and against an unbroken run."""

import json
import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tracked import make_chain

from orchestrator import logbook, track
from orchestrator.logbook import Ended
from orchestrator.run import Attempt, write_json

STEP_S = 2.0


def attempt(name, started_at, *, world=4, **more):
    return Attempt(name=name, job_id="7", world=world, host="node1", started_at=started_at, **more)


def lines(name, first, last, at):
    """Steps ``first`` to ``last`` of an attempt, the first of them written at ``at``."""
    steps = range(first, last + 1)
    return [
        {"step": s, "time": at + STEP_S * (s - first), "attempt": name, "tokens": 8 * s, "perf/step_s": STEP_S}
        for s in steps
    ]


def made(attempts, written, *, running=False, now=0.0, **more):
    return logbook.logbook(attempts, written, submitted={"1": 990.0, "2": 5000.0}, running=running, now=now, **more)


def test_of_an_unbroken_run():
    """40 s held by 4 ranks: 8 s to the first step, 10 steps of 2 s, the rest is saving."""
    book = made(
        [attempt("1", 1000.0, to_step=10, checkpoint_step=10, cause="done", ended_at=1040.0)], lines("1", 1, 10, 1010)
    )
    (entry,) = book.entries
    assert (entry.waited_s, entry.held_s, entry.start_s, entry.useful_s, entry.lost_s) == (10, 40, 8, 20, 0)
    assert (entry.steps_lost, entry.cause, entry.nodes) == (0, "done", "node1")
    assert book.goodput == 0.5
    assert (entry.gpu_hours, entry.gpu_hours_lost) == (pytest.approx(160 / 3600), pytest.approx(80 / 3600))


KILLED = attempt("1", 1000.0, checkpoint_step=5)
KILLED_LINES = lines("1", 1, 7, 1010)  # to 1022


def test_what_a_killed_attempt_trained_beyond_its_checkpoint_is_lost():
    again = attempt("1r1", 1100.0, from_step=5, to_step=10, checkpoint_step=10, cause="done", ended_at=1130.0)
    book = made([KILLED, again], KILLED_LINES + lines("1r1", 6, 10, 1110))
    first, second = book.entries
    assert (first.steps_lost, first.lost_s, first.useful_s, first.to_step) == (2, 4, 10, 7)
    assert (first.held_s, second.waited_s) == (22, 78)  # its last sign of life is its last line
    assert first.cause == "killed without a word"
    assert (second.steps_lost, second.useful_s) == (0, 10)
    assert book.goodput == pytest.approx(20 / (22 + 30))


def test_steps_before_a_batch_that_was_passed_over_count_once():
    """Step 8 was not finite: from the checkpoint of step 5 again, without its samples."""
    one = attempt("1", 1000.0, to_step=10, checkpoint_step=10, cause="done", ended_at=1040.0, passed_over=[(56, 64)])
    (entry,) = made([one], lines("1", 1, 7, 1010) + lines("1", 6, 10, 1026)).entries
    assert (entry.steps_lost, entry.lost_s, entry.useful_s, entry.to_step) == (2, 4, 20, 10)
    assert entry.cause == "done: not finite and passed over: samples 56 to 64"


@pytest.mark.parametrize(
    ("attempts", "written", "running", "lost"),
    [
        ([KILLED], KILLED_LINES, False, [2]),  # nobody has trained them again yet
        ([KILLED], KILLED_LINES, True, [0]),  # they may be saved yet
        ([KILLED, attempt("1r1", 1100.0)], KILLED_LINES, True, [2, 0]),  # it has not come to a step
        # The checkpoint of step 5 was damaged: the one before was used.
        ([KILLED, attempt("1r1", 1100.0)], KILLED_LINES + lines("1r1", 4, 4, 1110), True, [4, 0]),
        # A start that died before its first step decides nothing.
        (
            [KILLED, attempt("1r1", 1100.0), attempt("1r2", 1200.0)],
            KILLED_LINES + lines("1r2", 6, 9, 1210),
            True,
            [2, 0, 0],
        ),
    ],
)
def test_steps_lost(attempts, written, running, lost):
    assert [e.steps_lost for e in made(attempts, written, running=running, now=1300.0).entries] == lost


@given(st.data())
def test_what_counts_is_an_unbroken_run_however_often_it_was_killed(data):
    """Killed anywhere, resumed from its newest checkpoint: useful time is that of each step once."""
    steps, every = data.draw(st.integers(1, 40), "steps"), data.draw(st.integers(1, 9), "save_every")
    attempts, written, saved, now = [], [], 0, 1000.0
    for n in range(data.draw(st.integers(0, 6), "kills")):
        reached = data.draw(st.integers(saved, steps), "reached")
        name = f"1r{n}" if n else "1"
        new = lines(name, saved + 1, reached, now + 5)
        kept = max([saved, *(s for s in range(saved + 1, reached + 1) if s % every == 0)])
        attempts.append(attempt(name, now, from_step=saved, checkpoint_step=kept))
        written, saved, now = written + new, kept, now + 500
    attempts.append(attempt("2", now, from_step=saved, checkpoint_step=steps, cause="done", ended_at=now + 400))
    written += lines("2", saved + 1, steps, now + 5)
    book = made(attempts, written)
    assert sum(e.useful_s for e in book.entries) == pytest.approx(steps * STEP_S)
    assert sum(e.useful_s + e.lost_s for e in book.entries) == pytest.approx(len(written) * STEP_S)
    assert sum(e.steps_lost for e in book.entries) == len(written) - steps
    assert all(e.start_s + e.useful_s + e.lost_s <= e.held_s + 1e-9 for e in book.entries)


def test_waiting_counts_from_submission_or_requeue_not_between_submissions():
    first = attempt("1", 1000.0, cause="preempted", ended_at=1050.0)
    requeued = attempt("1r1", 1080.0, cause="cancelled", ended_at=1100.0)
    resumed = attempt("2", 5007.0)
    book = made([first, requeued, resumed], [], running=True, now=5100.0)
    assert [e.waited_s for e in book.entries] == [10, 30, 7]
    assert [e.cause for e in book.entries] == ["told to make room", "cancelled", "running"]
    assert [e.held_s for e in book.entries] == [50, 20, 93]


def test_a_stage_without_steps_has_no_goodput():
    done = attempt("1", 1000.0, world=1, cause="done", ended_at=1010.0)
    book = made([done], [{"step": 1, "time": 1009.0, "attempt": "1", "tokens": 5, "prepare/train_tokens": 5}])
    assert book.goodput is None and book.entries[0].steps_lost == 0
    assert logbook.summary(book) == "0.00278 GPU-hours; waited 10 s to start"


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (attempt("1", 0.0, cause="error", note="rank 0 said"), "error: rank 1: DataError"),
        (attempt("1", 0.0, cause="hardware", note="Xid 79 on node3"), "hardware: Xid 79 on node3"),
        (attempt("1", 0.0), "node failed (NODE_FAIL)"),
        (attempt("1", 0.0, cause="preempted"), "told to make room"),  # its own word counts more than the scheduler's
    ],
)
def test_causes_in_words(ended, said):
    known = {"1": Ended(state="NODE_FAIL", at=60.0, nodes="node[1-2]")}
    (entry,) = made([ended], [], failures={"1": "rank 1: DataError"}, ended=known).entries
    assert entry.cause == said


def test_the_scheduler_says_how_long_a_lost_node_was_held():
    known = {"1": Ended(state="NODE_FAIL", at=1300.0, nodes="node[1-2]")}
    (entry,) = made([KILLED], KILLED_LINES, ended=known).entries
    assert (entry.held_s, entry.nodes) == (300, "node[1-2]")


def test_the_page():
    book = made(
        [KILLED, attempt("1r1", 1100.0, from_step=5, cause="error", note="a | b\nmore", ended_at=1100.0)], KILLED_LINES
    )
    page = logbook.markdown("demo/pretrain", book).splitlines()
    assert page[0] == "## Logbook of demo/pretrain"
    assert page[2].startswith(
        "goodput 45.5%: 0.0111 of 0.0244 GPU-hours went into steps that count, 0.00444 into 2 steps"
    )
    head, rule, first, second = (line.replace(r"\|", "/").strip("| ").split(" | ") for line in page[4:])
    assert len(head) == len(rule) == len(first) == len(second)
    assert (first[0], first[-1], second[-1]) == ("1", "killed without a word", "error: a / b")
    newest = logbook.markdown("demo/pretrain", book, newest=1)
    assert "| 1r1 |" in newest and "| 1 |" not in newest and "and 1 attempts before these" in newest


def test_from_a_folder(tmp_path):
    run = make_chain(tmp_path)[0]
    run.submissions[0].submitted_at = 990.0
    run.save_attempt(attempt("1", 1000.0, world=2, cause="error", note="x", ended_at=1040.0))
    (run.folder / "failures").mkdir()
    for rank, at in ((0, 1039.0), (1, 1038.0)):
        failure = {"rank": rank, "time": at, "type": "ValueError", "message": "m", "hint": "", "traceback": ""}
        write_json(run.folder / "failures" / f"1-{rank}.json", failure)
    write_json(run.folder / "heartbeat.json", {"attempt": "1", "step": 1, "steps": 9, "tokens": 8, "time": 1012.0})
    (entry,) = logbook.of(run, running=False).entries
    assert entry.cause.startswith("error: rank 1: ValueError")
    assert (entry.waited_s, entry.held_s) == (10, 40)


def test_mlflow_has_the_logbook_and_one_goodput_per_end(tmp_path):
    """Sent once however often it is synced; a description that a person wrote stays."""
    run = make_chain(tmp_path)[0]
    database, metrics = tmp_path / "mlflow.db", run.folder / "metrics.jsonl"

    def end(name, began, first, last, cause):
        with metrics.open("a") as f:
            f.writelines(json.dumps(line) + "\n" for line in lines(name, first, last, began + 5))
        run.save_attempt(attempt(name, began, to_step=last, checkpoint_step=last, cause=cause, ended_at=began + 40))

    def known():
        run_id = json.loads((run.folder / "tracking.json").read_text())["run_id"]
        with sqlite3.connect(database) as db:
            points = db.execute("select step, value from metrics where key = 'perf/goodput' order by step").fetchall()
            (note,) = db.execute("select value from tags where key = 'mlflow.note.content'").fetchone()
        return points, note, next((tmp_path / "mlartifacts").rglob(f"{run_id}/artifacts/logbook.md")).read_text()

    end("1", 1000.0, 1, 10, "preempted")
    track.sync(run)
    track.sync(run)
    points, note, page = known()
    assert points == [(10, 0.5)]
    assert note == page and note.startswith("## Logbook of demo/pretrain") and "told to make room" in note
    with sqlite3.connect(database) as db:
        db.execute("update tags set value = 'my words' where key = 'mlflow.note.content'")
    end("1r1", 2000.0, 11, 12, "done")
    track.sync(run)
    points, note, page = known()
    assert points == [(10, 0.5), (12, pytest.approx(24 / 80))]
    assert note == "my words" and "| 1r1 |" in page
