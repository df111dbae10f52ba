"""Documents from files of every kind, whole and in parts."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.data import text
from jobs.data.text import list_parts, read
from orchestrator.errors import DataError
from orchestrator.spec import SourceSpec


def documents(*entries, text_key="text"):
    return [d for part in list_parts("s", SourceSpec(text=list(entries), text_key=text_key)) for d in read(part)]


def test_files_folders_globs_and_gz_in_the_order_of_names(tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, value in {
        "b/2.md": "two",
        "a.txt": "one\r\nline",
        "c.dat": "raw",
        "e.py": "",
        ".git/x.txt": "no",
    }.items():
        (tmp_path / name).write_bytes(value.encode())
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(b'{"text": "l1"}\n{"text": "l2"}'))
    assert documents(str(tmp_path)) == ["one\r\nline", "two", "packed", "l1", "l2"]
    assert documents(str(tmp_path / "c.dat")) == ["raw"]  # named, so it is text
    assert documents(str(tmp_path / "**" / "*.md"), str(tmp_path / "a.*")) == ["two", "one\r\nline"]
    assert documents(str(tmp_path / "a.txt"), str(tmp_path / "*.txt")) == ["one\r\nline"]  # once
    monkeypatch.chdir(tmp_path)
    assert documents("b", "a.txt") == ["two", "one\r\nline"]


def test_jsonl_takes_its_key_and_skips_what_is_empty(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x\\u00e9"}\n\n  \n{"content": ""}\n{"content": "y", "text": "z"}')
    assert documents(str(tmp_path / "a.jsonl"), text_key="content") == ["xé", "y"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=30), st.integers(1, 64))
def test_parts_of_any_size_read_each_line_once(tmp_path_factory, lines, size):
    path = tmp_path_factory.mktemp("t") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PART", size)
        assert documents(str(path)) == [line for line in lines if line]
        whole = path.with_suffix(".txt")
        whole.write_bytes("\n".join([*lines, "."]).encode())
        assert "".join(documents(str(whole))) == "\n".join([*lines, "."])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"text": "cut', r"a\.jsonl`, line 41: no JSON"),
        ("[" * 100_000, r"a\.jsonl`, line 41: no JSON"),
        ('{"body": "x", "id": 1}', r"line 41: no text under the key `text`; there is `body`, `id`"),
        ('{"text": 5}', r"line 41: no text under the key `text`"),
        ('["text"]', r"line 41: .*no keys"),
        ('{"text": "\\ud800"}', r"line 41: no text"),
    ],
)
def test_a_broken_line_is_named_also_in_a_later_part(tmp_path, monkeypatch, bad, says):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' * 40 + bad + "\n")
    for size in (text.PART, 100, 17, 1):
        monkeypatch.setattr(text, "PART", size)
        with pytest.raises(DataError, match=says) as e:
            documents(str(path))
        assert e.value.hint


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"se\xf1or")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"packed" * 1000)[:-9])
    (tmp_path / "plain.gz").write_bytes(b"not packed")
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.md").touch()
    for entry, says in {
        "latin.txt": "latin.txt`: not UTF-8 near byte 2",
        "cut.txt.gz": "cut.txt.gz`: Compressed file ended",
        "plain.gz": "plain.gz`: Not a gzipped file",
        "gone.txt": "source `s`: `.*gone.txt` does not exist",
        "*.rst": "matches no file",
        "empty": "holds no file ending in .txt",
        "blank.md": "source `s`: every file of `.*blank.md` is empty",
    }.items():
        with pytest.raises(DataError, match=says) as e:
            documents(str(tmp_path / entry))
        assert e.value.hint


def test_builtin_python_is_the_library_of_this_python():
    found = documents("builtin:python")
    assert sum("class OrderedDict(dict):" in d for d in found) == 1  # collections/__init__.py
    assert any(d.startswith('The "assert" statement') for d in found)  # a topic of help()
    assert not any("import unittest\nfrom test import support" in d for d in found)  # how its tests begin
    assert 500 < len(found) < 2000
    assert 8e6 < sum(map(len, found)) < 20e6
    with pytest.raises(DataError, match="builtin:pythn") as e:
        documents("builtin:pythn")
    assert "did you mean `builtin:python`" in e.value.hint
