"""Fine-tuning and a reward model, from `orch submit` to what they learned; killed in between, bit for bit the same."""

import json
import os
import signal

import pytest
from test_survive import curve, orch, rank_process, state, wait

from jobs.data.functions import functions
from orchestrator.run import Run

pytestmark = pytest.mark.slow

CONFIG = """
defaults: [cluster/local]
name: base
model: {layers: 2, hidden: 64, heads: 4, vocab: 512, seq_len: 192, dropout: 0.1}
data:
  folder: data
  sources: {text: {text: [demonstrations-train.jsonl], text_key: response}}
  examples:
    demonstrations: {train: [demonstrations-train.jsonl], val: [demonstrations-val.jsonl]}
    preferences: {train: [preferences-train.jsonl], val: [preferences-val.jsonl]}
stages:
  prepare: {kind: prepare, options: {workers: 1}}
  sft: &tune
    kind: sft
    after: [prepare]
    engine: deepspeed
    precision: fp32
    parallel: {micro_batch: 2, zero: 2}
    global_batch: 8
    steps: 100
    save_every: 7
    eval_every: 10
    optimizer: {lr: 4e-3}
    options: {epochs: 3}
  reward:
    <<: *tune
    kind: reward
    after: []
    init_from: sft
    engine: torch
    parallel: {micro_batch: 2, zero: 3}
    steps: 12
    optimizer: {lr: 1e-3}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    for split, count in (("train", 240), ("val", 40)):
        short = [f for f in functions(split) if len(f["prompt"] + f["response"]) < 160][:count]
        ranked = [{"prompt": f["prompt"], "responses": [f["response"], f["response"][::-1], "pass"]} for f in short]
        for name, lines in (("demonstrations", short), ("preferences", ranked)):
            (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "base.yaml").write_text(CONFIG)
    return folder


def test_a_chain_learns_and_survives_a_kill(place):
    orch(place, "submit", "base.yaml", "name=whole")
    sft, reward = (Run.load(place / "runs" / "whole" / stage) for stage in ("sft", "reward"))
    lines = curve(sft)
    held_out = [line["val/loss"] for line in lines.values() if line["val/loss"]]
    assert held_out[-1] < held_out[0] - 0.3
    log = (sft.folder / "logs" / "1-0.log").read_text()
    assert "3 epochs of" in log and f": {max(lines)} steps" in log
    facts = json.loads((reward.folder / "reward.json").read_text())
    assert facts["accuracy"] > 0.8
    assert sum(b["pairs"] for b in facts["calibration"]) == 3 * 40
    assert facts["std"] > 0

    broken = Run(folder=place / "runs" / "broken" / "sft", experiment="broken", stage="sft", index=2, key="")
    orch(place, "submit", "base.yaml", "name=broken", "--stage", "prepare", "--stage", "sft", "--detach")
    wait(lambda: max(broken.metrics(), default=0) >= 9, "step 9", 300)
    os.kill(rank_process(broken, 1).pid, signal.SIGKILL)
    wait(lambda: state(place, broken) == "failed", "the run has failed")
    orch(place, "resume", "broken/sft")
    assert curve(broken) == lines
    assert Run.load(broken.folder).attempts()[-1].from_step == 7
