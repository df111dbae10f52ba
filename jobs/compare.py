"""Stage `compare`: demonstrations become ranked responses, for `reward` and `dpo` to learn from.

A demonstrated response stands above a damaged copy of itself (jobs/data/damage.py), and of several answers that the
policy of `init_from` gives to one prompt, the better stands above the worse, as a rule sees them (Ouyang et al. 2022,
arXiv:2203.02155, section 3.4, where people rank them). Each line says its `kind`: the damage, or `sampled`.

    <data.folder>/<out>-train.jsonl -val.jsonl   the lines; held-out prompts stay held out
    <data.folder>/<out>.json                     what they were made of, and their SHA-256

Each step samples answers to `global_batch` prompts, and the last pass to `eval_samples` held-out ones. Nothing is saved
in between: an attempt that was stopped begins again, and finds the same, on any number of ranks.

Metrics of a step: `compare/score` is the mean of the rule, `compare/length` that of the tokens of an answer, end token
included, `compare/ranked` the share of prompts whose answers could be told apart.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, get_args

from jobs.data.damage import KINDS, Kind, damaged
from jobs.data.functions import Split
from jobs.runtime.job import Job
from orchestrator.errors import ConfigError, DataError
from orchestrator.run import check_name, read_json, write_atomic, write_json

if TYPE_CHECKING:
    from jobs.data.chat import Chat
    from jobs.data.examples import Prompt
    from jobs.data.rules import Rule
    from jobs.nn.gpt import GPT
    from orchestrator.spec import DataSpec

PER_GPU = True
SPLITS: tuple[Split, ...] = get_args(Split)
SAMPLED = "sampled"  # the kind of what is ranked by rule
log = logging.getLogger(__name__)

Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `stages.<name>.options` may say."""

    examples: str = "demonstrations"  # of `data.examples`
    out: str = "preferences"  # of `data.examples` too, where it names no files
    damage: list[Kind] = field(default_factory=lambda: list(KINDS))
    damaged: int | None = None  # prompts of each split whose response is damaged; null: all
    samples: int = 2  # answers to each prompt; 0: none, and no policy is needed
    rule: str = "jobs.data.functions:quality"  # `package.module:function` that ranks them
    margin: float = 0.05  # answers that the rule sees no further apart are no pair
    max_tokens: int = 128  # of an answer
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the policy said to one prompt."""

    number: int
    line: Line
    texts: list[str]
    scores: list[float]
    lengths: list[int]  # tokens


def run(job: Job) -> dict[str, float]:
    """Write the files, unless they are whole."""
    from jobs.data import rules
    from jobs.data.chat import Chat
    from jobs.data.examples import files_of, fingerprint
    from jobs.nn.gpt import GPT
    from jobs.runtime import dist, start

    data, options, stage = job.experiment.data, job.options, job.stage
    if options.samples == 1:
        raise ConfigError(
            f"stage `{job.run.stage}`: one sample is no pair", hint="`options.samples` is 0, or 2 and more"
        )
    if options.samples and not stage.init_from:
        raise ConfigError(f"stage `{job.run.stage}` has no policy", hint="set its `init_from`, or `options.samples: 0`")
    policy_of = stage.init_from if options.samples else None
    targets = targets_of(data, options.out)
    chat, rule = Chat.open(data), rules.load(options.rule)
    examples = {split: demonstrated(job, chat, split) for split in SPLITS}
    start.meet(job)
    policy = start.frozen(job, GPT, policy_of, chat.tokenizer_sha256) if policy_of else None
    made_of = {
        "options": asdict(options),
        "stage": [stage.seed, stage.steps, stage.global_batch, stage.eval_samples],
        "examples": [fingerprint(files_of(data, options.examples, split), chat) for split in SPLITS],
        "policy": job.record.loaded.get(policy_of) if policy_of else None,
        "rule": rules.source_sha256(options.rule) if policy_of else None,
    }
    if all(dist.gather(found_whole(targets, made_of))):
        log.info("found whole: `%s`", "`, `".join(map(str, targets.values())))
        return {}
    lines = {split: below_demonstrations(examples[split], options, stage.seed) for split in SPLITS}
    if policy:
        with policy.sampler() as model:
            for split, told in asked(job, model, chat, rule, examples).items():
                lines[split] += by_rule(told, options.margin)
    if not all(lines.values()):
        raise DataError("no responses could be told apart", hint="is `options.margin` too wide, or `damage` empty?")
    if job.ranks.rank == 0:
        write(targets, lines, made_of)
    dist.barrier()
    return {}


def demonstrated(job: Job, chat: Chat, split: Split) -> list[Prompt]:
    """The demonstrations of ``split``, shuffled."""
    from jobs.data.examples import answered, files_of, shuffled

    left_out: Counter[str] = Counter()
    files = files_of(job.experiment.data, job.options.examples, split)
    found = answered(files, chat, longest=job.experiment.model.seq_len, left_out=left_out)
    log.info("%d demonstrations to compare with in `%s`; left out: %s", len(found), split, dict(left_out))
    return [found[i] for i in shuffled(len(found), job.stage.seed, 0)]


def below_demonstrations(examples: Sequence[Prompt], options: Options, seed: int) -> list[Line]:
    """Each response above a damaged copy of itself, where damage shows."""
    lines = []
    for number, example in enumerate(examples[: options.damaged]):
        prompt, response = example.line["prompt"], example.line["response"]
        other = examples[(number + 1) % len(examples)].line["prompt"]
        worse = damaged(_said(prompt), response, _said(other), kinds=options.damage, seed=seed, number=number)
        if worse:
            lines.append({"prompt": prompt, "responses": [response, worse[1]], "kind": worse[0]})
    return lines


def asked(
    job: Job, model: GPT, chat: Chat, rule: Rule, examples: dict[Split, list[Prompt]]
) -> dict[Split, list[Answers]]:
    """What the policy answers, by prompt: each step a batch, then the held-out ones. Collective."""
    from jobs.nn.rollout import HELD_OUT
    from jobs.runtime import dist, start
    from jobs.runtime.faults import Stopped

    room = job.experiment.model.seq_len + 1 - job.options.max_tokens
    fitting = {split: [e for e in examples[split] if 0 < len(e.ids) <= room] for split in SPLITS}
    log.info("%d of %d prompts leave room for an answer", len(fitting["train"]), len(examples["train"]))
    if not all(fitting.values()):
        raise DataError(f"no prompt has at most {room} tokens, and leaves room", hint="lower `options.max_tokens`")
    job = start.limited_to(job, len(fitting["train"]), 1.0)
    found: dict[Split, list[Answers]] = {"train": [], "val": []}
    tokens = 0
    for step in range(job.stage.steps):
        job.mark("step", step)
        first = step * job.stage.global_batch
        now = batch_of_answers(job, model, chat, rule, fitting["train"][first : first + job.stage.global_batch], first)
        found["train"] += now
        tokens += round(sum(sum(a.lengths) for a in now))
        values = {
            "compare/score": fmean(s for a in now for s in a.scores),
            "compare/length": fmean(n for a in now for n in a.lengths),
            "compare/ranked": len(by_rule(now, job.options.margin)) / len(now),
        }
        job.report(step + 1, values, tokens=tokens)
        if told := [cause for cause in dist.gather(job.stop.cause) if cause]:
            raise Stopped(told[0], step + 1)
    job.mark("evaluate")
    held_out = fitting["val"][: job.stage.eval_samples]
    found["val"] = batch_of_answers(job, model, chat, rule, held_out, HELD_OUT)
    return found


def batch_of_answers(
    job: Job, model: GPT, chat: Chat, rule: Rule, prompts: Sequence[Prompt], first: int
) -> list[Answers]:
    """The answers to ``prompts``, which are numbered from ``first``, from all data ranks, in order. Collective."""
    from jobs.nn.rollout import Sampling, generate
    from jobs.runtime import dist

    options, micro = job.options, job.stage.parallel.micro_batch
    sampling = Sampling(max_tokens=options.max_tokens, temperature=options.temperature)
    mine: list[Answers] = []
    for start in range(job.place.data * micro, len(prompts), job.place.data_size * micro):
        job.mark()
        few = prompts[start : start + micro]
        ids = [p.ids for p in few for _ in range(options.samples)]
        number = (first + start) * options.samples
        said = generate(model, ids, sampling, end=chat.end, seed=job.stage.seed, first=number).responses()
        for i, prompt in enumerate(few):
            own = said[i * options.samples : (i + 1) * options.samples]
            texts = [chat.text(response) for response in own]
            scores = [rule(prompt.line["prompt"], text, prompt.line) for text in texts]
            at = first + start + i
            mine.append(Answers(number=at, line=prompt.line, texts=texts, scores=scores, lengths=[*map(len, own)]))
    shared = mine if not job.place.tensor else []  # peers say the same
    return sorted((a for of_rank in dist.gather(shared) for a in of_rank), key=lambda a: a.number)


def by_rule(answers: Sequence[Answers], margin: float) -> list[Line]:
    """The answers to each prompt, best first, less those that are within ``margin`` of a better one."""
    lines = []
    for a in answers:
        kept: list[int] = []
        for i in sorted(range(len(a.texts)), key=lambda i: -a.scores[i]):
            if not kept or a.scores[kept[-1]] - a.scores[i] > margin:
                kept.append(i)
        if len(kept) > 1:
            lines.append({"prompt": a.line["prompt"], "responses": [a.texts[i] for i in kept], "kind": SAMPLED})
    return lines


def targets_of(data: DataSpec, out: str) -> dict[Split, Path]:
    """The files to write. Raises DataError where the experiment has no such examples, or has files for them."""
    from jobs.data.examples import files_of

    files_of(data, check_name(out, "examples"), "train")
    if data.examples[out].train or data.examples[out].val:
        raise DataError(
            f"`data.examples.{out}` names files, and this stage is to make them",
            hint="leave its `train` and `val` out, or set `options.out` to examples that have none",
        )
    return {split: Path(files_of(data, out, split).names[0]) for split in SPLITS}


def found_whole(targets: dict[Split, Path], made_of: dict[str, Any]) -> bool:
    """Whether the files are there, made of the same. Raises DataError for a file that no such stage has written."""
    from jobs.data.bpe import file_sha256

    record = read_json(_record(targets), {"files": {}})
    there = [path for path in targets.values() if path.exists()]
    foreign = [path for path in there if record.get("files", {}).get(path.name) != file_sha256(path)]
    if "files" not in record:  # such as `dataset.json`, of `prepare`
        foreign.append(_record(targets))
    if foreign:
        raise DataError(
            f"`{foreign[0]}` was not written by this stage, or was changed since, and is not replaced",
            hint="move it away; or name it in `data.examples`, and do without this stage",
        )
    return len(there) == len(targets) and record["made_of"] == json.loads(json.dumps(made_of))


def write(targets: dict[Split, Path], lines: dict[Split, list[Line]], made_of: dict[str, Any]) -> None:
    """Replace the files. The record comes first, so that a file that it names is ours whenever we were stopped."""
    texts = {split: "".join(json.dumps(line) + "\n" for line in lines[split]) for split in SPLITS}
    for path in targets.values():
        path.unlink(missing_ok=True)
    hashes = {targets[split].name: hashlib.sha256(texts[split].encode()).hexdigest() for split in SPLITS}
    write_json(_record(targets), {"made_of": made_of, "files": hashes})
    for split in SPLITS:
        write_atomic(targets[split], texts[split])
        log.info("`%s`: %s", targets[split], dict(Counter(line["kind"] for line in lines[split])))


def _record(targets: dict[Split, Path]) -> Path:
    """`<out>.json`, beside the files it speaks of."""
    train = targets["train"]
    return train.with_name(train.name.removesuffix("-train.jsonl") + ".json")


def _said(prompt: str | list[dict[str, str]]) -> str:
    """The text of a prompt, or of its last turn."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
