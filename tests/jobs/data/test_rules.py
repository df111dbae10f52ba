"""Rules that the config names, and what is said of those that fail."""

import math
import sys

import pytest

from jobs.data import rules
from jobs.data.functions import ENOUGH, quality
from orchestrator.errors import ConfigError, DataError

HEAD = "def scale(values, by):\n"
OURS = """
def known(prompt, response, line):
    return response == line["answer"]

def fails(prompt, response, line):
    return line["nothing"]

def nan(prompt, response, line):
    return float("nan")

def words(prompt, response, line):
    return "good"
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "rules_of_a_user.py").write_text(OURS)
    (tmp_path / "broken_rules.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("rules_of_a_user", None)


def test_a_rule_is_found_by_name_and_given_the_line(mine):
    assert rules.load("jobs.data.functions:quality")(HEAD, "    return by", {}) == quality(HEAD, "    return by")
    known = rules.load("rules_of_a_user:known")
    assert [known("1 + 1?", said, {"answer": "2"}) for said in ("2", "3")] == [1.0, 0.0]


def test_a_changed_rule_is_another_rule(mine, tmp_path):
    before = rules.source_sha256("rules_of_a_user:known")
    (tmp_path / "rules_of_a_user.py").write_text(OURS + "# changed\n")
    assert rules.source_sha256("rules_of_a_user:known") not in (before, "")
    assert rules.source_sha256("sys:getsizeof") == "", "a module without a file"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("fails", r"raised KeyError: 'nothing'; the prompt was 'x{79}\.\.\."),
        ("nan", "returned `nan`, which is no finite number"),
        ("words", "returned `'good'`, which is no finite number"),
    ],
)
def test_a_rule_that_fails_names_itself_and_the_prompt(mine, name, what):
    with pytest.raises(DataError, match=f"rule `rules_of_a_user:{name}` {what}"):
        rules.load(f"rules_of_a_user:{name}")("x" * 200, "y", {})


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("jobs.data.functions:qality", "has no attribute 'qality'"),
        ("nowhere_at_all:f", "No module named 'nowhere_at_all'"),
        ("jobs.data.functions", "has no attribute ''"),
        ("broken_rules:f", "ZeroDivisionError"),
    ],
)
def test_a_rule_that_is_not_there(mine, name, what):
    with pytest.raises(ConfigError, match=what):
        rules.load(name)


def test_a_response_should_have_enough_words():
    long_enough = rules.load("jobs.data.functions:long_enough")
    said = [long_enough(HEAD, "word " * n, {}) for n in (0, ENOUGH // 2, ENOUGH, 3 * ENOUGH)]
    assert said == [-1, -0.5, 0, 0]
    assert not any(math.copysign(1, x) < 0 for x in said[2:])
