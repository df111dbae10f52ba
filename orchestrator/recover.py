"""After an attempt ended: what was it, and what comes next? Pure functions of what was seen, nothing else.

`jobs/runtime/warden.py` looks, at ranks, `srun` and Slurm, and does what is decided here. The kinds of failure, and
that a crash loop is stopped by progress rather than by a number of restarts, follow nvidia-resiliency-ext; that the
first error counts and not its echo on the other ranks is what users of torchrun ask for (pytorch#60910).

    asked to leave           requeue after a preemption, stop after a cancel
    error of a user          stop: the next attempt would end the same way
    hardware, frozen, lost   requeue, away from the node that is to blame; stop when three in a row brought nothing
    an error of no table     requeue once, if steps were trained before it or it is a driver's; the same again: stop
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from orchestrator.watch import Frozen, Patience, named

Kind = Literal["user", "hardware", "unknown", "peer"]

# What a rank raises when its machine is to blame. CUDA's and NCCL's words as in their headers and logs; Xid 48, 79,
# 94 and 95 are how the driver names memory and bus errors (docs.nvidia.com/deploy/xid-errors).
HARDWARE = re.compile(
    r"\bECC\b|\bXid\b|GPU is lost|fallen off the bus|devices? unavailable|hardware stack error|no CUDA-capable device"
    r"|CUDA unknown error|system not yet initialized|NVLink|Bus error"
    r"|Input/output error|Remote I/O error|Stale file handle|Transport endpoint is not connected",
    re.IGNORECASE,
)
# NCCL's word for a network card that fails, and for a peer that has gone; what it says beside it tells which.
NETWORK = re.compile(r"ncclSystemError|unhandled system error", re.IGNORECASE)
# What a rank raises because another one has gone: gloo's, NCCL's and the store's words.
PEER = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|connection (?:was )?(?:closed|lost|aborted)"
    r"|socket (?:closed|timeout)|timed out waiting|wait timeout|collective operation timeout|ncclRemoteError"
    r"|remote process exited|failed to recv|pair closure|heartbeat monitor|communicator was aborted",
    re.IGNORECASE,
)
PEER_TYPES = frozenset({"ConnectionError", "DistNetworkError", "DistStoreError"})
# Python's and torch's own words for a mistake in code, config or data: the next attempt would make it again.
USER_TYPES = frozenset(
    {"OrchError", "ValueError", "TypeError", "LookupError", "AttributeError", "NameError", "AssertionError"}
    | {"ImportError", "ArithmeticError", "NotImplementedError", "RecursionError", "MemoryError"}
    | {"FileNotFoundError", "PermissionError", "OutOfMemoryError"}
)
USER = re.compile(r"device-side assert|no kernel image|invalid device (?:function|ordinal)", re.IGNORECASE)
# Layers below torch, in which a node can be at fault in words that stand in no table.
DRIVER = re.compile(
    r"\b(?:CUDA|HIP) (?:error|driver)|\bcu(?:BLAS|DNN|SOLVER|FFT)_?|\b[NR]CCL\b|\bnccl[A-Z]|\bgloo\b|\bNVML\b"
    r"|InfiniBand|\bib[v_]\w|\bUCX\b",
    re.IGNORECASE,
)
CHANGING = re.compile(r"0x[0-9a-f]+|\d+", re.IGNORECASE)  # addresses, ports, ranks: what differs in the same error
FULL = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)
# srun: `srun: error: node2: task 1: Killed`, the first to go first; then it says that it ends the others.
EXIT = re.compile(r"srun: error: (?P<node>[^\s:]+): tasks? (?P<ranks>[\d,-]+): (?P<how>.+)")
NODE_FAILURE = re.compile(r"srun: error: Node failure on (?P<node>\S+)")
ENDING = re.compile(r"srun: .*(?:Terminating StepId|Job step aborted|forcing job termination)")
VANISHED = ("Killed", "Bus error", "Segmentation fault", "Illegal instruction", "Hangup")


# Looking at what is left


@dataclass(frozen=True, kw_only=True)
class Exit:
    """Ranks that left before `srun` ended the others, in the order they left."""

    ranks: tuple[int, ...]
    node: str
    how: str  # `Killed`, `Exited with exit code 1`


def exits(said: Sequence[str]) -> list[Exit]:
    """Who left by itself, by what ``srun`` said on stderr. What it says once it ends the rest is no news."""
    found: list[Exit] = []
    for line in said:
        if ENDING.search(line):
            break
        if match := EXIT.search(line):
            found.append(Exit(ranks=_numbers(match["ranks"]), node=match["node"], how=match["how"].strip()))
    return found


def failed_nodes(said: Sequence[str]) -> list[str]:
    """Nodes that Slurm gave up, by what ``srun`` said on stderr."""
    return [match["node"] for line in said if (match := NODE_FAILURE.search(line))]


def kind(failure: Mapping[str, Any]) -> Kind:
    """Whose fault an entry of ``failures/`` is, as far as its type and its words tell."""
    types, message = {failure["type"], *failure.get("bases", ())}, str(failure["message"])
    if "OrchError" in types:
        return "user"
    if HARDWARE.search(message):
        return "hardware"
    if types & PEER_TYPES or PEER.search(message):
        return "peer"
    if NETWORK.search(message):
        return "hardware"
    return "user" if types & USER_TYPES or USER.search(message) or FULL.search(message) else "unknown"


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two entries of ``failures/`` are the same error, whichever rank and address it names."""
    first, second = (CHANGING.sub("", f"{f['type']}: {f['message']}".partition("\n")[0]) for f in (one, other))
    return first == second


