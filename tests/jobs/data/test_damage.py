"""Damage: what each kind does, that it depends on seed and number alone, and that the rule sees it."""

from collections import Counter
from statistics import fmean

import pytest

from jobs.data.damage import KINDS, damaged
from jobs.data.functions import functions, quality

HEAD = 'def scale(values, by):\n    """Multiply."""\n'
BODY = "    total = [v * by for v in values]\n    return total.copy(by=by)\n    # by.by"
OTHER = "def open(self, path):\n"


def damage(kind, number=0, body=BODY, head=HEAD):
    return damaged(head, body, OTHER, kinds=[kind], seed=1, number=number)


def test_scrambled_keeps_words_and_dropped_loses_a_share_of_them():
    words = [f"w{n}" for n in range(20)]
    body = "  " + " ".join(words[:10]) + "\n  " + " ".join(words[10:])
    for number in range(20):
        _, text = damage("scrambled", number, body)
        assert text.replace(" ", "") != body.replace(" ", "")
        assert sorted(text) == sorted(body)
        assert text.count("\n  ") == 1
        _, text = damage("dropped", number, body)
        assert len(text.split()) == 14
        assert text.split() == sorted(text.split(), key=words.index)


def test_swapped_renames_one_parameter_everywhere_but_no_attribute():
    texts = {damage("swapped", number)[1] for number in range(20)}
    as_by = {BODY.replace(" by ", f" {n} ").replace("by=by", f"{n}={n}").replace("# by.by", f"# {n}.by")
             for n in ("self", "path")}  # fmt: skip
    as_values = {BODY.replace("values", n) for n in ("self", "path")}
    assert texts == as_by | as_values
    assert damage("swapped", body="    return 1") is None  # uses none
    assert damage("swapped", head="Say something:") is None  # no function


def test_shuffled_moves_lines():
    _, text = damage("shuffled")
    assert text != BODY
    assert sorted(text.split("\n")) == sorted(BODY.split("\n"))
    assert damage("shuffled", body="    return by") is None


@pytest.mark.parametrize("body", ["", "x", " "])
def test_what_cannot_be_damaged_is_none_or_another_text(body):
    for kind in KINDS:
        found = damage(kind, body=body)
        assert found is None or found[1] != body


def test_seed_and_number_decide_and_every_kind_comes():
    def all_of(seed):
        return [damaged(HEAD, BODY, OTHER, kinds=KINDS, seed=seed, number=n) for n in range(40)]

    assert all_of(1) == all_of(1) != all_of(2)
    assert {kind for kind, _ in all_of(1)} == set(KINDS)
    assert min(Counter(kind for kind, _ in all_of(1)).values()) >= 4


def test_the_rule_thinks_less_of_what_is_damaged():
    examples = functions("val")[:200]
    for kind in ("scrambled", "dropped", "swapped"):
        worse = []
        for n, e in enumerate(examples):
            found = damaged(e["prompt"], e["response"], examples[n - 1]["prompt"], kinds=[kind], seed=0, number=n)
            if found:
                worse.append(quality(e["prompt"], e["response"]) - quality(e["prompt"], found[1]))
        assert len(worse) > 50
        assert fmean(worse) > 0.05
