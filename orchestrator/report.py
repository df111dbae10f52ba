"""Pictures of a plan: memory per pipeline rank, the pipeline's timeline, time, money and loss over nodes.

As a PNG, or in an HTML page that needs no other file. matplotlib is imported only by what draws.
"""

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.memory import rank_bytes
from orchestrator.plan import Estimate, estimate, in_rows
from orchestrator.run import write_atomic
from orchestrator.scaling import loss
from orchestrator.schedule import total_tokens
from orchestrator.search import search
from orchestrator.show import duration
from orchestrator.spec import Experiment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN_RANKS, DRAWN_MICRO_BATCHES = 16, 24  # more would not be seen
COLORS = (
    "#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2", "#97bbf5", "#9c6b4e", "#3ca951", "#ff8ab7", "#9498a0",
)  # fmt: skip


def write(path: Path, experiment: Experiment, estimates: Sequence[Estimate]) -> None:
    """Write the pictures of ``estimates`` to ``path``: a PNG by its name, else a page of HTML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".png":
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(_png(draw(experiment, *estimates)))
        temporary.replace(path)
        return
    write_atomic(path, page(experiment, estimates))


def page(experiment: Experiment, estimates: Sequence[Estimate]) -> str:
    """The whole page, pictures inside."""
    sections = []
    for e in estimates:
        picture = base64.b64encode(_png(draw(experiment, e))).decode()
        rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in _facts(e).items())
        sections.append(
            f"<h2>{html.escape(e.stage)}</h2><table>{rows}</table>"
            f'<img alt="memory, timeline and nodes of {html.escape(e.stage)}" src="data:image/png;base64,{picture}">'
        )
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "th{text-align:left;font-weight:500;padding-right:2rem}img{max-width:100%;margin:1rem 0}"
    )
    title = html.escape(f"Plan of {experiment.name}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1>{''.join(sections)}</html>\n"
    )


def _facts(e: Estimate) -> dict[str, str]:
    """What stands above the pictures."""
    return {
        "engine": e.engine,
        "parameters": f"{e.params:,}",
        "ranks = data x pipeline x ulysses x tensor": f"{e.world} = {e.data} x {e.pipeline} x {e.ulysses} x {e.tensor}",
        "memory of the fullest rank": f"{e.memory_gb['total']:.1f} of {e.gpu_memory_gb:g} GB",
        "step": f"{duration(e.step_s)} (give or take {e.step_band:.0%})",
        "speed": f"{e.tokens_per_s:,.0f} tokens/s, MFU {e.mfu:.1%}, HFU {e.hfu:.1%}",
        "time": f"{duration(e.days * 86400)}; end to end {duration(e.days_end_to_end * 86400)}",
        "GPU-hours": f"{e.gpu_hours:,.1f}" + (f", ${e.usd:,.0f}" if e.usd else ""),
    }


def draw(experiment: Experiment, *estimates: Estimate) -> "Figure":
    """The pictures of one stage or several, one below the other."""
    from matplotlib.figure import Figure

    counts = [4 if experiment.stages[e.stage].kind == "pretrain" else 3 for e in estimates]
    figure = Figure(figsize=(11, 4.3 * sum(counts)), dpi=100, layout="constrained")
    parts = figure.subfigures(len(estimates), squeeze=False, height_ratios=counts)[:, 0]
    for part, e, count in zip(parts, estimates, counts, strict=True):
        stage = experiment.stages[e.stage]
        points = over_nodes(experiment, e.stage)
        if len(estimates) > 1:
            part.suptitle(e.stage, fontsize="xx-large")
        memory, timeline, nodes, *losses = part.subplots(count)
        _draw_memory(memory, experiment, e)
        if e.phases:
            _draw_phases(timeline, e)
        else:
            _draw_timeline(timeline, experiment, e)
        _draw_nodes(nodes, experiment, e, points)
        if losses:
            _draw_losses(losses[0], total_tokens(stage, experiment.model.seq_len), points)
    return figure


def _png(figure: "Figure") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _draw_memory(axes: Any, experiment: Experiment, e: Estimate) -> None:
    """A bar for each pipeline rank or phase, by use, under the line of what the GPU has."""
    bars = e.phases or _by_rank(experiment, e)
    names = [name for name in dict.fromkeys(name for gb in bars.values() for name in gb) if name != "total"]
    below = [0.0] * len(bars)
    for name, color in zip(names, COLORS, strict=False):
        gb = [parts.get(name, 0.0) for parts in bars.values()]
        axes.bar(list(bars), gb, bottom=below, label=name, color=color)
        below = [b + g for b, g in zip(below, gb, strict=True)]
    axes.axhline(e.gpu_memory_gb, color="black", ls="--", lw=1, label=f"{e.gpu_memory_gb:g} GB")
    what = "phase" if e.phases else "pipeline rank"
    axes.set(xlabel=what, ylabel="GB", title=f"Memory of one rank, by {what}")
    axes.legend(fontsize=8, ncols=4)


def _by_rank(experiment: Experiment, e: Estimate) -> dict[str, dict[str, float]]:
    """GB by use of one rank of each pipeline stage; of some, where there are many."""
    stage, last = experiment.stages[e.stage], e.pipeline - 1
    shown = range(e.pipeline) if last < DRAWN_RANKS else [
        round(i * last / (DRAWN_RANKS - 1)) for i in range(DRAWN_RANKS)
    ]  # fmt: skip
    on_gpu, factor = experiment.cluster.gpu != "cpu", experiment.cluster.memory_factor / 1e9
    parts = {i: rank_bytes(experiment.model, in_rows(stage), i, e.data, e.micro_batches, on_gpu=on_gpu) for i in shown}
    return {str(i): {name: size * factor for name, size in of.items()} for i, of in parts.items()}


def schedule(pipeline: int, micro_batches: int) -> list[list[tuple[float, float, int, bool]]]:
    """1F1B (Narayanan et al. 2021, section 2.2.1): per rank its (start, length, micro-batch, backward), in forward
    passes; a backward pass takes two."""
    order = []
    for rank in range(pipeline):
        warm = min(pipeline - rank - 1, micro_batches)
        steps = [(m, False) for m in range(warm)]
        for m in range(micro_batches - warm):
            steps += [(warm + m, False), (m, True)]
        order.append([*steps, *((m, True) for m in range(micro_batches - warm, micro_batches))])
    done: dict[tuple[int, int, bool], float] = {}
    at, next_of = [0.0] * pipeline, [0] * pipeline
    table: list[list[tuple[float, float, int, bool]]] = [[] for _ in range(pipeline)]
    while any(next_of[r] < len(order[r]) for r in range(pipeline)):
        for rank in range(pipeline):
            while next_of[rank] < len(order[rank]):
                m, backward = order[rank][next_of[rank]]
                before = done.get(_needed(rank, m, backward, pipeline), -1.0) if rank or backward else 0.0
                if before < 0:
                    break
                start = max(at[rank], before)
                length = 2.0 if backward else 1.0
                at[rank] = done[rank, m, backward] = start + length
                table[rank].append((start, length, m, backward))
                next_of[rank] += 1
    return table


def _needed(rank: int, micro_batch: int, backward: bool, pipeline: int) -> tuple[int, int, bool]:
    """What must be done before: the same pass of the neighbour, or on the last rank its own forward pass."""
    if not backward:
        return rank - 1, micro_batch, False
    return (rank + 1, micro_batch, True) if rank < pipeline - 1 else (rank, micro_batch, False)


def _draw_timeline(axes: Any, experiment: Experiment, e: Estimate) -> None:
    """Who computes what when, for the first micro-batches."""
    ranks, batches = min(e.pipeline, DRAWN_RANKS), min(e.micro_batches, DRAWN_MICRO_BATCHES)
    unit = (e.step_parts_s["compute_s"] + e.step_parts_s["tensor_s"] + e.step_parts_s["recompute_s"]) / e.micro_batches
    for rank, steps in enumerate(schedule(ranks, batches)):
        for backward, color in ((False, COLORS[0]), (True, COLORS[1])):
            bars = [(start * unit / 3, length * unit / 3) for start, length, _, b in steps if b == backward]
            axes.broken_barh(bars, (rank - 0.4, 0.8), facecolors=color, edgecolor="white", lw=0.4)
    cut = f", the first {batches} of {e.micro_batches} micro-batches" if batches < e.micro_batches else ""
    chunks = experiment.stages[e.stage].parallel.interleave
    more = f"; with {chunks} chunks a rank the gaps are a {chunks}th" if chunks > 1 else ""
    axes.set_yticks(range(ranks))
    axes.set(xlabel="seconds", ylabel="pipeline rank", title=f"One step, forward and backward{cut}{more}")
    axes.invert_yaxis()


def _draw_phases(axes: Any, e: Estimate) -> None:
    """What an iteration of several models is made of."""
    before = {"rollout": e.step_parts_s["rollout_s"], "score": e.step_parts_s["score_s"]}
    spans = {**before, "update": e.step_s - sum(before.values())}
    start = 0.0
    for (name, seconds), color in zip(spans.items(), COLORS, strict=False):
        axes.barh([name], [seconds], left=start, color=color)
        start += seconds
    axes.set(xlabel="seconds", title="One iteration")
    axes.invert_yaxis()


def _draw_nodes(axes: Any, experiment: Experiment, e: Estimate, points: Sequence[tuple[int, Estimate]]) -> None:
    """Days and GPU-hours of the best layout over numbers of nodes; and the plan's own."""
    nodes = [n for n, _ in points]
    axes.plot(nodes, [x.days for _, x in points], "o-", color=COLORS[0], label="days, best layout")
    axes.plot([experiment.stages[e.stage].parallel.nodes], [e.days], "s", color=COLORS[2], label="days, this plan")
    axes.set(xlabel="nodes", ylabel="days", title="Time and cost over nodes", xscale="log", yscale="log")
    axes.set_xticks(nodes, [f"{n:,}" for n in nodes])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:,.3g}")
    axes.yaxis.set_minor_formatter("{x:,.3g}")
    money = axes.twinx()
    priced = experiment.cluster.usd_per_gpu_hour > 0
    money.plot(nodes, [x.usd if priced else x.gpu_hours for _, x in points], "^:", color=COLORS[1])
    money.set_ylabel("USD (dotted)" if priced else "GPU-hours (dotted)")
    money.set_ylim(bottom=0)
    axes.legend(fontsize=8, loc="lower left")  # where neither line goes


