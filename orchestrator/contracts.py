"""What the stages of a chain must agree on: options that name each other, and what earlier stages left on disk.

The rules of one stage alone are in `checks.py`. The job holds what it loads against itself once more when it starts
(jobs/runtime/resume.py, jobs/ppo.py).
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.checks import Problem
from orchestrator.errors import DataError
from orchestrator.inputs import IMPORT
from orchestrator.registry import did_you_mean, find
from orchestrator.run import SHORT, file_sha256, read_json
from orchestrator.spec import Experiment

RULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {  # of options, whichever kind has them; all are finite
    "at least 1": (
        lambda x: x >= 1,
        "max_tokens minibatches inner_epochs rollout_batch kl_horizon patience hack_patience workers",
    ),
    "at least 2": (lambda x: x >= 2, "responses"),
    "more than 0": (
        lambda x: x > 0,
        "temperature top_p clip value_clip clip_reward epochs beta kl_target value_lr ptx_ratio tokenizer_mb max_kl "
        "max_logp_gap",
    ),
    "at least 0": (
        lambda x: x >= 0,
        "ptx_coef kl_coef top_k no_end_penalty samples damaged margin min_entropy min_length",
    ),
    "from 0 to 1": (lambda x: 0 <= x <= 1, "gamma lam top_p min_reward_accuracy"),
    "from 0 up to but not 1": (lambda x: 0 <= x < 1, "ema"),
}
STEERED = 5  # 1 / 0.2, within which arXiv:1909.08593, section 2.2, keeps the error that steers `kl_coef`
EVALUATIONS = 20  # of a stage, as configs/recipe/instructgpt.yaml has them
REWARD = "reward"  # the kind that leaves a reward model, and `reward.json` beside it
WITHOUT_WEIGHTS = ("prepare", "compare")  # kinds that leave no checkpoint


def check(experiment: Experiment, name: str, root: Path | None) -> list[Problem]:
    """What stage ``name`` cannot have from the other stages, as they are composed and as they lie below ``root``."""
    stage = experiment.stages[name]
    options = find("jobs", stage.kind).Options(**stage.options)
    found = [*_ranges(name, options), *_weights(experiment, name)]
    if hasattr(options, "examples"):
        found += _examples(experiment, name, options.examples)
        found += _templates(experiment)
    if hasattr(options, "examples") or stage.kind == IMPORT:
        found += _tokens(experiment)
    if hasattr(options, "max_tokens"):
        found += _room(experiment, name, options.max_tokens)
    if stage.kind in ("ppo", "dpo") or (stage.kind == "compare" and options.samples and stage.init_from):
        found += _start(experiment, name)
    if hasattr(options, "responses"):
        found += _longest_lists(experiment, name, options)
    if stage.kind in ("ppo", "compare"):
        found += _ramp(experiment, name)
    if stage.kind == "compare":
        found += _answers(experiment, name, options)
    if stage.kind == "ppo":
        found += _text(experiment, name, options)
        found += _rewards(experiment, name, options)
        found += _penalty(experiment, name, options)
        found += _unwatched(experiment, name)
    judge = getattr(options, "reward", None)
    for source in dict.fromkeys(filter(None, [stage.init_from, judge])):
        if root and source in experiment.stages:
            found += _left_behind(experiment, name, source, root / experiment.name / source)
    if root and judge in experiment.stages:
        found += _judgement(experiment, name, options, root / experiment.name / judge / "reward.json")
    return found


# As composed


def _examples(experiment: Experiment, name: str, entry: str) -> Iterator[Problem]:
    """Examples that the experiment does not name."""
    known = experiment.data.examples
    if entry not in known:
        hint = did_you_mean(entry, [*known]) if known else f"such as `data.examples.{entry}.train=[{entry}.jsonl]`"
        yield Problem(message=f"`stages.{name}.options.examples`: no examples `{entry}` in `data.examples`", hint=hint)


def _weights(experiment: Experiment, name: str) -> Iterator[Problem]:
    """A start from a stage that leaves nothing to start from."""
    source = experiment.stages[name].init_from
    if source in experiment.stages and (kind := experiment.stages[source].kind) in WITHOUT_WEIGHTS:
        yield Problem(
            message=f"`stages.{name}.init_from`: `{source}` is of kind `{kind}`, which leaves no weights",
            hint=f"`stages.{name}.after=[{source}]` waits for it and loads nothing",
        )


def _templates(experiment: Experiment) -> Iterator[Problem]:
    """Templates that have no place for what is said, or several."""
    for role in ("system", "user", "assistant"):
        template = getattr(experiment.data.chat, role)
        if template.count("{content}") != 1:
            yield Problem(
                message=f"`data.chat.{role}` is {template!r}, and must have one `{{content}}`",
                hint="that is where the text of a turn stands",
            )


def _tokens(experiment: Experiment) -> Iterator[Problem]:
    """A tokenizer without the template's end token, or with tokens that the model has no row for."""
    from jobs.data import bpe
    from jobs.data.chat import require_rows

    file, end = _tokenizer(experiment), experiment.data.chat.end
    if not file.is_file():  # it is still to be trained
        return
    try:
        tokenizer = bpe.load(file)
        require_rows(tokenizer, file, experiment.model.vocab)
    except DataError as e:
        yield Problem(message=str(e), hint=e.hint)
        return
    if tokenizer.token_to_id(end) is None:
        yield Problem(message=f"`data.chat.end`: `{file}` has no token `{end}`", hint="name the token that ends a text")


