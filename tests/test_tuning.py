"""Fine-tuning, ranked responses, a reward model and DPO: what they learn, and after a kill bit for bit the same."""

import json
import math
import os
import signal

import pytest
from clock import wait
from test_survive import curve, orch, rank_process, state

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
    made: {}
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
    options: {epochs: 3, responses: 3}
  compare:
    <<: *tune
    kind: compare
    after: []
    init_from: sft
    parallel: {micro_batch: 2, zero: 3}
    steps: 2
    eval_samples: 5
    options: {out: made, damaged: 20, rule: "rules_of_mine:words", margin: 0, max_tokens: 24}
  dpo:
    <<: *tune
    kind: dpo
    after: []
    init_from: sft
    parallel: {micro_batch: 2, zero: 3}
    steps: 20
    optimizer: {lr: 1e-3}
    options: {epochs: 3, responses: 3}
"""
RULE = """
def words(prompt, response, line):
    assert line["response"] and line["prompt"] == prompt
    return len(response.split())
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    for split, count in (("train", 240), ("val", 40)):
        short = [f for f in functions(split) if len(f["prompt"] + f["response"]) < 160][:count]
        ranked = [
            {"prompt": f["prompt"], "responses": [f["response"], f["response"][::-1], "pass"], "kind": "reversed"}
            for f in short
        ]
        for name, lines in (("demonstrations", short), ("preferences", ranked)):
            (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "base.yaml").write_text(CONFIG)
    (folder / "rules_of_mine.py").write_text(RULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield folder


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def killed_and_resumed(place, stage, step, *stages):
    """``broken/<stage>``, which lost a rank after ``step``."""
    run = Run(folder=place / "runs" / "broken" / stage, experiment="broken", stage=stage, index=2, key="")
    orch(place, "submit", "base.yaml", "name=broken", *(f"--stage={name}" for name in (*stages, stage)), "--detach")
    wait(lambda: max(run.metrics(), default=0) >= step, f"step {step}", 1200)
    os.kill(rank_process(run, 1).pid, signal.SIGKILL)
    wait(lambda: state(place, run) == "failed", "the run has failed")
    orch(place, "resume", f"broken/{stage}")
    return Run.load(run.folder)


def test_a_chain_learns_and_survives_a_kill(place):
    orch(place, "submit", "base.yaml", "name=whole")
    sft, reward, dpo = (Run.load(place / "runs" / "whole" / stage) for stage in ("sft", "reward", "dpo"))
    lines = curve(sft)
    held_out = [line["val/loss"] for line in lines.values() if line["val/loss"]]
    assert held_out[-1] < held_out[0] - 0.3
    log = (sft.folder / "logs" / "1-0.log").read_text()
    assert "3 epochs of" in log and f": {max(lines)} steps" in log

    facts = json.loads((reward.folder / "reward.json").read_text())
    assert facts["accuracy"] > 0.8
    assert facts["kinds"] == {"reversed": {"accuracy": facts["accuracy"], "pairs": 3 * 40}}
    assert sum(b["pairs"] for b in facts["calibration"]) == 3 * 40
    assert facts["std"] > 0

    for split, sampled in (("train", 16), ("val", 5)):
        shown = {(f["prompt"], f["response"]) for f in lines_of(place / f"demonstrations-{split}.jsonl")}
        made = lines_of(place / "data" / f"made-{split}.jsonl")
        damaged = [line for line in made if line["kind"] != "sampled"]
        assert len(damaged) == 20
        assert {(line["prompt"], line["responses"][0]) for line in damaged} <= shown
        assert 0 < len(made) - len(damaged) <= sampled
        for line in made[20:]:
            better, worse = (len(text.split()) for text in line["responses"])
            assert better > worse
            assert line["prompt"] in dict(shown)

    judged = {step: line for step, line in dpo.metrics().items() if "val/loss" in line}
    assert judged[0]["val/loss"] == pytest.approx(math.log(2), abs=1e-4)  # it is its reference still
    assert judged[20]["val/accuracy"] > 0.8
    assert judged[20]["val/margin"] > 0.1

    broken = killed_and_resumed(place, "sft", 9, "prepare")
    assert curve(broken) == lines
    assert broken.attempts()[-1].from_step == 7
    broken = killed_and_resumed(place, "dpo", 9)
    assert curve(broken) == curve(dpo)
    assert broken.attempts()[-1].from_step == 7
