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
from orchestrator.registry import did_you_mean, find
from orchestrator.run import SHORT, file_sha256, read_json
from orchestrator.spec import Experiment

RULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {  # of options, whichever kind has them
    "at least 1": (lambda x: x >= 1, "max_tokens minibatches inner_epochs rollout_batch kl_horizon patience workers"),
    "at least 2": (lambda x: x >= 2, "responses"),
    "more than 0": (
        lambda x: 0 < x < math.inf,
        "temperature top_p clip value_clip clip_reward epochs beta kl_target value_lr ptx_ratio tokenizer_mb",
    ),
    "at least 0": (lambda x: 0 <= x < math.inf, "ptx_coef kl_coef top_k no_end_penalty samples damaged margin"),
    "from 0 to 1": (lambda x: 0 <= x <= 1, "gamma lam top_p min_reward_accuracy"),
    "from 0 up to but not 1": (lambda x: 0 <= x < 1, "ema"),
}
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
        found += _end_token(experiment)
    if hasattr(options, "max_tokens"):
        found += _room(experiment, name, options.max_tokens)
    if stage.kind in ("ppo", "dpo"):
        found += _start(experiment, name)
    if stage.kind in ("ppo", "compare"):
        found += _ramp(experiment, name)
    if stage.kind == "compare":
        found += _answers(experiment, name, options)
    if stage.kind == "ppo":
        found += _text(experiment, name, options)
        found += _rewards(experiment, name, options)
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


def _end_token(experiment: Experiment) -> Iterator[Problem]:
    """A template whose end token the tokenizer does not have, or the model has no row for."""
    from jobs.data import bpe

    file, end = _tokenizer(experiment), experiment.data.chat.end
    if not file.is_file():  # it is still to be trained
        return
    try:
        number = bpe.load(file).token_to_id(end)
    except DataError as e:
        yield Problem(message=str(e), hint=e.hint)
        return
    if number is None:
        yield Problem(message=f"`data.chat.end`: `{file}` has no token `{end}`", hint="name the token that ends a text")
    elif number >= experiment.model.vocab:
        yield Problem(
            message=f"`data.chat.end` is token {number} of `{file}`, and `model.vocab` is {experiment.model.vocab}",
            hint=f"`model.vocab` may be {number + 1} and more",
        )


def _ranges(name: str, options: Any) -> Iterator[Problem]:
    """Numbers that no stage can have."""
    for words, (holds, keys) in RANGES.items():
        for key in keys.split():
            x = getattr(options, key, None)
            if x is not None and not holds(x):
                yield Problem(message=f"`stages.{name}.options.{key}` is {x:g}, and must be {words}")


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