def _ranges(name: str, options: Any) -> Iterator[Problem]:
    """Numbers that no stage can have. What is not finite would be within every bound."""
    numbers = dict(_numbers(options))
    for key in [key for key, x in numbers.items() if not math.isfinite(x)]:
        yield Problem(message=f"`stages.{name}.options.{key}` is {numbers.pop(key):g}, and must be finite")
    for words, (holds, keys) in RANGES.items():
        for key in keys.split():
            if key in numbers and not holds(numbers[key]):
                yield Problem(message=f"`stages.{name}.options.{key}` is {numbers[key]:g}, and must be {words}")


def _numbers(options: Any) -> Iterator[tuple[str, float]]:
    """Every number among ``options`` with its key, the coefficients of rules too."""
    for key, value in vars(options).items():
        inside = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        yield from ((k, v) for k, v in inside.items() if isinstance(v, int | float))


def _room(experiment: Experiment, name: str, max_tokens: int) -> Iterator[Problem]:
    """Responses that leave no room for a prompt."""
    seq_len = experiment.model.seq_len
    if max_tokens >= seq_len:
        yield Problem(
            message=f"`stages.{name}.options.max_tokens` is {max_tokens}, and `model.seq_len` {seq_len} is for the "
            "prompt too",
            hint=f"`stages.{name}.options.max_tokens` may be 1 to {seq_len - 1}, and leaves prompts the rest",
        )


def _start(experiment: Experiment, name: str) -> Iterator[Problem]:
    """A policy that begins as nothing, or as what writes no text; it is also what it must not go far from."""
    stage = experiment.stages[name]
    tuned = [other for other, s in experiment.stages.items() if s.kind == "sft"]
    if not stage.init_from or experiment.stages[stage.init_from].kind == REWARD:
        what = f"`{stage.init_from}`, a reward model" if stage.init_from else "empty"
        yield Problem(
            message=f"`stages.{name}.init_from` is {what}, and `{stage.kind}` needs a model that answers",
            hint=f"`stages.{name}.init_from={tuned[-1] if tuned else 'sft'}`",
        )


def _ramp(experiment: Experiment, name: str) -> Iterator[Problem]:
    """Batches that grow."""
    stage = experiment.stages[name]
    if stage.schedule.ramp_from is not None:
        yield Problem(
            message=f"`stages.{name}.schedule.ramp_from` is {stage.schedule.ramp_from}, and `{stage.kind}` has batches "
            "of one size",
            hint=f"`stages.{name}.schedule.ramp_from=null`",
        )


def _answers(experiment: Experiment, name: str, options: Any) -> Iterator[Problem]:
    """Answers that cannot be sampled or compared."""
    where = f"stages.{name}"
    if options.samples == 1:
        yield Problem(message=f"`{where}.options.samples` is 1, and one answer is no pair", hint="0, or 2 and more")
    if options.samples and not experiment.stages[name].init_from:
        yield Problem(
            message=f"`{where}` has no policy to sample from: `init_from` is empty",
            hint=f"name a stage, or `{where}.options.samples=0`",
        )
    if not RULE.fullmatch(options.rule):
        yield Problem(
            message=f"`{where}.options.rule`: `{options.rule}` names no function",
            hint="write `package.module:function`",
        )


