"""What is found ahead of a run: judgements with known answers, real sockets, and real jobs on a real Slurm."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from clock import wait
from slurm_cluster import NODES as BOX
from slurm_cluster import ORCH, Cluster

from jobs.runtime import probe
from jobs.runtime.slurm import first_host
from launch import _slurm_preflight as preflight
from launch import _slurmbox
from orchestrator.compose import compose
from orchestrator.errors import LaunchError
from orchestrator.run import Run

GOLDEN = Path(__file__).parents[1] / "golden" / "sbatch"
NODES = ["n1", "n2", "n3", "n4"]
REQUEST = {"nonce": "x", "gpus": 8, "paths": [], "per_node": 2, "parallel": {"tensor": 2, "pipeline": 2}}
PACKAGES = {"torch": "2.6", "mlflow": "3"}


# Judgements


def seen(**other):
    """What a healthy node says, but for what is named."""
    fine = {"nonce": "x", "unseen": [], "packages": PACKAGES, "gpus": 8, "driver": 8, "clock_s": 0.01}
    return fine | {"round_trip_s": 0.001, "copy_gb_per_s": 3000.0, "all_reduce_gb_per_s": 400.0} | other


def judged(**reports):
    """Problems of those nodes that have any; those not named are healthy, None has not answered."""
    said = {name: reports.get(name, seen()) for name in NODES}
    found = preflight.sick(REQUEST, {name: report for name, report in said.items() if report}, NODES)
    return {name: problems for name, problems in found.items() if problems}


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (None, "no answer"),
        (seen(nonce="old"), "an old version"),
        (seen(unseen=["/data"]), "does not see `/data`"),
        (seen(packages={"torch": None, "mlflow": "3"}), "`torch` is not installed"),
        (seen(packages={"torch": "2.5", "mlflow": "3"}), "`torch` is 2.5, on most nodes 2.6"),
        (seen(gpus=7), "Slurm gave 7 GPUs, the plan has 8"),
        (seen(driver=7), "the driver shows 7 GPUs, the plan has 8"),
        (seen(driver="no answer"), "no answer"),
        (seen(gpu_problem="NCCL error"), "NCCL error"),
        (seen(clock_s=-61.0), "61.0 s ahead"),
        (seen(clock_s=61.0), "61.0 s behind"),
        (seen(problem="cannot reach the first node"), "cannot reach the first node"),
        (seen(copy_gb_per_s=2000.0), "GPU memory: 2000 GB/s, the median is 3000"),
        (seen(all_reduce_gb_per_s=300.0), "all-reduce over its GPUs: 300 GB/s, the median is 400"),
    ],
)
def test_one_sick_node_is_named(report, words):
    found = judged(n3=report)
    assert list(found) == ["n3"]
    assert len(found["n3"]) == 1 and words in found["n3"][0]


def test_what_is_no_sickness():
    assert judged() == {}
    assert judged(n2=seen(copy_gb_per_s=2500.0, clock_s=3.0)) == {}  # within a fifth, within five seconds
    assert judged(n2=seen(clock_s=7.0, round_trip_s=6.0)) == {}  # as far as that can be known
    assert judged(**{name: seen(driver="no `nvidia-smi`") for name in NODES}) == {}  # fake GPUs everywhere


def test_where_most_cannot_reach_the_first_node_that_is_the_sick_one():
    unmet = {name: seen(problem="no route") for name in NODES[1:]}
    assert judged(**unmet) == {"n1": ["3 nodes do not reach it: no route"]}
    assert list(judged(n1=seen(problem="is 127.0.1.1 to itself"))) == ["n1"]


def ranks(**changes):
    """Eight ranks on four nodes, tensor 2 x pipeline 2 x data 2, as the plan has them."""
    return [
        {
            "rank": r,
            "world": 8,
            "local_rank": r % 2,
            "node": NODES[r // 2],
            "place": (r // 2 % 2, r // 4, r % 2),  # by hand: tensor innermost, pipeline outermost
            "rendezvous": ("n1", 12000),
            "torch": False,
        }
        | (changes if r == 5 else {})
        for r in range(8)
    ]


def test_ranks_that_stand_right_pass():
    report = preflight.of_ranks(REQUEST, ranks(), NODES)
    assert report["problems"] == [] and report["passed"]
    assert (report["sizes"], report["rendezvous"]) == ({"data": 2, "pipeline": 2, "tensor": 2}, "n1:12000")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"place": (0, 1, 0)}, "8 ranks have 7 of 8 coordinates"),
        ({"node": "n4"}, "rank 5 of 8 is on n4, not of 8 on n3"),
        ({"local_rank": 0}, "rank 5"),
        ({"world": 16}, "rank 5 of 16"),
        ({"rendezvous": ("n1", 12001)}, "would meet at"),
        ({"rendezvous": ("n2", 12000)}, "the first node is n1"),
        ({"torch": True}, "rank 5 has imported torch"),
        ({"rank": 4}, "rank 5 said nothing"),
    ],
)
def test_a_rank_that_stands_wrong_is_named(changes, words):
    report = preflight.of_ranks(REQUEST, ranks(**changes), NODES)
    assert not report["passed"] and words in "; ".join(report["problems"])


@pytest.mark.parametrize(
    ("listed", "first"),  # the right ones by `scontrol show hostnames`, Slurm 22.05
    [
        ("node1", "node1"),
        ("node[1-128]", "node1"),
        ("node[003,7-9],x1", "node003"),
        ("a,b", "a"),
        ("rack[1-2]node[007,9]", "rack1node007"),
    ],
)
def test_the_first_host_of_a_list(listed, first):
    assert first_host(listed) == first


@pytest.mark.parametrize(("gres", "gpus"), [
    ("gpu:8", 8), ("gpu", 1), ("gpu:a100:4(S:0-1)", 4), ("gpu:a100:4(S:0,2),gpu:h100:2,shard:16", 6), ("(null)", 0),
])  # fmt: skip
def test_gpus_of_a_node_are_counted(gres, gpus):
    from launch._slurm_doctor import _gpus

    assert _gpus(gres) == gpus


# The probe


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_nodes_meet_and_compare_clocks():
    port, came = free_port(), []
    server = threading.Thread(target=lambda: came.append(probe.answer("127.0.0.1", port, "x", 2, 60)))
    server.start()
    wait(lambda: _knock(port), "the server")  # a stranger, who is not counted
    told = [probe.ask("127.0.0.1", port, "x", 60) for _ in range(2)]
    server.join()
    assert came == [2]
    assert all(abs(answer["clock_s"]) <= answer["round_trip_s"] for answer in told), "one clock here"


def _knock(port):
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as s:
            s.sendall(b"GET / HTTP/1.0\n")
            return s.recv(100) == b"" or True
    except ConnectionResetError:
        return True
    except OSError:
        return False


def test_who_cannot_be_reached_is_said():
    assert "cannot reach the first node" in probe.ask("127.0.0.1", free_port(), "x", 0.5)["problem"]
    assert probe.answer("127.0.0.1", free_port(), "x", 1, 0.5) == 0


def test_a_name_that_does_not_resolve_is_said(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "no-such-node.invalid")
    assert "`no-such-node.invalid` does not resolve" in probe.meet("x", 2)["problem"]


@pytest.mark.slow
def test_rates_are_measured(tmp_path):
    """The same code as on GPUs, on two CPU ranks over gloo: rates that a CPU can have, and no more."""
    code = "import json, sys; from jobs.runtime.probe import gpu; "
    code += "print(json.dumps(gpu(int(sys.argv[1]), 2, sys.argv[2], 16, 4)))"
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(i), str(tmp_path / "meet")], stdout=subprocess.PIPE)
        for i in range(2)
    ]
    try:
        said = [json.loads(process.communicate(timeout=900)[0]) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(0.01 < rate < 1000 for rates in said for rate in rates.values()), said


# The scripts


@pytest.mark.parametrize("what", ["node", "rank"])
def test_the_script_is_as_it_was(what):
    chosen = ["cluster.launcher=slurm", "cluster.slurm={partition: gpu, time: '2-0', cpus_per_task: 12, mem: '0'}"]
    experiment = compose("gpt3-6.7b", chosen).experiment
    folder = Path("/runs/gpt3-6.7b/pretrain")
    run = Run(folder=folder, experiment="gpt3-6.7b", stage="pretrain", index=1, key="k")
    text = preflight.script(
        run, experiment, what, folder=folder / "preflight" / "1", base={"PATH": "/bin", "KEY": "hunter2"}, python="/py"
    )
    file = GOLDEN / f"probe-{what}.txt"
    if os.environ.get("ORCH_UPDATE_GOLDEN") == "1":
        file.write_text(text)
    assert file.exists(), f"no {file}: look at what ORCH_UPDATE_GOLDEN=1 writes, and commit it"
    assert text == file.read_text()
    assert "hunter2" not in text
    assert subprocess.run(["/bin/bash", "-n"], input=text, text=True, check=False).returncode == 0


# On Slurm


@contextmanager
def hidden(cluster, folder, node):
    """``folder`` is empty on ``node``, as if the file system were not mounted there."""
    slurmd = cluster("pgrep", "--full", f"^slurmd -N {node}$").split()[0]
    there = "nsenter", "--target", slurmd, "--mount", "--pid"
    cluster(*there, "mount", "-t", "tmpfs", "tmpfs", folder)
    try:
        yield
    finally:
        cluster(*there, "umount", "--lazy", folder)


def reports(cluster, name):
    """What `orch preflight` prints as JSON, before what it says on stderr as it waits."""
    return json.JSONDecoder().raw_decode(cluster(ORCH, "preflight", name, "--json"))[0]


@pytest.mark.slurm
def test_a_sick_node_is_found_and_left_out(cluster):
    """On node2 the run folder cannot be seen: the stages go without it, on nodes that are well."""
    words = ["submit", "base.yaml", "name=sick", "--stage", "prepare", "--stage", "pretrain", "--rehearse"]
    cluster(ORCH, *words, "--dry-run")  # makes the folder that is to be hidden
    with hidden(cluster, cluster.folder / "runs" / ".rehearsal" / "sick", "node2"):
        said = cluster(ORCH, *words, "--preflight")
    assert "1 of 2 nodes are well" in said and "node2  no answer" in said
    ahead, first, rehearsal = reports(cluster, "sick")
    assert (ahead["sick"], ahead["passed"], ahead["needed"]) == (["node2"], True, 2)
    assert (first["passed"], first["ranks"], rehearsal["passed"], rehearsal["ranks"]) == (True, 1, True, 2)
    run = Run.load(cluster.folder / "runs" / ".rehearsal" / "sick" / "pretrain")
    nodes = cluster(
        "sacct", "--noheader", "--allocations", f"--jobs={run.submissions[-1].job_id}", "--format=NodeList%40"
    )
    assert "node2" not in cluster("scontrol", "show", "hostnames", nodes.strip()).split()


@pytest.mark.slurm
def test_too_few_healthy_nodes_refuse_the_run(cluster, tmp_path):
    """All nodes are needed and one is sick: no stage starts, and the reason is told, now and later."""
    words = ["submit", "base.yaml", "name=few", "--stage", "prepare", "--stage", "pretrain"]
    text = tmp_path / "texts" / "text.txt"
    text.parent.mkdir()
    text.write_text("on a file system of its own")
    words += [f"stages.pretrain.global_batch={BOX}", "stages.pretrain.parallel.micro_batch=1"]
    words += [f"data.sources.text.text=[{text}]", f"cluster.nodes={BOX}", f"stages.pretrain.parallel.nodes={BOX}"]
    with hidden(cluster, tmp_path, "node5"):
        said = cluster(ORCH, *words, "--preflight", ok=1)
    assert f"node5  does not see `{text.parent}`" in said
    why = f"1 of {BOX} nodes are sick, which leaves {BOX - 1} of the {BOX} that are needed"
    assert f"refused: {why}" in said
    assert why in cluster(ORCH, "preflight", "few", ok=1)
    run = cluster.run("few")
    wait(lambda: cluster.job(run) == "CANCELLED", "the end of what waits behind")
    assert run.attempts() == []


@pytest.mark.slurm
def test_elsewhere_there_is_nothing_to_look_at(cluster):
    said = cluster(ORCH, "submit", "base.yaml", "name=here", "--launcher", "local", "--preflight", ok=1)
    assert "`--preflight`: this launcher starts no job ahead" in said
    assert "nothing has looked ahead for `here`" in cluster(ORCH, "preflight", "here", ok=1)


# 175 billion parameters on 1,024 GPUs

PLAN = compose("gpt3-175b", []).experiment.stages["pretrain"].parallel
WORDS = []
if PLAN.nodes != 128:  # the preset is of fewer GPUs
    layout = {"nodes": 128, "tensor": 8, "pipeline": 16, "zero": 1, "micro_batch": 1}
    PLAN, WORDS = dataclasses.replace(PLAN, **layout), [f"stages.pretrain.parallel.{k}={v}" for k, v in layout.items()]
CONFIG = GOLDEN.parents[2] / "configs" / "gpt3-175b.yaml"


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """A box of 128 nodes with 8 fake GPUs each."""
    try:
        _slurmbox.check()
    except LaunchError as error:
        pytest.skip(f"{error}; {error.hint}")
    box = Cluster(tmp_path_factory.mktemp("thousand"), nodes=128)
    try:
        yield box
    finally:
        box.close()


@pytest.mark.slow
@pytest.mark.slurm
def test_gpt3_175b_on_128_nodes(thousand):
    """Submitted as a user would: the preflight has all nodes, and the stage behind it may then start."""
    said = thousand(ORCH, "submit", CONFIG, *WORDS, *thousand.shards(), "--preflight", "--detach")
    assert "cpus_per_task` is not set" in said
    run = thousand.run("gpt3-175b")
    thousand("scontrol", "uhold", run.submissions[-1].job_id)  # this machine cannot import torch 1,024 times
    assert thousand.job(run, "%T %r") == "PENDING JobHeldUser"
    (report,) = reports(thousand, "gpt3-175b")
    assert report["passed"] and not report["sick"]
    assert {name: node["gpus"] for name, node in report["nodes"].items()} == {f"node{i}": 8 for i in range(1, 129)}
    assert report["nodes"]["node1"]["met"] == 127
    wait(lambda: thousand.job(run, "%E") == "(null)", "leave to start")
    assert thousand.job(run, "%D %r") == "128 JobHeldUser"
    thousand(ORCH, "cancel", "gpt3-175b")
    wait(lambda: thousand.job(run) in ("", "CANCELLED"), "the end")


@pytest.mark.slow
@pytest.mark.slurm
def test_a_rehearsal_of_1024_ranks(thousand):
    """Each rank of the stage's own job has its own coordinates, its node, and the one rendezvous of all."""
    thousand(ORCH, "submit", CONFIG, *WORDS, "--rehearse")
    report = reports(thousand, "gpt3-175b")[-1]
    assert report["problems"] == [] and report["passed"]
    assert (report["ranks"], report["nodes"]) == (1024, 128)
    data = 1024 // PLAN.pipeline // PLAN.tensor
    assert report["sizes"] == {"data": data, "pipeline": PLAN.pipeline, "tensor": PLAN.tensor}
    folder = thousand.folder / "runs" / ".rehearsal" / "gpt3-175b" / "pretrain" / "rehearsal"
    told = {}
    for file in (folder / "ranks").iterdir():
        lines = dict(line.split("=", 1) for line in file.read_text().splitlines())
        told[int(file.name)] = lines
    assert sorted(told) == list(range(1024))
    for rank, lines in told.items():
        assert (lines["SLURMD_NODENAME"], lines["SLURM_LOCALID"]) == (f"node{rank // 8 + 1}", str(rank % 8))
        assert (lines["SLURM_NTASKS"], lines["SLURM_JOB_NODELIST"], lines["torch"]) == ("1024", "node[1-128]", "False")
    assert report["rendezvous"].startswith("node1:")
