"""DeepSpeed's pipelines: 1F1B over the parts of the model, with ZeRO-0 or 1 over the data ranks.

The schedule is PipeDream-flush's (Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1). Every rank builds the
whole model on `meta` and makes real only the parts of its own stage, so names stay the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from jobs.engines import StepResult
from jobs.engines.deepspeed import DeepSpeedEngine, topology
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from jobs.engines import Batch, LossFn, Make
    from jobs.runtime.job import Ranks
    from orchestrator.spec import StageSpec

PARTITIONS = {"uniform": "type:^block$", "parameters": "parameters"}  # as many blocks, or weights, on every rank


class PipelineEngine(DeepSpeedEngine):
    """A ``deepspeed.PipelineEngine`` behind the engine protocol. ``module`` is on `meta` but for this rank's stage."""

    keys: tuple[str, ...] = ()  # of the batches under way
    shape: tuple[int, ...] = ()
    nll: torch.Tensor  # of the last micro-batch, on the last stage

    def __init__(self, make: Make, stage: StageSpec, ranks: Ranks, loss_fn: LossFn) -> None:
        super().__init__(make, stage, ranks, loss_fn)
        if self._masters_apart:
            # It clears the bf16 gradients once the backward pass has come to the output of the module, and with them
            # the head's, whose part lies behind that. `_last` clears them before.
            self.engine.optimizer.backward_prologue = lambda: None

    @property
    def _masters_apart(self) -> bool:
        """Whether DeepSpeed sums the gradients of micro-batches in fp32, beside those that the backward pass makes."""
        return hasattr(self.engine.optimizer, "clear_lp_grads")

    def _build(self, settings: dict[str, Any]) -> tuple[Any, Any]:
        import torch

        with torch.device("meta"):
            self.module = self.make(self.tensor) if self.tensor else self.make()
        partition = settings["pipeline"].get("partition", "uniform")
        pipe = _pipeline_module(self.module, topology(self.place), PARTITIONS[partition], self._last)
        all_blocks, body = set(self.module.blocks), self.module.body()
        blocks = [len(all_blocks.intersection(body[start:stop])) for start, stop in pairwise(pipe.parts)]
        if min(blocks) == 0:  # its ranks would wait for each other in DeepSpeed's gradient norm
            raise ConfigError(
                f"`engine_config.pipeline.partition` `{partition}` makes stages of 0 to {max(blocks)} blocks",
                hint="`uniform`, or fewer pipeline ranks",
            )
        return pipe, pipe.mpu()

    def train_step(self, batches: Sequence[Batch], *, lr: float, eps: float | None = None) -> StepResult:
        """One AdamW step over ``batches``; their number may differ from step to step (a batch ramp)."""
        self._prepare_step(len(batches), lr, eps)
        self.engine.train_batch(self._feed(batches))
        return StepResult(loss=self.engine.dp_group_loss.item(), grad_norm=self._norm())

    def forward(self, batch: Batch) -> torch.Tensor:
        """Negative log-likelihoods (B, T) of this data rank's batch, fp32, without gradients."""
        import torch
        import torch.distributed as td

        training = self.module.training
        try:
            self.engine.eval_batch(self._feed([batch]), reduce_output=None, bcast_loss=False, num_micro_batches=1)
        finally:
            self.module.train(training)
        last = self.engine.is_last_stage()
        nll = self.nll if last else torch.empty(batch["targets"].shape, dtype=torch.float32, device=self.device)
        td.broadcast(nll, group_src=self.place.pipeline_size - 1, group=self.grid.get_pipe_parallel_group())
        return nll

    @contextmanager
    def gathered(self) -> Iterator[torch.nn.Module]:
        """A copy of the whole module on every rank."""
        from jobs.nn.parallel import whole_copy

        yield whole_copy(self.module, self.make, self.tensor, self.grid.get_pipe_parallel_group())

    def _feed(self, batches: Sequence[Batch]) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
        """What DeepSpeed hands to the first stage, and to ``_last``."""
        self.keys, shape = tuple(batches[0]), tuple(batches[0]["tokens"].shape)
        if shape != self.shape:  # buffers for activations are kept between steps
            self.engine.reset_activation_shape()
            self.shape = shape
        return iter([(batch["tokens"], tuple(batch.values())) for batch in batches])

    def _last(self, x_BTH: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What the last stage does after its layers: the vocabulary and the loss, so that they can be fused."""
        if self._masters_apart:
            self.engine.optimizer.clear_lp_grads()
        labels = dict(zip(self.keys, batch, strict=True))
        nll = self.module.to_vocabulary(x_BTH, labels["targets"])
        self.nll = nll.detach()
        return self.loss_fn(nll, labels)


def _pipeline_module(model: Any, ranks: Any, partition: str, loss_fn: Any) -> Any:
    """``model``, which is on `meta`, as DeepSpeed cuts it; this rank's parts become real."""
    from deepspeed.pipe import PipelineModule, TiedLayerSpec
    from torch import Tensor, nn

    class Tied(TiedLayerSpec):  # type: ignore[misc]
        def __init__(self, module: nn.Module, forward_fn: Any = None) -> None:
            super().__init__("embed", type(module), forward_fn=forward_fn)
            self.module = module

        def build(self, log: bool = False) -> nn.Module:
            return self.module

    class Held(nn.Module):
        """The head: on the last stage, but used by the loss."""

        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, x_BTH: Tensor) -> Tensor:
            return x_BTH

    class Pipeline(PipelineModule):  # type: ignore[misc]
        def to(self, *args: Any, **kwargs: Any) -> Any:  # called with the device, once the stage is known
            if any(p.is_meta for p in self.parameters()):
                return self.to_empty(device=args[0])
            return super().to(*args, **kwargs)

    embed, *rest = model.body()
    if model.head is None:
        layers = [Tied(embed), *rest, Tied(embed, lambda _, x_BTH: x_BTH)]
    else:
        layers = [embed, *rest, Held(model.head)]
    with redirect_stdout(None):  # it prints every rank's coordinates
        return Pipeline(layers, topology=ranks, loss_fn=loss_fn, partition_method=partition)
