"""A model of transformers enters, is tuned, talks, and leaves again; at each border its logits are the same."""

import hashlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from click.testing import CliRunner
from clock import slowness
from safetensors.torch import load_file
from tracked import make_chain, start

from jobs import import_hf
from jobs.data import bpe
from jobs.data.chat import Chat
from jobs.data.functions import functions
from jobs.runtime import checkpoint, hf
from jobs.runtime.job import Job, Ranks
from jobs.runtime.serve import Stream, load
from orchestrator.cli import cli
from orchestrator.compose import compose
from orchestrator.errors import CheckpointError, ConfigError, DataError, OrchError
from orchestrator.export import export
from orchestrator.run import Run
from orchestrator.spec import ChatSpec, ModelSpec
from orchestrator.use import chat as talk
from orchestrator.use import language_model, lines_of, serving

ORCH = Path(sys.executable).with_name("orch")
END = "<|endoftext|>"
SPEC = ModelSpec(layers=2, hidden=32, heads=4, vocab=400, seq_len=192)
CONFIG = """
defaults: [cluster/local]
name: t
cluster: {gpus_per_node: 1}
model: {layers: 2, hidden: 32, heads: 4, vocab: 400, seq_len: 192}
data:
  folder: data
  tokenizer: gpt2/tokenizer.json
  chat: {user: "Q: {content}\\n", assistant: "A:{content}"}
  examples:
    demonstrations: {train: [train.jsonl], val: [val.jsonl]}
    preferences: {train: [train.jsonl], val: [val.jsonl]}
stages:
  base: {kind: import_hf, options: {folder: gpt2}}
  sft: &tune
    {kind: sft, init_from: base, precision: fp32, global_batch: 2, steps: 3, optimizer: {lr: 1e-3}}
  reward: {<<: *tune, kind: reward, init_from: sft}
"""


def orch(folder, *words, ok=0):
    """Run `orch`; return what it printed, and what it said beside."""
    how = {"cwd": folder, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 900}
    done = subprocess.run([ORCH, *words], check=False, **how)
    assert done.returncode == ok, done.stdout + done.stderr
    return done.stdout, done.stderr


