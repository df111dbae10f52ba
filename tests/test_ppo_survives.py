"""PPO killed in a rollout, in scoring and in an update: it goes on bit for bit, as if nothing had happened."""

import json

import pytest
from clock import wait
from test_survive import orch, state

from jobs.data.functions import functions
from orchestrator.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.parity]

CONFIG = """
defaults: [cluster/local]
name: chain
model: {layers: 2, hidden: 64, heads: 4, vocab: 512, seq_len: 128}
data:
  folder: data
  sources: {text: {text: [functions.jsonl], text_key: response}}
  examples:
    demonstrations: {train: [functions.jsonl], val: [functions.jsonl]}
    preferences: {train: [ranked.jsonl], val: [ranked.jsonl]}
    prompts: {train: [functions.jsonl], val: [functions.jsonl]}
stages:
  prepare: {kind: prepare, options: {workers: 1}}
  sft: &train
    kind: sft
    after: [prepare]
    precision: fp32
    parallel: {micro_batch: 4, zero: 3}
    global_batch: 16
    steps: 20
    optimizer: {lr: 3e-3}
  reward: {<<: *train, kind: reward, after: [], init_from: sft, parallel: {micro_batch: 4}}
  ppo: &ppo
    <<: *train
    kind: ppo
    engine: deepspeed
    engine_config: {zero_optimization: {reduce_bucket_size: 1000000}}  # else 2 GB for each of actor and critic
    after: [reward]
    init_from: sft
    steps: 14
    save_every: 3
    eval_every: 7
    eval_samples: 8
    optimizer: {lr: 1e-3}
    options:
      {max_tokens: 24, minibatches: 2, inner_epochs: 2, kl_target: 4, value_lr: 1e-3, ptx_coef: 0.1, ptx_ratio: 1,
       rules: {"deadly:rule": 0.5}}
  again: *ppo
"""
# A rule that a user might have written: it kills its own process where its examples say so, once, and only in step 5
# or later, when a checkpoint is there. `score` is at once, `update` a moment later, `rollout` when the step is over.
RULE = """
import os, pathlib, signal, threading, time
calls = 0

def rule(prompt, response, line):
    global calls
    calls += 1
    place = pathlib.Path(line["place"])
    told = place / "kill"
    if calls > 50 and told.exists():
        when = told.read_text()
        told.unlink(missing_ok=True)
        threading.Thread(target=kill, args=(when, place / "runs/chain/again/metrics.jsonl")).start()
        if when == "score":
            time.sleep(60)
    return len(response) / 100

def kill(when, metrics):
    if when == "update":
        time.sleep(0.1)
    if when == "rollout":
        lines = metrics.read_text().count("\\n")
        while metrics.read_text().count("\\n") == lines:
            time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    found = [f for f in functions("train") if len(f["prompt"] + f["response"]) < 120][:100]
    ranked = [{"prompt": f["prompt"], "responses": [f["response"], f["response"][::-1]]} for f in found]
    for name, lines in (("functions", found), ("ranked", ranked)):
        text = "".join(json.dumps(line | {"place": str(folder)}) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "chain.yaml").write_text(CONFIG)
    (folder / "deadly.py").write_text(RULE)
    return folder


def test_killed_anywhere_it_goes_on(place, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(place))
    orch(place, "submit", "chain.yaml", *(f"--stage={stage}" for stage in ("prepare", "sft", "reward", "ppo")))
    whole = Run.load(place / "runs" / "chain" / "ppo")
    run = Run(folder=place / "runs" / "chain" / "again", experiment="chain", stage="again", index=4, key="")
    (place / "kill").write_text("score")
    orch(place, "submit", "chain.yaml", "--stage", "again", "--detach")
    for when in ("update", "rollout", None):
        wait(lambda: state(place, run) == "failed", "its death", 1200)
        if when:
            (place / "kill").write_text(when)
        orch(place, "resume", "chain/again", "--detach")
    wait(lambda: state(place, run) == "done", "its end", 1200)
    attempts = Run.load(run.folder).attempts()
    first, *others = (a.from_step for a in attempts)
    assert first == 0
    assert len(others) == 3
    assert min(others) >= 3, "it went on from a checkpoint"
    assert exact(run) == exact(whole)
    for more in ([], ["--average"]):
        said = orch(place, "generate", "chain/again", "--prompt", "def f(self):", "--max-tokens=5", "--json", *more)
        assert 1 <= json.loads(said.splitlines()[0])["tokens"] <= 5


def exact(run):
    """What must repeat, by step."""
    return {
        step: {key: value for key, value in line.items() if key.startswith(("train/", "val/")) or key == "tokens"}
        for step, line in run.metrics().items()
    }
