"""Run a function on several gloo ranks at once.

Ranks are forked from a server process that has imported torch and DeepSpeed already, so a group starts in
a second instead of twenty.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from clock import slowness

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "deepspeed"])


def run_ranks(fn, world, *args, timeout_s=1200, preload=None):
    """``fn(Ranks, *args)`` in ``world`` processes that share a process group; its results by rank.

    ``fn`` stands at the top of a test module. A rank that raises fails the test with its traceback. ``preload``
    names a module that is slow to import: a process between imports it once and forks the ranks.
    """
    if preload is None:
        return _run(_context, fn, world, args, timeout_s)
    queue = _context.SimpleQueue()
    between = _context.Process(target=_between, args=(queue, preload, fn, world, args, timeout_s))
    between.start()
    try:
        return _collect([between], queue, 1, timeout_s + 120)[0]
    finally:
        between.terminate()
        between.join()


def _between(queue, preload, fn, world, args, timeout_s):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that it ends its ranks
    importlib.import_module(preload)
    try:
        queue.put((0, _run(multiprocessing.get_context("fork"), fn, world, args, timeout_s), ""))
    except AssertionError as e:
        queue.put((0, None, str(e)))


def _run(context, fn, world, args, timeout_s):
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        processes = [
            context.Process(target=_rank, args=(fn, r, world, f"{folder}/rendezvous", queue, args), daemon=True)
            for r in range(world)
        ]
        for p in processes:
            p.start()
        try:
            return _collect(processes, queue, world, timeout_s)
        finally:
            for p in processes:
                p.kill()
                p.join()


def _collect(processes, queue, world, timeout_s):
    results, waited = {}, 0.0
    while len(results) < world:
        if not queue.empty():
            rank, value, error = queue.get()
            assert not error, f"rank {rank} of {world}:\n{error}"
            results[rank] = value
            continue
        dead = [r for r, p in enumerate(processes) if not p.is_alive() and r not in results and queue.empty()]
        assert not dead, f"ranks {dead} of {world} died with {[processes[r].exitcode for r in dead]}"
        slow = waited >= timeout_s and waited >= timeout_s * slowness()
        assert not slow, f"ranks {sorted(set(range(world)) - results.keys())} not done in {waited:.0f} s"
        processes[0].join(0.05)
        waited += 0.05
    return [results[r] for r in range(world)]


def _rank(fn, rank, world, rendezvous, queue, args):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["LOCAL_RANK"] = str(rank)
    from jobs.runtime import dist
    from jobs.runtime.job import Ranks

    ranks = Ranks(rank=rank, world=world, local_rank=rank, local_world=world)
    try:
        dist.start(ranks, Path(rendezvous))
        value = fn(ranks, *args)
        dist.barrier()
        queue.put((rank, value, ""))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        os._exit(1)
    dist.close()