def by_blame(failures: Sequence[Mapping[str, Any]]) -> list[Any]:
    """``failures`` with those in front that explain the others; among equals the earliest."""
    order: dict[Kind, int] = {"user": 0, "hardware": 0, "unknown": 1, "peer": 2}
    return sorted(failures, key=lambda failure: (order[kind(failure)], failure["time"]))


def memory_hint(failure: Mapping[str, Any], planned_gb: float | None) -> str:
    """For an error of too little memory: what was planned and what was used; else nothing."""
    if failure["type"] not in ("MemoryError", "OutOfMemoryError") and not FULL.search(str(failure["message"])):
        return ""
    peak = failure.get("peak_memory_gb")
    said = [f"{planned_gb:.1f} GB planned"] if planned_gb else []
    said += [f"{peak:.1f} GB measured at its peak"] if peak else []
    return f"memory of a rank: {', '.join(said) or 'unknown'}; lower `micro_batch`, or `recompute`, or shard more"


# Deciding


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that is known of an attempt once its ranks are gone."""

    world: int
    noted: str = ""  # the cause that rank 0 noted
    note: str = ""  # and what it wrote beside it
    told: Literal["", "requeued", "over"] = ""  # Slurm ends the job from outside: to start it again, or for good
    time_is_up: bool = False
    preempting: bool = False  # Slurm has told the job to make room
    frozen: Frozen | None = None
    failures: Sequence[Mapping[str, Any]] = ()
    trained: bool = False  # since it was submitted, the run has ended a step
    before: Sequence[Mapping[str, Any]] = ()  # of each earlier attempt since then, what its first rank to fail raised
    said: Sequence[str] = ()  # srun, line by line, before the warden itself ended anything
    status: int = 0  # srun's
    node_of: Mapping[int, str] = field(default_factory=dict)
    last_words: str = ""  # of the first rank that left without a word in `failures/`
    fruitless: int = 1  # attempts in a row without a new checkpoint, this one included; 0: it brought one
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What an attempt's end was, and what is next."""

    cause: Literal["done", "cancelled", "preempted", "requeued", "error", "hardware", "frozen", "lost"]
    next: Literal["requeue", "stop"]
    note: str
    ranks: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()  # to stay away from


