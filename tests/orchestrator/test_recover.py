"""What is decided after an attempt, by tables: what was seen, and what has to come of it."""

from dataclasses import dataclass, replace

import pytest

from orchestrator import recover
from orchestrator.recover import Evidence, decide
from orchestrator.watch import Frozen

# As Slurm 22.05.8 said them.
KILLED = (
    "srun: error: node2: task 1: Killed",
    "srun: launch/slurm: _step_signal: Terminating StepId=5.0",
    "srun: error: node1: task 0: Killed",
)
TERMINATED = ("srun: error: node2: task 1: Terminated", *KILLED[1:])
BUS = ("srun: error: node2: task 1: Bus error", *KILLED[1:])
RAISED = ("srun: error: node2: task 1: Exited with exit code 1", *KILLED[1:])
FULL = ("slurmstepd: error: Detected 1 oom_kill event in StepId=5.0.", "srun: error: node2: task 1: Out Of Memory")
NODE_FAILURE = ("srun: error: Node failure on node2", "srun: Job step aborted: Waiting up to 4 seconds", *KILLED[1:])
# As raised: by gloo when a peer was killed, by NCCL and CUDA in their issues' reports.
GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.77.0.3]:41224"
WATCHDOG = "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 600000"
ECC = "CUDA error: uncorrectable ECC error encountered"
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:1970, unhandled system error, NCCL version 2.21.5"
NCCL_PEER = f"{NCCL}\nncclSystemError: Last error:\nsocketProgress: Connection closed by remote peer"
# Of no table: by CUDA, by torch for a shape that does not fit, by a file system.
LAUNCH = "CUDA error: unspecified launch failure\nCompile with `TORCH_USE_CUDA_DSA`"
SHAPE = "mat1 and mat2 shapes cannot be multiplied (8x64 and 32x64)"
SHUT_DOWN = "[Errno 108] Cannot send after transport endpoint shutdown: 'checkpoints/step-0000500'"
CUDA_FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


def failure(rank, kind, message, *, time=1.0, bases=("RuntimeError", "Exception", "BaseException", "object")):
    return {"rank": rank, "time": time, "type": kind, "bases": list(bases), "message": message}


PEER = failure(0, "RuntimeError", GLOO, time=0.5)
SEEN = Evidence(world=2, status=1, node_of={0: "node1", 1: "node2"})
UNKNOWN = failure(1, "OSError", SHUT_DOWN)
TRAINED = replace(SEEN, trained=True, said=RAISED)
FROZEN = Frozen(why="frozen after step 7", ranks=(1,), nodes=("node2",))

