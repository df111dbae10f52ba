"""Wait for what a preflight or a rehearsal finds, and show it. Any shell can: all is in the folder."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import LaunchError
from orchestrator.run import Run, read_json

REHEARSALS = ".rehearsal"  # in the runs folder; below it, run folders of their own
POLL_S = 0.5
LINE_S = 10.0


def folders(runs: Sequence[Run]) -> list[Path]:
    """The newest preflight of ``runs`` and their rehearsals, in the order of the stages."""
    ahead = [folder for run in runs for folder in (run.folder / "preflight").glob("[0-9]*")]
    newest = sorted(ahead, key=lambda f: read_json(f / "request.json")["asked_at"])[-1:]
    rehearsed = [run.folder / "rehearsal" for run in runs if (run.folder / "rehearsal").exists()]
    return [*newest, *rehearsed]


def await_report(folder: Path) -> dict[str, Any]:
    """Follow the job of ``folder`` to its verdict.

    Raises:
        LaunchError: it ended without one.
    """
    from launch import _slurm_queue as queue
    from orchestrator.show import err

    request, told_at, asked_at, over = read_json(folder / "request.json"), 0.0, -math.inf, False
    one = request["what"]
    wanted = request["nodes"] * (request["per_node"] if one == "rank" else 1)
    with err().status("") as line:
        while True:
            if time.monotonic() > asked_at + queue.ASK_EVERY_S:  # before the look, so that none is missed
                over, asked_at = queue.job_state(request["job"]) in {"", *queue.OVER}, time.monotonic()
            if "report.json" in [f.name for f in folder.iterdir()]:  # listed: NFS may remember that there was none
                return dict(read_json(folder / "report.json"))
            if over:
                logs = ", ".join(f"`{p}`" for p in folder.glob("*_log.out")) or f"no log in `{folder}`"
                raise LaunchError(
                    f"job {request['job']}, which looks at the nodes, ended without a verdict",
                    hint=f"does its first node see the runs folder? {logs}",
                )
            came = sum(1 for _ in (folder / f"{one}s").glob("*.json" if one == "node" else "*[0-9]"))
            text = f"{_title(folder)}: {came} of {wanted} {one}s have answered"
            line.update(text)
            if not err().is_terminal and time.monotonic() > told_at + LINE_S:
                told_at = time.monotonic()
                err().print(text)
            time.sleep(POLL_S)


def show(folder: Path, report: dict[str, Any]) -> None:
    """Print a verdict: a line on the whole, and one for each node or rank that is not as it should be."""
    from rich.markup import escape
    from rich.table import Table

    from orchestrator.show import out

    if "ranks" in report:
        sizes = " x ".join(f"{axis} {size}" for axis, size in report["sizes"].items())
        out().print(
            f"{_title(folder)}: {report['ranks']} of {report['world']} ranks on {report['nodes']} nodes, {sizes}; "
            f"they would meet at {report['rendezvous']}; {report['took_s']:.0f} s"
        )
        for problem in report["problems"][:20]:
            out().print(f"  {escape(problem)}")
        return
    nodes = report["nodes"]
    healthy = [report for report in nodes.values() if not report["problems"]]
    out().print(f"{_title(folder)}: {len(healthy)} of {len(nodes)} nodes are well; {report['took_s']:.0f} s")
    for name, value in _common(healthy):
        out().print(f"  {name}: {value}")
    if report["sick"]:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("node", "what is wrong"):
            table.add_column(column, overflow="fold")
        for name in report["sick"]:
            table.add_row(name, escape("; ".join(nodes[name]["problems"])))
        out().print(table)
        if report["passed"]:
            out().print("the stages go without them")
    if report["why"]:
        out().print(f"refused: {escape(report['why'])}")


def _common(healthy: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the healthy nodes have in common, each with its range."""
    if not healthy:
        return []
    packages = ", ".join(f"{name} {version}" for name, version in healthy[0]["packages"].items())
    rows = [("packages", packages)]
    if "gpus" in healthy[0]:
        driver = healthy[0]["driver"]
        rows.append(("GPUs a node", f"{healthy[0]['gpus']}; driver: {driver}"))
    clocks = [abs(report["clock_s"]) for report in healthy if "clock_s" in report]
    rows.append(("clocks", f"within {max(clocks, default=0):.3f} s of the first node's"))
    for key, name in (("copy_gb_per_s", "GPU memory"), ("all_reduce_gb_per_s", "all-reduce on a node")):
        rates = [report[key] for report in healthy if report.get(key)]
        if rates:
            rows.append((name, f"{min(rates):.0f} to {max(rates):.0f} GB/s"))
    return rows


def _title(folder: Path) -> str:
    return f"rehearsal of {folder.parent.name}" if folder.name == "rehearsal" else "preflight"
