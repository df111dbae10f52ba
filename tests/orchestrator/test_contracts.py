"""Stages that do not fit together are refused before a GPU is asked for: as composed, and by what lies on disk."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from jobs.__main__ import _read
from jobs.data import bpe
from jobs.runtime import checkpoint
from jobs.runtime.job import Ranks
from orchestrator import inputs
from orchestrator.checks import Problem
from orchestrator.compose import compose
from orchestrator.contracts import check
from orchestrator.errors import CheckpointError, DataError, PlanError
from orchestrator.plan import plan
from orchestrator.spec import ChatSpec, Experiment
from orchestrator.submit import submit

CHAIN = """
defaults: [cluster/local]
name: chain
model: {layers: 2, hidden: 32, heads: 2, vocab: 300, seq_len: 64, dropout: 0.1}
data:
  folder: data
  sources: {text: {text: [text.jsonl]}}
  examples: {demonstrations: {train: [asked.jsonl]}, preferences: {}, prompts: {}}
stages:
  prepare: {kind: prepare}
  pretrain: {kind: pretrain, after: [prepare], engine: torch, steps: 9, precision: fp32, global_batch: 2}
  sft: {kind: sft, engine: torch, init_from: pretrain, steps: 9, precision: fp32, global_batch: 2}
  reward: {kind: reward, engine: torch, init_from: sft, steps: 9, precision: fp32, global_batch: 2}
  ppo:
    kind: ppo
    engine: torch
    init_from: sft
    after: [reward]
    steps: 9
    eval_every: 3
    precision: fp32
    global_batch: 16
    parallel: {micro_batch: 2}
    options: {max_tokens: 16, minibatches: 2}
