"""Plans on a terminal: where memory and time go as bars, layouts that were found, plans side by side."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.show import duration, err, out, whole

if TYPE_CHECKING:
    from orchestrator.calibrate import Compared
    from orchestrator.plan import Estimate
    from orchestrator.search import Found

BAR = 28  # characters of a whole bar
STEP_WORDS = {
    "rollout_s": "rollout",
    "score_s": "score",
    "compute_s": "arithmetic",
    "recompute_s": "recompute",
    "tensor_s": "tensor ranks",
    "bubble_s": "bubble",
    "pipeline_s": "stage to stage",
    "data_s": "data ranks",
    "optimizer_s": "optimizer",
}


def details(estimates: Sequence[Mapping[str, Any]]) -> None:
    """Below the table of `orch plan`: memory and a step by use, and what interruptions leave."""
    console = out()
    for e in estimates:
        where = f"pipeline stage {e['fullest_stage']}" if not e["phases"] else _fullest_phase(e["phases"])
        console.print(f"\n{e['stage']}: memory of the fullest rank ({where}), {e['gpu_memory_gb']:g} GB")
        parts = {key: gb for key, gb in e["memory_gb"].items() if key != "total"}
        _bars(parts, e["gpu_memory_gb"], "GB")
        console.print(f"{e['stage']}: a step, {duration(e['step_s'])} give or take {e['step_band']:.0%}")
        _bars({STEP_WORDS[key]: seconds for key, seconds in e["step_parts_s"].items()}, e["step_s"], "s")
        for line in _end_to_end(e):
            console.print(line)


def _end_to_end(e: Mapping[str, Any]) -> list[str]:
    jobs = f", {e['submissions']} jobs" if e["submissions"] > 1 else ""
    energy = f", {_amount(e['energy_mwh'])} MWh" if e["energy_mwh"] else ""
    took = duration(e["days_end_to_end"] * 86400)
    size, room = _amount(e["checkpoint_gb"]), _amount(e["storage_tb"] * 1000)
    often = f"best every {e['save_every_optimal_steps']:,} steps"
    read = ", ".join(f"{source} {_amount(times)}" for source, times in e["epochs"].items())
    return [
        *([f"epochs of the data on disk: {read}"] if read else []),
        f"end to end {took}{jobs}{energy}: {e['interruptions']:.2g} interruptions, {e['goodput']:.1%} trains",
        *([f"a checkpoint: {size} GB in {duration(e['save_s'])}, {often}; {room} GB in all"] if e["save_s"] else []),
    ]


def _fullest_phase(phases: Mapping[str, Mapping[str, float]]) -> str:
    """`rollout; score 20.1, update 33.0`: the fullest, and the GB of the others."""
    fullest, *others = sorted(phases, key=lambda phase: -phases[phase]["total"])
    rest = ", ".join(f"{phase} {phases[phase]['total']:.1f}" for phase in others)
    return fullest + (f"; {rest}" if rest else "")


def _amount(x: float) -> str:
    """Three digits, or all of them before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _bars(parts: Mapping[str, float], full: float, unit: str) -> None:
    console, width = out(), max(map(len, parts))
    bar = max(1, min(BAR, console.width - width - len(f"{'':24}{unit}")))
    for name, value in parts.items():
        if value > 0.001 * full:
            filled = round(bar * min(1.0, value / full))
            drawn = "█" * filled + "·" * (bar - filled)
            console.print(f"  {name:<{width}}  {drawn}  {value:8.3g} {unit}  {value / full:4.0%}")


def found(layouts: "Sequence[Found]", current: "Estimate | None", command: str) -> None:
    """The layouts of `orch plan --search`, best first, and the line that asks for the first."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = (
        layouts[0].estimate.stage,
        "nodes",
        "data x pipe x tensor",
        "chunks",
        "ZeRO",
        "micro-batch",
        "recompute",
        "memory",
        "step",
        "MFU",
    )
    for column in (*columns, "time", "GPU-hours", "cost"):
        table.add_column(column, no_wrap=True)
    for i, f in enumerate(layouts, 1):
        e, p = f.estimate, f.parallel
        shape = f"{e.data} x {e.pipeline} x {e.tensor}{' seq' if p.sequence else ''}"
        cost = f"${e.usd:,.0f}" if e.usd else "-"
        table.add_row(
            str(i), str(p.nodes), shape, str(p.interleave), str(p.zero), str(p.micro_batch), p.recompute,
            f"{e.memory_gb['total']:.1f} GB", duration(e.step_s), f"{e.mfu:.1%}", duration(e.days * 86400),
            f"{e.gpu_hours:,.0f}", cost,
        )  # fmt: skip
    whole(table)
    best = layouts[0]
    err().print(_why(best.estimate, current))
    out().print(f"{command} {best.overrides}".rstrip(), soft_wrap=True, markup=False)


def _why(best: "Estimate", current: "Estimate | None") -> str:
    """What the first layout is better at."""
    parts = sorted(best.step_parts_s.items(), key=lambda item: -item[1])[:3]
    said = ", ".join(f"{STEP_WORDS[key]} {seconds / best.step_s:.0%}" for key, seconds in parts)
    text = f"the first spends its step on {said}"
    if current:
        faster = current.step_s / best.step_s
        text += f"; {faster:.2f} times as fast as the config's own layout" if faster > 1.005 else ""
        text += "; the config's own does not fit" if not current.fits else ""
    return text


def side_by_side(plans: "Mapping[str, Sequence[Mapping[str, Any]]]") -> None:
    """`orch plan --what-if`: one column per variant, stage by stage."""
    from rich.table import Table
    from rich.text import Text

    rows = {
        "GPUs": lambda e: f"{e['world']:,}",
        "memory": lambda e: f"{e['memory_gb']['total']:.1f} of {e['gpu_memory_gb']:g} GB" + ("" if e["fits"] else "!"),
        "step": lambda e: duration(e["step_s"]),
        "tokens/s": lambda e: f"{e['tokens_per_s']:,.0f}",
        "MFU": lambda e: f"{e['mfu']:.1%}",
        "time": lambda e: duration(e["days"] * 86400),
        "end to end": lambda e: duration(e["days_end_to_end"] * 86400),
        "GPU-hours": lambda e: f"{e['gpu_hours']:,.1f}",
        "cost": lambda e: f"${e['usd']:,.0f}" if e["usd"] else "-",
    }
    for i, first in enumerate(next(iter(plans.values()))):
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in (first["stage"], *plans):
            table.add_column(Text(column), no_wrap=True)
        for name, text in rows.items():
            table.add_row(name, *(text(estimates[i]) for estimates in plans.values()))
        whole(table)


def compared(run: str, rows: "Sequence[Compared]") -> None:
    """`orch plan --compare`: planned, measured, and their ratio."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (run, "planned", "measured", "measured / planned"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(row.what, f"{row.planned:,.4g} {row.unit}", f"{row.measured:,.4g} {row.unit}", f"{row.ratio:.2f}")
    whole(table)
