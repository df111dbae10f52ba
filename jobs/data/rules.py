"""Rewards by rule: a function that the config names, ours or the user's own, run as it is.

    def rule(prompt: str | list[dict], response: str, line: dict) -> float

``prompt`` is the one of the line, text or turns, ``response`` what a model wrote, without its end token, and ``line``
the whole object of the examples, whose other keys are the rule's: an answer to compare with, say.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from jobs.data.bpe import file_sha256
from orchestrator.errors import ConfigError, DataError

Rule = Callable[[Any, str, Mapping[str, Any]], float]
SHOWN = 80  # characters of a prompt in an error


def load(name: str) -> Rule:
    """The function ``name``, `package.module:function`. Where it fails, or gives no finite number, it is a DataError.

    Raises:
        ConfigError: there is no such module or function, or the module cannot be imported.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as e:  # whatever the user's own module raises
        raise ConfigError(
            f"no rule `{name}`: {type(e).__name__}: {e}",
            hint="name it `package.module:function`; install it, or put its folder on PYTHONPATH: on Slurm by "
            "`cluster.slurm.environment.PYTHONPATH`, else before `orch submit`",
        ) from e

    def rule(prompt: Any, response: str, line: Mapping[str, Any]) -> float:
        try:
            value = found(prompt, response, line)
        except Exception as e:
            raise _failed(name, prompt, f"raised {type(e).__name__}: {e}") from e
        if not isinstance(value, Real) or not math.isfinite(value):
            raise _failed(name, prompt, f"returned `{value!r}`, which is no finite number")
        return float(value)

    return rule


def source_sha256(name: str) -> str:
    """The SHA-256 of the file of rule ``name``, which is loaded already; empty where its module has none."""
    file = getattr(importlib.import_module(name.partition(":")[0]), "__file__", None)
    return file_sha256(Path(file)) if file else ""


def _failed(name: str, prompt: Any, what: str) -> DataError:
    shown = repr(prompt)
    shown = shown if len(shown) <= SHOWN else shown[:SHOWN] + "..."
    return DataError(f"rule `{name}` {what}; the prompt was {shown}", hint="a rule must say 0 of what it cannot judge")
