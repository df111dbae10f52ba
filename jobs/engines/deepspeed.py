"""DeepSpeed: ZeRO 0-3 with CPU offload (Rajbhandari et al. 2020, arXiv:1910.02054; arXiv:2101.06840).

The optimizer is torch's AdamW, handed over by us: DeepSpeed's own would compile for minutes and differ
from the torch engine's in the last bits. Checkpoints are DeepSpeed's, read without running their pickles.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.engines import StepResult
from jobs.runtime import dist
from jobs.runtime.job import Ranks
from orchestrator.errors import CheckpointError
from orchestrator.spec import Limits, Refusal, StageSpec

if TYPE_CHECKING:
    import torch

    from jobs.engines import Batch, LossFn

LIMITS = Limits(
    refused=(
        Refusal(
            when={"offload": ("optimizer",), "zero": (0,)},
            why="offload comes with ZeRO's shards",
            instead="`zero: 1`, `2` or `3`",
        ),
        Refusal(when={"offload": ("all",), "zero": (0, 1, 2)}, why="only ZeRO-3 shards weights", instead="`zero: 3`"),
        Refusal(
            when={"tensor": (True,)},
            why="it does not split tensors yet",
            instead="`tensor: 1`, with `zero: 3` to spread the weights",
        ),
        Refusal(
            when={"pipeline": (True,)},
            why="it has no pipeline yet",
            instead="`pipeline: 1`, with `zero: 3` to spread the weights",
        ),
        Refusal(when={"sequence": (True,)}, why="sequence parallel needs tensor ranks", instead="`sequence: false`"),
        Refusal(when={"interleave": (True,)}, why="its pipelines hold one chunk a rank", instead="`interleave: 1`"),
    ),
    owned=(
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "scheduler",
        "fp16",
        "bf16",
        "zero_optimization.stage",
        "zero_optimization.offload_optimizer",
        "zero_optimization.offload_param",
        "checkpoint",
    ),
)
TAG = "deepspeed"


def build(make: Callable[[], torch.nn.Module], stage: StageSpec, ranks: Ranks, loss_fn: LossFn) -> DeepSpeedEngine:
    """The model of ``make`` under ZeRO, with its optimizer. Collective."""
    return DeepSpeedEngine(make, stage, ranks, loss_fn)


def config(stage: StageSpec, ranks: Ranks) -> dict[str, Any]:
    """The DeepSpeed JSON: what the plan says, and under it what the user passes through.

    Keys: https://www.deepspeed.ai/docs/config-json/.
    """
    p = stage.parallel
    zero: dict[str, Any] = {"stage": p.zero}
    if p.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if p.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    plan = {
        "train_batch_size": stage.global_batch,
        "train_micro_batch_size_per_gpu": p.micro_batch,
        "gradient_clipping": stage.optimizer.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,  # the loop prints
        "bf16": {"enabled": stage.precision == "bf16"},
        "zero_optimization": zero,
    }
    return _merge(dict(stage.engine_config), plan)


class DeepSpeedEngine:
    """A ``deepspeed.DeepSpeedEngine`` behind the engine protocol."""

    portable: tuple[str, ...] = ()  # ZeRO's slices fit the layout they were saved with

    def __init__(self, make: Callable[[], torch.nn.Module], stage: StageSpec, ranks: Ranks, loss_fn: LossFn) -> None:
        import torch

        self.stage, self.ranks, self.loss_fn = stage, ranks, loss_fn
        self.device = dist.start(ranks)
        deepspeed = _import(ranks)
        from jobs.nn.gpt import decay_groups, init_weights

        settings = config(stage, ranks)
        if stage.parallel.zero == 3:
            with deepspeed.zero.Init(config_dict_or_path=settings):
                self.module: Any = make()
        else:
            with torch.device("meta"):
                self.module = make()
            self.module.to_empty(device=self.device)
        init_weights(self.module, stage.seed)
        if stage.compile:
            self.module.compile_blocks()
        o = stage.optimizer
        on_cpu = self.device.type == "cpu" or stage.parallel.offload != "none"
        groups = decay_groups(self.module, o.weight_decay)
        # `train_step` sets lr. To allocate the moments DeepSpeed steps without gradients, which must change nothing.
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=o.betas, eps=o.eps, fused=not on_cpu)
        self.engine, *_ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=settings)
        self._reset_optimizer()
        self.files = _checkpoint_files()
        self.engine.checkpoint_engine = self.files

    def train_step(self, batches: Sequence[Batch], *, lr: float) -> StepResult:
        """One AdamW step over ``batches``; their number may differ from step to step (a batch ramp)."""
        import torch

        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.set_train_batch_size(len(batches) * self.stage.parallel.micro_batch * self.ranks.world)
        loss, norm = torch.zeros((), device=self.device), None
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            self.engine.set_gradient_accumulation_boundary(last)  # its own count goes wrong when the batch grows
            part = self.loss_fn(self.engine(*self._inputs(batch)), batch)
            self.engine.backward(part)
            loss += part.detach() / len(batches)
            if last and self._plain:
                norm = torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
            self.engine.step()
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        return StepResult(loss=loss.item(), grad_norm=float(norm))

    def forward(self, batch: Batch) -> torch.Tensor:
        """Negative log-likelihoods (B, T) of this rank's batch, fp32, without gradients."""
        import torch

        training = self.module.training
        self.engine.eval()
        try:
            with torch.no_grad():
                nll: torch.Tensor = self.engine(*self._inputs(batch))
            return nll
        finally:
            self.engine.train(training)

    @contextmanager
    def gathered(self) -> Iterator[torch.nn.Module]:
        """The whole module on every rank."""
        import deepspeed

        sharded = self.stage.parallel.zero == 3
        with deepspeed.zero.GatheredParameters(list(self.module.parameters())) if sharded else nullcontext():
            yield self.module

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's files below ``folder``.

        Raises:
            OSError: only once every rank is through, since DeepSpeed waits for all of them inside.
        """
        self.files.failure = None
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        if self.files.failure:
            raise OSError(f"DeepSpeed's checkpoint: {self.files.failure}") from self.files.failure

    def load(self, folder: Path, *, weights_only: bool = False) -> None:
        """Read what ``save`` wrote, with the same engine settings and number of ranks."""
        groups = self.engine.optimizer.param_groups
        mine = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        path, _ = self.engine.load_checkpoint(str(folder), tag=TAG, load_lr_scheduler_states=False)
        if path is None:
            raise CheckpointError(f"`{folder}` holds no checkpoint of engine `deepspeed`")
        if not weights_only:
            return
        # ZeRO keeps the fp32 weights with the optimizer, so both are read, and the optimizer is set back.
        for group, values in zip(self.engine.optimizer.param_groups, mine, strict=True):
            group.update(values)
        self._reset_optimizer()

    def _reset_optimizer(self) -> None:
        """Set AdamW's moments and its count of steps to zero."""
        for state in self.engine.basic_optimizer.state.values():
            for value in state.values():
                value.zero_()

    @property
    def _plain(self) -> bool:
        """Whether gradients are whole on every rank, and DeepSpeed reports no norm of them (fp32, ZeRO-0)."""
        return self.stage.parallel.zero == 0 and self.stage.precision == "fp32"

    def _inputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            batch["tokens"].to(self.device, non_blocking=True),
            batch["targets"].to(self.device, non_blocking=True),
        )


def _import(ranks: Ranks) -> Any:
    """Import DeepSpeed as the machine needs it, and hand it the process group that runs already."""
    import torch

    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not torch.cuda.is_available():
        # The shared-memory all-reduce of the CPU accelerator crashes without AVX-512; an empty table of
        # compatible ops leaves it out. An internal of 0.19.8, which pyproject.toml pins.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _checkpoint_files() -> Any:
    """DeepSpeed's reader and writer of files, made safe: nothing in a file is executed, no error is lost."""
    import torch
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address])

    class Files(TorchCheckpointEngine):
        failure: Exception | None = None

        def save(self, state_dict: Any, path: str) -> None:
            try:
                torch.save(state_dict, path)
            except (OSError, RuntimeError) as e:  # a full disk is either
                self.failure = e

        def load(self, path: str, map_location: Any = None) -> Any:
            return torch.load(path, map_location=map_location, weights_only=True)

    return Files()


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid upon ``under``, section by section."""
    merged = dict(under)
    for key, value in over.items():
        below = under.get(key)
        merged[key] = _merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged
