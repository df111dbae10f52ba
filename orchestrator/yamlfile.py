"""YAML as users expect it, with the line of every key; nothing but plain data.

PyYAML reads YAML 1.1, where `1e-5` is text, `24:00:00` a number to base 60 and `no` false. Numbers and booleans
here are YAML 1.2's (https://yaml.org/spec/1.2.2/, section 10.3), with `_` between digits; dates stay text.
A key given twice is an error, as YAML asks for and PyYAML does not check.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import ConfigError

Lines = dict[tuple[str, ...], int]  # the line of every key

_NUMBERS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """SafeLoader with the numbers and booleans of YAML 1.2."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML declares it
        first: [(tag, r) for tag, r in resolvers if tag.rpartition(":")[2] not in (*_NUMBERS, "timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for _name, (_pattern, _first) in _NUMBERS.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def load(file: Path) -> tuple[dict[str, Any], Lines]:
    """The mapping in ``file``, and the line of each of its keys.

    Raises:
        ConfigError: the file cannot be read, is no YAML, is no mapping, or gives a key twice.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read `{place_of(file)}`: {e}") from e
    lines: Lines = {}
    value = _load(text, place_of(file), lines, in_file=True)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{place_of(file)}:1: a config is a mapping of `key: value`, not `{str(value)[:40]}`")
    return value or {}, lines


def parse(text: str, place: str) -> Any:
    """The value that ``text`` is in YAML; ``place`` stands before an error. Raises ConfigError."""
    return _load(text, place, {}, in_file=False)


def place_of(file: Path) -> str:
    """``file`` as the user would type it: relative, where it lies below the current folder."""
    path, here = file.absolute(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _load(text: str, place: str, lines: Lines, *, in_file: bool) -> Any:
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            lines.update(_keys(node, place, ()))
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{place}:{mark.line + 1}" if in_file and mark else place
        raise ConfigError(
            f"{where}: broken YAML: {getattr(e, 'problem', None) or e}",
            hint="look at this line and the one above it: brackets, quotes, `key: value` with a space, no tabs",
        ) from e
    except RecursionError:
        raise ConfigError(f"{place}: an anchor contains itself") from None


def _keys(node: yaml.Node, place: str, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    """Every key below ``node`` with its line, from 1. Raises ConfigError for a key that is there twice."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            list(_keys(item, place, above))  # for its duplicates: keys inside a list have no name of their own
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value in node.value:
        name, line = str(key_node.value), key_node.start_mark.line + 1
        if name in seen and name != "<<":
            raise ConfigError(
                f"{place}:{line}: `{'.'.join((*above, name))}` is given twice, here and in line {seen[name]}",
                hint="keep one of them",
            )
        seen[name] = line
        yield (*above, name), line
        yield from _keys(value, place, (*above, name))
