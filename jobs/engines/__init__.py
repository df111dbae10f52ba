"""What a stage needs from a distributed backend. A module in here is an engine: ``LIMITS``, ``build``.

An engine module can be imported without torch: heavy imports stand inside ``build``.

    build(make: Make, stage: StageSpec, ranks: Ranks, loss_fn: LossFn) -> Engine

``make()`` builds the whole model, ``make(tensor_group)`` what one tensor rank holds of it. The engine calls it where
parameters take no memory (on `meta`, under `zero.Init`), shards it, and only then draws the weights with
``init_weights(module, stage.seed)``: no rank ever holds more than its share. ``module(tokens, targets)`` returns the
negative log-likelihood of each target token, (B, T) in fp32; ``module(tokens)`` returns logits (B, T, V).

Parameters keep the model's own names in every layout: ``dict(engine.module.named_parameters())``, less those that
are on `meta`, which other pipeline ranks hold. ``parameter.cut`` (jobs.nn.cut.Cut), where there is one, says which
slice of the whole tensor this tensor rank holds; the rest is whole on all tensor ranks. A tied table is on the first
and the last pipeline rank, where its ``ds_pipe_replicated`` is true. What the data ranks share is the engine's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from orchestrator.spec import Refusal

if TYPE_CHECKING:
    import torch

    from jobs.runtime.pieces import Piece

    Batch = dict[str, torch.Tensor]  # tokens (B, T) and targets (B, T), int64, on the CPU
    Make = Callable[..., torch.nn.Module]  # of no argument, or of a jobs.nn.parallel.TensorGroup
    LossFn = Callable[[torch.Tensor, Batch], torch.Tensor]  # (nll (B, T), batch) -> scalar


# What the layers of jobs/nn/parallel.py cannot do, under whichever engine.
OUR_LAYERS = (
    Refusal(
        when={"tensor": (True,), "compile": (True,)},
        why="torch.compile has not been shown to keep collectives and dropout inside a block in order",
        instead="`compile: false`",
    ),
    Refusal(
        when={"sequence": (True,), "tensor": (False,)},
        why="sequence parallel cuts over tensor ranks",
        instead="`sequence: false`, or `tensor: 2` and more",
    ),
    Refusal(
        when={"kind": ("reward", "dpo", "compare", "ppo"), "sequence": (True,)},
        why="tensor ranks would each score, or sample after, their own tokens alone",
        instead="`sequence: false`",
    ),
)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step says of itself."""

    loss: float  # mean over this data rank's micro-batches, the same on its tensor and pipeline peers
    grad_norm: float  # global 2-norm before clipping, the same on every rank


def set_groups(groups: Iterable[dict[str, Any]], lr: float, eps: float | None) -> None:
    """Set what AdamW's parameter groups step with next; ``eps`` None: as it is."""
    for group in groups:
        group["lr"] = lr
        if eps is not None:
            group["eps"] = eps


def inputs(module: Any, batch: Batch, device: torch.device) -> tuple[torch.Tensor, ...]:
    """What ``module`` takes of ``batch``, in the order of its ``inputs``, on ``device``."""
    return tuple(batch[name].to(device, non_blocking=True) for name in module.inputs if name in batch)


def draw_weights(engine: Engine, seed: int, device: torch.device) -> None:
    """Give ``engine`` the fp32 weights that any engine begins a run of ``seed`` with; each rank draws its share."""
    import torch

    from jobs.nn.gpt import draw

    spec: Any = engine.module.spec
    for piece in engine.pieces():
        if piece.slot == "weight":
            shape = piece.cut.whole_shape(piece.shape) if piece.cut else piece.shape
            whole = draw(spec, seed, piece.name, torch.Size(shape), device)
            local = piece.cut.take(whole) if piece.cut else whole
            piece.data.copy_(local.view(-1)[piece.start : piece.start + piece.data.numel()])
    engine.filled()


class Engine(Protocol):
    """One model, its optimizer and its shards on all ranks. Every method is collective."""

    module: torch.nn.Module

    def train_step(self, batches: Sequence[Batch], *, lr: float, eps: float | None = None) -> StepResult:
        """One optimizer step over this rank's micro-batches, with learning rate ``lr`` and AdamW's ``eps``."""
        ...

    def forward(self, batch: Batch) -> torch.Tensor:
        """Negative log-likelihoods (B, T) of this data rank's batch, fp32, without gradients; on its peers too."""
        ...

    def gathered(self) -> AbstractContextManager[torch.nn.Module]:
        """The whole module on every rank, for export."""
        ...

    def sampler(self) -> AbstractContextManager[Any]:
        """The module to generate with, cut over tensor ranks at most: a forward pass waits for no data rank."""
        ...

    def pieces(self) -> list[Piece]:
        """All that this rank holds of the weights, in fp32, and of AdamW's state: what a checkpoint is made of."""
        ...

    def filled(self) -> None:
        """Bring in line what is made of the pieces (bf16 copies, gathered weights): they have just been replaced."""
        ...