def _longest_lists(experiment: Experiment, name: str, options: Any) -> Iterator[Problem]:
    """Lists of more responses than a row has room for, from a stage that ranks its samples."""
    for other in sorted(_before(experiment, name)):
        stage = experiment.stages[other]
        if stage.kind != "compare":
            continue
        made = find("jobs", stage.kind).Options(**stage.options)
        if made.out == options.examples and made.samples > options.responses:
            yield Problem(
                message=f"`stages.{name}.options.responses` is {options.responses}, and `{other}` ranks up to "
                f"{made.samples} responses to a prompt (`options.samples`)",
                hint=f"`stages.{name}.options.responses={made.samples}`, or `stages.{other}.options.samples="
                f"{options.responses}`",
            )


def _text(experiment: Experiment, name: str, options: Any) -> Iterator[Problem]:
    """Pretraining text that cannot be mixed in."""
    where = f"stages.{name}"
    if options.ptx_coef and not experiment.data.sources:
        yield Problem(
            message=f"`{where}.options.ptx_coef` is {options.ptx_coef:g}, and `data.sources` has no text to mix in",
            hint=f"name the sources of `pretrain`, or `{where}.options.ptx_coef=0`",
        )
    if options.ptx_coef and options.temperature != 1:
        yield Problem(
            message=f"`{where}.options.ptx_coef` is {options.ptx_coef:g} at `temperature` {options.temperature:g}: the "
            "loss on text would be that of other probabilities",
            hint=f"`{where}.options.temperature=1`, or `{where}.options.ptx_coef=0`",
        )
    if options.ptx_coef and experiment.data.tokenizer:
        yield from _other_tokenizer(experiment, name)


def _other_tokenizer(experiment: Experiment, name: str) -> Iterator[Problem]:
    """Text to mix in that was prepared with another tokenizer than the prompts are read with."""
    data, given = experiment.data, _tokenizer(experiment)
    made = any(experiment.stages[other].kind == "prepare" for other in _before(experiment, name))
    if made or not given.is_file() or all(s.shards for s in data.sources.values() if s.weight):
        return
    prepared = read_json(Path(data.folder) / "dataset.json", {}).get("tokenizer_sha256")
    if prepared and prepared != (sha256 := file_sha256(given)):
        yield Problem(
            message=f"`stages.{name}.options.ptx_coef` mixes in `{data.folder}`, which was prepared with tokenizer "
            f"{prepared[:SHORT]}; `data.tokenizer` ({given}) is {sha256[:SHORT]}",
            hint=f"prepare the text again in another `data.folder`, or `stages.{name}.options.ptx_coef=0`",
        )


def _rewards(experiment: Experiment, name: str, options: Any) -> Iterator[Problem]:
    """Nothing to learn from, or a reward model that will not be there."""
    where, stages = f"stages.{name}", experiment.stages
    judges = [other for other, stage in stages.items() if stage.kind == REWARD]
    for rule in options.rules:
        if not RULE.fullmatch(rule):
            yield Problem(
                message=f"`{where}.options.rules`: `{rule}` names no function",
                hint="write `package.module:function`",
            )
    names = [rule.rpartition(":")[2] for rule in options.rules]
    if len({*names}) < len(names):
        yield Problem(
            message=f"`{where}.options.rules` has several functions of one name: {', '.join(names)}",
            hint="metrics go by the name of the function: give each its own",
        )
    if options.reward is None:
        if not any(options.rules.values()):
            yield Problem(
                message=f"`{where}` has no reward: `options.reward` is null, and no rule counts",
                hint=f"name a stage of kind `{REWARD}`, or give one of `options.rules` a coefficient",
            )
    elif options.reward not in judges:
        kind = f"is of kind `{stages[options.reward].kind}`" if options.reward in stages else "is no stage"
        hint = did_you_mean(options.reward, judges) if judges else f"add a stage of kind `{REWARD}`, or null for rules"
        yield Problem(message=f"`{where}.options.reward`: `{options.reward}` {kind}", hint=hint)
    elif options.reward not in _before(experiment, name):
        yield Problem(
            message=f"`{where}` learns from `{options.reward}`, and does not wait for it",
            hint=f"`{where}.after=[{', '.join([*stages[name].after, options.reward])}]`",
        )


