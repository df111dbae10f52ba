"""The layout of transformers' GPT-2, and ours: names, settings, tokenizer, chat template. No torch.

transformers keeps the matrices of a block as Conv1D, (in, out), where ours are (out, in); embeddings and an untied head
are as ours (transformers 4.51, `modeling_gpt2.py` and `configuration_gpt2.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from jobs.data.bpe import file_sha256, load
from jobs.data.chat import Chat
from jobs.runtime import checkpoint
from orchestrator.errors import ConfigError, DataError
from orchestrator.run import read_json
from orchestrator.spec import ChatSpec, DataSpec, Experiment, ModelSpec

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
INDEX = "model.safetensors.index.json"  # where the weights are in several files
# What GPT2LMHeadModel cannot be told: settings, and the only values it has.
FIXED: dict[str, Any] = {
    "norm": "layernorm",
    "norm_position": "pre",
    "position": "learned",
    "attention": "dense",
    "bias": True,
    "parallel_block": False,
}
# Our settings by theirs, with the default of GPT2Config.
SETTINGS: dict[str, tuple[str, Any]] = {
    "layers": ("n_layer", 12),
    "hidden": ("n_embd", 768),
    "heads": ("n_head", 12),
    "vocab": ("vocab_size", 50257),
    "seq_len": ("n_positions", 1024),
    "ffn": ("n_inner", None),  # None: 4 x n_embd
    "activation": ("activation_function", "gelu_new"),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "tie_embeddings": ("tie_word_embeddings", True),
}
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
UNUSUAL = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


class Parameter(NamedTuple):
    """One tensor, here and there."""

    name: str
    shape: tuple[int, ...]  # here
    theirs: str
    transposed: bool


def parameters(spec: ModelSpec) -> Iterator[Parameter]:
    """Every tensor of ``spec``, in the order of the model."""
    h, f = spec.hidden, spec.ffn
    yield Parameter("embed.weight", (spec.vocab, h), "transformer.wte.weight", False)
    yield Parameter("positions.weight", (spec.seq_len, h), "transformer.wpe.weight", False)
    for i in range(spec.layers):
        for ours, theirs, shape in (
            ("norm1", "ln_1", (h,)),
            ("attn.qkv", "attn.c_attn", (3 * h, h)),
            ("attn.proj", "attn.c_proj", (h, h)),
            ("norm2", "ln_2", (h,)),
            ("mlp.up", "mlp.c_fc", (f, h)),
            ("mlp.down", "mlp.c_proj", (h, f)),
        ):
            there = f"transformer.h.{i}.{theirs}"
            yield Parameter(f"blocks.{i}.{ours}.weight", shape, f"{there}.weight", len(shape) == 2)
            yield Parameter(f"blocks.{i}.{ours}.bias", shape[:1], f"{there}.bias", False)
    yield Parameter("norm.weight", (h,), "transformer.ln_f.weight", False)
    yield Parameter("norm.bias", (h,), "transformer.ln_f.bias", False)
    if not spec.tie_embeddings:
        yield Parameter("head.weight", (spec.vocab, h), "lm_head.weight", False)


def refuse_other_models(spec: ModelSpec) -> None:
    """Raise ConfigError that names every setting which GPT-2's layout cannot express."""
    found = [f"`model.{k}` is {getattr(spec, k)}, there it is {v}" for k, v in FIXED.items() if getattr(spec, k) != v]
    if spec.activation not in ACTIVATIONS.values():
        known = ", ".join(dict.fromkeys(ACTIVATIONS.values()))
        found.append(f"`model.activation` is {spec.activation}, there it is one of {known}")
    if spec.kv_hidden != spec.hidden:
        found.append(f"`model.kv_heads` is {spec.kv_heads}, there it is `heads`, {spec.heads}")
    if found:
        raise ConfigError(
            "transformers' GPT-2 cannot be this model: " + "; ".join(found),
            hint="`orch consolidate` writes any model as safetensors, by our own names",
        )


def config_of(spec: ModelSpec, *, end: int, dtype: str) -> dict[str, Any]:
    """What ``config.json`` says of a model that is not refused."""
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == spec.activation)
    ours = {theirs: getattr(spec, key) for key, (theirs, _) in SETTINGS.items()} | {"activation_function": activation}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), spec.dropout)
    end_of_text = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    kind = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "torch_dtype": dtype}
    return {**kind, **ours, **drop, **UNUSUAL, **end_of_text}


