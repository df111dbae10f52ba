"""Examples for tuning: the template, what is learned, what is left out, and how conversations are packed."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from jobs.data import bpe
from jobs.data.chat import Chat
from jobs.data.examples import Files, answered, demonstrations, fingerprint, prompts, ranked
from jobs.data.packing import Demonstrations
from jobs.runtime.serve import tokens_of
from orchestrator.errors import DataError
from orchestrator.spec import ChatSpec, DataSpec

TEXT = ["the quick brown fox jumps over the lazy dog", "def add(a, b):\n    return a + b\n"]
SPEC = ChatSpec(system="[{content}]\n", user="Q: {content}\n", assistant="A: {content}", end="<|end|>")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe.train(TEXT, vocab=300, end_of_text="<|end|>").save(str(path))
    return Chat.open(DataSpec(tokenizer=str(path), chat=SPEC))


def write(folder, *lines):
    path = folder / "examples.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return Files(names=[str(path)])


def test_what_the_model_writes_is_learned_and_nothing_else(chat):
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "fox?"},
        {"role": "assistant", "content": "dog"},
        {"role": "user", "content": "cat?"},
        {"role": "assistant", "content": "no"},
    ]
    encoded = chat.encode(turns)
    everything = chat.tokenizer.decode(encoded.ids, skip_special_tokens=False)
    assert everything == "[be brief]\nQ: fox?\nA: dog<|end|>Q: cat?\nA: no<|end|>"
    learned = [i for i, learn in zip(encoded.ids, encoded.learn, strict=True) if learn]
    assert chat.tokenizer.decode(learned, skip_special_tokens=False) == "dog<|end|>no<|end|>"


def test_a_prompt_has_the_same_tokens_in_training_and_in_use(chat):
    before = [{"role": "user", "content": "the lazy"}]
    prompt = chat.prompt(before)
    for answer in ("dog", " dog", "\n", "x" * 20):
        encoded = chat.encode([*before, {"role": "assistant", "content": answer}])
        assert encoded.ids[: len(prompt)] == prompt
        assert encoded.learn == [0] * len(prompt) + [1] * (len(encoded.ids) - len(prompt))
        assert chat.text(encoded.ids[len(prompt) :]) == answer


def test_a_special_token_in_a_content_is_text_and_ends_nothing(chat):
    turns = [{"role": "user", "content": "fox<|end|>A: dog"}, {"role": "assistant", "content": "no <|end|> way"}]
    encoded = chat.encode(turns)
    assert encoded.ids.count(chat.end) == 1
    assert encoded.ids[-1] == chat.end
    said = "Q: fox<|end|>A: dog\nA: no <|end|> way<|end|>"
    assert chat.tokenizer.decode(encoded.ids, skip_special_tokens=False) == said
    assert encoded.ids[: len(chat.prompt(turns[:1]))] == chat.prompt(turns[:1])
    assert chat.tokenizer.encode("<|end|>").ids == [chat.end]


def test_what_the_template_puts_behind_an_answer_is_no_part_of_it(chat):
    spec = replace(SPEC, assistant="A: {content} |\n")
    framed = Chat(chat.tokenizer, spec, end=chat.end, tokenizer_sha256=chat.tokenizer_sha256)
    encoded = framed.encode([{"role": "assistant", "content": "dog |\n"}])
    written = [i for i, learn in zip(encoded.ids, encoded.learn, strict=True) if learn]
    assert framed.text(written) == "dog |\n"
    assert framed.text(written[:-1]) == "dog |\n |\n"  # cut before its end, it may have meant it


def test_the_hash_knows_template_and_tokenizer(chat, tmp_path):
    bpe.train(TEXT[:1], vocab=300, end_of_text="<|end|>").save(str(tmp_path / "other.json"))
    other = Chat.open(DataSpec(tokenizer=str(tmp_path / "other.json"), chat=SPEC))
    (tmp_path / "same.json").write_text(chat.tokenizer.to_str(pretty=True))
    plain = Chat.open(DataSpec(tokenizer=str(tmp_path / "same.json"), chat=ChatSpec(end="<|end|>")))
    assert len({chat.sha256, other.sha256, plain.sha256}) == 3


def test_an_end_token_that_the_tokenizer_lacks_is_an_error(chat, tmp_path):
    (tmp_path / "t.json").write_text(chat.tokenizer.to_str())
    with pytest.raises(DataError, match=r"has no token `<\|endoftext\|>`"):
        Chat.open(DataSpec(tokenizer=str(tmp_path / "t.json")))


def test_what_cannot_be_learned_from_is_counted(chat, tmp_path):
    left_out = Counter()
    good = {"prompt": "a", "response": "b"}
    files = write(tmp_path, good, {"prompt": "a", "response": ""}, {"prompt": "a" * 99, "response": "b"}, "",
                  {"prompt": "a", "response": "b" * 99})  # fmt: skip
    found = demonstrations(files, chat, longest=30, left_out=left_out)
    assert left_out == {"empty responses": 1, "prompts too long": 1, "truncated": 1}
    assert [len(e.ids) for e in found][1] == 30
    assert [e.ids[-1] == chat.end for e in found] == [True, False]
    assert len(prompts(files, chat, longest=30, left_out=left_out)) == 3


def test_of_a_prompt_nothing_is_learned_whoever_spoke(chat, tmp_path):
    before = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "cat"), ("user", "b"))]
    line = {"prompt": before, "response": "dog", "responses": ["dog", "fox", ""]}
    files, prompt, left_out = write(tmp_path, line), chat.prompt(before), Counter()
    (demonstration,) = demonstrations(files, chat, longest=60, left_out=left_out)
    (preference,) = ranked(files, chat, longest=60, left_out=left_out)
    assert left_out == {"empty responses": 1, "equal responses": 0}
    assert [*preference.responses, demonstration].count(demonstration) == 2
    for encoded in preference.responses:
        assert encoded.ids[: len(prompt)] == prompt
        assert encoded.learn == [0] * len(prompt) + [1] * (len(encoded.ids) - len(prompt))
    tight = replace(files, max_prompt=len(prompt))
    for read in (demonstrations, answered):
        assert len(read(tight, chat, longest=60, left_out=Counter())) == 1
        for narrow, longest in ((replace(files, max_prompt=len(prompt) - 1), 60), (files, len(prompt))):
            with pytest.raises(DataError, match="1 prompts too long"):
                read(narrow, chat, longest=longest, left_out=Counter())
    messages = write(tmp_path, {"messages": [*before, {"role": "assistant", "content": "dog"}]})
    assert sum(demonstrations(messages, chat, longest=60, left_out=Counter())[0].learn) > sum(demonstration.learn)


def test_a_response_is_empty_whatever_the_template_puts_behind_it(chat, tmp_path):
    spec = replace(SPEC, assistant="A: {content}\n")
    framed = Chat(chat.tokenizer, spec, end=chat.end, tokenizer_sha256=chat.tokenizer_sha256)
    files = write(tmp_path, {"prompt": "a", "response": ""}, {"prompt": "a", "response": "b"})
    left_out = Counter()
    assert len(demonstrations(files, framed, longest=30, left_out=left_out)) == 1
    assert left_out == {"empty responses": 1}


def test_lengths_that_the_examples_may_have(chat, tmp_path):
    room = [len(chat.prompt([{"role": "user", "content": "aa"}])), len(chat.tokenizer.encode("bb").ids) + 1]
    lines = [{"prompt": "a" * n, "response": "b" * m, "responses": ["b" * m, "c"]} for n, m in ((2, 2), (9, 2), (2, 9))]
    files = write(tmp_path, *lines)
    most = replace(files, max_prompt=room[0], max_response=room[1])
    left_out = Counter()
    assert len(demonstrations(files, chat, longest=60, left_out=left_out)) == 3
    assert len(demonstrations(most, chat, longest=60, left_out=left_out)) == 1
    assert left_out == {"prompts too long": 1, "responses too long": 1}
    assert [len(r.responses) for r in ranked(most, chat, longest=60, left_out=Counter())] == [2]
    assert [p.line for p in prompts(most, chat, longest=60, left_out=Counter())] == [lines[0], lines[2]]
    ways = [files, replace(files, max_prompt=3), replace(files, max_response=3)]
    assert len({fingerprint(w, chat) for w in ways}) == 3


def test_what_is_asked_has_tokens_and_what_is_answered_a_response(chat, tmp_path):
    plain = Chat(chat.tokenizer, ChatSpec(end="<|end|>"), end=chat.end, tokenizer_sha256=chat.tokenizer_sha256)
    files = write(
        tmp_path, {"prompt": "", "response": "b"}, {"prompt": "a", "response": ""}, {"prompt": "a", "response": "b"}
    )
    left_out = Counter()
    assert len(prompts(files, plain, longest=9, left_out=left_out)) == 2
    assert left_out == {"empty prompts": 1}
    found = answered(files, chat, longest=30, left_out=left_out)
    assert [p.line["response"] for p in found] == ["b", "b"]
    assert found[1].ids == chat.prompt([{"role": "user", "content": "a"}])
    assert left_out["empty responses"] == 1
    with pytest.raises(DataError, match="line 1: no `response`; there is `prompt`"):
        answered(write(tmp_path, {"prompt": "a"}), chat, longest=30, left_out=left_out)


def test_equal_responses_are_no_preference(chat, tmp_path):
    left_out = Counter()
    files = write(tmp_path, {"prompt": "a", "responses": ["x", "y", "x"]}, {"prompt": "a", "responses": ["x", "x"]})
    found = ranked(files, chat, longest=30, left_out=left_out)
    assert [[chat.text([i for i, w in zip(r.ids, r.learn, strict=True) if w]) for r in e.responses] for e in found] == [
        ["x", "y"]
    ]
    assert left_out == {"equal responses": 2}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "respons', "line 2: no JSON"),
        ('{"prompt": "a"}', "line 2: no `response`; there is `prompt`"),
        ('{"prompt": 3, "response": "b"}', "line 2: it must be a text or a list of turns"),
        ('{"prompt": "a", "response": null}', "line 2: a response must be a text, not NoneType"),
        ('{"messages": [{"role": "robot", "content": "b"}]}', "line 2: no role `robot`"),
        (r'{"prompt": "a", "response": "b\ud83d"}', "line 2: character 2 of a text is half a surrogate pair"),
        (r'{"prompt": "\ud83d", "response": "b"}', "line 2: character 1 of a text is half a surrogate pair"),
        ("[1]", "line 2: no object but list"),
        ("[" * 100_000, "line 2: no JSON"),
    ],
)
def test_a_malformed_line_is_named(chat, tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        demonstrations(write(tmp_path, {"prompt": "a", "response": "b"}, line), chat, longest=30, left_out=Counter())


def test_a_line_that_is_no_utf8_is_named(chat, tmp_path):
    files = write(tmp_path, *({"prompt": "a" * 90, "response": "b"} for _ in range(3000)))
    with open(files.names[0], "ab") as f:
        f.write('{"prompt": "für"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match="line 3001: not UTF-8 at byte 13 of the line"):
        demonstrations(files, chat, longest=200, left_out=Counter())


@pytest.mark.parametrize("raw", [True, False])
def test_no_model_is_asked_half_a_character(chat, raw):
    with pytest.raises(DataError, match="half a surrogate pair"):
        tokens_of("a\ud83d", chat, raw=raw)


def test_files_with_nothing_to_learn_say_why(chat, tmp_path):
    with pytest.raises(DataError, match=r"nothing to learn from in .*: 1 empty responses"):
        demonstrations(write(tmp_path, {"prompt": "a", "response": ""}), chat, longest=30, left_out=Counter())


def test_rows_hold_every_conversation_once_an_epoch(chat, tmp_path):
    lines = [{"prompt": "q" * (i % 7), "response": "r" * (1 + i % 11)} for i in range(60)]
    data = Demonstrations(write(tmp_path, *lines), chat, seq_len=64, seed=1)
    rows = data.samples_per_epoch
    assert 60 > rows >= sum(len(e.ids) - 1 for e in data.examples) / 64
    batch = data.batch(0, rows)
    whole = []
    for tokens, targets, segments, weight in zip(
        *(batch[k] for k in ("tokens", "targets", "segments", "weight")), strict=True
    ):
        for number in range(1, int(segments.max()) + 1):
            mine = segments == number
            whole.append([*tokens[mine].tolist(), targets[mine][-1].item()])
            assert tokens[mine][1:].tolist() == targets[mine][:-1].tolist()
            assert weight[mine].sum() > 1
        assert weight[segments == 0].sum() == 0
    assert sorted(whole) == sorted(e.ids for e in data.examples)


def test_the_order_is_a_function_of_the_row_alone(chat, tmp_path):
    files = write(tmp_path, *({"prompt": "q" * (i % 5), "response": "r" * (1 + i % 9)} for i in range(40)))
    data, again = (Demonstrations(files, chat, seq_len=48, seed=1) for _ in range(2))
    far = data.batch(50, 4)
    for first in range(50):
        again.batch(first, 1)
    assert all(torch.equal(far[k], again.batch(50, 4)[k]) for k in far)
    assert data.fingerprint == again.fingerprint != Demonstrations(files, chat, seq_len=48, seed=2).fingerprint
    epochs = [data.batch(0, 1)["tokens"], data.batch(data.samples_per_epoch, 1)["tokens"]]
    assert not torch.equal(*epochs)
