"""The chain from pretraining to PPO over two nodes of a real Slurm, and an urgent job in the middle of PPO."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from clock import wait
from slurm_cluster import (
    ORCH,
    finished_once_in_mlflow,
    held,
    is_told,
    no_orphan,
    steps_in_file,
    wait_for_end,
    wait_for_step,
)

from jobs.data.functions import functions

pytestmark = pytest.mark.slurm

STEPS = 10
STAGES = ("--stage", "pretrain", "--stage", "sft", "--stage", "reward", "--stage", "ppo")
CHAIN = """
defaults: [base]
name: chain
data:
  examples:
    demonstrations: {train: [%(folder)s/functions.jsonl], val: [%(folder)s/functions.jsonl]}
    preferences: {train: [%(folder)s/ranked.jsonl], val: [%(folder)s/ranked.jsonl]}
    prompts: {train: [%(folder)s/functions.jsonl], val: [%(folder)s/functions.jsonl]}
stages:
  pretrain: {after: [], steps: 10, eval_every: 0}
  sft: &train
    kind: sft
    init_from: pretrain
    precision: fp32
    parallel: {nodes: 2, micro_batch: 2}
    global_batch: 8
    steps: 12
    optimizer: {lr: 3e-3}
  reward: {<<: *train, kind: reward, init_from: sft}
  ppo:
    <<: *train
    kind: ppo
    init_from: sft
    after: [reward]
    steps: 10
    save_every: 4
    eval_every: 5
    eval_samples: 8
    options: {max_tokens: 16, minibatches: 2, value_lr: 1e-3, kl_coef: 0.1, min_reward_accuracy: 0}
"""


@pytest.fixture(scope="module")
def chains(cluster, unbroken):
    """The same chain twice: left alone, and with PPO preempted."""
    found = [f for f in functions("train") if len(f["prompt"] + f["response"]) < 50][:40]
    ranked = [{"prompt": f["prompt"], "responses": [f["response"], f["response"][::-1]]} for f in found]
    for name, lines in (("functions", found), ("ranked", ranked)):
        (cluster.folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (cluster.folder / "chain.yaml").write_text(CHAIN % {"folder": cluster.folder})
    for name in ("left-alone", "disturbed"):
        cluster(ORCH, "submit", "chain.yaml", f"name={name}", "--detach", *STAGES)
    alone, run = cluster.run("left-alone", "ppo"), cluster.run("disturbed", "ppo")
    wait(run.metrics, "the first step of PPO", 600)
    wait_for_step(run, 2)
    with held(run) as ranks:
        urgent = ("--partition=urgent", f"--nodelist={','.join(cluster.nodes(run))}", "--nodes=2", "--exclusive")
        cluster("sbatch", *urgent, "--output=/dev/null", "--wrap=true")
        wait(lambda: all(is_told(rank, signal.SIGUSR2) for rank in ranks), "the signal")
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(wait_for_end, cluster, run, "1r1"), pool.submit(wait_for_end, cluster, alone, "1")]:
            done.result()
    return alone, run


def test_preempted_in_the_middle_of_ppo(chains, cluster):
    alone, run = chains
    assert set(cluster.state("disturbed").values()) == {"done"}
    first, second = run.attempts()
    assert (first.cause, second.cause) == ("preempted", "done")
    assert 2 <= first.to_step == first.checkpoint_step == second.from_step < STEPS
    assert steps_in_file(run) == list(range(STEPS + 1)), "a step was taken twice"
    expected, found = ({s: _exact(line) for s, line in r.metrics().items()} for r in (alone, run))
    assert found == expected
    finished_once_in_mlflow(run, steps=STEPS)
    no_orphan(run)


def _exact(line):
    """What must repeat bit for bit."""
    return {key: value for key, value in line.items() if key.startswith(("train/", "val/")) or key == "tokens"}