def check_config(folder: Path, spec: ModelSpec) -> None:
    """Raise ConfigError unless ``config.json`` in ``folder`` is of the model ``spec``; it lists what differs."""
    refuse_other_models(spec)
    hint = "name a folder that `save_pretrained` has written"
    try:
        said = read_json(folder / CONFIG)
    except ValueError as e:
        raise ConfigError(f"`{folder / CONFIG}` is no JSON: {e}", hint=hint) from e
    if said is None:
        raise ConfigError(f"no `{CONFIG}` in `{folder}`", hint=hint)
    if not isinstance(said, dict):
        raise ConfigError(f"`{folder / CONFIG}` holds no JSON object", hint=hint)
    if said.get("model_type") != "gpt2":
        raise ConfigError(f"`{folder / CONFIG}` is of a `{said.get('model_type')}` model", hint="only gpt2 can enter")
    differ = []
    for key, (theirs, default) in SETTINGS.items():
        there, here = said.get(theirs, default), getattr(spec, key)
        if key == "ffn" and there is None:
            there = 4 * said.get("n_embd", 768)
        if key == "activation":
            there = ACTIVATIONS.get(there, there)
        if there != here:
            differ.append(f"`{theirs}` is {there} there, and `model.{'ffn_hidden' if key == 'ffn' else key}` is {here}")
    differ += [f"`{k}` is {said[k]} there, and ours is {v}" for k, v in UNUSUAL.items() if said.get(k, v) != v]
    if differ:
        raise ConfigError(f"`{folder / CONFIG}` is of another model: " + "; ".join(differ), hint="change `model`")


def identified(folder: Path, experiment: Experiment) -> Chat:
    """The tokenizer and template of ``experiment``.

    Raises:
        CheckpointError: the checkpoint in ``folder`` is of another model or tokenizer.
        DataError: the tokenizer is gone.
    """
    chat = Chat.open(experiment.data)
    saved = checkpoint.identity_of(folder)
    checkpoint.check_identity(folder, saved, identity(experiment.model, chat), free=("data",))
    return chat


def identity(spec: ModelSpec, chat: Chat) -> dict[str, Any]:
    """What a checkpoint says of its model and tokenizer; dropout is no part of it."""
    model = asdict(spec)
    del model["dropout"]
    return {"model": model, "tokenizer": chat.tokenizer_sha256}


def tokenizer_of(data: DataSpec) -> Path:
    """Where the tokenizer of ``data`` lies."""
    return Path(data.tokenizer or Path(data.folder) / TOKENIZER)


def same_tokenizer(theirs: Path, ours: Path) -> str:
    """In which sense two tokenizer.json are the same: `file`, or `vocabulary and merges`. Raises DataError."""
    if not theirs.exists():
        raise DataError(
            f"no `{theirs}`",
            hint="`AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)` makes it of `vocab.json`",
        )
    if file_sha256(theirs) == file_sha256(ours):
        return "file"
    there, here = _rules(theirs), _rules(ours)
    if there == here:
        return "vocabulary and merges"
    common = len(there["vocab"].items() & here["vocab"].items())
    raise DataError(
        f"`{theirs}` is not the tokenizer of the data, `{ours}`: {len(there['vocab']):,} tokens there, "
        f"{len(here['vocab']):,} here, {common:,} of them with the same number",
        hint=f"prepare the data with it: `data.tokenizer: {theirs}`",
    )


def _rules(path: Path) -> dict[str, Any]:
    """What decides the tokens of a text: vocabulary, added tokens included, and merges in order."""
    tokenizer = load(path)
    said = json.loads(tokenizer.to_str())
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in said["model"].get("merges", [])]
    return {"vocab": tokenizer.get_vocab(), "merges": merges, **{k: said[k] for k in ("normalizer", "pre_tokenizer")}}


def tokenizer_config(chat: Chat, seq_len: int, *, template: bool) -> dict[str, Any]:
    """What ``tokenizer_config.json`` says; with ``template``, how a conversation becomes text too."""
    said: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), chat.spec.end),
    }
    return said | ({"chat_template": jinja(chat.spec)} if template else {})


def jinja(spec: ChatSpec) -> str:
    """The template as transformers' `apply_chat_template` takes it."""
    cases = []
    for role in ("system", "user", "assistant"):
        before, _, after = getattr(spec, role).partition("{content}")
        after += spec.end if role == "assistant" else ""
        cases.append(f"if message['role'] == '{role}' %}}{{{{ {before!a} + message['content'] + {after!a} }}}}")
    wrong = "else %}{{ raise_exception('no role ' + message['role']) }}"
    each = "{% " + "{% el".join(cases) + "{% " + wrong + "{% endif %}"
    begin = spec.assistant.partition("{content}")[0]
    last = f"{{% if add_generation_prompt %}}{{{{ {begin!a} }}}}{{% endif %}}"
    return "{% for message in messages %}" + each + "{% endfor %}" + last


def joins_alike(chat: Chat) -> bool:
    """Whether a conversation has the tokens that our template gives it when it is split as one text, as theirs is."""
    turns = [{"role": "user", "content": "Why?\n"}, {"role": "assistant", "content": " Because."}]
    turns.append({"role": "user", "content": "And then"})
    return all(_as_one_text(chat, turns[:n]) == chat.prompt(turns[:n]) for n in (1, 3))


def _as_one_text(chat: Chat, turns: Sequence[Mapping[str, str]]) -> list[int]:
    text = ""
    for turn in turns:
        before, _, after = getattr(chat.spec, turn["role"]).partition("{content}")
        text += before + turn["content"] + after + (chat.spec.end if turn["role"] == "assistant" else "")
    text += chat.spec.assistant.partition("{content}")[0]
    ids: list[int] = chat.tokenizer.encode(text, add_special_tokens=False).ids
    return ids
