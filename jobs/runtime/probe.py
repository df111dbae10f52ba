"""What a node of a job says before it starts: one process each, one file each in a folder that all must see.

    python probe.py FOLDER

It only looks; `launch/_slurm_preflight.py` asks with FOLDER/request.json, and judges. Standard library only;
torch is imported by processes of its own, where there are GPUs.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jobs.runtime.slurm import rendezvous

MEET_S = 120.0  # for all nodes to start and to connect to the first
QUIET_S = 30.0  # after which, if nobody came, nobody more is waited for
CALL_S = 10.0  # for one conversation of two nodes
PINGS = 5  # questions for the time; the fastest answer counts (as in NTP, RFC 5905, section 8)
GPU_S = 300.0  # for torch's import, NCCL's start and the measurement
COPY_MB, REDUCE_MB, ROUNDS = 1024, 256, 20


def main(argv: list[str]) -> None:
    """Look, and write down what was seen; or, called by itself, measure one GPU."""
    if argv[0] == "gpu":
        print(json.dumps(gpu(int(argv[2]), int(argv[3]), argv[1])))  # noqa: T201 - for the process that started it
        return
    folder = Path(argv[0])
    report = look(folder, json.loads((folder / "request.json").read_text()))
    temporary = folder / "nodes" / f".{report['node']}"
    temporary.write_text(json.dumps(report))
    temporary.replace(folder / "nodes" / f"{report['node']}.json")


def look(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What this node has, sees and reaches."""
    return {
        "node": os.environ["SLURMD_NODENAME"],
        "first": os.environ["SLURM_NODEID"] == "0",
        "nonce": (folder / "nonce").read_text(),
        "unseen": [path for path in request["paths"] if not Path(path).exists()],
        "python": ".".join(map(str, sys.version_info[:3])),
        "packages": versions(request["packages"]),
        **meet(request["nonce"], int(os.environ["SLURM_JOB_NUM_NODES"])),
        **gpus(request["gpus"]),
    }


def versions(packages: list[str]) -> dict[str, str | None]:
    """The versions that are installed, by their metadata: importing torch takes seconds."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def meet(nonce: str, nodes: int) -> dict[str, Any]:
    """Be at the ranks' own rendezvous: the first node listens there, the others call it and compare clocks."""
    host, port = rendezvous(os.environ)
    try:
        address = socket.gethostbyname(host)
    except OSError as e:
        return {"problem": f"the name `{host}` does not resolve: {e.strerror}"}
    if os.environ["SLURM_NODEID"] != "0":
        return {"address": address, **ask(address, port, nonce)}
    if nodes > 1 and address.startswith("127."):
        return {"address": address, "problem": f"`{host}` is {address} to itself, where no other node can reach it"}
    try:
        return {"address": address, "clock_s": 0.0, "met": answer(address, port, nonce, nodes - 1)}
    except OSError as e:
        return {"address": address, "problem": f"cannot listen at {address}:{port}: {e.strerror}"}


def answer(address: str, port: int, nonce: str, callers: int, wait_s: float = MEET_S) -> int:
    """Tell the time to ``callers`` that know ``nonce``; return how many came before ``wait_s`` or QUIET_S was over."""
    deadline, came = time.monotonic() + wait_s, 0
    with socket.create_server((address, port), backlog=1024) as server:
        while came < callers and (left := deadline - time.monotonic()) > 0:
            server.settimeout(min(left, QUIET_S))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                break
            with connection:
                connection.settimeout(CALL_S)
                try:
                    came += _tell(connection, nonce)
                except OSError:  # it hung up, or never spoke
                    continue
    return came


def _tell(connection: socket.socket, nonce: str) -> bool:
    """Answer each line of one caller; whether it was one of ours, and stayed to the end."""
    with connection.makefile("rw", newline="\n") as lines:
        for _ in range(PINGS):
            if lines.readline(200).strip() != nonce:
                return False
            lines.write(f"{time.time()!r}\n")
            lines.flush()
    return True


