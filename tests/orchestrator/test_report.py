"""Pictures and comparisons: what they show is what the plan and the run say."""

import base64
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.calibrate import calibrated, compare, write_cluster
from orchestrator.cli import cli
from orchestrator.compose import compose, copy_presets
from orchestrator.errors import LaunchError
from orchestrator.memory import rank_bytes
from orchestrator.plan import estimate, layout, plan
from orchestrator.report import draw, over_nodes, page, schedule, write
from orchestrator.run import Run
from orchestrator.scaling import loss
from orchestrator.schedule import batches

SMALL = ["stages.pretrain.parallel.nodes=1", "stages.pretrain.steps=40000"]


@pytest.mark.parametrize(("pipeline", "micro_batches"), [(1, 3), (4, 8), (4, 2), (8, 24)])
def test_the_timeline_is_1f1b(pipeline: int, micro_batches: int) -> None:
    table = schedule(pipeline, micro_batches)
    for steps in table:
        assert sorted((m, b) for _, _, m, b in steps) == [(m, b) for m in range(micro_batches) for b in (False, True)]
        ends = [start + length for start, length, _, _ in steps]
        assert all(end <= start for end, (start, *_) in zip(ends, steps[1:], strict=False))
    whole = max(start + length for start, length, _, _ in table[0])
    assert whole == 3 * (
        micro_batches + pipeline - 1
    )  # Narayanan et al. 2021, section 2.2.1: t_id = (p - 1)(t_f + t_b)


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    e = compose("gpt3-125m", SMALL).experiment
    write(tmp_path / "plan.html", e, plan(e))
    text = (tmp_path / "plan.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    HTMLParser().feed(text)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(pictures) == 1
    assert base64.b64decode(pictures[0]).startswith(b"\x89PNG")
    assert f"{e.model.params:,}" in text
    assert page(e, []).count("<img") == 0
    write(tmp_path / "new" / "plan.png", e, plan(e))
    assert (tmp_path / "new" / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(f.name for f in tmp_path.rglob("*.*")) == ["plan.html", "plan.png"]


def test_one_picture_shows_every_stage() -> None:
    e = compose("configs/chatgpt-demo.yaml", []).experiment
    estimates = [p for p in plan(e) if p.stage in ("pretrain", "ppo")]
    first, second = draw(e, *estimates).subfigs
    assert [first.get_suptitle(), second.get_suptitle()] == ["pretrain", "ppo"]
    assert first.axes[1].get_title() == "One step, forward and backward"
    assert second.axes[1].get_title() == "One iteration"


def test_bars_are_as_high_as_the_memory() -> None:
    e = compose("gpt3-125m", [*SMALL, "stages.pretrain.parallel.pipeline=2"]).experiment
    (planned,) = plan(e)
    memory, timeline, nodes = draw(e, planned).axes[:3]
    tops = [max(p.get_y() + p.get_height() for p in memory.patches if abs(p.get_x() - x) < 0.5) for x in (-0.4, 0.6)]
    assert max(tops) == pytest.approx(planned.memory_gb["total"])
    assert len(timeline.collections) == 2 * 2
    assert [list(line.get_xdata()) for line in nodes.lines][1] == [1]


def test_phases_stand_beside_each_other() -> None:
    e = compose("instructgpt-1.3b").experiment
    (planned,) = plan(e, ["ppo"])
    memory, iteration = draw(e, planned).axes[:2]
    tops = {
        phase: max(p.get_y() + p.get_height() for p in memory.patches if abs(p.get_x() + 0.4 - i) < 0.1)
        for i, phase in enumerate(planned.phases)
    }
    assert tops == pytest.approx({phase: gb["total"] for phase, gb in planned.phases.items()})
    spans = {p.get_x(): p.get_width() for p in iteration.patches}
    assert sum(spans.values()) == pytest.approx(planned.step_s)
    assert list(spans)[1] == pytest.approx(planned.step_parts_s["rollout_s"])


def test_losses_fall_to_what_the_law_says() -> None:
    e = compose("gpt3-13b").experiment
    (planned,) = plan(e)
    lines = draw(e, planned).axes[3].lines
    points = over_nodes(e, "pretrain")
    assert len(lines) == len(points)
    for line, (nodes, best) in zip(lines, points, strict=True):
        assert line.get_label() == f"{nodes:,} nodes: ${best.usd:,.0f}"
        assert line.get_xdata()[-1] == pytest.approx(best.days)
        assert line.get_ydata()[-1] == pytest.approx(loss(e.model.params, 300e9), rel=1e-3)
        assert list(line.get_ydata()) == sorted(line.get_ydata(), reverse=True)


def test_more_nodes_take_less_time() -> None:
    points = over_nodes(compose("gpt3-13b").experiment, "pretrain")
    days = [e.days for _, e in points]
    assert len(points) >= 3
    assert days == sorted(days, reverse=True)


def trained(folder: Path, step_s: float, memory_gb: float, overrides: Sequence[str] = ()) -> Run:
    """A run folder as a job leaves it: spec and metrics, the first steps slow."""
    from omegaconf import OmegaConf

    e = compose("demo", ["stages.pretrain.steps=20", *overrides]).experiment
    run = Run(folder=folder / e.name / "pretrain", experiment=e.name, stage="pretrain", index=1, key="k")
    run.folder.mkdir(parents=True)
    run.save()
    (run.folder / "spec.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(e)))
    tokens = e.stages["pretrain"].global_batch * e.model.seq_len
    lines = []
    for step in range(1, 11):
        took = step_s * (5 if step <= 2 else 1)
        perf = {"perf/step_s": took, "perf/tokens_per_s": tokens / took, "perf/peak_memory_gb": memory_gb}
        lines.append(json.dumps({"step": step, "attempt": "1", "time": 0.0, "tokens": step * tokens, **perf}))
    (run.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return Run.load(run.folder)


def test_planned_and_measured(tmp_path: Path) -> None:
    run = trained(tmp_path / "runs", 0.5, 1.5)
    rows = {row.what: row for row in compare(run)}
    planned = estimate(run.spec(), "pretrain")
    assert (rows["step"].planned, rows["step"].measured) == (planned.step_s, 0.5)
    assert rows["memory"].measured == 1.5
    assert rows["GPU-hours"].measured == pytest.approx((8 * 0.5 + 2 * 2.5) * 2 / 3600)
    assert rows["GPU-hours"].planned == pytest.approx(planned.gpu_hours / 2)


def test_a_calibrated_cluster_plans_what_was_measured(tmp_path: Path) -> None:
    run = trained(tmp_path / "runs", 0.5, 1.5)
    copy_presets(tmp_path)
    file = tmp_path / "configs" / "cluster" / "measured.yaml"
    result = CliRunner().invoke(cli, ["--runs", str(tmp_path / "runs"), "plan", "--compare", "demo/pretrain",
                                      "--calibrate", str(file)])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "measured / planned" in result.stdout
    again = compose(str(tmp_path / "configs" / "demo.yaml"), ["cluster=measured"]).experiment
    e = estimate(again, "pretrain")
    assert e.step_s == pytest.approx(0.5, rel=1e-3)
    assert again.cluster.memory_factor == 1  # of a CPU, a process's memory says nothing of what was handed out
    write_cluster(file, calibrated(again.cluster, compare(run)), run)


GPU = ("cluster=a100-80g", "stages.pretrain.parallel.pipeline=2", "stages.pretrain.parallel.micro_batch=1")


@pytest.mark.parametrize(("times", "factor"), [(1.2, 1.2), (1.0, 1.0), (0.5, 1.0)])
def test_memory_is_held_against_what_rank_0_was_handed(tmp_path: Path, times: float, factor: float) -> None:
    spec = compose("demo", GPU).experiment
    stage = spec.stages["pretrain"]
    _, data, micro_batches = layout(stage, spec.cluster)
    parts = rank_bytes(spec.model, stage, 0, data, micro_batches)
    handed = (sum(parts.values()) - parts["other"]) / 1e9  # the context is no allocator's; the first stage is rank 0's
    run = trained(tmp_path, 0.5, times * handed, GPU)
    (memory,) = (row for row in compare(run) if row.what == "memory")
    assert memory.planned == pytest.approx(handed)
    assert calibrated(spec.cluster, compare(run)).memory_factor == pytest.approx(factor, abs=1e-3)


def test_only_steps_of_the_full_batch_are_compared(tmp_path: Path) -> None:
    ramp = "stages.pretrain.schedule={warmup_tokens: 0, ramp_from: 8, ramp_step: 8, ramp_tokens: 5120}"
    run = trained(tmp_path, 0.5, 1.5, (ramp,))
    sizes = batches(run.spec().stages["pretrain"], run.spec().model.seq_len)
    growing = sum(steps for size, steps in sizes.items() if size < 16)
    assert 2 < growing < 8
    file = run.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines[:growing]:
        line["perf/step_s"] = 0.1
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert next(row.measured for row in compare(run) if row.what == "step") == 0.5


def test_a_run_of_two_steps_tells_nothing(tmp_path: Path) -> None:
    run = trained(tmp_path, 0.5, 1.5)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    (run.folder / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n")
    with pytest.raises(LaunchError, match="2 measured steps, and none of the full batch"):
        compare(run)


SHARDS = "data.sources.wikipedia.shards=[/data/wikipedia-train]"


@pytest.mark.parametrize("columns", ["40", "200"])
def test_tables_are_whole_on_any_terminal(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stdout for a terminal
    monkeypatch.setenv("COLUMNS", columns)
    found = CliRunner().invoke(cli, ["plan", "gpt3-125m", SHARDS, "--search", "--top", "1"]).stdout
    assert not {"…", "\n\n"} & set(found)
    (best,) = json.loads(CliRunner().invoke(cli, ["plan", "gpt3-125m", "--search", "--top", "1", "--json"]).stdout)
    assert f"{best['memory_gb']['total']:.1f} GB" in found and f"${best['usd']:,.0f}" in found
    assert found.splitlines()[-1].startswith(f"orch plan gpt3-125m '{SHARDS}'")
    beside = CliRunner().invoke(cli, ["plan", "gpt3-125m", "--what-if", f"'{SHARDS}'"]).stdout
    assert SHARDS in beside and "…" not in beside


def test_each_stage_is_named_beside_its_numbers() -> None:
    planned = CliRunner().invoke(cli, ["plan", "instructgpt-1.3b", "--stage", "sft", "--stage", "ppo"])
    lines = planned.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines if "fullest rank" in line or "a step" in line] == [
        "sft", "sft", "ppo", "ppo"
    ]  # fmt: skip
    searched = CliRunner().invoke(cli, ["plan", "instructgpt-1.3b", "--stage", "sft", "--search"]).stdout
    assert searched.startswith("sft ")
    for way in (["--search"], ["--what-if", "name=x"], []):
        nothing = CliRunner().invoke(cli, ["plan", "demo", "--stage", "prepare", *way])
        assert (nothing.exit_code, nothing.stdout) == (0, "")
        assert "none of these stages trains" in nothing.stderr


def test_the_command_searches_and_compares_variants() -> None:
    search = CliRunner().invoke(cli, ["plan", "gpt3-125m", "--search", "--json", "--top", "2"])
    rows = json.loads(search.stdout)
    assert len(rows) == 2
    assert rows[0]["step_s"] <= rows[1]["step_s"]
    both = CliRunner().invoke(cli, ["plan", "gpt3-125m", "--what-if", "cluster=h200", "--json"])
    plans = json.loads(both.stdout)
    assert list(plans) == ["as it is", "cluster=h200"]
    assert plans["cluster=h200"][0]["step_s"] < plans["as it is"][0]["step_s"]
    table = CliRunner().invoke(cli, ["plan", "gpt3-125m", "--what-if", "cluster=h200"])
    assert "cluster=h200" in table.stdout
    assert CliRunner().invoke(cli, ["plan"]).exit_code == 2