TABLE = {
    # what was seen: (cause, next, nodes to leave out, words of the note)
    "done": (replace(SEEN, noted="done", status=0), "done", "stop", (), "target step"),
    "done, and a rank fails on its way out": (replace(SEEN, noted="done", failures=[PEER]), "done", "stop", (), ""),
    "preempted": (replace(SEEN, noted="preempted", status=0), "preempted", "requeue", (), "saved"),
    "cancelled": (replace(SEEN, noted="cancelled", status=0), "cancelled", "stop", (), "saved"),
    "GraceTime sends SIGTERM": (replace(SEEN, noted="cancelled", preempting=True), "preempted", "requeue", (), ""),
    "saved within KillWait": (replace(SEEN, noted="cancelled", told="requeued"), "preempted", "requeue", (), ""),
    "requeued by someone": (replace(SEEN, told="requeued", said=KILLED[1:]), "requeued", "requeue", (), "requeued"),
    "its peer says so": (replace(SEEN, told="requeued", failures=[PEER]), "requeued", "requeue", (), ""),
    "scancel": (replace(SEEN, told="over"), "cancelled", "stop", (), "cancelled at once"),
    "time is up": (replace(SEEN, told="over", time_is_up=True), "preempted", "requeue", (), "before all ranks"),
    "node failure": (replace(SEEN, told="requeued", said=NODE_FAILURE), "lost", "requeue", ("node2",), "node2"),
    "frozen": (replace(SEEN, frozen=FROZEN, said=()), "frozen", "requeue", ("node2",), "step 7"),
    "frozen, by a mistake that was told": (
        replace(SEEN, frozen=FROZEN, failures=[failure(1, "KeyError", "'x'", bases=("LookupError", "Exception"))]),
        "error", "stop", (), "rank 1: KeyError",
    ),
    "user's error": (
        replace(SEEN, failures=[PEER, failure(1, "ValueError", "bad", time=9.0)], said=RAISED),
        "error", "stop", (), "rank 1: ValueError: bad",
    ),
    "CUDA is full": (
        replace(SEEN, failures=[failure(1, "OutOfMemoryError", CUDA_FULL)]), "error", "stop", (), "out of memory",
    ),
    "an OrchError about a connection": (
        replace(SEEN, failures=[failure(0, "DataError", "connection refused", bases=("OrchError", "Exception"))]),
        "error", "stop", (), "DataError",
    ),
    "unknown, at its first step": (
        replace(TRAINED, trained=False, failures=[failure(1, "RuntimeError", SHAPE)]), "error", "stop", (), SHAPE,
    ),
    "unknown, while it trains": (
        replace(TRAINED, failures=[PEER, UNKNOWN]),
        "error", "requeue", ("node2",), "shutdown: 'checkpoints/step-0000500'; of no kind that is known",
    ),
    "unknown, on two nodes": (
        replace(TRAINED, failures=[UNKNOWN, failure(0, "OSError", SHUT_DOWN)]),
        "error", "requeue", (), "tried again once",
    ),
    "unknown, where there is one node": (
        replace(TRAINED, node_of={0: "node1", 1: "node1"}, failures=[UNKNOWN]),
        "error", "requeue", (), "tried again once",
    ),
    "unknown, of the driver, at its first step": (
        replace(TRAINED, trained=False, failures=[failure(1, "AcceleratorError", LAUNCH)]),
        "error", "requeue", ("node2",), "unspecified launch failure",
    ),
    "the same again": (
        replace(
            TRAINED,
            failures=[failure(0, "OSError", SHUT_DOWN.replace("500", "600"))],
            before=[UNKNOWN],
        ),
        "error", "stop", (), "as in an attempt before this one",
    ),
    "the same again, after a new checkpoint": (
        replace(TRAINED, fruitless=0, failures=[UNKNOWN], before=[UNKNOWN]),
        "error", "requeue", ("node2",), "tried again once",
    ),
    "another one": (
        replace(TRAINED, failures=[UNKNOWN], before=[failure(1, "CudaError", LAUNCH)]),
        "error", "requeue", ("node2",), "tried again once",
    ),
    "unknown, for the third time in a row": (
        replace(TRAINED, fruitless=3, failures=[UNKNOWN]),
        "error", "stop", ("node2",), "3 attempts in a row",
    ),
    "a user's error while it trains": (
        replace(TRAINED, failures=[failure(1, "IndexError", "x", bases=("LookupError", "Exception"))]),
        "error", "stop", (), "IndexError",
    ),
    "a user's error, and its unknown echo": (
        replace(TRAINED, failures=[failure(0, "RuntimeError", "aborted"), failure(1, "ValueError", "bad", time=9.0)]),
        "error", "stop", (), "rank 1: ValueError: bad",
    ),
    "an index out of range on a GPU": (
        replace(TRAINED, failures=[failure(1, "AcceleratorError", "CUDA error: device-side assert triggered")]),
        "error", "stop", (), "device-side assert",
    ),
    "unknown, by a rank whose peer was killed": (
        replace(TRAINED, said=KILLED, failures=[failure(0, "RuntimeError", "aborted")]),
        "lost", "requeue", ("node2",), "rank 1 on node2: left without a word: Killed",
    ),
    "unknown, as Slurm ends it": (
        replace(TRAINED, told="over", failures=[UNKNOWN]),
        "cancelled", "stop", (), "cancelled at once",
    ),
    "host is full": (replace(SEEN, said=FULL), "error", "stop", (), "rank 1 on node2: killed for using more memory"),
    "ECC": (replace(SEEN, failures=[PEER, failure(1, "CudaError", ECC)]), "hardware", "requeue", ("node2",), "ECC"),
    "NCCL": (replace(SEEN, failures=[failure(0, "DistBackendError", NCCL)]), "hardware", "requeue", ("node1",), "NCCL"),
    "NCCL's peer has gone": (
        replace(SEEN, failures=[failure(0, "DistBackendError", NCCL_PEER)], said=KILLED),
        "lost", "requeue", ("node2",), "rank 1 on node2",
    ),
    "told before it had a handler": (
        replace(SEEN, said=TERMINATED, failures=[PEER]), "cancelled", "stop", (), "rank 1 on node2: told to leave",
    ),
    "the same, to make room": (replace(SEEN, said=TERMINATED, preempting=True), "preempted", "requeue", (), "told"),
    "disk": (
        replace(SEEN, failures=[failure(1, "OSError", "[Errno 5] Input/output error: 'x'")]),
        "hardware", "requeue", ("node2",), "Input/output",
    ),
    "vanished": (replace(SEEN, said=KILLED, failures=[PEER]), "lost", "requeue", ("node2",), "rank 1 on node2"),
    "bus error": (replace(SEEN, said=BUS), "lost", "requeue", ("node2",), "Bus error"),
    "lost connections alone": (replace(SEEN, failures=[PEER]), "lost", "requeue", (), "only lost connections"),
    "NCCL's watchdog alone": (
        replace(SEEN, failures=[failure(3, "DistBackendError", WATCHDOG)]), "lost", "requeue", (), "rank 3",
    ),
    "no word": (
        replace(SEEN, said=RAISED, last_words="No module named 'torch'"),
        "error", "stop", (), "before it could say why: No module named 'torch'",
    ),
    "no word, but of the disk": (
        replace(SEEN, said=RAISED, last_words="OSError: [Errno 116] Stale file handle: '/runs/e/s/code'"),
        "hardware", "requeue", ("node2",), "rank 1 on node2: OSError",
    ),
    "all left": (replace(SEEN, status=0), "error", "stop", (), "the target step is not reached"),
    "srun could not start": (
        replace(SEEN, said=("srun: error: Unable to create step: Invalid node",)),
        "lost", "requeue", (), "Unable to create step",
    ),
    "third in a row": (replace(SEEN, said=KILLED, fruitless=3), "lost", "stop", ("node2",), "3 attempts in a row"),
    "third, but preempted": (replace(SEEN, noted="preempted", fruitless=3), "preempted", "requeue", (), ""),
    "third that takes too long": (
        replace(SEEN, told="over", time_is_up=True, fruitless=3), "preempted", "stop", (), "3 attempts in a row",
    ),
    "second in a row": (replace(SEEN, said=KILLED, fruitless=2), "lost", "requeue", ("node2",), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", list(TABLE))
def test_decisions(name):
    evidence, cause, following, nodes, words = TABLE[name]
    made = decide(evidence)
    assert (made.cause, made.next, made.nodes) == (cause, following, nodes), made.note
    assert words in made.note and made.note, "a reason is always given"


@dataclass
class Attempt:
    cause: str
    from_step: int
    checkpoint_step: int


@pytest.mark.parametrize(
    ("attempts", "count"),
    [
        ([], 0),
        ([("lost", 0, 0)] * 3, 3),
        ([("lost", 0, 0), ("lost", 0, 9), ("", 9, 9), ("frozen", 9, 9)], 2),
        ([("lost", 9, 9), ("cancelled", 9, 9), ("requeued", 9, 9), ("lost", 9, 9)], 2),  # to make room is no sign
        ([("lost", 9, 9), ("preempted", 9, 12)], 0),
        ([("preempted", 9, 9), ("preempted", 9, 9)], 2),  # the time is always up before it has saved
    ],
)
def test_attempts_in_a_row_without_a_checkpoint(attempts, count):
    assert recover.fruitless([Attempt(*a) for a in attempts]) == count


@pytest.mark.parametrize(
    ("excluded", "needed", "kept"),
    [
        (["n1"], 3, ["n1"]),
        (["n1", "n2"], 3, ["n2"]),  # the newest has failed last
        (["n1", "n2", "n9"], 3, ["n2", "n9"]),  # n9 is down anyway
        (["n1", "n2"], 4, []),
        (["n1", "n2"], 5, []),  # too few are up whatever is excluded
        ([], 3, []),
    ],
)
def test_nodes_that_a_job_can_do_without(excluded, needed, kept):
    assert recover.affordable(excluded, ["n1", "n2", "n3", "n4"], needed) == kept


def test_nodes_that_a_job_may_get():
    listed = "n1|idle n2|mixed- n3|down* n4|allocated+ n5|idle* n6|drained n7|reserved"
    assert recover.usable(listed, reserved=False) == {"n1", "n2", "n4"}
    assert recover.usable(listed, reserved=True) == {"n1", "n2", "n4", "n7"}
    assert recover.usable("sinfo: error: n1|idle is all that was heard", reserved=False) == {"n1"}


def test_ranks_of_an_exit():
    (left,) = recover.exits(["srun: error: node[1-2]: tasks 0-2,5: Exited with exit code 3"])
    assert (left.ranks, left.node, left.how) == ((0, 1, 2, 5), "node[1-2]", "Exited with exit code 3")


def test_memory_planned_beside_memory_used():
    found = failure(0, "OutOfMemoryError", CUDA_FULL) | {"peak_memory_gb": 79.2}
    assert "61.5 GB planned, 79.2 GB measured" in recover.memory_hint(found, 61.5)
    assert recover.memory_hint(PEER, 61.5) == ""
