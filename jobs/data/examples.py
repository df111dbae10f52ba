"""Examples for tuning, from JSONL: demonstrations, ranked responses, prompts. One object a line.

    {"prompt": ..., "response": "..."}              a demonstration, for `sft`
    {"messages": [{"role": ..., "content": ...}]}   the same, of several turns
    {"prompt": ..., "responses": ["best", ...]}     ranked, best first, for `reward` and `dpo`; perhaps with a `kind`
    {"prompt": ...}                                 for `ppo`; other keys are handed to a rule as they are

A prompt is a text or a list of turns. A line that is not like that is an error with its number; what
cannot be used, such as an empty response or a prompt without room for an answer, is counted and left out.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jobs.data.bpe import file_sha256
from jobs.data.chat import Chat, Encoded, as_text, turns_of
from jobs.data.functions import Split, functions
from jobs.data.order import GOLDEN, key, mix_bits, permute
from orchestrator.errors import DataError
from orchestrator.registry import did_you_mean
from orchestrator.spec import DataSpec

BUILTIN = "builtin:"
LENGTHS = "are `model.seq_len`, or `max_prompt` and `max_response` of these examples, too short?"


@dataclass(frozen=True, kw_only=True)
class Files:
    """JSONL files, or `builtin:` names, and how many tokens what is taken from them may have (ExamplesSpec)."""

    names: list[str]
    max_prompt: int | None = None
    max_response: int | None = None


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Responses to one prompt, best first, each with the prompt before it."""

    responses: list[Encoded]
    kind: str = ""  # what the line says of itself: accuracy is told by kind too


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a policy is asked, and the line it came from."""

    ids: list[int]
    line: dict[str, Any]


def demonstrations(files: Files, chat: Chat, *, longest: int, left_out: Counter[str]) -> list[Encoded]:
    """Conversations of at most ``longest`` tokens; longer ones are cut, which ``left_out`` counts too."""
    found = []
    for where, line in read(files.names):
        with _named(where, line, "`prompt` and `response`, or `messages`"):
            before = [] if "messages" in line else turns_of(line["prompt"])
            turns = [*before, _answer(line["response"])] if before else turns_of(line["messages"])
            encoded = _encoded(chat, turns, len(before), files, longest, left_out)
        if encoded:
            found.append(encoded)
    return _some(found, files, left_out)


def ranked(files: Files, chat: Chat, *, longest: int, left_out: Counter[str]) -> list[Ranked]:
    """Responses by rank. One that is equal to a better one, once encoded and cut, says nothing and is left out."""
    found = []
    for where, line in read(files.names):
        with _named(where, line, "`prompt` and `responses`"):
            before, responses = turns_of(line["prompt"]), line["responses"]
            if not isinstance(responses, list) or len(responses) < 2:
                raise ValueError("`responses` must be a list of at least 2")
            turns = [[*before, _answer(r)] for r in responses]
            fitting = [_encoded(chat, t, len(before), files, longest, left_out) for t in turns]
        encoded = [e for e in fitting if e]
        distinct = [e for i, e in enumerate(encoded) if e not in encoded[:i]]
        left_out["equal responses"] += len(encoded) - len(distinct)
        if len(distinct) > 1:
            found.append(Ranked(responses=distinct, kind=str(line.get("kind", ""))))
    return _some(found, files, left_out)


def prompts(files: Files, chat: Chat, *, longest: int, left_out: Counter[str]) -> list[Prompt]:
    """Prompts of at most ``longest`` tokens, up to where the model is to write."""
    found = []
    for where, line in read(files.names):
        with _named(where, line, "`prompt`"):
            ids = chat.prompt(turns_of(line["prompt"]))
        if not ids:
            left_out["empty prompts"] += 1
        elif len(ids) > min(longest, files.max_prompt or longest):
            left_out["prompts too long"] += 1
        else:
            found.append(Prompt(ids=ids, line=line))
    return _some(found, files, left_out)


def answered(files: Files, chat: Chat, *, longest: int, left_out: Counter[str]) -> list[Prompt]:
    """Prompts of lines that have a response too, where the two have at most ``longest`` tokens, or are cut to that."""
    found = []
    for where, line in read(files.names):
        with _named(where, line, "`prompt` and `response`"):
            before = turns_of(line["prompt"])
            turns = [*before, _answer(line["response"])]
            encoded = _encoded(chat, turns, len(before), files, longest, left_out)
        if encoded:
            found.append(Prompt(ids=chat.prompt(before), line=line))
    return _some(found, files, left_out)


def read(files: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line with its file and number. Raises DataError for one that is no JSON object."""
    for name in files:
        if name.startswith(BUILTIN):
            yield from _builtin(name)
            continue
        try:
            with open(name, "rb") as f:
                for number, raw in enumerate(f, 1):
                    if not raw.isspace():
                        yield f"`{name}`, line {number}", _object(f"`{name}`, line {number}", raw)
        except OSError as e:
            raise DataError(f"`{name}`: {e.strerror}", hint="is the path right, and readable from here?") from e


