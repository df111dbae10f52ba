"""The shape of an experiment. Plain frozen dataclasses: no torch, no OmegaConf, no I/O.

Names follow the papers: ``hidden`` is h, ``layers`` is L, ``heads`` is a, ``seq_len`` is s.
Sizes are in elements unless the name ends in a unit; GB is 1e9 bytes.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Zero = Literal[0, 1, 2, 3]
CHECKPOINT_BYTES_PER_PARAM = 12  # in any precision: fp32 weights and AdamW's two moments (jobs/runtime/pieces.py)
DEGREES = ("tensor", "ulysses", "pipeline", "interleave")  # of ParallelPlan: 1 is off


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer. The defaults are GPT-3's (Brown et al. 2020, section 2.1)."""

    layers: int
    hidden: int
    heads: int
    vocab: int = 50257
    seq_len: int = 2048
    kv_heads: int | None = None  # grouped-query attention; None: as many as heads
    ffn_hidden: int | None = None  # None: 4 x hidden
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu"] = "gelu_tanh"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_position: Literal["pre", "post"] = "pre"  # post: GPT-1
    norm_eps: float = 1e-5
    position: Literal["learned", "rope", "none"] = "learned"
    rope_theta: float = 10_000.0
    attention: Literal["dense", "banded", "alternating"] = "dense"  # alternating: dense, banded, ...
    window: int = 256  # positions a banded layer looks back, its own included
    bias: bool = True
    tie_embeddings: bool = True
    parallel_block: bool = False  # attention and feed-forward side by side (GPT-J)
    dropout: float = 0.0  # on embeddings, attention weights and residual branches
    init_std: float = 0.02
    scaled_init: bool = True  # residual projections start at init_std / sqrt(2 L) (GPT-2, section 2.3)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def kv_hidden(self) -> int:
        """Width of the keys, and of the values, over all their heads."""
        return self.head_dim * (self.kv_heads or self.heads)

    @property
    def ffn(self) -> int:
        """Width of the feed-forward layer."""
        return self.ffn_hidden or 4 * self.hidden

    @property
    def layer_params(self) -> int:
        """Parameters of one block, counted exactly."""
        h, f, b = self.hidden, self.ffn, int(self.bias)
        norm = h * (1 + int(self.bias and self.norm == "layernorm"))
        attention = h * (h + 2 * self.kv_hidden) + b * (h + 2 * self.kv_hidden) + h * h + b * h
        up = 2 if self.activation == "swiglu" else 1
        feed_forward = up * (h * f + b * f) + f * h + b * h
        norms = 1 if self.parallel_block else 2
        return attention + feed_forward + norms * norm

    @property
    def embedding_params(self) -> int:
        """Parameters outside the blocks: tokens, positions, last norm, untied head."""
        h = self.hidden
        norm = h * (1 + int(self.bias and self.norm == "layernorm"))
        positions = self.seq_len * h if self.position == "learned" else 0
        head = 0 if self.tie_embeddings else self.vocab * h
        return self.vocab * h + positions + head + (norm if self.norm_position == "pre" else 0)

    @property
    def params(self) -> int:
        """Parameters of the whole model, counted exactly (12 L h^2 is its leading term)."""
        return self.layers * self.layer_params + self.embedding_params

    @property
    def flops_per_token(self) -> int:
        """Model flops of one token, forward and backward, at the full ``seq_len``; recompute is not counted.

        72 L h^2 (1 + s / 6h + V / 12hL) for GPT-3 (Narayanan et al. 2021, arXiv:2104.04473, equation 3, less
        the recomputed forward pass; Chowdhery et al. 2022, arXiv:2204.02311, appendix B): 6 per weight of a
        matrix product, and 12 h per key a query meets. As there, a dense layer counts all s keys although half
        are masked; a banded layer counts ``window``.
        """
        h, f, L = self.hidden, self.ffn, self.layers
        up = 2 if self.activation == "swiglu" else 1
        weights = L * (h * (h + 2 * self.kv_hidden) + h * h + up * h * f + f * h) + self.vocab * h
        banded = {"dense": 0, "alternating": L // 2, "banded": L}[self.attention]
        keys = (L - banded) * self.seq_len + banded * min(self.window, self.seq_len)
        return 6 * weights + 12 * h * keys


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One source of a data mix: text for `prepare` to tokenize, or shards that exist already."""

    weight: float = 1.0  # share of the training samples, relative to the other sources
    text: list[str] = field(default_factory=list)  # files, folders, globs, or `builtin:python`
    text_key: str = "text"  # key of the text in each line of a .jsonl file
    shards: list[str] = field(default_factory=list)  # Megatron .bin/.idx prefixes, for training
    val_shards: list[str] = field(default_factory=list)  # the same, held out


@dataclass(frozen=True, kw_only=True)
class ExamplesSpec:
    """Examples for tuning, in JSONL (docs/tuning.md), or `builtin:functions-train` and `builtin:functions-val`.

    Where no files are named, a stage of the experiment makes them: ``<folder>/<name>-train.jsonl`` and -val.
    """

    train: list[str] = field(default_factory=list)
    val: list[str] = field(default_factory=list)  # held out
    max_prompt: int | None = None  # tokens before the model's first; longer ones are left out and counted
    max_response: int | None = None  # tokens of the model's own, end tokens included; the same


@dataclass(frozen=True, kw_only=True)
class ChatSpec:
    """How a conversation becomes text. The content of a turn stands where `{content}` does."""

    system: str = "{content}\n\n"
    user: str = "{content}"
    assistant: str = "{content}"
    end: str = "<|endoftext|>"  # the token behind each turn of the model


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Where the tokens come from. `prepare` fills ``folder``; the training stages read it."""

    folder: str = "data"
    sources: dict[str, SourceSpec] = field(default_factory=dict)
    tokenizer: str | None = None  # a tokenizer.json; None: train one of model.vocab tokens
    val_fraction: float = 0.05  # share of each text source that is held out
    seed: int = 1234  # of the sample order
    chat: ChatSpec = field(default_factory=ChatSpec)
    examples: dict[str, ExamplesSpec] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """The machine a stage asks for, and how jobs reach it."""

    gpu: str  # as the vendor names it; `cpu` for none
    gpus_per_node: int  # ranks per node, also where gpu is `cpu`
    gpu_memory_gb: float  # memory one rank may fill, as in the vendor's data sheet
    node_memory_gb: float | None = None  # of the node itself, for `offload`; None: not checked
    gpu_tflops: float  # dense bf16 (fp16 where there is no bf16) peak, 1e12 flop/s
    nodes: int | None = None  # how many there are; None: unknown, not checked
    launcher: str = "slurm"  # a module of launch/
    checkpoint_gb_per_s: float = 10.0  # aggregate write rate of the shared file system
    usd_per_gpu_hour: float = 0.0
    matmul_tflops: float | None = None  # the best bf16 product measured; None: 0.85 of the peak
    memory_gb_per_s: float | None = None  # of the GPU's own memory; None: as much to the peak as an A100
    link_gb_per_s: float | None = None  # from a GPU to the others of its node, one direction; None: NVLink 3
    network_gb_per_s: float | None = None  # from a GPU to other nodes, one direction; None: 200 Gb/s
    gpu_watts: float = 0.0  # of a busy GPU with its share of the node; 0: energy is not estimated
    failures_per_node_day: float = 0.0038  # Llama 3, arXiv:2407.21783: 419 in 54 days on 2,048 nodes
    restart_s: float = 600.0  # from an interruption to the first new step
    queue_s: float = 0.0  # how long a job waits before it starts
    storage_tb: float | None = None  # for checkpoints; None: not checked
    step_factor: float = 1.0  # measured over planned time of a step: `orch plan --compare RUN --calibrate FILE`
    memory_factor: float = 1.0  # the same of memory
    slurm: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """How one stage is cut over ranks: world = nodes x gpus_per_node = data x pipeline x ulysses x tensor."""

    nodes: int = 1
    tensor: int = 1
    pipeline: int = 1
    interleave: int = 1  # chunks of layers each pipeline rank holds (arXiv:2104.04473, section 2.2)
    sequence: bool = False  # norms and residuals sharded over the tensor ranks too (arXiv:2205.05198, section 4.2.2)
    ulysses: int = 1  # ranks that share the tokens of a sequence, and exchange them for heads (arXiv:2309.14509)
    zero: Zero = 0  # 1: optimizer, 2: + gradients, 3: + weights sharded over data (arXiv:1910.02054)
    offload: Literal["none", "optimizer", "all"] = "none"  # to CPU memory; all: weights too
    micro_batch: int = 1  # sequences per rank per forward pass
    recompute: Literal["none", "selective", "full"] = "none"  # of activations, in the backward pass

    @property
    def replica(self) -> int:
        """How many ranks read the same samples: world = data x replica."""
        return self.tensor * self.ulysses * self.pipeline

    @property
    def replica_words(self) -> str:
        """What ``replica`` is made of: `tensor 2 x pipeline 4 = 8`."""
        sizes = {"tensor": self.tensor, "ulysses": self.ulysses, "pipeline": self.pipeline}
        said = [f"{key} {size}" for key, size in sizes.items() if size > 1 or key != "ulysses"]
        return f"{' x '.join(said)} = {self.replica}"


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """AdamW (arXiv:1711.05101); the defaults are GPT-3's (Brown et al. 2020, appendix B)."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    eps_beside: Literal["corrected", "uncorrected"] = "corrected"  # sqrt(v); the latter is TensorFlow 1's, and so PPO's
    weight_decay: float = 0.1  # on matrices and embeddings; not on biases and norms
    clip: float = 1.0  # of the global gradient norm; 0: none


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """Learning rate and batch size as functions of the tokens seen (GPT-3, appendix B)."""

    shape: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_tokens: float = 0
    decay_tokens: float | None = None  # where the decay ends, warm-up included; None: with the run
    min_lr_ratio: float = 0.1
    ramp_from: int | None = None  # sequences in the first batches; None: no ramp
    ramp_step: int | None = None  # the batch grows by this many sequences at a time; None: ramp_from
    ramp_tokens: float = 0  # where the ramp reaches global_batch


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One run: preparing data, training, evaluating. ``kind`` names the module ``jobs/<kind>.py``."""

    kind: str
    engine: str = "torch"  # a module of jobs/engines/
    engine_config: dict[str, Any] = field(default_factory=dict)  # passed through where the engine's LIMITS allow it
    parallel: ParallelPlan = field(default_factory=ParallelPlan)
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False  # torch.compile each block
    init_from: str | None = None  # a stage of this experiment
    after: list[str] = field(default_factory=list)  # stages that must succeed first, besides init_from
    global_batch: int = 1  # sequences per optimizer step, over all ranks
    steps: int = 0  # optimizer steps; 0 only where the kind does not train
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    eval_every: int = 0  # steps between evaluations on held-out text; 0: only after the last
    eval_samples: int = 64  # sequences in one evaluation
    save_every: int = 500  # steps between checkpoints; one is always saved at the end
    keep: int = 2  # newest checkpoints kept
    skip_batches: int = 2  # in a row, whose loss or gradients are not finite: undone and passed over; then it stops
    seed: int = 0  # of initial weights and dropout
    options: dict[str, Any] = field(default_factory=dict)  # the Options dataclass of jobs/<kind>.py


@dataclass(frozen=True, kw_only=True)
class TrackingSpec:
    """Where MLflow is."""

    uri: str | None = None  # None: a sqlite file in the runs folder
    experiment: str | None = None  # None: the experiment's name


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything one YAML file says."""

    name: str
    model: ModelSpec
    cluster: ClusterSpec
    data: DataSpec = field(default_factory=DataSpec)
    tracking: TrackingSpec = field(default_factory=TrackingSpec)
    stages: dict[str, StageSpec]


def checkpoint_gb(model: ModelSpec, stage: StageSpec) -> float:
    """Size of one checkpoint of ``stage``."""
    if stage.kind == "compare":
        return 0.0
    each = CHECKPOINT_BYTES_PER_PARAM
    if stage.kind == "ppo":  # actor and critic, and the actor's average
        each = 2 * each + (4 if stage.options.get("ema", 1) is not None else 0)
    return model.params * each / 1e9


def in_order(experiment: Experiment) -> list[str]:
    """All stages, each behind those it waits for, else as in the file."""
    ordered: list[str] = []

    def visit(name: str) -> None:
        if name not in ordered:
            for other in waits_for(experiment, name):
                visit(other)
            ordered.append(name)

    for name in experiment.stages:
        visit(name)
    return ordered


def waits_for(experiment: Experiment, stage: str) -> list[str]:
    """The stages that must be done before ``stage`` starts."""
    spec = experiment.stages[stage]
    return [*([spec.init_from] if spec.init_from else []), *spec.after]


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A combination of settings that an engine does not run, and the way out.

    ``when`` maps settings of StageSpec or ParallelPlan to the values that, all together, are refused;
    DEGREES count as True where they are above 1.
    """

    when: dict[str, tuple[object, ...]]
    why: str  # goes on from "engine `x` cannot run this: "
    instead: str  # a hint, such as "`zero: 1`"

    def applies(self, stage: StageSpec) -> bool:
        """Whether ``stage`` asks for this combination."""
        return asks(stage, self.when)


# How many micro-batches may add up in bf16. A sum of equal addends (20,000 of them, normally distributed) is 0.8 % off
# after 16, 3 % after 64 and 31 % after 512, where it has come to stand still; of noise it is 0.5, 0.9 and 2 %.
BF16_SUMS = 64


def summed(stage: StageSpec, data: int) -> int:
    """Micro-batches whose gradients one of ``data`` ranks adds up for an optimizer step of the full batch."""
    turns = stage.global_batch // max(1, data * stage.parallel.micro_batch)
    if stage.kind != "ppo":
        return turns
    o = stage.options
    turns = max(1, turns // o.get("minibatches", 1))
    return turns + (round(turns * o.get("ptx_ratio", 1)) if o.get("ptx_coef") else 0)  # and those of text


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an engine cannot run; each ``jobs/engines/<name>.py`` states its own as ``LIMITS``."""

    refused: tuple[Refusal, ...] = ()
    owned: tuple[str, ...] = ()  # keys of engine_config, dotted, that the plan sets
    # keys and sections of engine_config, dotted, shown not to change what is computed, and what each is for
    allowed: dict[str, str] = field(default_factory=dict)
    choices: dict[str, tuple[object, ...]] = field(default_factory=dict)  # the values that some of these may have
    full_pipeline: bool = False  # a pipeline takes no fewer micro-batches than it has stages
    # where it adds up the gradients of micro-batches in bf16, if `precision` is that; None: nowhere
    bf16_sums: dict[str, tuple[object, ...]] | None = None

    def refusals(self, stage: StageSpec) -> list[Refusal]:
        """All that applies to ``stage``; empty where the engine can run it."""
        return [r for r in self.refused if r.applies(stage)]


def asks(stage: StageSpec, when: dict[str, tuple[object, ...]]) -> bool:
    """Whether each of the settings ``when`` has one of its values in ``stage``."""
    return all(setting(stage, name) in values for name, values in when.items())


def setting(stage: StageSpec, name: str) -> object:
    """The value of a setting as ``Refusal.when`` speaks of it."""
    value: object = getattr(stage.parallel if hasattr(stage.parallel, name) else stage, name)
    return value > 1 if name in DEGREES and isinstance(value, int) else value


def layout_of(stage: StageSpec, world: int) -> dict[str, Any]:
    """How ``stage`` lies over ``world`` ranks: what a checkpoint says of how it came about."""
    keys = (*DEGREES, "sequence", "zero", "offload")
    cut = {key: getattr(stage.parallel, key) for key in keys}
    how = {"engine": stage.engine, "engine_config": stage.engine_config, "precision": stage.precision}
    return {**how, "world": world, **cut}


def describe_layout(layout: dict[str, Any]) -> str:
    """A layout in words: `deepspeed ZeRO-1, tensor 2 x pipeline 2, on 8 ranks in bf16`."""
    cut = " x ".join(f"{key} {layout[key]}" for key in DEGREES if layout.get(key, 1) > 1)
    more = f", {cut}," if cut else ""
    more += " with sequence parallel" if layout["sequence"] else ""
    more += f" with offload {layout['offload']}" if layout["offload"] != "none" else ""
    ranks = "1 rank" if layout["world"] == 1 else f"{layout['world']} ranks"
    return f"{layout['engine']} ZeRO-{layout['zero']}{more} on {ranks} in {layout['precision']}"