def _penalty(experiment: Experiment, name: str, options: Any) -> Iterator[Problem]:
    """A coefficient that cannot be steered: each step multiplies it by 1 plus at most 0.2 `global_batch` / horizon."""
    where, batch = f"stages.{name}.options", experiment.stages[name].global_batch
    if options.kl_target is None:
        return
    if options.kl_coef == 0:
        yield Problem(
            message=f"`{where}.kl_coef` is 0, and `kl_target` {options.kl_target:g} multiplies it: it stays 0",
            hint=f"`{where}.kl_coef=0.02`, or `{where}.kl_target=null`",
        )
    if batch >= STEERED * options.kl_horizon >= STEERED:
        yield Problem(
            message=f"`{where}.kl_horizon` is {options.kl_horizon}, and a step of `global_batch` {batch} would take "
            f"{batch / STEERED / options.kl_horizon:.0%} off `kl_coef`: none would be left",
            hint=f"`{where}.kl_horizon` may be {batch // STEERED + 1} and more; 10000 is usual",
        )


def _unwatched(experiment: Experiment, name: str) -> Iterator[Problem]:
    """A policy that nobody looks at: the gate against a hacked reward is at the evaluations, and so are samples."""
    stage = experiment.stages[name]
    if not stage.eval_every and stage.steps:
        yield Problem(
            message=f"`stages.{name}.eval_every` is 0: in {stage.steps} steps nothing would tell that the reward is "
            "hacked, and no samples would be kept",
            hint=f"such as `stages.{name}.eval_every={max(1, stage.steps // EVALUATIONS)}`",
        )


def _before(experiment: Experiment, name: str) -> set[str]:
    """All that ``name`` waits for, directly or through others."""
    stage = experiment.stages[name]
    direct = [*([stage.init_from] if stage.init_from else []), *stage.after]
    return {*direct}.union(*(_before(experiment, other) for other in direct))


# As it lies on disk


def _left_behind(experiment: Experiment, name: str, source: str, folder: Path) -> Iterator[Problem]:
    """A checkpoint of ``source`` that is of another model, tokenizer or template."""
    there, here = _identity(folder), _model(experiment)
    if not there:
        return
    model = there.get("model", {})
    differ = [(f"model.{k}", model.get(k), v) for k, v in here.items() if model.get(k) != v]
    tokenizer = _tokenizer(experiment)
    trained_with = there.get("tokenizer", "")
    if tokenizer.is_file() and (given := file_sha256(tokenizer)) != trained_with:
        differ.append((f"tokenizer ({tokenizer})", trained_with[:SHORT], given[:SHORT]))
    if hasattr(find("jobs", experiment.stages[source].kind).Options, "examples"):
        was, now = _chat(folder), asdict(experiment.data.chat)
        differ += [(f"data.chat.{key}", was[key], now[key]) for key in now if was.get(key, now[key]) != now[key]]
    if differ:
        lines = "; ".join(f"`{key}` is {was!r} there and {now!r} here" for key, was, now in differ)
        yield Problem(
            message=f"`stages.{name}` loads `{folder}`, which does not fit: {lines}",
            hint=f"use the model and `data` it was trained with, or train `{source}` again under another `name`",
        )


def _judgement(experiment: Experiment, name: str, options: Any, file: Path) -> Iterator[Problem]:
    """A reward model that is too often wrong."""
    accuracy = read_json(file, {}).get("accuracy")
    if accuracy is not None and not accuracy >= options.min_reward_accuracy:
        yield Problem(
            message=f"the reward model of `{file}` is right on {accuracy:.3f} of held-out pairs, and "
            f"`stages.{name}.options.min_reward_accuracy` is {options.min_reward_accuracy:g}",
            hint=f"train `{options.reward}` on more pairs under another `name`, or lower the gate",
        )


def _identity(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint in a run's ``folder`` says it is of; empty where there is none."""
    from jobs.runtime import checkpoint

    steps = checkpoint.committed(folder / "checkpoints")
    return checkpoint.identity_of(checkpoint.folder_of(folder / "checkpoints", steps[0])) if steps else {}


def _model(experiment: Experiment) -> dict[str, Any]:
    """The model as checkpoints have it."""
    model = asdict(experiment.model)
    del model["dropout"]
    return model


def _tokenizer(experiment: Experiment) -> Path:
    return Path(experiment.data.tokenizer or Path(experiment.data.folder) / "tokenizer.json")


def _chat(folder: Path) -> dict[str, str]:
    """The template that a run was trained with; empty where it does not say."""
    import yaml

    file = folder / "spec.yaml"
    spec = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    return dict(spec.get("data", {}).get("chat", {}))