def _draw_losses(axes: Any, tokens: int, points: Sequence[tuple[int, Estimate]]) -> None:
    """The loss that the scaling law promises, as time passes on each number of nodes, and what it costs there."""
    shares = [50 ** (i / 40 - 1) for i in range(41)]  # of the run: from a fiftieth to all
    for (nodes, e), color in zip(points, COLORS, strict=False):
        cost = f"${e.usd:,.0f}" if e.usd else f"{e.gpu_hours:,.0f} GPU-hours"
        losses = [loss(e.params, share * tokens) for share in shares]
        axes.plot([share * e.days for share in shares], losses, color=color, label=f"{nodes:,} nodes: {cost}")
    axes.set(xlabel="days", ylabel="nats per token", xscale="log")
    axes.set_title("Predicted loss over time and cost, by Chinchilla's law: other text and tokenizers shift it")
    axes.legend(fontsize=8)


def over_nodes(experiment: Experiment, name: str) -> list[tuple[int, Estimate]]:
    """The fastest layout on a quarter to four times the nodes, where one fits."""
    from orchestrator.errors import PlanError

    stage, cluster = experiment.stages[name], experiment.cluster
    most = cluster.nodes or 10**9
    counts = sorted({n for k in range(-2, 3) if 1 <= (n := int(stage.parallel.nodes * 2.0**k)) <= most})
    found = []
    for n in counts:
        try:
            best = search(experiment, name, gpus=n * cluster.gpus_per_node, top=1)[0]
        except PlanError:
            continue  # too few nodes, or a batch that so many do not divide
        found.append((n, best.estimate))
    if not found:  # not even the plan's own engine and batch leave a choice
        found.append((stage.parallel.nodes, estimate(experiment, name)))
    return found
