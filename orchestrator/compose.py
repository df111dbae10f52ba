"""YAML files -> one Experiment, and where each of its values came from.

Later wins: the files that `defaults` names, the file itself, then `key=value` from the command line.
The merge is ours, so that every value keeps its file and line. Groups and their swap by name follow Hydra
(https://hydra.cc/docs/advanced/defaults_list).
"""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from orchestrator import yamlfile
from orchestrator.errors import ConfigError
from orchestrator.registry import did_you_mean, find
from orchestrator.run import check_name
from orchestrator.spec import Experiment, StageSpec
from orchestrator.strict import Key, Origin, Origins, convert, elsewhere, flatten, put, show
from orchestrator.yamlfile import place_of

NAMED = {"stages": "stage", "data.sources": "data source"}  # mappings whose keys the user chooses


@dataclass(frozen=True, kw_only=True)
class Composed:
    """An experiment, and the answer to "who set this?"."""

    experiment: Experiment
    origins: Origins

    @cached_property
    def yaml(self) -> str:
        """Every field, resolved, as `orch show` prints it and ``spec.yaml`` holds it; it composes to the same again."""
        from omegaconf import OmegaConf

        return OmegaConf.to_yaml(OmegaConf.structured(self.experiment))

    def why(self, key: str) -> str:
        """Which file and line, or override, set ``key``, and what it replaced; a line for each value below it.

        Raises:
            ConfigError: there is no such key; the hint names the nearest.
        """
        leaves = _leaves(self.experiment, key)
        return "\n".join(line for leaf in leaves for line in self._story(*leaf))

    def _story(self, leaf: str, value: Any, default: str) -> Iterator[str]:
        setters = [o for k, history in self.origins.items() for o in history if ".".join(k) == leaf]
        yield f"{leaf} = {show(value)}: {setters[-1].place if setters else default}"
        for replaced in reversed(setters[:-1]):
            yield f"  instead of {show(replaced.value)}: {replaced.place}"


def compose(config: str | Path, overrides: Sequence[str] = ()) -> Composed:
    """Read ``config`` and the files its ``defaults`` name, and apply ``overrides``.

    ``config`` is a path, or the name of a shipped preset: ``gpt3-175b``. An override is ``key=value``, the
    value in YAML; ``group=name``, such as ``cluster=h100-80g``, swaps a file of ``defaults``.

    Raises:
        ConfigError: a file is missing or broken, a key unknown or given twice, a value of the wrong type.
    """
    file = find_config(config)
    swaps, settings = _split_overrides(overrides, _roots(file))
    origins: Origins = {}
    _read(file, swaps, origins)
    for key, value, place in settings:
        _check_named(key, origins, place)
        for leaf, x in flatten(value, key):
            put(origins, leaf, Origin(x, place))
    experiment = cast(Experiment, convert(Experiment, origins))
    stages = {name: _resolve_stage(name, stage, origins) for name, stage in experiment.stages.items()}
    experiment = dataclasses.replace(experiment, stages=stages)
    _check_names(experiment, origins)
    _check_chain(experiment, origins)
    return Composed(experiment=experiment, origins=origins)


def resolve_options(where: str, options: Mapping[str, Any], cls: type) -> Any:
    """``options`` as an instance of the dataclass ``cls``, as strictly as an experiment; ``where`` is their key.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type.
    """
    prefix = tuple(where.split("."))
    return convert(cls, {k: [Origin(v, "")] for k, v in flatten(dict(options), prefix)}, prefix)


