"""Conversations as tokens: the template, the end of a turn, and what is learned of them.

One template serves all stages and the use of the model: text that the user writes and text that the model
writes are encoded apart, so that a prompt has the same tokens in training and in generation, whatever
follows it. Each turn of the model ends with the end token (Ouyang et al. 2022, arXiv:2203.02155, appendix C,
train on the response; what stands before it is only read).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.data.bpe import file_sha256, load, vocab_size
from jobs.data.packed import read_dataset
from orchestrator.errors import DataError
from orchestrator.registry import did_you_mean
from orchestrator.spec import ChatSpec, DataSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One conversation. ``learn`` is 1 where a token is the model's own to write, its end token included."""

    ids: list[int]
    learn: list[int]


class Chat:
    """A tokenizer and a template."""

    def __init__(self, tokenizer: Tokenizer, spec: ChatSpec, *, end: int, tokenizer_sha256: str) -> None:
        self.tokenizer, self.spec, self.end, self.tokenizer_sha256 = tokenizer, spec, end, tokenizer_sha256
        self.special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        self.sha256 = hashlib.sha256(json.dumps([tokenizer_sha256, asdict(spec)]).encode()).hexdigest()

    @classmethod
    def open(cls, data: DataSpec) -> Chat:
        """The template of ``data`` with the tokenizer it was prepared with.

        Raises:
            DataError: the tokenizer is missing, or has no such end token.
        """
        path = Path(data.tokenizer or Path(data.folder) / "tokenizer.json")
        if not data.tokenizer:
            read_dataset(data.folder)
        tokenizer = load(path)
        end = tokenizer.token_to_id(data.chat.end)
        if end is None:
            raise DataError(
                f"tokenizer `{path}` has no token `{data.chat.end}`",
                hint="set `data.chat.end` to the token that ends a text there",
            )
        return cls(tokenizer, data.chat, end=end, tokenizer_sha256=file_sha256(path))

    def encode(self, turns: Sequence[Mapping[str, str]], *, only_read: int = 0) -> Encoded:
        """Tokens of ``turns``, each with `role` and `content`; of the first ``only_read`` nothing is learned.

        Raises DataError for a role the template has not.
        """
        ids: list[int] = []
        learn: list[int] = []
        for number, turn in enumerate(turns):
            before, content, after = self._render(turn)
            if turn["role"] == "assistant":
                read, write = self._ids(before), [*self._said("", content, after), self.end]
            else:
                read, write = self._said(before, content, after), []
            ids += read + write
            learn += [0] * len(read) + [int(number >= only_read)] * len(write)
        return Encoded(ids=ids, learn=learn)

    def prompt(self, turns: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of ``turns`` up to where the model is to write."""
        before = self._template("assistant").partition("{content}")[0]
        return [*self.encode(turns).ids, *self._ids(before)]

    def text(self, ids: Sequence[int]) -> str:
        """What the model wrote: its end token left out, and what the template has before that."""
        said: str = self.tokenizer.decode([i for i in ids if i != self.end], skip_special_tokens=False)
        ended = bool(ids) and ids[-1] == self.end
        return said.removesuffix(self.behind_answers) if ended else said

    @property
    def behind_answers(self) -> str:
        """What the template has between an answer and the end token."""
        return self._template("assistant").partition("{content}")[2]

    def _said(self, before: str, content: str, after: str) -> list[int]:
        """Tokens of a turn. A special token that is written in its content is text: it must not end a turn."""
        if not any(token in content for token in self.special):
            return self._ids(before + content + after)
        self.tokenizer.encode_special_tokens = True
        try:
            written = self._ids(content)
        finally:
            self.tokenizer.encode_special_tokens = False
        return [*self._ids(before), *written, *self._ids(after)]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids if text else []
        return ids

    def _render(self, turn: Mapping[str, str]) -> tuple[str, str, str]:
        before, _, after = self._template(turn["role"]).partition("{content}")
        return before, turn["content"], after

    def _template(self, role: str) -> str:
        templates = {"system": self.spec.system, "user": self.spec.user, "assistant": self.spec.assistant}
        if role not in templates:
            raise DataError(f"no role `{role}` in a conversation", hint=did_you_mean(role, [*templates]))
        return templates[role]


def require_rows(tokenizer: Tokenizer, file: Path, vocab: int) -> None:
    """Raise DataError where ``tokenizer``, of ``file``, has more tokens than a model of ``vocab`` has rows for."""
    if (found := vocab_size(tokenizer)) > vocab:
        raise DataError(
            f"tokenizer `{file}` has {found:,} tokens, and `model.vocab` is {vocab:,}: the others have no row",
            hint=f"`model.vocab` may be {found} and more; `resize_token_embeddings({found})` of transformers gives its "
            "models the rows",
        )


def turns_of(prompt: Any) -> list[dict[str, str]]:
    """The turns of a prompt: a text is what the user says.

    Raises:
        ValueError: it is neither a text nor a list of turns.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": as_text(prompt)}]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError("it must be a text or a list of turns")
    for turn in prompt:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ValueError("each turn must have a `role` and a `content`")
        as_text(turn["content"])
    return prompt


def as_text(text: str) -> str:
    """``text``, which no tokenizer takes where it has half a surrogate pair: JSON can say one. Raises ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"character {e.start + 1} of a text is half a surrogate pair, {text[e.start]!a}") from e
    return text
