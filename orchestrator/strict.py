"""Values with their places -> a frozen dataclass, strictly; errors in the user's words.

OmegaConf's structured configs (https://omegaconf.readthedocs.io) decide what a value may be: no unknown
key, no missing value, no other type. It names neither file nor line, so the words and the place are ours.
"""

import dataclasses
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ConfigError, together
from orchestrator.registry import did_you_mean
from orchestrator.spec import Experiment

GROUPS = {"model": "model=gpt3-125m", "cluster": "cluster=local"}  # mandatory, and shipped
Key = tuple[str, ...]  # a dotted key, split


@dataclass(frozen=True)
class Origin:
    """One setting of one value."""

    value: Any
    place: str  # `configs/demo.yaml:7`, or the override; empty: nowhere to point at


Origins = dict[Key, list[Origin]]  # every value ever given to a key; the last one counts


def flatten(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every value below ``value`` that is no mapping, or an empty one, with its key."""
    if not isinstance(value, dict) or (not value and key):
        yield key, value
        return
    for name, below in value.items():
        yield from flatten(below, (*key, str(name)))


def put(origins: Origins, key: Key, origin: Origin) -> None:
    """Let ``origin`` win at ``key``. A value takes the place of a mapping, or the reverse; ``{}`` adds nothing."""
    below = [k for k in origins if len(k) > len(key) and k[: len(key)] == key]
    if origin.value == {} and below:
        return
    for k in [*below, *(key[:n] for n in range(1, len(key)))]:
        origins.pop(k, None)
    origins.setdefault(key, []).append(origin)


def _tree(origins: Origins, skip: int = 0) -> dict[str, Any]:
    """The values that count, as nested mappings, without the first ``skip`` parts of their keys."""
    tree: dict[str, Any] = {}
    for key, history in origins.items():
        *above, last = key[skip:] or ("",)
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        if last:
            node[last] = history[-1].value
    return tree


def convert(cls: type, origins: Origins, prefix: Key = ()) -> Any:
    """The values below ``prefix`` as a ``cls``, strictly. Raises ConfigError with the places of all bad ones."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def merge(tree: dict[str, Any]) -> Any:
        return OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.create(tree))

    try:
        return OmegaConf.to_object(merge(_tree(origins, len(prefix))))
    except OmegaConfBaseException as error:
        stages = {k[1] for k in origins if k[0] == "stages" and len(k) > 1}
        bad: dict[Key, ConfigError] = {}
        for key, history in origins.items():
            try:
                merge(_tree({key: history}, len(prefix)))
            except OmegaConfBaseException:
                at, problem = _bad_value(cls, key, history[-1], len(prefix), stages)
                bad.setdefault(at, problem)  # one for all keys below a name that is none
        if bad:
            raise together(list(bad.values())) from None
        full = (*prefix, *(error.full_key or "").split("."))
        raise _incomplete(full, str(error).splitlines()[0], origins) from None


def _bad_value(cls: type, key: Key, origin: Origin, skip: int, stages: Collection[str]) -> tuple[Key, ConfigError]:
    """Why ``key`` cannot have the value of ``origin``: there is no such key, or it has another type; and which of its
    parts say so."""
    dotted, place = ".".join(key), f"{origin.place}: " if origin.place else ""
    type_, names, at = _type_at(cls, key[skip:])
    if type_ is None and names:
        unknown = key[: skip + at + 1]
        hint = elsewhere(key, stages) or did_you_mean(unknown[-1], names)
        return unknown, ConfigError(f"{place}no key `{'.'.join(unknown)}`", hint=hint)
    if type_ is None:
        above = ".".join(key[: skip + at])
        text = f"{place}`{above}` is one value, so there is no `{dotted}`"
        return key[: skip + at], ConfigError(text, hint=f"set `{above}` itself")
    value, hint = origin.value, ""
    if type_ in (int, int | None) and isinstance(value, float) and value.is_integer():
        hint = f"write it as a whole number: `{int(value)}`"
    return key, ConfigError(f"{place}`{dotted}` must be {_describe(type_)}, not {show(value)}", hint=hint)


def _incomplete(key: Key, text: str, origins: Origins) -> ConfigError:
    """A mandatory value is missing, or an interpolation leads nowhere."""
    dotted = ".".join(key)
    if "missing mandatory" not in text:
        place = origins[key][-1].place + ": " if key in origins else ""
        return ConfigError(f"{place}`{dotted}`: {text}", hint="`${key}` takes the value of another key")
    if key in origins:
        return ConfigError(
            f"{origins[key][-1].place}: `{dotted}` is still to be filled in", hint="put a value for `???`"
        )
    beside = next((h[-1].place for k, h in origins.items() if k[: len(key) - 1] == key[:-1]), "")
    hint = f"set `{dotted}`"
    if dotted in GROUPS:
        hint = f"add one to `defaults`, or to the command: `{GROUPS[dotted]}`"
    return ConfigError(f"{beside + ': ' if beside else ''}`{dotted}` is missing", hint=hint)


def _type_at(cls: Any, key: Key) -> tuple[Any, list[str], int]:
    """The type at ``key``; or None, the names there are, and the index of the part that is none of them."""
    for i, part in enumerate(key):
        if dataclasses.is_dataclass(cls):
            hints = typing.get_type_hints(cls)
            if part not in hints:
                return None, list(hints), i
            cls = hints[part]
        elif typing.get_origin(cls) is dict:
            cls = typing.get_args(cls)[1]
        elif cls is not Any:
            return None, [], i
    return cls, [], len(key)


def _describe(type_: Any) -> str:
    """A type in the user's words."""
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    args = typing.get_args(type_)
    if type_ in plain:
        return plain[type_]
    if typing.get_origin(type_) is typing.Literal:
        return "one of " + ", ".join(f"`{a}`" for a in args)
    if typing.get_origin(type_) is list:
        return f"a list of {_describe(args[0])}"
    if typing.get_origin(type_) is tuple:
        return f"a list of {len(args)}, each {_describe(args[0])}"
    if args and type(None) in args:
        return " or ".join(_describe(a) for a in args)
    return "a mapping"


def elsewhere(key: Key, stages: Collection[str]) -> str:
    """A hint, if ``key`` is the end of a longer one: `parallel.nodes` of `stages.<name>.parallel.nodes`."""
    if key[0] in stages:
        return f"did you mean `{'.'.join(('stages', *key))}`?"
    for above in (("stages", "<stage>"), ("model",), ("cluster",), ("data",), ("tracking",)):
        if _type_at(Experiment, (*above, *key))[0] is not None:
            return f"did you mean `{'.'.join((*above, *key))}`?"
    return ""


def show(value: Any) -> str:
    """``value`` as it stands in YAML."""
    if isinstance(value, str):
        return f"`{value}`"
    if isinstance(value, list | tuple):
        return f"[{', '.join(show(v) for v in value)}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