def files_of(data: DataSpec, name: str, split: Split) -> Files:
    """The files of the examples ``name``. Raises DataError where the experiment has none of that name."""
    if name not in data.examples:
        raise DataError(f"no examples `{name}` in `data.examples`", hint=did_you_mean(name, [*data.examples]))
    spec = data.examples[name]
    given = spec.train if split == "train" else spec.val
    made = [str(Path(data.folder) / f"{name}-{split}.jsonl")]
    return Files(names=given or made, max_prompt=spec.max_prompt, max_response=spec.max_response)


def digests(data: DataSpec, name: str) -> dict[str, str]:
    """SHA-256 of each file of the examples ``name``, of both splits; one that is not there is left out."""
    files = [file for split in get_args(Split) for file in files_of(data, name, split).names]
    return {file: _digest(file) for file in files if file.startswith(BUILTIN) or Path(file).is_file()}


def fingerprint(files: Files, chat: Chat, *what: object) -> str:
    """A hash of the examples, of how they are encoded, and of ``what`` else decides the order of samples."""
    taken = [[_digest(name) for name in files.names], files.max_prompt, files.max_response]
    return hashlib.sha256(json.dumps([*taken, chat.sha256, *what]).encode()).hexdigest()


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of [0, count): the order of ``epoch``."""
    keys = np.repeat(mix_bits(key(seed, "examples") + np.array([epoch], np.uint64) * GOLDEN), count)
    return permute(np.arange(count, dtype=np.uint64), count, keys).astype(np.int64)


def _digest(file: str) -> str:
    if file.startswith(BUILTIN):
        return hashlib.sha256(json.dumps([line for _, line in _builtin(file)]).encode()).hexdigest()
    return file_sha256(Path(file))


def _builtin(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    splits: dict[str, Split] = {f"{BUILTIN}functions-{split}": split for split in get_args(Split)}
    if name not in splits:
        raise DataError(f"no examples `{name}`", hint=did_you_mean(name, [*splits]))
    for number, line in enumerate(functions(splits[name]), 1):
        yield f"`{name}`, line {number}", dict(line)


def _answer(response: Any) -> dict[str, str]:
    if not isinstance(response, str):
        raise ValueError(f"a response must be a text, not {type(response).__name__}")  # noqa: TRY004 a wrong line
    return {"role": "assistant", "content": as_text(response)}


def _encoded(
    chat: Chat, turns: Sequence[dict[str, str]], only_read: int, files: Files, longest: int, left_out: Counter[str]
) -> Encoded | None:
    """``turns``, cut to ``longest`` tokens; None where they are longer than ``files`` may have, or teach nothing."""
    encoded = chat.encode(turns, only_read=only_read)
    response = sum(encoded.learn)
    if not any(turn["content"] for turn in turns[only_read:] if turn["role"] == "assistant"):
        left_out["empty responses"] += 1
        return None
    if files.max_prompt and encoded.learn.index(1) > files.max_prompt:
        left_out["prompts too long"] += 1
        return None
    if files.max_response and response > files.max_response:
        left_out["responses too long"] += 1
        return None
    if len(encoded.ids) <= longest:
        return encoded
    cut = Encoded(ids=encoded.ids[:longest], learn=encoded.learn[:longest])
    left_out["truncated" if any(cut.learn) else "prompts too long"] += 1
    return cut if any(cut.learn) else None


def _some(found: list[Any], files: Files, left_out: Counter[str]) -> list[Any]:
    if not found:
        why = ", ".join(f"{n} {what}" for what, n in left_out.items()) or "they are empty"
        raise DataError(f"nothing to learn from in `{'`, `'.join(files.names)}`: {why}", hint=LENGTHS)
    return found


def _object(where: str, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError as e:
        raise DataError(f"{where}: not UTF-8 at byte {e.start:,} of the line", hint="convert it, with `iconv`") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: no JSON ({e})", hint="each line must be one JSON object; was it cut off?") from e
    if not isinstance(value, dict):
        raise DataError(f"{where}: no object but {type(value).__name__}", hint="each line must be a JSON object")
    return value


@contextmanager
def _named(where: str, line: dict[str, Any], wanted: str) -> Iterator[None]:
    """Say of what is wrong with ``line`` where that is, and what is ``wanted`` of a line here."""
    try:
        yield
    except DataError as e:
        raise DataError(f"{where}: {e}", hint=e.hint) from e
    except (KeyError, ValueError) as e:
        problem = f"no `{e.args[0]}`" if isinstance(e, KeyError) else str(e)
        keys = ", ".join(f"`{k}`" for k in line) or "nothing"
        raise DataError(f"{where}: {problem}; there is {keys}", hint=f"a line here has {wanted}") from e