"""


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "asked.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "chain.yaml").write_text(CHAIN)
    return tmp_path / "chain.yaml"


def problems(config: Path, *overrides: str, root: Path | None = None) -> list[Problem]:
    return check(compose(config, overrides).experiment, "ppo", root)


# As composed


def test_a_chain_that_fits_has_no_problems(config):
    experiment = compose(config, ()).experiment
    assert [check(experiment, name, config.parent) for name in experiment.stages] == [[]] * 5
    assert [e.stage for e in plan(experiment, root=config.parent)] == ["pretrain", "sft", "reward", "ppo"]


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        ("init_from=null", "`stages.ppo.init_from` is empty", "`stages.ppo.init_from=sft`"),
        ("options.max_tokens=64", "is 64, and `model.seq_len` 64 is for the prompt too", "may be 1 to 63"),
        ("schedule.ramp_from=4 schedule.ramp_tokens=99", "`stages.ppo.schedule.ramp_from` is 4", "ramp_from=null"),
        ("options.minibatches=0", "`stages.ppo.options.minibatches` is 0, and must be at least 1", ""),
        ("options.lam=1.5", "`stages.ppo.options.lam` is 1.5, and must be from 0 to 1", ""),
        ("options.kl_coef=-1", "`stages.ppo.options.kl_coef` is -1, and must be at least 0", ""),
        ("options.value_lr=0", "`stages.ppo.options.value_lr` is 0, and must be more than 0", ""),
        ("options.ptx_ratio=-2", "`stages.ppo.options.ptx_ratio` is -2, and must be more than 0", ""),
        ("options.reward=sft", "`sft` is of kind `sft`", "one of: `reward`"),
        ("options.reward=rewrad", "`rewrad` is no stage", "did you mean `reward`?"),
        ("after=[]", "`stages.ppo` learns from `reward`, and does not wait for it", "`stages.ppo.after=[reward]`"),
        ("options.reward=null", "`stages.ppo` has no reward", "a coefficient"),
        ("options.rules={my-rules.short: 1}", "`my-rules.short` names no function", "`package.module:function`"),
        ("init_from=reward", "`stages.ppo.init_from` is `reward`, a reward model", "`stages.ppo.init_from=sft`"),
        ("options.rules={a:good: 1, b:good: 0}", "several functions of one name: good, good", "give each its own"),
        ("options.examples=promts", "no examples `promts` in `data.examples`", "did you mean `prompts`?"),
        ("options.ptx_coef=1 options.temperature=0.7", "is 1 at `temperature` 0.7", "options.temperature=1`, or"),
        ("options.max_kl=.nan", "`stages.ppo.options.max_kl` is nan, and must be finite", ""),
        ("options.max_logp_gap=.inf", "`stages.ppo.options.max_logp_gap` is inf, and must be finite", ""),
        ("options.min_entropy=.nan", "`stages.ppo.options.min_entropy` is nan, and must be finite", ""),
        ("options.min_length=-1", "`stages.ppo.options.min_length` is -1, and must be at least 0", ""),
        ("options.reward_coef=-.inf", "`stages.ppo.options.reward_coef` is -inf, and must be finite", ""),
        ("options.lam=.nan", "`stages.ppo.options.lam` is nan, and must be finite", ""),
        ("options.rules={a:good: .nan}", "`stages.ppo.options.rules.a:good` is nan, and must be finite", ""),
        ("options.kl_target=6 options.kl_horizon=3", "of `global_batch` 16 would take 107% off", "may be 4 and more"),
        ("options.kl_target=6 options.kl_horizon=0", "options.kl_horizon` is 0, and must be at least 1", ""),
        ("options.kl_target=6 options.kl_coef=0", "`kl_target` 6 multiplies it: it stays 0", "kl_target=null`"),
        ("eval_every=0", "in 9 steps nothing would tell that the reward is hacked", "`stages.ppo.eval_every=1`"),
        ("options.samples=-1", "`stages.ppo.options.samples` is -1, and must be at least 0", ""),
        ("init_from=prepare", "`prepare` is of kind `prepare`, which leaves no weights", "after=[prepare]`"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_would(config, overrides, message, hint):
    words = [f"stages.ppo.{word}" for word in overrides.split(" ") if "=" in word]
    words = [f"stages.ppo.{overrides}"] if "{" in overrides else words
    (problem,) = problems(config, *words)
    assert message in problem.message
    assert hint in problem.hint


@pytest.mark.parametrize("template", ["Q: {text}", "", "{content}{content}"])
def test_a_template_has_one_place_for_what_is_said(config, template):
    composed = compose(config, [f"data.chat.user={json.dumps(template)}"]).experiment
    for stage in ("sft", "ppo"):
        (problem,) = check(composed, stage, None)
        assert f"`data.chat.user` is {template!r}, and must have one `{{content}}`" in problem.message
    assert not check(composed, "pretrain", None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("options: {samples: 1, max_tokens: 8}", "one answer is no pair"),
        ("options: {max_tokens: 8}, init_from: null", "has no policy to sample from"),
        ("options: {damaged: -1, max_tokens: 8}", "options.damaged` is -1, and must be at least 0"),
        ("options: {rule: quality, max_tokens: 8}", "`quality` names no function"),
        ("options: {max_tokens: 8}, schedule: {ramp_from: 2, ramp_tokens: 99}", "`compare` has batches of one size"),
        ("options: {max_tokens: 8}, init_from: reward", "`compare` needs a model that answers"),
    ],
)
def test_answers_that_cannot_be_compared(config, more, message):
    start = "" if "init_from" in more else "init_from: sft, "
    words = f"stages.compare={{kind: compare, engine: torch, precision: fp32, steps: 1, {start}{more}}}"
    (problem,) = check(compose(config, [words]).experiment, "compare", None)
    assert message in problem.message


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_lists_of_samples_must_have_room(config, kind):
    made = "kind: compare, engine: torch, init_from: sft, precision: fp32, steps: 1, options: {samples: 4}"
    words = [f"stages.ranks={{{made}}}", f"stages.reward.kind={kind}", "stages.reward.after=[ranks]"]
    (problem,) = check(compose(config, words).experiment, "reward", None)
    assert "options.responses` is 2, and `ranks` ranks up to 4 responses" in problem.message
    assert "`stages.reward.options.responses=4`, or `stages.ranks.options.samples=2`" in problem.hint
    for mended in ("stages.reward.options.responses=4", "stages.ranks.options.out=prompts", "stages.reward.after=[]"):
        assert not check(compose(config, [*words, mended]).experiment, "reward", None)


@pytest.mark.parametrize("option", ["workers=0", "tokenizer_mb=0"])
def test_nothing_is_prepared_with_nothing(config, option):
    (problem,) = check(compose(config, [f"stages.prepare.options.{option}"]).experiment, "prepare", None)
    assert f"`stages.prepare.options.{option.split('=')[0]}` is 0, and must be" in problem.message


def test_rules_alone_are_a_reward(config):
    assert not problems(config, "stages.ppo.options.reward=null", "stages.ppo.options.rules={a.b:c: 1.0}")
    assert not problems(config, "stages.ppo.options.rules={a:b: 0.0}")
    (problem,) = problems(config, "stages.ppo.options.reward=null", "stages.ppo.options.rules={a:b: 0.0}")
    assert "no rule counts" in problem.message


def test_text_to_mix_in_must_be_there(config):
    experiment = compose(config, ["stages.ppo.options.ptx_coef=27.8"]).experiment
    assert not check(experiment, "ppo", None)
    without = replace(experiment, data=replace(experiment.data, sources={}))
    (problem,) = check(without, "ppo", None)
    assert "`data.sources` has no text" in problem.message


def test_text_to_mix_in_is_of_the_tokenizer_of_the_prompts(config, tokenizer):
    words = ["stages.ppo.options.ptx_coef=27.8", "data.tokenizer=data/tokenizer.json"]
    experiment = compose(config, words).experiment
    record = config.parent / "data" / "dataset.json"
    made = experiment.stages["pretrain"]
    stages = experiment.stages | {"pretrain": replace(made, after=[])}
    given = replace(experiment, stages=stages)  # whose text nothing prepares again
    for sha256, refused in ((tokenizer, 0), ("f" * 64, 1)):
        record.write_text(json.dumps({"tokenizer_sha256": sha256}))
        found = check(given, "ppo", None)
        assert len(found) == refused
        assert not check(experiment, "ppo", None)
    assert f"prepared with tokenizer ffffffffffff; `data.tokenizer` (data/tokenizer.json) is {tokenizer[:12]}" in (
        found[0].message
    )


def test_the_reward_may_be_waited_for_through_others(config):
    experiment = compose(config, ()).experiment
    stages = experiment.stages
    between = replace(stages["sft"], init_from=None, after=["reward"])
    stages = {**stages, "between": between, "ppo": replace(stages["ppo"], after=["between"])}
    assert not check(replace(experiment, stages=stages), "ppo", None)


def test_all_is_said_at_once_with_the_other_rules(config):
    words = ["init_from=null", "after=[]", "options.max_tokens=0", "options.minibatches=3", "parallel.tensor=3"]
    composed = compose(config, [f"stages.ppo.{word}" for word in words])
    with pytest.raises(PlanError) as caught:
        submit(composed, root=config.parent / "runs", stages=["ppo"])
    said = str(caught.value)
    for part in (
        "problems",
        "`stages.ppo.init_from` is empty",
        "does not wait for it",
        "max_tokens` is 0",
        "parallel.tensor",
    ):
        assert part in said
    assert not (config.parent / "runs").exists()


def test_files_of_examples_must_be_there_at_submit_and_not_in_a_plan(config):
    (config.parent / "asked.jsonl").unlink()
    experiment = compose(config, ()).experiment
    assert not check(experiment, "sft", None)
    with pytest.raises(DataError, match=r"no examples at `asked\.jsonl`") as caught:
        inputs.check(experiment, "sft", ["prepare", "pretrain"])
    assert caught.value.hint == "set `data.examples.demonstrations.train`"


# As it lies on disk


def leave(root: Path, experiment: Experiment, stage: str, tokenizer: str, **changes: object) -> Path:
    """What a finished stage leaves below ``root``: its spec, and a checkpoint that says what it is of."""
    folder = root / experiment.name / stage
    made = checkpoint.folder_of(folder / "checkpoints", 9)
    made.mkdir(parents=True, exist_ok=True)
    model = {k: v for k, v in asdict(experiment.model).items() if k != "dropout"} | changes
    checkpoint._commit(made, {"identity": {"model": model, "tokenizer": tokenizer, "data": "0" * 64}}, {})
    (folder / "spec.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(experiment)))
    return folder


@pytest.fixture
def tokenizer(config) -> str:
    """A real one in `data.folder`; its hash."""
    trained = bpe.train(["what is asked, and what is answered"] * 9, vocab=300, end_of_text="<|endoftext|>")
    (config.parent / "data").mkdir()
    trained.save(str(config.parent / "data" / "tokenizer.json"))
    return bpe.file_sha256(config.parent / "data" / "tokenizer.json")


def test_what_fits_on_disk_passes(config, tokenizer, tmp_path):
    experiment = compose(config, ()).experiment
    for stage in ("sft", "reward"):
        leave(tmp_path, experiment, stage, tokenizer)
    assert not problems(config, root=tmp_path)
    assert not problems(config, "model.dropout=0", root=tmp_path)


def test_a_checkpoint_of_another_model_or_tokenizer_is_refused_with_both_values(config, tokenizer, tmp_path):
    experiment = compose(config, ()).experiment
    leave(tmp_path, experiment, "sft", tokenizer, layers=4, seq_len=32)
    leave(tmp_path, experiment, "reward", "f" * 64)
    sft, reward = problems(config, root=tmp_path)
    assert "`model.layers` is 4 there and 2 here; `model.seq_len` is 32 there and 64 here" in sft.message
    assert "`stages.ppo` loads" in sft.message and "train `sft` again under another `name`" in sft.hint
    assert f"is 'ffffffffffff' there and '{tokenizer[:12]}' here" in reward.message
    assert "model" not in reward.message.partition("fit:")[2]
    with pytest.raises(PlanError, match="2 problems"):
        plan(experiment, stages=["ppo"], root=tmp_path)
    assert plan(experiment, stages=["ppo"])  # nowhere to look


def test_a_damaged_state_of_another_stage_is_named(config, tokenizer, tmp_path):
    folder = leave(tmp_path, compose(config, ()).experiment, "sft", tokenizer)
    (folder / "checkpoints" / "step-0000009" / "state.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"state\.json` cannot be read") as refused:
        problems(config, root=tmp_path)
    assert refused.value.hint


def test_a_template_of_before_is_refused_where_stages_learned_it(config, tokenizer, tmp_path):
    experiment = compose(config, ()).experiment
    old = replace(experiment, data=replace(experiment.data, chat=ChatSpec(user="Q: {content}")))
    for stage in ("pretrain", "sft"):
        leave(tmp_path, old, stage, tokenizer)
    (problem,) = problems(config, root=tmp_path)
    assert "`data.chat.user` is 'Q: {content}' there and '{content}' here" in problem.message
    assert not check(experiment, "sft", tmp_path)  # `pretrain` knows no template


def test_a_reward_model_that_is_too_often_wrong_is_refused(config, tmp_path):
    folder = tmp_path / "chain" / "reward"
    folder.mkdir(parents=True)
    (folder / "reward.json").write_text(json.dumps({"accuracy": 0.55}))
    (problem,) = problems(config, root=tmp_path)
    assert "is right on 0.550 of held-out pairs, and `stages.ppo.options.min_reward_accuracy` is 0.6" in problem.message
    assert not problems(config, "stages.ppo.options.min_reward_accuracy=0.5", root=tmp_path)
    (folder / "reward.json").write_text(json.dumps({"accuracy": float("nan")}))
    assert len(problems(config, root=tmp_path)) == 1


def test_the_end_token_must_be_one_that_the_model_can_say(config, tokenizer):
    (problem,) = problems(config, "data.chat.end=<|im_end|>")
    assert "has no token `<|im_end|>`" in problem.message


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "base"])
def test_a_model_must_have_a_row_for_every_token(config, tokenizer, stage):
    file = config.parent / "data" / "tokenizer.json"
    more = bpe.load(file)
    size = bpe.vocab_size(more)
    more.add_special_tokens(["<|user|>"])
    more.save(str(file))
    words = ["stages.base={kind: import_hf, options: {folder: gpt2}}"]
    (problem,) = check(compose(config, [*words, f"model.vocab={size}"]).experiment, stage, None)
    assert f"`data/tokenizer.json` has {size + 1} tokens, and `model.vocab` is {size}" in problem.message
    assert f"`model.vocab` may be {size + 1} and more" in problem.hint
    assert not check(compose(config, [*words, f"model.vocab={size + 1}"]).experiment, stage, None)


def test_a_job_holds_its_tokenizer_against_its_model_once_more(config, tokenizer):
    words = ["data.tokenizer=data/tokenizer.json", "data.examples.demonstrations.val=[asked.jsonl]"]
    experiment = compose(config, words).experiment
    size = bpe.vocab_size(bpe.load(config.parent / "data" / "tokenizer.json"))
    short = replace(experiment, model=replace(experiment.model, vocab=size - 1))
    options = SimpleNamespace(examples="demonstrations")
    with pytest.raises(DataError, match=f"has {size} tokens, and `model.vocab` is {size - 1}"):
        _read(SimpleNamespace(experiment=short, options=options, ranks=Ranks()))
    read = _read(SimpleNamespace(experiment=experiment, options=options, ranks=Ranks()))
    assert read == {"asked.jsonl": bpe.file_sha256(Path("asked.jsonl"))}
    assert _read(SimpleNamespace(experiment=short, options=SimpleNamespace(), ranks=Ranks())) == {}


def test_a_coefficient_is_steered_where_it_stays_above_0(config):
    """Ziegler et al. (arXiv:1909.08593, section 2.2): a step leaves 1 - 0.2 n / horizon of it, or more."""
    words = ["stages.ppo.options.kl_target=6", "stages.ppo.global_batch=20"]
    refused = {horizon: problems(config, *words, f"stages.ppo.options.kl_horizon={horizon}") for horizon in (3, 4, 5)}
    assert {horizon: bool(found) for horizon, found in refused.items()} == {3: True, 4: True, 5: False}
