"""Plain PyTorch: DDP for ZeRO-0, FSDP2 for ZeRO-2 and 3 (arXiv:2304.11277). The reference the others are held to.

Weights, gradients and AdamW state are fp32. With bf16, DDP computes under autocast, and FSDP2 gathers
bf16 copies and reduces gradients in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
        Refusal(when={"zero": (1,)}, why="FSDP2 shards gradients and weights too", instead="`zero: 2` or `zero: 3`"),
        Refusal(
            when={"offload": ("optimizer", "all")},
            why="it keeps everything on the GPU",
            instead="`offload: none`, or `engine: deepspeed`",
        ),
        Refusal(
            when={"tensor": (True,)},
            why="it does not split tensors yet",
            instead="`tensor: 1`, with `zero: 3` to spread the weights",
        ),
        Refusal(
            when={"pipeline": (True,)},
            why="it has no pipeline",
            instead="`pipeline: 1`, with `zero: 3` to spread the weights",
        ),
        Refusal(when={"sequence": (True,)}, why="sequence parallel needs tensor ranks", instead="`sequence: false`"),
        Refusal(when={"interleave": (True,)}, why="it has no pipeline", instead="`interleave: 1`"),
    )
)


def build(make: Callable[[], torch.nn.Module], stage: StageSpec, ranks: Ranks, loss_fn: LossFn) -> TorchEngine:
    """The model of ``make`` on every rank, whole (ZeRO-0) or sharded, with its optimizer. Collective."""
    return TorchEngine(make, stage, ranks, loss_fn)


class TorchEngine:
    """DDP or FSDP2 behind the engine protocol. Its checkpoints can be read at any world size and ZeRO level."""

    portable = ("world", "parallel.zero")

    def __init__(self, make: Callable[[], torch.nn.Module], stage: StageSpec, ranks: Ranks, loss_fn: LossFn) -> None:
        import torch

        from jobs.nn.gpt import decay_groups, init_weights

        self.stage, self.ranks, self.loss_fn = stage, ranks, loss_fn
        self.device = dist.start(ranks)
        self.sharded = stage.parallel.zero > 0
        with torch.device("meta"):
            module: Any = make()
        self.module = module
        if stage.compile:
            self.module.compile_blocks()
        if self.sharded:
            _shard(self.module, stage, ranks, self.device)
        self.module.to_empty(device=self.device)
        init_weights(self.module, stage.seed)
        self.replica: Any = _replicate(self.module, ranks, self.device) if not self.sharded else self.module
        o = stage.optimizer
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.module, o.weight_decay), lr=o.lr, betas=o.betas, eps=o.eps, fused=True
        )

    def train_step(self, batches: Sequence[Batch], *, lr: float) -> StepResult:
        """One AdamW step over ``batches``. DDP reduces gradients once, with the last; FSDP2 with each, as they
        would not be sharded until then."""
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            with self._accumulating(last=i == len(batches) - 1):
                part = self._loss(batch) / len(batches)
                part.backward()
            loss += part.detach()
        parameters = list(self.module.parameters())
        clip = self.stage.optimizer.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss=loss.item(), grad_norm=_whole(norm).item())

    def forward(self, batch: Batch) -> torch.Tensor:
        """Negative log-likelihoods (B, T) of this rank's batch, fp32, without gradients."""
        import torch

        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad(), self._autocast():
                nll: torch.Tensor = self.replica(*self._inputs(batch))
            return nll
        finally:
            self.module.train(training)
            self._reshard()  # ZeRO-2 waits for a backward pass with that, and `save` would find gathered weights

    @contextmanager
    def gathered(self) -> Iterator[torch.nn.Module]:
        """The whole module on every rank."""
        for m in self._fsdp_modules():
            m.unshard()
        try:
            yield self.module
        finally:
            self._reshard()

    def save(self, folder: Path) -> None:
        """Write slices along dim 0 as safetensors: rank 0 the whole of it (DDP), or each rank its own."""
        from safetensors.torch import save_file

        if not self.sharded and self.ranks.rank != 0:
            return
        tensors = {key: _local(t).contiguous() for key, t in self._state().items()}
        name = f"torch-{self.ranks.rank:05d}-of-{self.ranks.world if self.sharded else 1:05d}.safetensors"
        save_file(tensors, folder / name)

    def load(self, folder: Path, *, weights_only: bool = False) -> None:
        """Read what ``save`` wrote, at this or another world size, whole or sharded."""
        import torch

        files = sorted(folder.glob("torch-*-of-*.safetensors"))
        if not files or int(files[0].stem.rpartition("-")[2]) != len(files):
            raise CheckpointError(f"`{folder}` holds no whole checkpoint of engine `torch`: {len(files)} files")
        if not weights_only:
            self._fill_optimizer()
        with _Slices(files) as slices, torch.no_grad():
            for key, t in self._state(weights_only=weights_only).items():
                local = _local(t)
                local.copy_(slices.rows(key, *_rows(t)) if t.dim() else slices.scalar(key))

    def _fsdp_modules(self) -> list[Any]:
        """The modules that FSDP2 gathers and shards; none under DDP."""
        return [m for m in self.module.modules() if hasattr(m, "unshard")]

    def _reshard(self) -> None:
        for m in self._fsdp_modules():
            m.reshard()

    def _loss(self, batch: Batch) -> torch.Tensor:
        with self._autocast():
            nll = self.replica(*self._inputs(batch))
        return self.loss_fn(nll, batch)

    def _inputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            batch["tokens"].to(self.device, non_blocking=True),
            batch["targets"].to(self.device, non_blocking=True),
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        """bf16 by autocast under DDP; FSDP2 casts by its own policy."""
        import torch

        if self.stage.precision == "bf16" and not self.sharded:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Under DDP, leave gradients unreduced until the last micro-batch."""
        wait = not last and not self.sharded and self.ranks.world > 1
        return self.replica.no_sync() if wait else nullcontext()

    def _fill_optimizer(self) -> None:
        """Give every parameter its AdamW state, so that there are tensors to load into."""
        import torch

        for group in self.optimizer.param_groups:
            for p in group["params"]:
                self.optimizer.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }

    def _state(self, *, weights_only: bool = False) -> dict[str, torch.Tensor]:
        """Every tensor of a checkpoint by its key: the parameter's name, or ``<state>/<name>``."""
        tensors: dict[str, torch.Tensor] = {}
        for name, p in self.module.named_parameters():
            tensors[_plain(name)] = p.detach()
            if not weights_only:
                state = self.optimizer.state.get(p, {})
                tensors |= {f"{key}/{_plain(name)}": value for key, value in state.items()}
        return tensors


