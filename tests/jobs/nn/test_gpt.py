"""The decoder against transformers' models, papers' parameter counts, closed forms, and itself when sharded."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from jobs.nn.gpt import GPT, band, decay_groups, init_weights
from orchestrator.errors import ConfigError, DataError
from orchestrator.spec import ModelSpec

GPT2 = ModelSpec(layers=4, hidden=32, heads=4, vocab=61, seq_len=24)
GPT1 = replace(GPT2, norm_position="post", scaled_init=False)
GPT3 = replace(GPT2, attention="alternating", window=5)
GPTJ = replace(GPT2, position="rope", parallel_block=True, tie_embeddings=False)
LLAMA = replace(
    GPT2, norm="rmsnorm", activation="swiglu", position="rope", kv_heads=2, ffn_hidden=40, bias=False,
    tie_embeddings=False, norm_eps=1e-6, rope_theta=500.0,
)  # fmt: skip
ALL = {"gpt1": GPT1, "gpt2": GPT2, "gpt3": GPT3, "gptj": GPTJ, "llama": LLAMA}


def model_of(spec, seed=0, **settings):
    return init_weights(GPT(spec, **settings), seed)


def tokens_of(spec, batch=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(spec.vocab, (2, batch, spec.seq_len), generator=g)


# ------------------------------------------------------------------ transformers


def theirs(kind, spec):
    """transformers' model of the same sizes, with random weights that leave nothing near zero."""
    import transformers as hf

    shape = {"vocab_size": spec.vocab, "attn_implementation": "eager"}
    gpt = {**shape, "n_embd": spec.hidden, "n_layer": spec.layers, "n_head": spec.heads, "n_positions": spec.seq_len}
    if kind == "gpt1":
        model = hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(**gpt))
    elif kind == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**gpt))
    elif kind == "gptj":
        model = hf.GPTJForCausalLM(hf.GPTJConfig(**gpt, rotary_dim=spec.head_dim))
    elif kind == "gpt3":
        model = hf.GPTNeoForCausalLM(
            hf.GPTNeoConfig(
                **shape, hidden_size=spec.hidden, num_layers=spec.layers, num_heads=spec.heads,
                max_position_embeddings=spec.seq_len, window_size=spec.window,
                attention_types=[[["global", "local"], spec.layers // 2]],
            )
        )  # fmt: skip
    else:
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                **shape, hidden_size=spec.hidden, num_hidden_layers=spec.layers, num_attention_heads=spec.heads,
                num_key_value_heads=spec.kv_heads, intermediate_size=spec.ffn_hidden, rms_norm_eps=spec.norm_eps,
                rope_theta=spec.rope_theta, max_position_embeddings=spec.seq_len,
            )
        )  # fmt: skip
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if p.ndim == 1 and name.endswith("weight") else 0.0, 0.15, generator=g)
        for name, p in model.named_parameters():
            if name in ("lm_head.bias",):
                p.zero_()
    return model.eval()