def gpt2(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 192, "initializer_range": 0.2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.1)  # biases and norms count too
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a random GPT-2 and a tokenizer as transformers saves them, and examples."""
    folder = tmp_path_factory.mktemp("use")
    for split, count in (("train", 60), ("val", 20)):
        short = [f for f in functions(split) if len(f["prompt"] + f["response"]) < 200][:count]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(f) + "\n" for f in short))
    tokenizer = bpe.train((f["prompt"] for f in short), vocab=400, end_of_text=END)
    gpt2().save_pretrained(folder / "gpt2")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder / "gpt2")
    (folder / "base.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def chain(place):
    """The same folder, with the runs `t/base` and `t/sft` done and `t/reward` written."""
    orch(place, "submit", "base.yaml", "--stage", "base", "--stage", "sft")
    orch(place, "submit", "base.yaml", "--stage", "reward", "--dry-run")
    return place


def run_of(place, stage):
    return Run.load(place / "runs" / "t" / stage)


def ours(place, stage):
    run = run_of(place, stage)
    return load(run, language_model(run, None))


def tokens():
    return torch.randint(400, (2, 192), generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
def test_what_enters_computes_the_same_and_leaves_bit_for_bit(chain):
    model, _ = ours(chain, "base")
    with torch.no_grad():
        expected = gpt2()(tokens()).logits
        assert expected.std() > 0.5  # the comparison sees something
        torch.testing.assert_close(model(tokens()), expected, rtol=2e-5, atol=2e-5)
    assert "the same file" in (chain / "runs/t/base/logs/1-0.log").read_text()
    orch(chain, "export", "t/base", "back")
    before, after = (load_file(chain / folder / "model.safetensors") for folder in ("gpt2", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    hf.check_config(chain / "back", SPEC)
    assert (chain / "back/tokenizer.json").read_bytes() == (chain / "gpt2/tokenizer.json").read_bytes()


@pytest.mark.slow
def test_a_stage_starts_from_it_and_transformers_takes_the_result(chain):
    base, (model, chat) = ours(chain, "base")[0], ours(chain, "sft")
    moved = [(a - b).abs().max().item() for a, b in zip(base.parameters(), model.parameters(), strict=True)]
    assert 0 < max(moved) < 0.01  # three steps of AdamW at 1e-3, from those weights
    run = run_of(chain, "sft")
    export(run, language_model(run, None), chain / "sft", file_bytes=20_000)
    assert len([*(chain / "sft").glob("model-*-of-*.safetensors")]) > 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(chain / "sft").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(chain / "sft")
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens()).logits, model(tokens()), rtol=2e-5, atol=2e-5)
    text = "def f(x, über):\n    return x  # 1 + 1 = 2\n"
    assert tokenizer.encode(text) == chat.tokenizer.encode(text).ids
    turns = [{"role": "user", "content": "Say it.\n"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    assert prompt == chat.prompt(turns)
    wrote = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    out, _ = orch(chain, "generate", "t/sft", "--prompt", "Say it.\n", "--max-tokens", "12", "--temperature", "0")
    assert out == tokenizer.decode(wrote, skip_special_tokens=True) + "\n"

    half = load_file(export(run, language_model(run, None), chain / "half", dtype="fp16")[2])
    whole = model.state_dict()["blocks.1.attn.qkv.weight"]
    assert torch.equal(half["transformer.h.1.attn.c_attn.weight"], whole.T.half())


@pytest.mark.slow
def test_generate(chain):
    """Prompts of a file and of the command line; the same seed the same text; each sample its own."""
    lines = [{"prompt": "def f():"}, {"messages": [{"role": "user", "content": "x"}]}]
    (chain / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    words = ("generate", "t/sft", "--prompt", "a", "--file", "asked.jsonl", "--samples", "2", "--max-tokens", "9")
    out, _ = orch(chain, *words, "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert [(f["prompt"], f["sample"]) for f in found] == [
        (p, k) for p in ("a", "def f():", lines[1]["messages"]) for k in (0, 1)
    ]
    assert len({f["text"] for f in found}) == 6 and all(f["tokens"] <= 9 for f in found)
    again, _ = orch(chain, *words)
    assert found[3]["text"] in again and "== prompt 2, sample 2\n" in again
    raw, said = orch(
        chain, "generate", "t/base", "--prompt", "def f", "--max-tokens", "3", "--seed", "5", "--top-k", "3"
    )
    assert raw and "raw text" in said


@pytest.mark.slow
def test_what_generate_refuses(chain):
    _, said = orch(chain, "generate", "t/sft", "--prompt", "a b " * 200, ok=1)
    assert re.search(r"a prompt of \d{3} tokens does not fit the model's context of 192", said)
    _, said = orch(chain, "generate", "t/sft", "--prompt", "a", "--max-tokens", "192", ok=1)
    assert re.search(r"a prompt of \d tokens and a response of up to 192 does not fit .* 192\nhint: ask for", said)
    _, said = orch(chain, "generate", "t/reward", "--prompt", "a", ok=1)
    assert "is a reward model" in said and "`t/sft`" in said
    _, said = orch(chain, "generate", "t/sft", "--step", "7", "--prompt", "a", ok=1)
    assert "does not have the checkpoint of step 7" in said
    (chain / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    _, said = orch(chain, "generate", "t/sft", "--file", "bad.jsonl", ok=1)
    assert "`bad.jsonl`, line 2" in said


@pytest.mark.slow
def test_chat_keeps_the_conversation(chain):
    """The second answer is the one to all three turns; on a terminal it comes in parts, and is the same."""
    how = ("--temperature", "0", "--max-tokens", "10")
    (chain / "said.txt").write_text("Hello\nAnd then?\n")
    out, _ = orch(chain, "chat", "t/sft", "--file", "said.txt", "--json", *how)
    first, second = map(json.loads, out.splitlines())
    turns = [{"role": role, "content": first[role]} for role in ("user", "assistant")]
    turns.append({"role": "user", "content": "And then?"})
    (chain / "turns.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    out, _ = orch(chain, "generate", "t/sft", "--file", "turns.jsonl", *how)
    assert out == second["assistant"] + "\n"

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [ORCH, "chat", "t/sft", *how], cwd=chain, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        os.write(ours, b"Hello\nAnd then?\n/new\nAnd then?\n\x04")
        out, said = process.communicate(timeout=600 * slowness())
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)
    shown = out.decode()
    assert process.returncode == 0 and ">" in said.decode() and not shown.startswith(">")
    assert shown.index(first["assistant"]) < shown.index(second["assistant"])


def test_a_checkpoint_that_is_not_whole_is_not_used(tmp_path, caplog):
    """Its files are measured before it talks, and hashed before it is exported."""
    run = make_chain(tmp_path)[1]
    before, newest = (checkpoint.folder_of(run.checkpoints, step) for step in (5, 9))
    for folder in (before, newest):
        folder.mkdir(parents=True)
        (folder / "weights").write_text("whole")
        checkpoint.commit(folder, {})
    (newest / "weights").write_text("other")
    assert language_model(run, None) == language_model(run, 9) == newest
    assert language_model(run, None, hashes=True) == before and "step-0000009` is damaged" in caplog.text
    with pytest.raises(CheckpointError, match="step 9 is damaged"):
        language_model(run, 9, hashes=True)
    (before / "weights").write_text("")
    (newest / "weights").unlink()
    for step, which in ((None, "every one of 2"), (5, "step 5"), (9, "step 9")):
        with pytest.raises(CheckpointError, match=f"{which}.* is damaged") as refused:
            language_model(run, step)
        assert refused.value.hint


def test_a_file_that_is_no_utf8_is_refused(tmp_path):
    file = tmp_path / "latin.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n' + '{"prompt": "für"}\n'.encode("latin-1"))
    result = CliRunner().invoke(cli, ["generate", "t/sft", "--file", str(file)])
    assert result.exit_code == 1 and "latin.jsonl`, line 2: not UTF-8 at byte 13" in result.stderr
    with file.open("rb") as turns, pytest.raises(DataError, match="line 2: not UTF-8"):
        list(lines_of(turns, file.name))


@pytest.mark.parametrize(("option", "value"), [("temperature", "nan"), ("temperature", "inf"), ("top-p", "nan")])
def test_what_is_no_finite_number_is_refused(option, value):
    result = CliRunner().invoke(cli, ["generate", "t/sft", "--prompt", "a", f"--{option}", value])
    assert result.exit_code == 2 and "is no finite number" in result.stderr


@pytest.mark.slow
def test_what_fails_in_the_model_is_an_answer_and_its_end_ends_the_chat(chain, capsys):
    run = run_of(chain, "sft")
    with serving(run, language_model(run, None)) as ask:
        (child,) = (p for p in psutil.Process().children() if "jobs.runtime.serve" in p.cmdline())
        child.rlimit(psutil.RLIMIT_AS, (child.memory_info().vms + 2**20, -1))
        with pytest.raises(OrchError, match=r"(RuntimeError|MemoryError): ") as refused:
            list(ask(prompts=["a " * 60], samples=16, max_tokens=60))
        assert "for want of memory" in refused.value.hint
        child.rlimit(psutil.RLIMIT_AS, (-1, -1))
        assert [*ask(prompts=["a"], max_tokens=2)]

    def says():
        """A person who goes on talking while the process that answers is killed."""
        yield "Hello"
        (child,) = (p for p in psutil.Process().children() if "jobs.runtime.serve" in p.cmdline())
        child.kill()
        child.wait()
        yield "And then?"
        pytest.fail("asked for more")

    with pytest.raises(OrchError, match="went away"):
        talk(run, language_model(run, None), says(), system=None, as_json=False, live=True, max_tokens=2)


def test_text_is_shown_as_soon_as_it_is_whole(place):
    said = []
    tokenizer = bpe.load(place / "gpt2" / "tokenizer.json")
    chat = Chat(tokenizer, ChatSpec(), end=tokenizer.token_to_id(END), tokenizer_sha256="")

    def say(delta):
        said.append(delta)

    stream = Stream(chat, say)
    text = "a für €"
    for i in tokenizer.encode(text).ids:
        stream(torch.tensor([i]))
    assert "".join(said) == text and len(said) > 3 and not any("\ufffd" in s for s in said)


def test_what_the_template_has_behind_an_answer_is_never_shown(place):
    tokenizer = bpe.load(place / "gpt2" / "tokenizer.json")
    spec = ChatSpec(assistant="A: {content}\n--\n")
    chat = Chat(tokenizer, spec, end=tokenizer.token_to_id(END), tokenizer_sha256="")
    said = []
    stream = Stream(chat, lambda **shown: said.append(shown["delta"]))
    answer = "one\n-two\n"
    for i in [*tokenizer.encode(answer + "\n--\n").ids, chat.end]:
        stream(torch.tensor([i]))
    shown = "".join(said)
    assert answer.startswith(shown) and shown.startswith("one\n-two")


def test_models_that_gpt2_cannot_be_are_refused_by_their_settings():
    other = replace(SPEC, position="rope", activation="swiglu", norm="rmsnorm", bias=False, kv_heads=2)
    with pytest.raises(ConfigError) as refused:
        hf.refuse_other_models(other)
    for setting in (
        "position` is rope",
        "activation` is swiglu",
        "norm` is rmsnorm",
        "bias` is False",
        "kv_heads` is 2",
    ):
        assert f"`model.{setting}" in str(refused.value)
    for change in ({"attention": "alternating"}, {"norm_position": "post"}, {"parallel_block": True}):
        with pytest.raises(ConfigError):
            hf.refuse_other_models(replace(SPEC, **change))


def test_another_model_is_refused_with_all_that_differs(place):
    hf.check_config(place / "gpt2", SPEC)
    with pytest.raises(ConfigError) as refused:
        hf.check_config(place / "gpt2", replace(SPEC, layers=3, seq_len=64, activation="relu", ffn_hidden=100))
    for words in ("n_layer` is 2 there, and `model.layers` is 3", "n_positions` is 192 there", "is gelu_tanh there",
                  "n_inner` is 128 there, and `model.ffn_hidden` is 100"):  # fmt: skip
        assert words in str(refused.value)
    _, said = orch(place, "submit", "base.yaml", "name=u", "model.layers=3", "--dry-run", ok=1)
    assert "n_layer" in said and not (place / "runs" / "u").exists()


@pytest.mark.parametrize(("content", "said"), [("{", "is no JSON"), ("[]", "holds no JSON object"), (None, "no `conf")])
def test_a_config_that_is_none_is_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=said) as refused:
        hf.check_config(tmp_path, SPEC)
    assert refused.value.hint


def test_another_tokenizer_is_refused_and_the_same_in_other_words_is_not(place, tmp_path):
    theirs = place / "gpt2" / "tokenizer.json"
    (tmp_path / "t.json").write_text(json.dumps(json.loads(theirs.read_text())))
    assert hf.same_tokenizer(theirs, theirs) == "file"
    assert hf.same_tokenizer(theirs, tmp_path / "t.json") == "vocabulary and merges"
    bpe.train(["other words"], vocab=300, end_of_text=END).save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"400 tokens there, \d+ here"):
        hf.same_tokenizer(theirs, tmp_path / "t.json")


def importing(place, root, folder):
    """The job of `base`, to import ``folder``."""
    spec = compose(place / "base.yaml", ()).experiment
    data = replace(spec.data, tokenizer=str(folder / "tokenizer.json"))
    run = Run(folder=root / "t" / "base", experiment="t", stage="base", index=1, key="k")
    (run.folder / "attempts").mkdir(parents=True)
    return Job(
        run=run,
        experiment=replace(spec, data=data),
        stage=spec.stages["base"],
        options=import_hf.Options(folder=str(folder)),
        ranks=Ranks(),
        attempt="1",
        record=start(run),
    )


def test_what_was_imported_is_noted_file_by_file(place, tmp_path):
    theirs = tmp_path / "theirs"
    gpt2().save_pretrained(theirs, max_shard_size="20KB")
    shutil.copy(place / "gpt2" / "tokenizer.json", theirs)
    job = importing(place, tmp_path, theirs)
    import_hf.run(job)
    (attempt,) = job.run.attempts()
    files = [theirs / "config.json", theirs / hf.INDEX, *sorted(theirs.glob("model-*.safetensors"))]
    assert len(files) > 3
    assert attempt.read == {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_tokenizer_with_more_tokens_than_the_model_is_not_imported(place, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(place / "gpt2", theirs)
    tokenizer = bpe.load(theirs / "tokenizer.json")
    tokenizer.add_special_tokens(["<|user|>"])
    tokenizer.save(str(theirs / "tokenizer.json"))
    with pytest.raises(DataError, match=r"has 401 tokens, and `model\.vocab` is 400") as refused:
        import_hf.run(importing(place, tmp_path, theirs))
    assert "resize_token_embeddings(401)" in refused.value.hint
    assert not (tmp_path / "t" / "base" / "checkpoints").exists()


@pytest.mark.parametrize("how", ["sharded", "bf16", "untied", "without prefix"])
def test_weights_as_transformers_may_have_saved_them(tmp_path, how):
    spec, model = SPEC, gpt2(tie_word_embeddings=how != "untied")
    if how == "untied":
        spec = replace(SPEC, tie_embeddings=False)
    if how == "bf16":
        model = model.bfloat16()
    saved = model.transformer if how == "without prefix" else model
    saved.save_pretrained(tmp_path, max_shard_size="20KB" if how == "sharded" else "5GB")
    assert (tmp_path / hf.INDEX).exists() == (how == "sharded")
    state = model.state_dict()
    with import_hf.Weights(tmp_path, spec) as weights:
        for p in hf.parameters(spec):
            theirs = state[p.theirs].float()
            assert torch.equal(torch.from_numpy(weights.read(p.name)), theirs.T if p.transposed else theirs)


def test_weights_that_are_not_to_be_trusted_or_not_there(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(CheckpointError, match="only a pickle") as refused:
        import_hf.files_of(tmp_path)
    assert "save_pretrained" in refused.value.hint
    (tmp_path / hf.INDEX).write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(CheckpointError, match="no file of this folder"):
        import_hf.files_of(tmp_path)
    model.save_pretrained(tmp_path / "less")
    with pytest.raises(CheckpointError, match=r"lacks `transformer.h.2.*12 in all"):
        import_hf.Weights(tmp_path / "less", replace(SPEC, layers=3))
    with import_hf.Weights(tmp_path / "less", replace(SPEC, seq_len=64)) as weights:
        with pytest.raises(CheckpointError, match=r"shape \(192, 32\)"):
            weights.read("positions.weight")
