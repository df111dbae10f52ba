"""Find a stage, an engine or a launcher by name: the file is the registration."""

import difflib
import functools
import importlib
import pkgutil
from types import ModuleType

from orchestrator.errors import ConfigError

KINDS = {"jobs": "stage kind", "jobs.engines": "engine", "launch": "launcher"}


@functools.cache
def available(package: str) -> list[str]:
    """Names of the modules directly in ``package``; its subpackages are shared code, not plug-ins."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.ispkg and m.name[0] != "_")


def find(package: str, name: str) -> ModuleType:
    """Import ``<package>.<name>``.

    Raises:
        ConfigError: there is no such module; the hint names the nearest.
    """
    names = available(package)
    if name not in names:
        raise ConfigError(f"no {KINDS[package]} `{name}`", hint=did_you_mean(name, names))
    return importlib.import_module(f"{package}.{name}")


def did_you_mean(name: str, names: list[str]) -> str:
    """A hint: the names that begin so, the one that was meant, or all there are."""
    near = [n for n in names if name and n.startswith(name)] or difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean {' or '.join(f'`{n}`' for n in near)}?"
    return "one of: " + ", ".join(f"`{n}`" for n in names)