LAYER = {  # ours: theirs; several are stacked, `T` marks Conv1D, which stores its matrix transposed
    "gpt1": ("transformer.h.{}.", {
        "norm1": "ln_1", "norm2": "ln_2", "attn.qkv": "attn.c_attn T", "attn.proj": "attn.c_proj T",
        "mlp.up": "mlp.c_fc T", "mlp.down": "mlp.c_proj T"}),
    "gpt2": ("transformer.h.{}.", {
        "norm1": "ln_1", "norm2": "ln_2", "attn.qkv": "attn.c_attn T", "attn.proj": "attn.c_proj T",
        "mlp.up": "mlp.c_fc T", "mlp.down": "mlp.c_proj T"}),
    "gpt3": ("transformer.h.{}.", {
        "norm1": "ln_1", "norm2": "ln_2",
        "attn.qkv": "attn.attention.q_proj, attn.attention.k_proj, attn.attention.v_proj",
        "attn.proj": "attn.attention.out_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}),
    "gptj": ("transformer.h.{}.", {
        "norm1": "ln_1", "attn.qkv": "attn.q_proj, attn.k_proj, attn.v_proj", "attn.proj": "attn.out_proj",
        "mlp.up": "mlp.fc_in", "mlp.down": "mlp.fc_out"}),
    "llama": ("model.layers.{}.", {
        "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
        "attn.qkv": "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj", "attn.proj": "self_attn.o_proj",
        "mlp.up": "mlp.gate_proj, mlp.up_proj", "mlp.down": "mlp.down_proj"}),
}  # fmt: skip
OUTSIDE = {
    "gpt1": {"embed": "transformer.tokens_embed", "positions": "transformer.positions_embed"},
    "gpt2": {"embed": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f"},
    "gpt3": {"embed": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f"},
    "gptj": {"embed": "transformer.wte", "norm": "transformer.ln_f", "head": "lm_head"},
    "llama": {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
}


def weights_from(kind, spec, hf_model):
    """transformers' weights under our names. Biases that theirs lack are zero."""
    source = hf_model.state_dict()
    prefix, layer = LAYER[kind]
    names = dict(OUTSIDE[kind])
    for i, (ours, parts) in product(range(spec.layers), layer.items()):
        names[f"blocks.{i}.{ours}"] = ", ".join(prefix.format(i) + part for part in parts.split(", "))
    out = {}
    for name in GPT(spec).state_dict():
        module, _, leaf = name.rpartition(".")
        parts = []
        for part in names[module].split(", "):
            path, _, transposed = part.partition(" ")
            key = f"{path}.{leaf}"
            t = source[key] if key in source else torch.zeros(len(source[f"{path}.weight"]))
            t = t.T if transposed and t.ndim == 2 else t
            if kind == "gpt3" and path.endswith("q_proj"):
                t = t * math.sqrt(spec.head_dim)  # GPT-Neo does not divide scores by sqrt(head_dim)
            if kind == "gptj" and path.endswith(("q_proj", "k_proj")):  # GPT-J turns dims 2d and 2d + 1 together
                heads = t.unflatten(0, (spec.heads, spec.head_dim // 2, 2))
                t = heads.transpose(1, 2).flatten(0, 2)
            parts.append(t)
        out[name] = torch.cat(parts)
    return out


@pytest.mark.parametrize("kind", ALL)
def test_logits_equal_transformers(kind):
    spec = ALL[kind]
    hf_model = theirs(kind, spec)
    model = GPT(spec)
    model.load_state_dict(weights_from(kind, spec, hf_model))
    tokens, targets = tokens_of(spec)
    with torch.no_grad():
        expected, got = hf_model(tokens).logits, model(tokens)
        nll = model(tokens, targets)
    assert expected.std() > 0.5  # the comparison sees something
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(nll, F.cross_entropy(expected.transpose(1, 2), targets, reduction="none"))


# ------------------------------------------------------------------ counts


def parameters(spec):
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(spec).parameters())


def test_every_variant_has_the_parameters_its_spec_says():
    options = {
        "norm": ["layernorm", "rmsnorm"], "norm_position": ["pre", "post"], "position": ["learned", "rope", "none"],
        "activation": ["gelu", "swiglu"], "bias": [True, False], "tie_embeddings": [True, False],
        "parallel_block": [True, False], "kv_heads": [None, 2],
    }  # fmt: skip
    for values in product(*options.values()):
        spec = replace(GPT2, layers=2, **dict(zip(options, values, strict=True)))
        assert parameters(spec) == spec.params, spec


def test_published_parameter_counts():
    """GPT-2 by nanoGPT's transformer_sizing.ipynb and by OpenAI's checkpoints; GPT-3 by its table D.1."""
    assert parameters(ModelSpec(layers=12, hidden=768, heads=12, seq_len=1024, bias=False)) == 124_337_664
    for layers, hidden, heads, count in ((12, 768, 12, 124_439_808), (48, 1600, 25, 1_557_611_200)):
        assert parameters(ModelSpec(layers=layers, hidden=hidden, heads=heads, seq_len=1024)) == count
    for layers, hidden, heads, millions in (
        (12, 768, 12, 125), (24, 1024, 16, 356), (24, 1536, 16, 760), (24, 2048, 16, 1320),
        (32, 2560, 32, 2650), (32, 4096, 32, 6660), (40, 5120, 40, 12850), (96, 12288, 96, 174600),
    ):  # fmt: skip
        spec = ModelSpec(layers=layers, hidden=hidden, heads=heads)
        assert parameters(spec) == spec.params
        assert spec.params / 1e6 == pytest.approx(millions, rel=0.01)


def test_model_flops():
    """nanoGPT's transformer_sizing.ipynb prints GPT-2 124M's for 1,024 tokens; Narayanan et al. eq. 3 gives GPT-3's."""
    gpt2 = ModelSpec(layers=12, hidden=768, heads=12, seq_len=1024)
    assert gpt2.flops_per_token * 1024 == 874_944_921_600
    s, h, layers, v = 2048, 12288, 96, 50257
    gpt3 = ModelSpec(layers=layers, hidden=h, heads=96)
    with_recompute = 96 * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    forward_again = 24 * layers * h**2 * (1 + s / (6 * h))  # the blocks' forward pass, of which eq. 3 counts two
    assert gpt3.flops_per_token == pytest.approx(with_recompute - forward_again, rel=1e-12)


def test_model_flops_equal_what_pytorch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    for spec in (GPT1, GPT2, LLAMA, GPTJ):
        tokens, _ = tokens_of(spec)
        model = model_of(spec)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # matrix products it can see
            model(tokens).sum().backward()
        assert counter.get_total_flops() == spec.flops_per_token * tokens.numel()
    assert GPT2.flops_per_token - GPT3.flops_per_token == 12 * 32 * 2 * (24 - 5)  # two banded layers, window 5


# ------------------------------------------------------------------ behaviour


@pytest.mark.parametrize("window", [1, 2, 5, 24, 100])
def test_a_banded_layer_sees_its_window_and_nothing_else(window):
    t = 24
    expected = [[i - window < j <= i for j in range(t)] for i in range(t)]
    assert band(t, window, torch.device("cpu")).tolist() == expected
    # by the model's own gradients: which inputs does each output of one banded layer depend on?
    spec = replace(GPT2, layers=1, position="none", attention="banded", window=window)
    model = model_of(replace(spec, init_std=0.3))
    x = torch.randn(1, t, spec.hidden, requires_grad=True)
    y = model.blocks[0](x)
    for i in (0, 3, t - 1):
        seen = torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)[0][0].abs().sum(-1) > 0
        assert seen.tolist() == expected[i]


def test_alternating_layers_are_dense_then_banded():
    windows = [block.attn.window for block in GPT(GPT3).blocks]
    assert windows == [None, 5, None, 5]


def losses_and_grads(model, tokens, targets):
    torch.manual_seed(5)  # dropout
    nll = model(tokens, targets)
    nll.mean().backward()
    return nll.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_bit(kind, recompute):
    spec = replace(ALL[kind], dropout=0.1)
    tokens, targets = tokens_of(spec)
    nll, grads = losses_and_grads(model_of(spec), tokens, targets)
    nll2, grads2 = losses_and_grads(model_of(spec, recompute=recompute), tokens, targets)
    assert torch.equal(nll, nll2)
    assert all(torch.equal(grads[n], grads2[n]) for n in grads)


def test_recompute_keeps_less():
    spec = replace(GPT2, seq_len=128, attention="banded", window=16, dropout=0.1)
    tokens, targets = tokens_of(spec)
    kept = {}
    for recompute in ("none", "selective", "full"):
        total = 0

        def pack(t):
            nonlocal total
            total += t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model_of(spec, recompute=recompute)(tokens, targets)
        kept[recompute] = total
    assert kept["full"] < kept["selective"] < kept["none"] / 2  # dropout keeps its (T, T) masks otherwise


@pytest.mark.slow
def test_compiled_blocks_give_the_same_loss():
    spec = replace(GPT3, layers=2)
    tokens, targets = tokens_of(spec)
    nll, grads = losses_and_grads(model_of(spec), tokens, targets)
    model = model_of(spec, recompute="full")
    model.compile_blocks()
    nll2, grads2 = losses_and_grads(model, tokens, targets)
    torch.testing.assert_close(nll2, nll)
    assert list(grads2) == list(grads)
    for n in grads:
        torch.testing.assert_close(grads2[n], grads[n])


def test_initial_weights():
    model = model_of(replace(GPT2, hidden=256, vocab=512))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif "norm" in name:
            assert (p == 1).all()
        else:
            residual = name.endswith(("proj.weight", "down.weight"))
            expected = 0.02 / math.sqrt(2 * 4) if residual else 0.02  # GPT-2, section 2.3: N = 2L residual layers
            assert p.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * p.numel())), name
            assert abs(p.mean().item()) < 5 * expected / math.sqrt(p.numel()), name
    loss = model(*tokens_of(model.spec)).mean().item()
    assert loss == pytest.approx(math.log(512), abs=0.1)


def test_initial_weights_depend_on_name_and_seed_alone():
    spec = GPT2
    whole = model_of(spec).state_dict()
    torch.manual_seed(99)
    torch.randn(7)
    shorter = model_of(replace(spec, layers=2, scaled_init=False)).state_dict()
    longer = model_of(replace(spec, scaled_init=False)).state_dict()
    assert all(torch.equal(shorter[n], longer[n]) for n in shorter)
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), model_of(spec).state_dict().values(), strict=True))
    other = model_of(spec, seed=1)
    assert all(not torch.equal(whole[n], p) for n, p in other.named_parameters() if p.ndim > 1)
    matrices = [t.flatten()[:100] for n, t in whole.items() if t.ndim > 1]
    assert len({tuple(m.tolist()) for m in matrices}) == len(matrices)


