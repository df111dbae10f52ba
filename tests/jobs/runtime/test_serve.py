"""The process that answers: whatever one request does to it, that is told, and the next one is answered."""

import io
import json
import os
from dataclasses import replace

import pytest
from omegaconf import OmegaConf
from tracked import make_chain

from jobs.data import bpe
from jobs.data.chat import Chat
from jobs.runtime import serve
from jobs.runtime.hf import identity
from orchestrator.errors import DataError, OrchError
from orchestrator.run import write_json


def test_what_fails_on_one_request_is_told_and_the_next_is_answered(tmp_path, monkeypatch, capfd):
    def answer(model, chat, request, say, *, raw):
        if request == "beyond":
            raise IndexError("index 400 is out of range")
        if request == "much":
            raise MemoryError
        if request == "wrong":
            raise OrchError("it is wrong", hint="ask for less")

    monkeypatch.setattr(serve, "load", lambda run, folder: (None, None))
    monkeypatch.setattr(serve, "answer", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO('"beyond"\n"much"\n"wrong"\n{\n"fine"\n'))
    kept = os.dup(1)
    try:
        serve.main(str(make_chain(tmp_path)[1].folder), "step-9")
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    out, err = capfd.readouterr()
    ready, beyond, much, wrong, no_json, fine = map(json.loads, out.splitlines())
    assert ready == {"ready": "`step-9`", "raw": False}
    assert beyond["error"] == "IndexError: index 400 is out of range" and "is a defect" in beyond["hint"]
    assert "for want of memory" in much["hint"]
    assert wrong == {"error": "it is wrong", "hint": "ask for less"}
    assert no_json["error"].startswith("JSONDecodeError")
    assert fine == {"done": True}
    assert err.count("Traceback") == 2  # of the defects alone


def test_a_tokenizer_with_tokens_that_the_model_does_not_know_is_not_loaded(tmp_path):
    run = make_chain(tmp_path)[1]
    tokenizer = bpe.train(["some words " * 9], vocab=300, end_of_text="<|endoftext|>")
    size = bpe.vocab_size(tokenizer)
    tokenizer.add_special_tokens(["<|user|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    spec = run.spec()
    model, data = replace(spec.model, vocab=size), replace(spec.data, tokenizer=str(tmp_path / "tokenizer.json"))
    (run.folder / "spec.yaml").write_text(OmegaConf.to_yaml(replace(spec, model=model, data=data)))
    (tmp_path / "step-9").mkdir()
    write_json(tmp_path / "step-9" / "state.json", {"identity": identity(model, Chat.open(data))})
    with pytest.raises(DataError, match=f"has {size + 1} tokens, and `model.vocab` is {size}: the others have no row"):
        serve.load(run, tmp_path / "step-9")
