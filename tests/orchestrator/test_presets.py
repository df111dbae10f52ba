"""The shipped configs: each composes, passes every check and fits; sizes and recipes are the papers'."""

import dataclasses
import re

import pytest

from orchestrator import spec
from orchestrator.compose import compose, presets
from orchestrator.plan import check, plan
from orchestrator.schedule import total_tokens
from orchestrator.strict import show

EXPERIMENTS = sorted(f.stem for f in presets().glob("*.yaml"))
MODELS = sorted(f.stem for f in (presets() / "model").glob("*.yaml"))
CLUSTERS = sorted(f.stem for f in (presets() / "cluster").glob("*.yaml") if f.stem != "mine")

# Brown et al. 2020, arXiv:2005.14165: table 2.1 (layers, width, heads, head width, batch in tokens, learning rate;
# XL's heads and 13B's width put right) and table D.1 (parameters in millions).
GPT3 = {
    "125m": (12, 768, 12, 64, 0.5e6, 6.0e-4, 125),
    "350m": (24, 1024, 16, 64, 0.5e6, 3.0e-4, 356),
    "760m": (24, 1536, 16, 96, 0.5e6, 2.5e-4, 760),
    "1.3b": (24, 2048, 16, 128, 1e6, 2.0e-4, 1320),
    "2.7b": (32, 2560, 32, 80, 1e6, 1.6e-4, 2650),
    "6.7b": (32, 4096, 32, 128, 2e6, 1.2e-4, 6660),
    "13b": (40, 5120, 40, 128, 2e6, 1.0e-4, 12850),
    "175b": (96, 12288, 96, 128, 3.2e6, 0.6e-4, 174600),
}


# Ouyang et al. 2022, arXiv:2203.02155, appendix C: learning rates and batches of the models that PPO starts from, and
# learning rates of the values; "6B" is GPT-3's 6.7B
INSTRUCTGPT = {
    "1.3b": ("gpt3-1.3b", 5.0e-6, 32, 9e-6),
    "6b": ("gpt3-6.7b", 1.04e-5, 32, 9e-6),
    "175b": ("gpt3-175b", 2.45e-6, 8, 5e-6),
}


