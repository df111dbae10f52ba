"""Functions of Python's standard library as examples: real text that every machine has, with a rule to judge it.

A prompt is a function's signature and the first line of its docstring, the response its body. A file is
either for training or held out, by the hash of its path, so that no stage sees what another is judged on. The
library repeats itself from file to file, so of held-out files no function counts whose prompt a file for training has.
Bodies are written anew from their syntax tree: layout and comments are not what is learned here.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import sysconfig
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

NOT_TEXT = {"test", "tests", "idle_test", "pydoc_data", "site-packages", "dist-packages"}
NOT_CODE = NOT_TEXT | {"lib2to3", "encodings"}  # nor examples, though text to learn from
HELD_OUT = 10  # one file in so many
LINES = 30  # of the longest function
DOC_CHARS = 60  # of a docstring's first line
ENOUGH = 4  # words a response should have, as short bodies have: else the shortest that parses wins (`self.get()`)
NAMES = frozenset(dir(builtins))

Split = Literal["train", "val"]


def functions(split: Split) -> list[dict[str, str]]:
    """``prompt``, ``response`` and ``path`` of every function of ``split``, each pair once, in order of files.

    What is held out has no prompt that text or examples to train on have, whatever the body.
    """
    return _library()[split]


@cache
def _library() -> dict[Split, list[dict[str, str]]]:
    """Both splits, of one reading."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[Split, dict[tuple[str, str], str]] = {"train": {}, "val": {}}
    seen: set[str] = set()
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if not NOT_TEXT.isdisjoint(path.parts):
            continue
        split, is_code = split_of(path), NOT_CODE.isdisjoint(path.parts)
        for node in _defined(file):
            prompt = _prompt(node)
            if split == "train":
                seen.add(prompt)
            if is_code and (response := _response(node)):
                found[split].setdefault((prompt, response), path.as_posix())
    found["val"] = {pair: path for pair, path in found["val"].items() if pair[0] not in seen}
    return {
        split: [{"prompt": p, "response": r, "path": path} for (p, r), path in pairs.items()]
        for split, pairs in found.items()
    }


def split_of(path: Path) -> Split:
    """Where the file at ``path`` below the library's folder belongs."""
    digest = hashlib.sha256(path.as_posix().encode()).digest()
    return "val" if digest[0] % HELD_OUT == 0 else "train"


def quality(prompt: str, response: str, line: Mapping[str, Any] | None = None) -> float:
    """How good a body is, by rule, from 0 to 1: a reward that needs no model.

    A third each for: it parses as the one function that was begun; then, it uses no name that is defined
    nowhere; and the share of the parameters it uses. Less where it is shorter than ENOUGH words.
    """
    facts = judge(prompt, response)
    full = (facts["parses"] + facts["clean"] + facts["uses"]) / 3
    return full * min(1.0, len(response.split()) / ENOUGH)


def long_enough(prompt: str, response: str, line: Mapping[str, Any] | None = None) -> float:
    """From -1, for no words at all, to 0 for ENOUGH: a rule to stand beside a reward that likes short answers."""
    return min(0.0, len(response.split()) / ENOUGH - 1)


def judge(prompt: str, response: str) -> dict[str, float]:
    """What can be said of a body without running it: ``parses`` and ``clean``, 0 or 1, and ``uses``, a share."""
    function = _parse(prompt + response)
    if function is None:
        return {"parses": 0.0, "clean": 0.0, "uses": 0.0}
    own = set(_parameters(function))
    read, bound = _names(function)
    unknown = {n for n in read - own - bound - NAMES if n.islower() and not n.startswith("_")}
    uses = len(own & read) / len(own) if own else 1.0
    return {"parses": 1.0, "clean": float(not unknown), "uses": uses}


def parameters(prompt: str) -> list[str]:
    """The names of the parameters of the function that ``prompt`` begins; none where it begins no function."""
    function = _parse(prompt + "    pass")
    return _parameters(function) if function else []


def _defined(file: Path) -> list[ast.FunctionDef]:
    """Every function that ``file`` defines, at whatever depth; none where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def _response(node: ast.FunctionDef) -> str:
    """The body, where it is worth learning; else nothing."""
    if node.decorator_list or (node.end_lineno or node.lineno) - node.lineno >= LINES:
        return ""
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    return "" if all(isinstance(s, ast.Pass) for s in body) else "\n".join(_indented(s) for s in body)


def _prompt(node: ast.FunctionDef) -> str:
    head = ast.unparse(ast.FunctionDef(node.name, node.args, [ast.Pass()], [], node.returns, lineno=0, col_offset=0))
    first = (ast.get_docstring(node) or "").strip().partition("\n")[0].replace("\\", "").replace('"', "'")[:DOC_CHARS]
    return head.rpartition("\n")[0] + "\n" + (f'    """{first}"""\n' if first else "")


def _indented(statement: ast.stmt) -> str:
    return "\n".join("    " + line for line in ast.unparse(statement).splitlines())


def _parse(text: str) -> ast.FunctionDef | None:
    """The one function that ``text`` is, or nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return body[0] if len(body) == 1 and isinstance(body[0], ast.FunctionDef) else None


def _parameters(function: ast.FunctionDef) -> list[str]:
    a = function.args
    return [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if p]


def _names(function: ast.FunctionDef) -> tuple[set[str], set[str]]:
    """Names that the body reads, and names that it binds."""
    read: set[str] = set()
    bound: set[str] = set()
    for node in (n for statement in function.body for n in ast.walk(statement)):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                read.add(name)
            case ast.Name(id=name):
                bound.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                bound.add(name)
            case ast.arg(arg=name) | ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                bound.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                bound |= {(n.asname or n.name).partition(".")[0] for n in names}
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                bound |= set(names)
    return read, bound
