"""Composing: what wins, where a value came from, and one clear error for each way to get it wrong."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from orchestrator import compose as compose_module
from orchestrator import yamlfile
from orchestrator.compose import Composed, compose, copy_presets, presets, resolve_options
from orchestrator.errors import ConfigError
from orchestrator.spec import Experiment

REPO = Path(__file__).parents[2]

FILES = {
    "configs/model/small.yaml": "model: {layers: 2, hidden: 8, heads: 2}\n",
    "configs/model/large.yaml": "model:\n  layers: 4\n  hidden: 16\n  heads: 4\n  dropout: 0.1\n",
    "configs/cluster/two.yaml": "cluster: {gpu: cpu, gpus_per_node: 2, gpu_memory_gb: 4, gpu_tflops: 0.1}\n",
    "configs/x.yaml": """\
# a comment
defaults: [model/small, cluster/two]
name: x
model:
  hidden: 32
data:
  sources:
    books: {weight: 2}
stages:
  first:
    kind: pretrain
    steps: 95_000
    optimizer: {lr: 1e-3}
    schedule: {warmup_tokens: 375e6}
  second:
    kind: pretrain
    steps: 10
    init_from: first
""",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        write(tmp_path / name, text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def reload(composed: Composed) -> Experiment:
    """What Run.spec() makes of spec.yaml."""
    merged = OmegaConf.merge(OmegaConf.structured(Experiment), OmegaConf.create(composed.yaml))
    result = OmegaConf.to_object(merged)
    assert isinstance(result, Experiment)
    return result


def test_later_wins(folder: Path) -> None:
    e = compose("configs/x.yaml", ["stages.first.steps=7", "model.heads=4"]).experiment
    assert (e.model.layers, e.model.hidden, e.model.heads) == (2, 32, 4)  # group, file, override
    assert e.stages["first"].steps == 7
    assert e.stages["first"].optimizer.lr == 1e-3
    assert e.stages["first"].schedule.warmup_tokens == 375e6
    assert e.stages["first"].optimizer.betas == (0.9, 0.95)
    assert list(e.stages) == ["first", "second"]
    assert compose("configs/x.yaml").experiment.stages["first"].steps == 95_000


def test_yaml_loads_back(folder: Path) -> None:
    composed = compose(
        "configs/x.yaml", ["cluster.slurm={time: '24:00:00', note: 1e-5, x: '1e-5', y: 'yes', z: '1_0'}"]
    )
    assert reload(composed) == composed.experiment
    assert "seq_len: 2048" in composed.yaml  # defaults too
    assert "final_eval_samples" in composed.yaml  # of the stage's Options as well
    again = write(folder / "again.yaml", composed.yaml)
    assert compose(again).experiment == composed.experiment


@settings(deadline=None, max_examples=25)
@given(
    text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20).filter(
        lambda t: "$" not in t and t != "???"  # interpolation and the mark of a missing value
    ),
    lr=st.floats(1e-12, 1e3, allow_subnormal=False),
    steps=st.integers(0, 10**12),
    extra=st.dictionaries(
        st.text("abcxyz_", min_size=1, max_size=5),
        st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none(), st.lists(st.integers())),
        max_size=3,
    ),
)
def test_any_legal_override_round_trips(text: str, lr: float, steps: int, extra: dict[str, object]) -> None:
    def dump(value: object) -> str:
        return OmegaConf.to_yaml(OmegaConf.create({"v": value})).removeprefix("v:").strip("\n")

    overrides = [
        f"tracking.uri={dump(text)}",
        f"stages.pretrain.optimizer.lr={lr!r}",
        f"stages.pretrain.steps={steps}",
        f"stages.pretrain.engine_config={dump(extra)}",
    ]
    composed = compose(presets() / "gpt2.yaml", overrides)
    stage = composed.experiment.stages["pretrain"]
    assert composed.experiment.tracking.uri == text
    assert (stage.optimizer.lr, stage.steps, stage.engine_config) == (lr, steps, extra)
    assert reload(composed) == composed.experiment


def test_groups_are_swapped_by_name(folder: Path) -> None:
    e = compose("configs/x.yaml", ["model=large"]).experiment
    assert (e.model.layers, e.model.hidden, e.model.dropout) == (4, 32, 0.1)  # the file still wins
    assert compose("configs/x.yaml", ["cluster=h200"]).experiment.cluster.gpu == "H200-SXM-141GB"  # shipped
    e = compose("configs/x.yaml", ["data=python-docs"]).experiment  # a group the file does not have
    assert set(e.data.sources) == {"books", "python"}


def test_a_swap_reaches_into_a_base(folder: Path) -> None:
    mine = write(folder / "elsewhere/mine.yaml", "defaults: [gpt3-125m]\nname: mine\n")
    e = compose(mine, ["cluster=h100-80g"]).experiment
    assert e.name == "mine"
    assert e.model.hidden == 768
    assert e.cluster.gpu == "H100-SXM5-80GB"
    assert e.cluster.usd_per_gpu_hour == 3  # nothing is left of the a100's file


def test_a_file_may_build_on_the_preset_of_its_own_name(folder: Path) -> None:
    mine = write(folder / "configs/gpt3-125m.yaml", "defaults: [gpt3-125m]\nmodel: {dropout: 0.1}\n")
    e = compose(mine).experiment
    assert (e.model.dropout, e.model.layers) == (0.1, 12)


@pytest.mark.parametrize("name", ["gpt3-1.3b", "gpt3-1.3b.yaml", "configs/gpt3-1.3b.yaml"])
def test_presets_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose(name).experiment.name == "gpt3-1.3b"


def test_own_files_come_before_presets(folder: Path) -> None:
    write(folder / "configs/model/gpt2.yaml", "model: {layers: 1, hidden: 8, heads: 1}\n")
    assert compose("x", ["model=gpt2"]).experiment.model.layers == 1


def test_why(folder: Path) -> None:
    composed = compose("x", ["stages.first.steps=7", "cluster=h200"])
    assert composed.why("stages.first.steps") == (
        "stages.first.steps = 7: override `stages.first.steps=7`\n  instead of 95000: configs/x.yaml:12"
    )
    assert composed.why("model.hidden") == (
        "model.hidden = 32: configs/x.yaml:5\n  instead of 8: configs/model/small.yaml:1"
    )
    assert composed.why("model.vocab") == "model.vocab = 50257: default of ModelSpec in orchestrator/spec.py"
    assert composed.why("cluster.gpu").endswith("cluster/h200.yaml:3")
    assert "model.layers = 2: configs/model/small.yaml:1\n" in composed.why("model")
    assert composed.why("stages.first.options.final_eval_samples").startswith(
        "stages.first.options.final_eval_samples = null: default of Options"
    )


@pytest.mark.parametrize(
    ("key", "message", "hint"),
    [
        ("model.hiddn", "no key `model.hiddn`", "did you mean `hidden`?"),
        ("name.x", "no key `name.x`", ""),
        ("first.steps", "no key `first`", "did you mean `stages.first.steps`?"),
        ("parallel.nodes", "no key `parallel`", "did you mean `stages.<stage>.parallel.nodes`?"),
    ],
)
def test_why_of_no_key(folder: Path, key: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as e:
        compose("x").why(key)
    assert (str(e.value), e.value.hint) == (message, hint)


OVERRIDES = [
    ("stages.first.stepz=1", "no key `stages.first.stepz`", "did you mean `steps`?"),
    ("parallel.nodes=2", "no key `parallel`", "did you mean `stages.<stage>.parallel.nodes`?"),
    ("layers=2", "no key `layers`", "did you mean `model.layers`?"),
    ("stages.firstt.steps=1", "no stage `firstt`", "did you mean `first`?"),
    ("data.sources.bookz.weight=1", "no data source `bookz`", "did you mean `books`?"),
    ("stages.first.steps=1e5", "must be a whole number, not 100000.0", "write it as a whole number: `100000`"),
    ("stages.first.steps=abc", "`stages.first.steps` must be a whole number, not `abc`", ""),
    ("stages.first.optimizer.lr=fast", "must be a number, not `fast`", ""),
    ("stages.first.after=second", "must be a list of text, not `second`", ""),
    ("stages.first.optimizer.betas=[0.9]", "must be a list of 2, each a number, not [0.9]", ""),
    ("stages.first.parallel.zero=4", "must be one of `0`, `1`, `2`, `3`, not 4", ""),
    ("stages.first.parallel=3", "`stages.first.parallel` must be a mapping, not 3", ""),
    ("stages.first.steps.x=1", "`stages.first.steps` is one value", "set `stages.first.steps` itself"),
    ("stages.first.options.nope=1", "no key `stages.first.options.nope`", "one of: `final_eval_samples`"),
    ("stages.first.kind=pretran", "no stage kind `pretran`", "did you mean `pretrain`?"),
    ("stages.first.engine=deepsped", "no engine `deepsped`", "did you mean `deepspeed`?"),
    ("stages.new={engine: torch}", "`stages.new.kind` is missing", "set `stages.new.kind`"),
    ("stages.first.after=[thirdd]", "`stages.first.after`: no stage `thirdd`", "one of: `first`, `second`"),
    ("stages.second.init_from=firstt", "`stages.second.init_from`: no stage `firstt`", "did you mean `first`?"),
    ("stages.first.after=[second]", "stages wait for each other: `first` -> `second` -> `first`", "take one out"),
    ("stages.first.init_from=first", "stages wait for each other: `first` -> `first`", "take one out"),
    ("first.parallel.nodes=2", "no key `first`", "did you mean `stages.first.parallel.nodes`?"),
    ("model=la", "no config `model/la`", "did you mean `large`?"),
    ("model=lrge", "no config `model/lrge`", "did you mean `large`?"),
    ("cluster=mine", "`cluster.gpu` is still to be filled in", "put a value for `???`"),
    ("name=../../x", "experiment name `../../x` cannot be a folder name", "use letters"),
    ("stages={a/b: {kind: pretrain}}", "stage `a/b` cannot be a folder name", "use letters"),
    ("stages={a.b: {kind: pretrain}}", "stage `a.b` has a dot in it", "keys are dotted"),
    ("data.sources={a.b: {weight: 1}}", "data source `a.b` has a dot in it", "keys are dotted"),
    ("name=${nope}", "Interpolation key 'nope' not found", "takes the value of another key"),
    ("name=[1", "broken YAML", "brackets"),
    ("name={a: 1, a: 2}", "`a` is given twice", "keep one"),
    ("name", "override `name` is not `key=value`", "such as"),
    ("model..x=1", "is not `key=value`", "such as"),
]


@pytest.mark.parametrize(("override", "message", "hint"), OVERRIDES)
def test_bad_overrides(folder: Path, override: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as e:
        compose("x", [override])
    assert message in str(e.value)
    assert hint in e.value.hint


def test_all_bad_keys_at_once(folder: Path) -> None:
    with pytest.raises(ConfigError) as e:
        compose("x", ["stages.first.stepz=1", "model.hidden=wide", "optimiser={lr: 1, clip: 2}"])
    assert str(e.value).splitlines() == [  # a key that has a value keeps its place
        "3 problems",
        "1. override `model.hidden=wide`: `model.hidden` must be a whole number, not `wide`",
        "2. override `stages.first.stepz=1`: no key `stages.first.stepz`",
        "   hint: did you mean `steps`?",
        "3. override `optimiser={lr: 1, clip: 2}`: no key `optimiser`",
        "   hint: one of: `name`, `model`, `cluster`, `data`, `tracking`, `stages`",
    ]


BAD_FILES = [
    ("name: y\nmodel: {hiddn: 3}\n", "y.yaml:2: no key `model.hiddn`"),
    ("name: y\nmodel:\n  layers: 2\n  layers: 3\n", "y.yaml:4: `model.layers` is given twice, here and in line 3"),
    ("name: y\nmodel: [1\n", "y.yaml:3: broken YAML"),
    ("name: y\n\tmodel: 1\n", "y.yaml:2: broken YAML"),
    ("- 1\n- 2\n", "y.yaml:1: a config is a mapping"),
    ("defaults: model/small\n", "y.yaml:1: `defaults` is no list of names"),
    ("name: y\ndefaults: [model/smalll]\n", "y.yaml:2: no config `model/smalll`"),
    ("defaults: [model/small, z]\n", "`defaults` go round in a circle: `configs/y.yaml` -> `configs/z.yaml` -> "),
    ("defaults: [model/small, cluster/two]\nname: y\n", "`stages` is missing"),
    ("defaults: [model/small]\nname: y\nstages: {a: {kind: pretrain}}\n", "`cluster` is missing"),
    ("defaults: [model/small, cluster/two]\nstages: {a: {kind: pretrain}}\n", "`name` is missing"),
    ("defaults: [model/small, cluster/two]\nname: y\nstages: {}\n", "y.yaml:3: `stages` is empty"),
    ("name: !!python/object/apply:os.getcwd []\n", "y.yaml:1: broken YAML: could not determine a constructor"),
    ("a: &a {b: *a}\n", "y.yaml: an anchor contains itself"),
    ("", "`name` is missing"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_bad_files(folder: Path, text: str, message: str) -> None:
    write(folder / "configs/y.yaml", text)
    write(folder / "configs/z.yaml", "defaults: [y]\n")
    with pytest.raises(ConfigError) as e:
        compose("configs/y.yaml")
    assert message in str(e.value)


def test_files_that_are_not_there(folder: Path) -> None:
    with pytest.raises(ConfigError) as e:
        compose("configs/gpt3-175.yaml")
    assert str(e.value) == "no such config: `configs/gpt3-175.yaml`"
    assert e.value.hint == "did you mean `gpt3-175b`?"
    (folder / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(ConfigError, match=r"cannot read `latin\.yaml`"):
        compose("latin.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("95_000", 95_000),
        ("375e6", 375e6),
        (".5", 0.5),
        ("0x1f", 31),
        ("007", "007"),
        ("24:00:00", "24:00:00"),  # a time limit, not 86400
        ("2024-01-01", "2024-01-01"),
        ("no", "no"),
        ("true", True),
        ("~", None),
        ("", None),
        ("[1, 2e-5]", [1, 2e-5]),
        ("{a: {b: x}}", {"a": {"b": "x"}}),
    ],
)
def test_values_are_read_as_users_expect(text: str, value: object) -> None:
    got = yamlfile.parse(text, "here")
    assert got == value
    assert type(got) is type(value)


def test_resolve_options() -> None:
    from jobs.pretrain import Options

    assert resolve_options("stages.a.options", {"final_eval_samples": 3}, Options) == Options(final_eval_samples=3)
    assert resolve_options("stages.a.options", {}, Options) == Options()
    with pytest.raises(ConfigError, match=r"^no key `stages\.a\.options\.final`$"):
        resolve_options("stages.a.options", {"final": 3}, Options)
    with pytest.raises(ConfigError, match=r"must be a whole number or null, not `x`$"):
        resolve_options("stages.a.options", {"final_eval_samples": "x"}, Options)


def test_copy_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = copy_presets(tmp_path)
    assert tmp_path / "configs/cluster/mine.yaml" in files
    assert len(files) == len(list(presets().rglob("*.yaml")))
    monkeypatch.chdir(tmp_path)
    mine = (tmp_path / "configs/cluster/mine.yaml").read_text()
    for value in ("A100-SXM4-80GB", "8", "80", "312"):
        mine = mine.replace("???", value, 1) if "`???`" not in mine else mine.replace(": ???", f": {value}", 1)
    (tmp_path / "configs/cluster/mine.yaml").write_text(mine)
    assert compose("gpt3-125m", ["cluster=mine"]).experiment.cluster.gpu_tflops == 312
    before = {f: f.read_bytes() for f in files}
    files[3].unlink()
    with pytest.raises(ConfigError, match="exists already; nothing was written"):
        copy_presets(tmp_path)
    assert not files[3].exists()
    assert all(f.read_bytes() == b for f, b in before.items() if f != files[3])


def test_composing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from orchestrator.compose import compose; from orchestrator.plan import plan\n"
        "plan(compose('gpt3-175b').experiment)\n"
        "print(*sorted({'torch', 'deepspeed', 'mlflow', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.slow
def test_an_installed_wheel_finds_the_presets(tmp_path: Path) -> None:
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "-q",
        "-w",
        str(tmp_path),
        str(REPO),
    ]
    subprocess.run(wheel, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as z:
        z.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    code = (
        "from orchestrator import compose as c; e = c.compose('configs/gpt3-175b.yaml', ['cluster=h200']).experiment\n"
        "print(c.presets(), e.model.layers, e.cluster.gpu)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "empty",
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(tmp_path / "site/orchestrator/_configs"), "96", "H200-SXM-141GB"]


def test_presets_of_a_checkout() -> None:
    assert presets() == Path(compose_module.__file__).parent.parent / "configs"


def test_an_empty_mapping_takes_nothing_away():
    assert list(compose("demo", ["data.sources={}"]).experiment.data.sources) == ["python"]
