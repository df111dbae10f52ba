"""Documents from files. A source is listed once as parts, ranges of bytes that any process can read alone.

A part holds the lines that begin in its range, as splits of text do in MapReduce (Dean and Ghemawat 2004,
section 3.1), so that big files are read in parallel and the list does not depend on who reads it. A line
of a `.jsonl` file is a document; any other file is one, or several if it is bigger than a part. Files
ending in `.gz` are read from end to end.

`builtin:functions` are the functions of jobs/data/functions.py whose files are not held out, a document for each.
`builtin:python` is text that every machine has: the standard library of this Python without its tests, a
document for each module, and the language reference that `help()` shows, a document for each topic. In
`builtin:python-train` the modules are missing whose functions are held out.
"""

import glob
import gzip
import importlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from jobs.data import functions
from orchestrator.errors import DataError
from orchestrator.registry import did_you_mean
from orchestrator.spec import SourceSpec

PART = 2 << 20  # bytes
SUFFIXES = (".txt", ".md", ".py", ".rst", ".jsonl")
BUILTIN = ["builtin:python", "builtin:python-train", "builtin:functions"]
NOT_TEXT = functions.NOT_TEXT | {"__pycache__"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of the documents of a source."""

    path: str
    start: int  # bytes; the part holds the lines that begin in [start, stop)
    stop: int
    kind: Literal["text", "jsonl", "topics", "functions"]
    text_key: str = "text"

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.stop - self.start


def list_parts(name: str, source: SourceSpec) -> list[Part]:
    """The parts of all files of the source ``name``, in an order that depends on the files' names only.

    Raises DataError where a path leads to no text, or all files are empty.
    """
    parts: dict[Part, None] = {}  # a set that keeps its order
    for entry in source.text:
        if entry.startswith("builtin:"):
            parts.update(dict.fromkeys(_builtin(name, entry)))
        else:
            for path in _files(name, entry):
                parts.update(dict.fromkeys(_cut(path, source.text_key)))
    if not parts:
        raise DataError(f"source `{name}`: every file of `{'`, `'.join(source.text)}` is empty", hint="give it text")
    return list(parts)


def read(part: Part) -> Iterator[str]:
    """The documents of a part, empty ones left out. Raises DataError where a line or a file is broken."""
    if part.kind == "topics":
        topics = importlib.import_module("pydoc_data.topics").topics
        yield from (topics[key] for key in sorted(topics))
        return
    if part.kind == "functions":
        yield from (f["prompt"] + f["response"] for f in functions.functions("train"))
        return
    try:
        packed = part.path.endswith(".gz")
        with gzip.open(part.path) if packed else open(part.path, "rb") as f:
            lines = _lines(cast(BinaryIO, f), part.start, 1 << 63 if packed else part.stop)
            documents = _jsonl(part, lines) if part.kind == "jsonl" else _text(part, lines)
            yield from (text for text in documents if text)
    except (OSError, EOFError) as e:
        raise DataError(f"`{part.path}`: {e}", hint="is the file whole, and readable from this machine?") from e


def _files(name: str, entry: str) -> list[Path]:
    """The files one entry of `text` stands for."""
    path = Path(entry)
    if path.is_dir():
        files = [f for f in path.rglob("*") if f.is_file() and _suffix(f) in SUFFIXES and not _hidden(f, path)]
        missing = f"holds no file ending in {', '.join(SUFFIXES)} (or these with `.gz`)"
    elif glob.has_magic(entry) and not path.exists():
        files = [Path(f) for f in glob.glob(entry, recursive=True) if Path(f).is_file()]  # noqa: PTH207 absolute too
        missing = "matches no file"
    else:
        files = [path] if path.is_file() else []
        missing = "does not exist"
    if not files:
        raise DataError(
            f"source `{name}`: `{entry}` {missing}",
            hint=f"`data.sources.{name}.text` takes files, folders, globs and {', '.join(BUILTIN)}; "
            f"relative paths start at `{Path.cwd()}`",
        )
    return sorted(files)


def _builtin(name: str, entry: str) -> list[Part]:
    if entry not in BUILTIN:
        raise DataError(f"source `{name}`: no text `{entry}`", hint=did_you_mean(entry, BUILTIN))
    root = Path(sysconfig.get_path("stdlib"))
    if entry == "builtin:functions":
        size = sum(len(f["prompt"] + f["response"]) for f in functions.functions("train"))
        return [Part(path=str(root), start=0, stop=size, kind="functions")]
    modules = [f for f in root.rglob("*.py") if not NOT_TEXT.intersection(f.relative_to(root).parts)]
    if entry == "builtin:python-train":
        modules = [f for f in modules if functions.split_of(f.relative_to(root)) == "train"]
    topics = root / "pydoc_data" / "topics.py"
    if not modules or not topics.is_file():
        raise DataError(
            f"`builtin:python`: the sources of Python are not in `{root}`",
            hint="install Python with its standard library as files, or name text of your own",
        )
    parts = [part for path in sorted(modules) for part in _cut(path, "")]
    return [*parts, Part(path=str(topics), start=0, stop=topics.stat().st_size, kind="topics")]


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _cut(path: Path, text_key: str) -> list[Part]:
    size = path.stat().st_size
    kind: Literal["text", "jsonl"] = "jsonl" if _suffix(path) == ".jsonl" else "text"
    step = max(1, size) if path.suffix == ".gz" else PART
    return [
        Part(path=str(path), start=start, stop=min(start + step, size), kind=kind, text_key=text_key)
        for start in range(0, size, step)
    ]


def _lines(f: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin in [start, stop)."""
    position = start
    if start:
        f.seek(start - 1)
        position += len(f.readline()) - 1  # the rest of a line that began before, or its end alone
    while position < stop and (line := f.readline()):
        position += len(line)
        yield line


def _text(part: Part, lines: Iterator[bytes]) -> Iterator[str]:
    raw = b"".join(lines)
    try:
        yield raw.decode()
    except UnicodeDecodeError as e:
        raise DataError(
            f"`{part.path}`: not UTF-8 near byte {part.start + e.start:,}",
            hint="convert it, for example with `iconv -f latin1 -t utf-8`, or leave it out",
        ) from e


def _jsonl(part: Part, lines: Iterator[bytes]) -> Iterator[str]:
    for number, raw in enumerate(lines):
        if raw.isspace():
            continue
        try:
            value = json.loads(raw)
            text = value[part.text_key]
            text.encode()  # half a surrogate pair passes as JSON, but is no text
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise _broken_line(part, number, raw, e) from e
        yield text


def _broken_line(part: Part, number: int, raw: bytes, error: Exception) -> DataError:
    """Say what is wrong, and in which line of the file."""
    end = max(0, part.start - 1)
    with open(part.path, "rb") as f:  # only now is it worth counting the lines before the part
        before = sum(f.read(min(PART, end - at)).count(b"\n") for at in range(0, end, PART)) + (part.start > 0)
    try:
        value: Any = json.loads(raw)
    except (ValueError, RecursionError):
        problem, hint = f"no JSON ({error})", "each line must be one JSON object; was the file cut off?"
    else:
        keys = ", ".join(f"`{k}`" for k in value) if isinstance(value, dict) else "no keys"
        problem = f"no text under the key `{part.text_key}`; there is {keys}"
        hint = "set `text_key` of the source to the key that holds the text"
    return DataError(f"`{part.path}`, line {before + number + 1}: {problem}", hint=hint)
