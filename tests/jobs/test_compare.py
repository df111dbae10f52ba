"""Ranked responses: what stands above what, on any number of ranks the same, and files of others are safe."""

import json

import pytest
from ranks import run_ranks

from jobs import compare
from jobs.compare import Answers, Options, below_demonstrations, by_rule, found_whole, targets_of, write
from jobs.data import bpe, rules
from jobs.data.chat import Chat
from jobs.data.examples import Files, Prompt, answered
from jobs.data.functions import functions
from jobs.nn.gpt import GPT, init_weights
from jobs.runtime.job import Job
from orchestrator.errors import DataError
from orchestrator.run import Attempt, Run
from orchestrator.spec import (
    ChatSpec,
    ClusterSpec,
    DataSpec,
    ExamplesSpec,
    Experiment,
    ModelSpec,
    ParallelPlan,
    StageSpec,
)

MODEL = ModelSpec(layers=1, hidden=16, heads=2, vocab=300, seq_len=128, init_std=0.2)


def test_a_demonstration_stands_above_its_damaged_copy():
    examples = [Prompt(ids=[0], line=line) for line in functions("val")[:60]]
    lines = below_demonstrations(examples, Options(), seed=0)
    assert {line["kind"] for line in lines} == set(compare.KINDS)
    demonstrated = {(e.line["prompt"], e.line["response"]) for e in examples}
    for line in lines:
        better, worse = line["responses"]
        assert (line["prompt"], better) in demonstrated
        assert worse != better
    few = below_demonstrations(examples, Options(damaged=7, damage=["dropped"]), seed=0)
    assert len(few) == 7
    assert {line["kind"] for line in few} == {"dropped"}
    assert below_demonstrations(examples, Options(damaged=0), seed=0) == []


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([0.1, 0.9], ["b", "a"]),
        ([0.5, 0.5], None),
        ([0.5, 0.55], None),
        ([0.2, 0.26, 0.3, 0.9], ["d", "c", "a"]),  # b is too near to c, and the margin is counted from c
    ],
)
def test_answers_within_the_margin_are_no_pair(scores, kept):
    answers = Answers(number=0, line={"prompt": "p"}, texts=[*"abcd"][: len(scores)], scores=scores, lengths=[1])
    found = by_rule([answers], 0.0501)
    assert found == ([{"prompt": "p", "responses": kept, "kind": "sampled"}] if kept else [])


@pytest.fixture
def data(tmp_path):
    return DataSpec(folder=str(tmp_path), examples={"made": ExamplesSpec(), "given": ExamplesSpec(val=["v.jsonl"])})


def test_files_are_made_once_and_what_others_wrote_stays(data, tmp_path):
    targets, lines = targets_of(data, "made"), {"train": [{"kind": "a"}], "val": [{"kind": "b"}]}
    assert not found_whole(targets, {"seed": 0})
    write(targets, lines, {"seed": 0})
    assert json.loads((tmp_path / "made-val.jsonl").read_text()) == {"kind": "b"}
    assert found_whole(targets, {"seed": 0})
    assert not found_whole(targets, {"seed": 1})  # another policy: ours, so it may be replaced
    write(targets, lines | {"val": [{"kind": "c"}]}, {"seed": 1})
    targets["train"].unlink()  # as after a kill between the two
    assert not found_whole(targets, {"seed": 1})
    targets["val"].write_text('{"kind": "by hand"}\n')
    with pytest.raises(DataError, match=r"made-val.jsonl` was not written by this stage, or was changed since"):
        found_whole(targets, {"seed": 1})
    (tmp_path / "made.json").unlink()
    with pytest.raises(DataError, match="was not written by this stage"):
        found_whole(targets, {"seed": 1})


def test_the_record_of_another_stage_is_not_replaced(data, tmp_path):
    (tmp_path / "made.json").write_text('{"sources": {}}')  # as `dataset.json` of `prepare`
    with pytest.raises(DataError, match=r"made.json` was not written by this stage"):
        found_whole(targets_of(data, "made"), {"seed": 0})


def test_examples_that_name_files_are_not_made(data):
    with pytest.raises(DataError, match=r"`data.examples.given` names files, and this stage is to make them"):
        targets_of(data, "given")
    with pytest.raises(DataError, match=r"no examples `mad` in `data.examples`"):
        targets_of(data, "mad")


def _answers(ranks, folder):
    cluster = ClusterSpec(gpu="cpu", gpus_per_node=ranks.world, gpu_memory_gb=1, gpu_tflops=1)
    stage = StageSpec(kind="compare", precision="fp32", parallel=ParallelPlan(micro_batch=2))
    data = DataSpec(tokenizer=str(folder / "tokenizer.json"), chat=ChatSpec(end="<|end|>"))
    job = Job(
        run=Run(folder=folder, experiment="x", stage="s", index=1, key=""),
        experiment=Experiment(name="x", model=MODEL, cluster=cluster, data=data, stages={"s": stage}),
        stage=stage,
        options=Options(samples=3, max_tokens=8, temperature=2.0),
        ranks=ranks,
        attempt="1",
        record=Attempt(name="1", job_id="", world=ranks.world, host="", started_at=0.0),
    )
    chat, rule = Chat.open(data), rules.load("jobs.data.functions:long_enough")
    prompts = answered(Files(names=[str(folder / "d.jsonl")]), chat, longest=64, left_out=compare.Counter())
    model = GPT(MODEL)
    init_weights(model, 0)
    return compare.batch_of_answers(job, model, chat, rule, prompts, 10)


def test_answers_are_the_same_on_any_number_of_ranks(tmp_path):
    bpe.train(["abcdefghi " * 20], vocab=MODEL.vocab, end_of_text="<|end|>").save(str(tmp_path / "tokenizer.json"))
    lines = [{"prompt": "abc" * k, "response": "d"} for k in range(1, 8)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    alone = run_ranks(_answers, 1, tmp_path)[0]
    assert run_ranks(_answers, 3, tmp_path) == [alone] * 3
    assert [a.line for a in alone] == lines
    assert [a.number for a in alone] == [*range(10, 17)]
    assert all(len(set(a.texts)) > 1 for a in alone)  # samples of one prompt are drawn apart
    long_enough = rules.load("jobs.data.functions:long_enough")
    assert alone[0].scores == [long_enough("abc", text, {}) for text in alone[0].texts]
