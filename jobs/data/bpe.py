"""Byte-level BPE tokenizers (Radford et al. 2019, section 2.2), by Hugging Face's `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import run
from orchestrator.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def train(texts: Iterable[str], *, vocab: int, end_of_text: str) -> Tokenizer:
    """A tokenizer of at most ``vocab`` tokens, ``end_of_text`` included.

    Raises DataError where ``vocab`` does not even hold all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab <= len(alphabet):
        raise DataError(
            f"`model.vocab` is {vocab}; all bytes and `{end_of_text}` need {len(alphabet) + 1}",
            hint="512 does for a demonstration, GPT-3 has 50257",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=alphabet, special_tokens=[end_of_text], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def file_sha256(path: Path) -> str:
    """The hash of a file. Raises DataError where it cannot be read."""
    try:
        return run.file_sha256(path)
    except OSError as e:
        raise DataError(f"`{path}`: {e.strerror}", hint="is the path right, and readable from this machine?") from e


def load(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json. Raises DataError where it is unreadable."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises nothing narrower
        raise DataError(f"tokenizer `{path}`: {e}", hint="it must be a `tokenizer.json` of Hugging Face's") from e


def vocab_size(tokenizer: Tokenizer) -> int:
    """How many tokens a model needs for it: the largest id plus one."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1
