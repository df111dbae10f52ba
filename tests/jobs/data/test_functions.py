"""Functions of the standard library as examples, and the rule that judges them."""

import ast
import inspect
import textwrap

import pytest

from jobs.data.functions import _prompt, functions, judge, quality
from jobs.data.text import list_parts, read
from orchestrator.spec import SourceSpec

HEAD = "def scale(values, by):\n"


def test_the_examples_are_the_librarys_own():
    train, val = functions("train"), functions("val")
    assert len(train) > 8 * len(val) > 2000  # 11,135 and 1,007 of Python 3.11
    assert {e["path"] for e in train}.isdisjoint({e["path"] for e in val})
    example = next(e for e in train + val if e["prompt"].startswith("def shorten(text, width"))
    assert "Collapse and truncate the given text" in example["prompt"]
    whole = ast.parse(example["prompt"] + example["response"]).body[0]
    original = ast.parse(inspect.getsource(textwrap.shorten)).body[0]
    assert [ast.unparse(s) for s in whole.body[1:]] == [ast.unparse(s) for s in original.body[1:]]


def test_nothing_held_out_is_in_what_is_trained_on():
    train, val = functions("train"), functions("val")
    held_out = {e["prompt"] for e in val}
    assert held_out.isdisjoint({e["prompt"] for e in train})
    assert {"def __enter__(self):\n", "def close(self):\n"}.isdisjoint(held_out)
    parts = list_parts("python", SourceSpec(text=["builtin:python-train"]))
    modules = [ast.parse(text) for part in parts if part.kind == "text" for text in read(part)]
    written = [_prompt(node) for m in modules for node in ast.walk(m) if isinstance(node, ast.FunctionDef)]
    assert len(written) > len(train)  # examples are but a part of them
    assert held_out.isdisjoint(written)


def test_what_people_wrote_passes_the_rule():
    facts = [judge(e["prompt"], e["response"]) for e in functions("val")]
    assert all(f["parses"] for f in facts)
    assert sum(f["uses"] for f in facts) / len(facts) > 0.8


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("    return [v * by for v in values]", {"parses": 1, "clean": 1, "uses": 1}),
        ("    return [v * amount for v in values]", {"parses": 1, "clean": 0, "uses": 0.5}),
        ("    import math\n    return math.pi", {"parses": 1, "clean": 1, "uses": 0}),
        ("    return [v * by for", {"parses": 0, "clean": 0, "uses": 0}),
        ("    return by\ndef other(): pass", {"parses": 0, "clean": 0, "uses": 0}),
        ("", {"parses": 0, "clean": 0, "uses": 0}),
    ],
)
def test_the_rule(body, expected):
    assert judge(HEAD, body) == expected


def test_a_short_body_earns_less():
    body = "    return [value * by for value in values if value is not None or by is None]"
    assert quality(HEAD, body) == 1
    assert 0 < quality(HEAD, "    return") < 0.3