def ask(address: str, port: int, nonce: str, wait_s: float = MEET_S) -> dict[str, Any]:
    """Call the first node until it answers; how far its clock is ahead of ours, and the round trip."""
    deadline, problem = time.monotonic() + wait_s, ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((address, port), timeout=CALL_S) as connection:
                with connection.makefile("rw", newline="\n") as lines:
                    trips = [_ping(lines, nonce) for _ in range(PINGS)]
            round_trip_s, clock_s = min(trips)
            return {"clock_s": clock_s, "round_trip_s": round_trip_s}
        except (OSError, ValueError) as e:  # it may not listen yet
            problem = str(e)
        time.sleep(0.2)
    return {"problem": f"cannot reach the first node at {address}:{port} in {wait_s:g} s: {problem}"}


def _ping(lines: Any, nonce: str) -> tuple[float, float]:
    sent = time.time()
    lines.write(nonce + "\n")
    lines.flush()
    theirs, received = float(lines.readline(200)), time.time()
    return received - sent, theirs - (sent + received) / 2


# GPUs


def gpus(wanted: int) -> dict[str, Any]:
    """How many GPUs Slurm gave, how many the driver shows, and where there are any, how fast they are."""
    if not wanted:
        return {}
    given = len([g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as e:
        return {"gpus": given, "driver": f"no answer from `nvidia-smi`: {e}"}
    seen = sum(line.startswith("GPU ") for line in listed.splitlines())
    return {"gpus": given, "driver": seen, **speeds(min(given, seen))}


def speeds(count: int) -> dict[str, Any]:
    """Copy rate of the slowest GPU and all-reduce rate over all of this node, each in a process of its own."""
    if not count:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "jobs.runtime.probe", "gpu", str(Path(folder) / "meet")]
        started = [
            subprocess.Popen([*words, str(i), str(count)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for i in range(count)
        ]
        deadline, said = time.monotonic() + GPU_S, []
        try:
            for process in started:
                out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
                if process.returncode:
                    return {"gpu_problem": (err.strip().splitlines() or [f"status {process.returncode}"])[-1]}
                said.append(json.loads(out.splitlines()[-1]))
        except subprocess.TimeoutExpired:
            return {"gpu_problem": f"the measurement took more than {GPU_S:g} s"}
        finally:
            for process in started:
                process.kill()
                process.communicate()
    return {key: min(s[key] for s in said) for key in ("copy_gb_per_s", "all_reduce_gb_per_s")}


def gpu(index: int, count: int, meeting: str, copy_mb: int = COPY_MB, reduce_mb: int = REDUCE_MB) -> dict[str, float]:
    """Measure one device of ``count``; collective. On a machine without GPUs, its CPU over gloo.

    A copy reads and writes every byte. The all-reduce rate is nccl-tests' bus bandwidth, 2 (n - 1) / n of the bytes
    over the time (doc/PERFORMANCE.md there), which does not depend on n; with one device there is none, and 0 stands.
    """
    import torch
    import torch.distributed as td

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", index) if on_gpu else torch.device("cpu")
    wait = (lambda: torch.cuda.synchronize(device)) if on_gpu else (lambda: None)

    def rate_gb(what: Any, gb: float) -> float:
        for _ in range(3):  # the first ones allocate and connect
            what()
        wait()
        began = time.perf_counter()
        for _ in range(ROUNDS):
            what()
        wait()
        return ROUNDS * gb / (time.perf_counter() - began)

    source = torch.ones(copy_mb * 250_000, device=device)
    target = torch.empty_like(source)
    found = {"copy_gb_per_s": rate_gb(lambda: target.copy_(source), 2 * copy_mb / 1e3), "all_reduce_gb_per_s": 0.0}
    if count > 1:
        if on_gpu:
            torch.cuda.set_device(device)
        td.init_process_group("nccl" if on_gpu else "gloo", f"file://{meeting}", rank=index, world_size=count)
        shared = torch.zeros(reduce_mb * 250_000, device=device)
        bus = 2 * (count - 1) / count * reduce_mb / 1e3
        found["all_reduce_gb_per_s"] = rate_gb(lambda: td.all_reduce(shared), bus)
        td.destroy_process_group()
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