def _shard(module: Any, stage: StageSpec, ranks: Ranks, device: torch.device) -> None:
    """FSDP2 over all ranks, a block at a time; ZeRO-2 keeps the weights gathered until the backward pass is done."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (ranks.world,))
    low = torch.bfloat16 if stage.precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None)
    reshard = stage.parallel.zero == 3
    for block in module.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)


def _replicate(module: Any, ranks: Ranks, device: torch.device) -> Any:
    """DDP, where there is more than one rank."""
    from torch.nn.parallel import DistributedDataParallel

    if ranks.world == 1:
        return module
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)


class _Slices:
    """Tensors kept as slices along dim 0, one file per rank in rank order; read back in any other slicing."""

    def __init__(self, paths: Sequence[Path]) -> None:
        from safetensors import safe_open

        self.files = [safe_open(p, "pt") for p in paths]

    def __enter__(self) -> _Slices:
        return self

    def __exit__(self, *exc: object) -> None:
        self.files.clear()

    def rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of the whole tensor."""
        import torch

        parts, at = [], 0
        for f in self.files:
            rows = f.get_slice(key)
            n = rows.get_shape()[0]
            low, high = max(start, at), min(stop, at + n)
            if low < high:
                parts.append(rows[low - at : high - at])
            at += n
        return torch.cat(parts) if parts else f.get_tensor(key)[:0]

    def scalar(self, key: str) -> torch.Tensor:
        """A tensor of no dims, which every file holds alike."""
        value: torch.Tensor = self.files[0].get_tensor(key)
        return value


def _plain(name: str) -> str:
    """A parameter's name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


def _local(t: Any) -> torch.Tensor:
    """This rank's slice of a DTensor; a plain tensor as it is."""
    return t.to_local() if hasattr(t, "to_local") else t


def _whole(t: Any) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def _rows(t: Any) -> tuple[int, int]:
    """Which rows of the whole tensor this rank holds."""
    if not hasattr(t, "to_local"):
        return 0, t.shape[0]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    return offset[0], offset[0] + shape[0]
