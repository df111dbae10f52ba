"""docs/slurm.md: every key and every finding is in it, and every command of it runs."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from clock import wait
from slurm_cluster import ORCH

from launch import _slurm_doctor
from launch._slurm_container import Container
from launch._slurm_script import Options
from orchestrator import doctor
from orchestrator.compose import compose, copy_presets
from orchestrator.plan import plan

PAGE = (Path(__file__).parents[2] / "docs" / "slurm.md").read_text()
# The box of the tests in place of the page's cluster: its partition, one CPU rank a node.
BOX = {"A100-SXM4-80GB": "cpu", "gpus_per_node: 8": "gpus_per_node: 1", "partition: gpu": "partition: main"}
DEMO = "configs/demo.yaml cluster=mine stages.pretrain.parallel.micro_batch=2"


def section(title):
    """Text of a section of the page."""
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def first_cells(title):
    """Names in backticks in the first cells of the tables of a section."""
    return [
        name
        for row in re.findall(r"^\| (`[^|]*)\|", section(title), re.MULTILINE)
        for name in re.findall(r"`(\w[\w-]*)`", row)
    ]


def test_every_key_of_the_cluster_file_is_explained():
    assert sorted(first_cells("The cluster file")) == sorted(f.name for f in dataclasses.fields(Options))
    assert sorted(first_cells("Containers")) == sorted(f.name for f in dataclasses.fields(Container))


def test_every_finding_is_listed_with_its_remedy():
    advice = doctor.ADVICE | _slurm_doctor.ADVICE
    assert sorted(first_cells("What `orch doctor` finds")) == sorted(advice)
    rows = {row.split("`")[1]: row for row in section("What `orch doctor` finds").splitlines() if row.startswith("| `")}
    for code, (level, remedy) in advice.items():
        assert f"| {level} |" in rows[code] and rows[code].endswith(f"| {remedy} |"), code


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def states(cluster, folder):
    rows = json.loads(cluster("sh", "-c", f"cd {folder} && {ORCH} status demo --json"))
    return {row["run"]: row["state"] for row in rows}


def test_what_it_submits_fits_the_cluster_it_describes(tmp_path):
    copy_presets(tmp_path)
    (tmp_path / "configs" / "cluster" / "mine.yaml").write_text(blocks("yaml")[0])
    config, *overrides = DEMO.split()
    composed = compose(tmp_path / config, overrides)
    assert composed.experiment.cluster.gpus_per_node == 8
    assert plan(composed.experiment)


@pytest.mark.slow
@pytest.mark.slurm
def test_every_command_runs(cluster, tmp_path):
    """One after the other, as a reader would type them, in a folder that all nodes see."""
    config = blocks("yaml")[0]
    for theirs, ours in BOX.items():
        assert theirs in config
        config = config.replace(theirs, ours)
    said, commands = {}, [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) >= 10
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "orch"
        if command == f"orch doctor {DEMO}":
            (tmp_path / "configs" / "cluster" / "mine.yaml").write_text(config)
        if words[0] == "resume":  # as the page says
            wait(lambda: not {"running", "queued"} & {*states(cluster, tmp_path).values()}, "the end of `cancel`")
        # What follows until the end gets the reader's Ctrl-C.
        patience = ["timeout", "--preserve-status", "--signal=INT", "5"] if "-f" in words else []
        line = shlex.join([*patience, str(ORCH), *words])
        said[command] = cluster("sh", "-c", f"cd {tmp_path} && {line}" + (" || true" if patience else ""))
    cluster("sh", "-c", f"cd {tmp_path} && {ORCH} cancel demo --now")  # the box is others' too
    assert "--nodes" in cluster(ORCH, "doctor", "--help")
    assert "its job would be accepted" in said[f"orch doctor {DEMO}"]
    assert "#SBATCH --partition=main" in said[f"orch submit {DEMO} --dry-run"]
    assert said[f"orch submit {DEMO} --rehearse"].count("1 of 1 ranks") == 2
    assert "preflight: 1 of 1 nodes are well" in said["orch preflight demo"]
    assert "demo/pretrain" in said["orch status demo"]
    assert "==> " in said["orch logs -f demo/prepare"]