def decide(e: Evidence) -> Decision:
    """What to do after an attempt. A reason is always given."""
    if e.noted == "done":
        return Decision(cause="done", next="stop", note=e.note or "the target step is reached")
    if e.noted == "preempted" or (e.noted == "cancelled" and (e.preempting or e.told == "requeued")):
        return Decision(cause="preempted", next="requeue", note=e.note or "saved when told to make room")
    if e.noted == "cancelled":
        return Decision(cause="cancelled", next="stop", note=e.note or "saved and left when told to")
    failures = by_blame(e.failures)
    if failures and kind(failures[0]) == "user":
        return _error(failures[0])
    if e.told:
        found = _from_outside(e)
    elif e.frozen:
        f = e.frozen
        found = Decision(cause="frozen", next="requeue", note=f.why, ranks=f.ranks, nodes=f.nodes)
    else:
        found = _machine(e, failures)
    # What Slurm requeues itself cannot be stopped here; it is before the next start.
    if found.next == "requeue" and e.told != "requeued" and e.fruitless >= e.patience.attempts:
        note = f"{found.note}; {fruitless_note(e.fruitless)}"
        return Decision(cause=found.cause, next="stop", note=note, ranks=found.ranks, nodes=found.nodes)
    return found


def fruitless_note(attempts: int) -> str:
    """Why a run is stopped that could go on."""
    return f"stopped: {attempts} attempt{'s in a row' * (attempts > 1)} brought no new checkpoint"


def fruitless(attempts: Sequence[Any]) -> int:
    """How many of the newest of one submission's ``attempts`` brought no new checkpoint.

    Those that Slurm or the user ended at once are passed over: that others come first says nothing about this run.
    """
    count = 0
    for attempt in reversed(attempts):
        if attempt.checkpoint_step > attempt.from_step:
            break
        count += attempt.cause not in ("requeued", "cancelled")
    return count


def affordable(excluded: Sequence[str], usable: Iterable[str], needed: int) -> list[str]:
    """The newest of ``excluded``, oldest first: as many as leave ``needed`` of the ``usable`` nodes."""
    up = set(usable)
    return next((list(excluded[i:]) for i in range(len(excluded)) if len(up.difference(excluded[i:])) >= needed), [])


def usable(listed: str, *, reserved: bool) -> set[str]:
    """Nodes that a job may get, now or when others have left, by `sinfo --Node --format=%N|%T`.

    ``reserved``: the job has a reservation, and so the nodes in one.
    """
    states = {"idle", "mixed", "allocated", "completing", "planned"} | ({"reserved"} if reserved else set())
    rows = (word.partition("|") for word in listed.split())
    return {name for name, _, state in rows if state.rstrip("+-~#!%$@^") in states}  # `*`: does not respond


def _error(failure: Mapping[str, Any]) -> Decision:
    rank = int(failure["rank"])
    return Decision(
        cause="error",
        next="stop",
        note=f"rank {rank}: {failure['type']}: {failure['message']}",
        ranks=(rank,),
    )


def _from_outside(e: Evidence) -> Decision:
    """Slurm ended the job; it has decided already, and is only understood."""
    if e.told == "requeued" and (nodes := failed_nodes(e.said)):
        return Decision(cause="lost", next="requeue", note=f"node failure: {', '.join(nodes)}", nodes=tuple(nodes))
    if e.told == "requeued":
        return Decision(cause="requeued", next="requeue", note="Slurm requeued it at once: preempted, or by hand")
    if e.time_is_up:
        return Decision(cause="preempted", next="requeue", note="the time was up before all ranks had saved")
    return Decision(cause="cancelled", next="stop", note="the job was cancelled at once")