def test_decay_groups():
    model = GPT(GPT2)
    decay, rest = decay_groups(model, 0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decay["params"]} == {id(p) for p in model.parameters() if p.ndim == 2}
    assert {id(p) for p in rest["params"]} == {id(p) for p in model.parameters() if p.ndim == 1}


def test_bad_sizes_are_named():
    with pytest.raises(ConfigError, match="`heads` = 5 does not divide `hidden` = 32") as e:
        GPT(replace(GPT2, heads=5))
    assert "[1, 2, 4, 8, 16, 32]" in e.value.hint
    with pytest.raises(ConfigError, match="`kv_heads` = 3 does not divide `heads` = 4"):
        GPT(replace(GPT2, kv_heads=3))
    with pytest.raises(ConfigError, match="32 / 32 = 1 dims per head is odd"):
        GPT(replace(GPT2, position="rope", heads=32))
    with pytest.raises(DataError, match="25 tokens is longer than the model's 24"):
        GPT(GPT2)(torch.zeros(1, 25, dtype=torch.long))


# ------------------------------------------------------------------ sharded, as the engines do it

SHARDED = [(GPT2, "none"), (replace(LLAMA, tie_embeddings=True), "full"), (GPT3, "selective"), (GPTJ, "none")]


@pytest.fixture(scope="module")
def one_rank():
    import torch.distributed as td

    td.init_process_group("gloo", store=td.HashStore(), rank=0, world_size=1)
    yield
    td.destroy_process_group()


