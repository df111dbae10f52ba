"""`orch doctor` on a real Slurm: nothing is wrong with the box, and what is made wrong is found."""

import json
from pathlib import Path

import pytest
from slurm_cluster import NODES, ORCH

from launch import slurm

GPT3 = Path(slurm.__file__).parents[1] / "configs" / "gpt3-125m.yaml"

pytestmark = pytest.mark.slurm


def codes(cluster, *words, ok=1):
    """Codes of what `orch doctor` finds on the box, by check."""
    said = cluster(ORCH, "doctor", *words, "--json", ok=ok)
    found = json.JSONDecoder().raw_decode(said[said.index("[\n") :])[0]
    return {f["check"]: f["code"] for f in found}


def test_a_real_slurm_is_looked_at(cluster):
    found = codes(cluster, GPT3, *cluster.shards(), ok=0)
    assert {code for check, code in found.items() if check != "gpus"} == {""}, "all is well there"
    assert {"slurm", "preemption", "accounting", "requeue", "partition", "gpus a node", "stage pretrain"} <= {*found}


def test_what_a_config_cannot_have_is_found(cluster):
    base = f"schedule.ramp_from={(NODES + 1) * 32}"
    found = codes(
        cluster,
        GPT3,
        f"stages.pretrain.{base}",
        f"stages.pretrain.parallel.nodes={NODES + 1}",
        f"stages.pretrain.global_batch={(NODES + 1) * 64}",
        "cluster.gpus_per_node=16",
        "cluster.slurm={account: nobody, qos: gold}",
    )
    assert (found["partition"], found["gpus a node"]) == ("few-nodes", "few-gpus")
    assert (found["account"], found["qos"], found["stage pretrain"]) == ("no-account", "no-qos", "refused")
    found = codes(cluster, GPT3, "cluster.slurm.partition=nope", "stages.pretrain.global_batch=7")
    assert (found["partition"], found["plan"]) == ("no-partition", "no-plan")


def test_a_partition_that_is_down_or_short_is_found(cluster):
    cluster("scontrol", "update", "PartitionName=urgent", "State=DOWN", "MaxTime=60")
    try:
        assert codes(cluster, GPT3, "cluster.slurm.partition=urgent")["partition"] == "partition-down"
        cluster("scontrol", "update", "PartitionName=urgent", "State=UP")
        assert codes(cluster, GPT3, "cluster.slurm={partition: urgent, time: '2:00:00'}")["time"] == "long-time"
    finally:
        cluster("scontrol", "update", "PartitionName=urgent", "State=UP", "MaxTime=UNLIMITED")


def test_nodes_are_looked_at_in_a_job(cluster):
    found = codes(cluster, GPT3, *cluster.shards(), "--nodes", ok=0)
    assert found["nodes"] == ""
    assert (cluster.folder / "runs" / ".doctor" / "gpt3-125m" / "pretrain" / "preflight" / "1" / "report.json").exists()