def test_the_promised_presets_are_there() -> None:
    assert {f"gpt3-{size}" for size in GPT3} | {"gpt1", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"} <= set(MODELS)
    tuned = {f"instructgpt-{size}" for size in INSTRUCTGPT} | {"instructgpt-13b"}
    assert (set(MODELS) - {"tiny"}) | {"demo"} | tuned <= set(EXPERIMENTS)
    assert set(CLUSTERS) == {"v100-32g", "a100-40g", "a100-80g", "h100-80g", "h200", "local"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_run_and_fits(name: str) -> None:
    e = compose(name).experiment
    assert e.name == name
    assert plan(e)  # raises for a broken rule, or for too little memory


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_every_cluster_runs_some_layout(cluster: str) -> None:
    overrides = [f"cluster={cluster}", "stages.pretrain.precision=fp32"] if cluster != "h200" else ["cluster=h200"]
    e = compose("gpt3-125m", overrides).experiment
    assert check(e, "pretrain") == []


@pytest.mark.parametrize("size", GPT3)
def test_gpt3(size: str) -> None:
    layers, hidden, heads, head_dim, batch_tokens, lr, millions = GPT3[size]
    e = compose(f"gpt3-{size}").experiment
    m, s = e.model, e.stages["pretrain"]
    assert (m.layers, m.hidden, m.heads, m.head_dim) == (layers, hidden, heads, head_dim)
    assert m.params / 1e6 == pytest.approx(millions, rel=0.005)
    assert (m.ffn, m.seq_len, m.vocab, m.attention) == (4 * hidden, 2048, 50257, "alternating")
    # Appendix B; table 2.1 prints batches to one or two digits
    o, schedule = s.optimizer, s.schedule
    assert s.global_batch * m.seq_len == pytest.approx(batch_tokens, rel=0.05)
    assert (o.lr, o.betas, o.eps, o.weight_decay, o.clip) == (lr, (0.9, 0.95), 1e-8, 0.1, 1.0)
    assert (schedule.shape, schedule.warmup_tokens, schedule.decay_tokens) == ("cosine", 375e6, 260e9)
    assert schedule.min_lr_ratio == 0.1
    assert 4e9 <= schedule.ramp_tokens <= 12e9
    each = plan(e)[0].data * s.parallel.micro_batch
    assert schedule.ramp_from == max(16, each)  # 32k tokens, or the least that the layout can cut
    tokens = total_tokens(s, m.seq_len)
    assert 300e9 <= tokens < 300e9 + s.global_batch * m.seq_len


def test_the_mix_is_table_2_2() -> None:
    sources = compose("gpt3-175b").experiment.data.sources
    assert {name: s.weight for name, s in sources.items()} == {
        "common-crawl": 60, "webtext2": 22, "books1": 8, "books2": 8, "wikipedia": 3,
    }  # fmt: skip
    assert sum(s.weight for s in sources.values()) == 101  # as printed


@pytest.mark.parametrize("size", INSTRUCTGPT)
def test_instructgpt(size: str) -> None:
    model, sft_lr, sft_batch, value_lr = INSTRUCTGPT[size]
    e = compose(f"instructgpt-{size}").experiment
    assert list(e.stages) == ["pretrain", "sft", "reward", "ppo"]
    assert e.model == compose(model).experiment.model
    assert e.stages["pretrain"] == compose(model).experiment.stages["pretrain"]
    sft, reward, ppo = (e.stages[name] for name in ("sft", "reward", "ppo"))
    assert (sft.optimizer.lr, sft.global_batch, sft.options["epochs"]) == (sft_lr, sft_batch, 2)
    assert sft.steps * sft_batch >= 2 * 12_725
    assert (reward.optimizer.lr, reward.global_batch, reward.options["epochs"]) == (9e-6, 64, 1)
    assert (sft.init_from, reward.init_from, ppo.init_from, ppo.after) == ("pretrain", "sft", "sft", ["reward"])
    o = ppo.options
    assert ppo.global_batch * ppo.steps == 256_000  # episodes
    assert ppo.global_batch / o["minibatches"] == 64
    assert (o["kl_coef"], o["clip"], o["gamma"], o["ema"], o["inner_epochs"]) == (0.02, 0.2, 1, 0.992, 1)
    assert (o["ptx_coef"], o["ptx_ratio"], o["value_lr"], o["max_tokens"]) == (27.8, 8, value_lr, 1024)
    assert (ppo.schedule.shape, ppo.optimizer.betas) == ("constant", (0.9, 0.95))
    assert 2.55e-6 <= ppo.optimizer.lr <= 8.05e-6


@pytest.mark.parametrize(
    ("name", "params"),
    [
        # Hugging Face's openai-gpt, gpt2, gpt2-medium, gpt2-large, gpt2-xl, as `num_parameters` counts them
        ("gpt1", 116_534_784),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_gpt1_and_gpt2(name: str, params: int) -> None:
    assert compose(name).experiment.model.params == params


def test_gpt2_without_biases() -> None:
    e = compose("gpt2", ["model.bias=false"]).experiment
    assert e.model.params == 124_337_664  # karpathy/nanoGPT, transformer_sizing.ipynb


def test_the_demo() -> None:
    e = compose("demo").experiment
    assert list(e.stages) == ["prepare", "pretrain"]
    assert e.stages["pretrain"].after == ["prepare"]
    assert (e.cluster.launcher, e.cluster.gpu, e.cluster.gpus_per_node) == ("local", "cpu", 2)
    assert e.data.sources["python"].text == ["builtin:python"]


def test_the_docs_list_every_field_with_its_default() -> None:
    listed: dict[str, list[tuple[str, str]]] = {}
    for line in (presets().parent / "docs/configuration.md").read_text().partition("## Fields")[2].splitlines():
        if line.startswith("### "):
            rows = listed.setdefault(line.removeprefix("### ").strip("`"), [])
        elif line.startswith("| `"):
            cells = re.split(r"(?<!\\)\|", line)[1:3]
            name, default = (cell.strip().strip("`").replace("\\|", "|") for cell in cells)
            rows.append((name, default))
    assert listed == {
        "the file itself": fields(spec.Experiment),
        "model": fields(spec.ModelSpec),
        "data": fields(spec.DataSpec),
        "data.examples.<name>": fields(spec.ExamplesSpec),
        "data.chat": fields(spec.ChatSpec),
        "data.sources.<name>": fields(spec.SourceSpec),
        "cluster": fields(spec.ClusterSpec),
        "tracking": fields(spec.TrackingSpec),
        "stages.<name>": fields(spec.StageSpec),
        "stages.<name>.parallel": fields(spec.ParallelPlan),
        "stages.<name>.optimizer": fields(spec.OptimizerSpec),
        "stages.<name>.schedule": fields(spec.ScheduleSpec),
    }


def fields(cls: type) -> list[tuple[str, str]]:
    """Name and default, as YAML has it, of each field; empty where there is none or it is a dataclass."""
    found = []
    for f in dataclasses.fields(cls):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        absent = default is dataclasses.MISSING or dataclasses.is_dataclass(default)
        found.append((f.name, "" if absent else show(default).strip("`").replace("\n", "\\n")))
    return found