def presets() -> Path:
    """The folder of configs shipped with the package: ``configs/`` of a checkout, ``_configs`` of a wheel."""
    installed = Path(__file__).parent / "_configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def copy_presets(dest: Path) -> list[Path]:
    """Copy the presets into ``<dest>/configs``, with ``cluster/mine.yaml`` to fill in; return the files written.

    Raises:
        ConfigError: one of the files exists already; nothing is written then.
    """
    files = sorted(presets().rglob("*.yaml"))
    targets = [dest / "configs" / f.relative_to(presets()) for f in files]
    taken = [t for t in targets if t.exists()]
    if taken:
        raise ConfigError(f"`{taken[0]}` exists already; nothing was written", hint="choose another folder")
    try:
        for source, target in zip(files, targets, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    except OSError as e:
        raise ConfigError(f"cannot write to `{dest}`: {e.strerror}", hint="choose a folder you may write to") from e
    return targets


# Files


def find_config(config: str | Path) -> Path:
    """The file meant by ``config``: a path, with or without ``.yaml``, else one of ``configs/``, else a preset."""
    path = Path(config).expanduser()
    if not path.name:
        raise ConfigError(f"no such config: `{config}`", hint="name a YAML file or a preset, such as `demo`")
    name = path if path.suffix in (".yaml", ".yml") else path.with_name(path.name + ".yaml")
    inside = name.relative_to("configs") if name.is_relative_to("configs") else name
    for candidate in (path, name, Path("configs") / inside, presets() / inside):
        if candidate.is_file():
            return candidate
    beside = [*name.parent.glob("*.yaml"), *Path("configs").glob("*.yaml"), *presets().glob("*.yaml")]
    raise ConfigError(f"no such config: `{config}`", hint=did_you_mean(name.stem, sorted({f.stem for f in beside})))


def _roots(file: Path) -> list[Path]:
    """Where the entries of ``defaults`` in ``file`` are looked up, first to last."""
    configs = next((p for p in file.resolve().parents if p.name == "configs"), None)
    return [file.parent, *([configs] if configs else []), presets()]


def _find_entry(name: str, file: Path, place: str) -> Path:
    """The file of one entry of ``defaults``. An entry may bear the name of ``file``: it means the next one."""
    roots = _roots(file)
    for root in roots:
        candidate = root / f"{name.removesuffix('.yaml')}.yaml"
        if candidate.is_file() and candidate.resolve() != file.resolve():
            return candidate
    group, _, stem = name.rpartition("/")
    near = sorted({f.stem for root in roots for f in (root / group).glob("*.yaml")})
    raise ConfigError(f"{place}: no config `{name}`", hint=did_you_mean(stem, near) if near else "")


def _read(file: Path, swaps: dict[str, tuple[str, str]], origins: Origins, chain: tuple[Path, ...] = ()) -> set[str]:
    """Put the values of ``file``, over those of its ``defaults``, into ``origins``; return the groups swapped."""
    here = file.resolve()
    if here in chain:
        loop = " -> ".join(f"`{place_of(f)}`" for f in (*chain[chain.index(here) :], here))
        raise ConfigError(f"`defaults` go round in a circle: {loop}", hint="take one of them out")
    values, lines = yamlfile.load(file)
    place = f"{place_of(file)}:{lines.get(('defaults',), 1)}"
    entries = values.pop("defaults", None) or []
    if not isinstance(entries, list) or not all(isinstance(e, str) for e in entries):
        raise ConfigError(f"{place}: `defaults` is no list of names", hint="such as `[model/gpt3-13b, cluster/local]`")
    met = set()
    for entry in entries:
        group = entry.rpartition("/")[0]
        name, by = swaps.get(group, (entry, place))
        met |= {group} & set(swaps)
        met |= _read(_find_entry(name, file, by), swaps, origins, (*chain, here))
    for group in [] if chain else [g for g in swaps if g not in met]:
        name, by = swaps[group]
        _read(_find_entry(name, file, by), swaps, origins, (*chain, here))
    for leaf, value in flatten(values):
        put(origins, leaf, Origin(value, f"{place_of(file)}:{_line(lines, leaf)}"))
    return met


def _line(lines: dict[Key, int], leaf: Key) -> int:
    """The line of ``leaf``, or of the nearest key above it that has one."""
    return next((lines[leaf[:n]] for n in range(len(leaf), 0, -1) if leaf[:n] in lines), 1)


def _split_overrides(
    overrides: Sequence[str], roots: Sequence[Path]
) -> tuple[dict[str, tuple[str, str]], list[tuple[Key, Any, str]]]:
    """Tell swaps of a group, {group: (entry, place)}, from settings of a key, (key, value, place)."""
    swaps, settings = {}, []
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = tuple(key.split("."))
        if not equals or not all(parts) or key != "".join(key.split()):
            raise ConfigError(
                f"override `{override}` is not `key=value`", hint="such as `stages.pretrain.steps=100`, `model=gpt2`"
            )
        place = f"override `{override}`"
        value = yamlfile.parse(text, place)
        is_group = any(next((root / key).glob("*.yaml"), None) for root in roots) if len(parts) == 1 else False
        if is_group and not isinstance(value, dict):
            swaps[key] = (f"{key}/{text.strip()}", place)
        else:
            settings.append((parts, value, place))
    return swaps, settings


# Values


def _check_named(key: Key, origins: Origins, place: str) -> None:
    """Refuse an override inside a stage or a source that no file names: it would start a new one."""
    for above, what in NAMED.items():
        depth = above.count(".") + 1
        names = [k[depth] for k in origins if ".".join(k[:depth]) == above and len(k) > depth]
        if ".".join(key[:depth]) == above and len(key) > depth + 1 and key[depth] not in names:
            hint = did_you_mean(key[depth], sorted(set(names))) if names else ""
            raise ConfigError(f"{place}: no {what} `{key[depth]}`", hint=hint)


def _leaves(experiment: Experiment, key: str) -> Iterator[tuple[str, Any, str]]:
    """Every value at or below ``key``: its own key, the value, and who set it if nobody did."""
    value, default = cast(Any, experiment), ""
    for i, part in enumerate(parts := key.split(".")):
        below = _below(value)
        if part not in below:
            hint = elsewhere(tuple(parts), experiment.stages) or (did_you_mean(part, list(below)) if below else "")
            raise ConfigError(f"no key `{'.'.join(parts[: i + 1])}`", hint=hint)
        default = _default(value, part)
        value = below[part]
    if not _below(value):
        yield key, value, default
    for part in _below(value):
        yield from _leaves(experiment, f"{key}.{part}")


def _below(value: Any) -> dict[str, Any]:
    """What the next part of a dotted key may be."""
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return value if isinstance(value, dict) else {}


def _default(owner: Any, name: str) -> str:
    """Where a value that nobody set comes from."""
    if dataclasses.is_dataclass(owner):
        return f"default of {type(owner).__name__} in orchestrator/spec.py"
    return f"default of Options (`{name}`) in the stage's module"


# Stages


def _resolve_stage(name: str, stage: StageSpec, origins: Origins) -> StageSpec:
    """``stage`` with its options complete; its kind and engine must exist."""
    where = ("stages", name)
    with _placed(origins, (*where, "kind")):
        module = find("jobs", stage.kind)
    with _placed(origins, (*where, "engine")):
        find("jobs.engines", stage.engine)
    prefix = (*where, "options")
    given = {k: h for k, h in origins.items() if k[: len(prefix)] == prefix and len(k) > len(prefix)}
    options = convert(module.Options, given, prefix)
    return dataclasses.replace(stage, options=dataclasses.asdict(options))


def _check_names(experiment: Experiment, origins: Origins) -> None:
    """Names that become folders, and parts of dotted keys."""
    with _placed(origins, ("name",)):
        check_name(experiment.name, "experiment name")
    for what, names in (("stage", experiment.stages), ("data source", experiment.data.sources)):
        for name in names:
            if "." in check_name(name, what):
                raise ConfigError(f"{what} `{name}` has a dot in it", hint="keys are dotted: use `-` or `_`")


def _check_chain(experiment: Experiment, origins: Origins) -> None:
    """There are stages, ``init_from`` and ``after`` name them, and none waits for itself."""
    stages = experiment.stages
    if not stages:
        raise ConfigError(f"{_place(origins, ('stages',))}`stages` is empty", hint="give at least one, with its `kind`")
    for name, stage in stages.items():
        for key, others in (("init_from", [stage.init_from]), ("after", stage.after)):
            for other in others:
                if other is not None and other not in stages:
                    raise ConfigError(
                        f"{_place(origins, ('stages', name, key))}`stages.{name}.{key}`: no stage `{other}`",
                        hint=did_you_mean(other, list(stages)),
                    )

    def walk(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join(f"`{s}`" for s in (*path[path.index(name) :], name))
            raise ConfigError(f"stages wait for each other: {circle}", hint="take one out of `after` or `init_from`")
        for other in (stages[name].init_from, *stages[name].after):
            if other is not None:
                walk(other, (*path, name))

    for name in stages:
        walk(name, ())


@contextmanager
def _placed(origins: Origins, key: Key) -> Iterator[None]:
    """Let an error say where ``key`` was set."""
    try:
        yield
    except ConfigError as e:
        raise ConfigError(f"{_place(origins, key)}{e}", hint=e.hint) from None


def _place(origins: Origins, key: Key) -> str:
    """Where ``key`` was set, as the beginning of a message."""
    return f"{origins[key][-1].place}: " if key in origins else ""