@pytest.mark.parametrize(("spec", "recompute"), SHARDED)
def test_fsdp2_equals_the_plain_model(one_rank, spec, recompute):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    tokens, targets = tokens_of(spec)
    nll, grads = losses_and_grads(model_of(spec), tokens, targets)
    with torch.device("meta"):
        model = GPT(spec, recompute=recompute)
    mesh = init_device_mesh("cpu", (1,))
    for module in (*model.blocks, model.embed, model):  # the tied table in a group of its own: the harder case
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    init_weights(model.to_empty(device="cpu"), 0)
    nll2, grads2 = losses_and_grads(model, tokens, targets)
    torch.testing.assert_close(nll2, nll, rtol=0, atol=0)
    for n in grads:
        torch.testing.assert_close(grads2[n].full_tensor(), grads[n], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_zero3_equals_the_plain_model(one_rank, monkeypatch):
    """DeepSpeed ZeRO-3 from sharded birth, every parameter gathered and let go at each use."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    import deepspeed

    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "steps_per_print": 10**9, "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    for spec, recompute in SHARDED:
        tokens, targets = tokens_of(spec)
        plain = model_of(spec)
        adamw = torch.optim.AdamW(decay_groups(plain, 0.1), lr=1e-3)
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = GPT(spec, recompute=recompute)
        init_weights(model, 0)
        optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=1e-3)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for _ in range(3):
            expected, got = plain(tokens, targets).mean(), engine(tokens, targets).mean()
            assert got.item() == pytest.approx(expected.item(), abs=2e-6)
            expected.backward()
            adamw.step()
            adamw.zero_grad()
            engine.backward(got)
            engine.step()
        engine.destroy()