def _machine(e: Evidence, failures: Sequence[Mapping[str, Any]]) -> Decision:  # noqa: PLR0911 a table, read from the top
    """The end of an attempt that nobody asked for, and for which no rank named an error of the user."""
    left = exits(e.said)
    full = [x for x in left if x.how.startswith("Out Of Memory")]
    if full or any("oom_kill" in line or "oom-kill" in line for line in e.said):
        ranks = full[0].ranks if full else ()
        who = f"{named(ranks)} on {full[0].node}" if full else "a rank"
        return Decision(
            cause="error",
            next="stop",
            note=f"{who}: killed for using more memory than the job has on a node: ask for more with `mem`",
            ranks=ranks,
        )
    if failures and kind(failures[0]) == "hardware":
        return _blame("hardware", [int(failures[0]["rank"])], f"{failures[0]['type']}: {failures[0]['message']}", e)
    if nodes := failed_nodes(e.said):
        return Decision(cause="lost", next="requeue", note=f"node failure: {', '.join(nodes)}", nodes=tuple(nodes))
    wordless = [x for x in left if not {*x.ranks} & {int(f["rank"]) for f in failures}]
    for x in wordless:
        if x.how.startswith("Terminated"):  # before it had a handler; with one it would have noted the same
            making_room = e.preempting
            return Decision(
                cause="preempted" if making_room else "cancelled",
                next="requeue" if making_room else "stop",
                note=f"{named(x.ranks)} on {x.node}: told to leave before it could save",
                ranks=x.ranks,
            )
        if x.how.startswith(VANISHED):
            perhaps = "; by the kernel, for want of memory? its log on the node says so" * (x.how == "Killed")
            return _blame("lost", x.ranks, f"left without a word: {x.how}{perhaps}", e)
    if failures and kind(failures[0]) == "unknown":
        return _unknown(failures, e)
    if failures:
        first = failures[0]
        note = f"only lost connections were seen, first by rank {first['rank']}: {first['message']}"
        return Decision(cause="lost", next="requeue", note=note)
    for x in wordless:
        if x.how.startswith("Exited") and HARDWARE.search(e.last_words):  # Python could not be read there, say
            return _blame("hardware", x.ranks, e.last_words, e)
        if x.how.startswith("Exited"):
            note = f"{named(x.ranks)} on {x.node}: {x.how.lower()}, before it could say why"
            said = f": {e.last_words}" if e.last_words else ""
            return Decision(cause="error", next="stop", note=note + said, ranks=x.ranks)
    if e.status == 0:
        note = "all ranks left in order, and the target step is not reached"
        return Decision(cause="error", next="stop", note=note)
    return Decision(cause="lost", next="requeue", note=f"srun ended with status {e.status}{_quoted(e.said)}")


def _unknown(failures: Sequence[Mapping[str, Any]], e: Evidence) -> Decision:
    """An error that no table knows: a bug, or a node's fault in words not seen before. A second try tells which.

    Where it begins with the run, it is a bug: a wrong shape is a RuntimeError too. Else the run goes on once, without
    the node that raised it where that is one; the same error again, with no new checkpoint since, stops it.
    """
    first = failures[0]
    ended = _error(first)
    if not (e.trained or DRIVER.search(f"{first['type']}: {first['message']}")):
        return ended
    if e.fruitless and any(same(first, other) for other in e.before):
        return replace(ended, note=f"{ended.note}; as in an attempt before this one")
    nodes = {e.node_of.get(int(f["rank"]), "") for f in failures if kind(f) == "unknown"}
    one = tuple(nodes - {""}) if len(nodes) == 1 and len({*e.node_of.values()}) > 1 else ()
    note = f"{ended.note}; of no kind that is known, so tried again once"
    return replace(ended, next="requeue", note=note, nodes=one)


def _blame(cause: Literal["hardware", "lost"], ranks: Sequence[int], what: str, e: Evidence) -> Decision:
    nodes = tuple(sorted({e.node_of[r] for r in ranks if r in e.node_of}))
    note = f"{named(ranks)} on {', '.join(nodes) or 'an unknown node'}: {what}"
    return Decision(cause=cause, next="requeue", note=note, ranks=tuple(ranks), nodes=nodes)


def _quoted(said: Sequence[str]) -> str:
    last = [line.removeprefix("srun: ").strip() for line in said if line.strip()][-1:]
    return f": {last[0]}" if last else ""


def _numbers(text: str) -> tuple[int, ...]:
    """`0-2,5` as numbers."""
    ends = ([int(n) for n in part.split("-")] for part in text.split(","))
    return tuple(n for first, *last in ends for n in range(first, (last or [first])[0] + 1))
