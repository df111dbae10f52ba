"""Plain PyTorch: DDP for ZeRO-0, FSDP2 for ZeRO-2 and 3 (arXiv:2304.11277). The reference the others are held to.

Weights, gradients and AdamW state are fp32. With bf16, DDP computes under autocast, and FSDP2 gathers
bf16 copies and reduces gradients in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from jobs.engines import OUR_LAYERS, StepResult, inputs, set_groups
from jobs.runtime import dist
from jobs.runtime.job import Ranks
from jobs.runtime.pieces import Piece, Slot
from orchestrator.spec import Limits, Refusal, StageSpec

if TYPE_CHECKING:
    import torch

    from jobs.engines import Batch, LossFn, Make

LIMITS = Limits(
    refused=(
        Refusal(when={"zero": (1,)}, why="FSDP2 shards gradients and weights too", instead="`zero: 2` or `zero: 3`"),
        Refusal(
            when={"offload": ("optimizer", "all")},
            why="it keeps everything on the GPU",
            instead="`offload: none`, or `engine: deepspeed`",
        ),
        *OUR_LAYERS,
        Refusal(
            when={"pipeline": (True,)},
            why="it has no pipeline",
            instead="`pipeline: 1`, with `zero: 3` to spread the weights",
        ),
        Refusal(
            when={"ulysses": (True,)},
            why="it has no exchange of tokens for heads",
            instead="`ulysses: 1`, or `engine: deepspeed`",
        ),
        Refusal(when={"interleave": (True,)}, why="it has no pipeline", instead="`interleave: 1`"),
    )
)


def build(make: Make, stage: StageSpec, ranks: Ranks, loss_fn: LossFn) -> TorchEngine:
    """The model of ``make`` on every data rank, whole (ZeRO-0) or sharded, with its optimizer. Collective."""
    return TorchEngine(make, stage, ranks, loss_fn)


class Frozen:
    """A model that is only asked, beside an engine that trains: whole on every data rank, or sharded by FSDP2."""

    def __init__(self, make: Make, stage: StageSpec, ranks: Ranks) -> None:
        import torch

        from jobs.nn.gpt import init_weights

        self.make, self.stage, self.ranks = make, stage, ranks
        self.device = dist.start(ranks)
        self.sharded = stage.parallel.zero > 0
        self.tensor = dist.tensor_group(ranks, stage.parallel)
        self.data = dist.group(ranks, stage.parallel, "data") if self.tensor else None
        with torch.device("meta"):
            module: Any = make(self.tensor) if self.tensor else make()
        self.module = module
        if stage.compile:
            self.module.compile_blocks()
        if self.sharded:
            _shard(self.module, stage, ranks, self.device, self.data)
        self.module.to_empty(device=self.device)
        init_weights(self.module, stage.seed)
        self.replica: Any = self.module

    def forward(self, batch: Batch) -> torch.Tensor:
        """What the module makes of this rank's batch, (B, T) in fp32, without gradients."""
        import torch

        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad(), self._autocast():
                nll: torch.Tensor = self.replica(*inputs(self.module, batch, self.device))
            return nll
        finally:
            self.module.train(training)
            self._reshard()  # ZeRO-2 waits for a backward pass with that, and `save` would find gathered weights

    @contextmanager
    def gathered(self) -> Iterator[torch.nn.Module]:
        """The whole module on every rank; under tensor parallel a copy."""
        from jobs.nn.parallel import whole_copy

        for m in self._fsdp_modules():
            m.unshard()
        try:
            yield whole_copy(self.module, self.make, self.tensor) if self.tensor else self.module
        finally:
            self._reshard()

    @contextmanager
    def sampler(self) -> Iterator[Any]:
        """The module itself; a copy where FSDP2 would gather at every layer, in bf16 if it computes in that."""
        import torch

        from jobs.nn.parallel import unsharded_copy

        low = torch.bfloat16 if self.stage.precision == "bf16" else None
        with self._autocast():
            yield unsharded_copy(self.module, self.make, self.tensor, low) if self.sharded else self.module

    def pieces(self) -> list[Piece]:
        """Whole tensors, or rows of them (FSDP2)."""
        found: list[Piece] = []
        for name, p in self.module.named_parameters():
            cut, local = getattr(p, "cut", None), tuple(p.shape)
            start = _first_row(p) * (p.numel() // p.shape[0])
            for slot, value in self._tensors(p).items():
                data = _local(value.detach()).view(-1)
                if slot == "step":
                    found.append(Piece(name=_plain(name), slot=slot, shape=(1,), data=data))
                else:
                    found.append(Piece(name=_plain(name), slot=slot, shape=local, data=data, start=start, cut=cut))
        return found

    def filled(self) -> None:
        """FSDP2 gathers anew before the next forward pass; DDP's weights are what was filled."""
        self._reshard()

    def _tensors(self, p: torch.nn.Parameter) -> dict[Slot, torch.Tensor]:
        """All that there is of a parameter."""
        return {"weight": p}

    def _fsdp_modules(self) -> list[Any]:
        """The modules that FSDP2 gathers and shards; none under DDP."""
        return [m for m in self.module.modules() if hasattr(m, "unshard")]

    def _reshard(self) -> None:
        for m in self._fsdp_modules():
            m.reshard()

    def _autocast(self) -> AbstractContextManager[Any]:
        """bf16 by autocast where weights are whole; FSDP2 casts by its own policy."""
        import torch

        if self.stage.precision == "bf16" and not self.sharded:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


class TorchEngine(Frozen):
    """DDP or FSDP2 behind the engine protocol."""

    def __init__(self, make: Make, stage: StageSpec, ranks: Ranks, loss_fn: LossFn) -> None:
        import torch

        from jobs.nn.gpt import decay_groups
        from jobs.nn.parallel import mark_counted

        super().__init__(make, stage, ranks)
        self.loss_fn = loss_fn
        mark_counted(self.module.parameters(), self.tensor)
        if not self.sharded:
            self.replica = _replicate(self.module, ranks, self.device, self.data)
        o = stage.optimizer
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.module, o.weight_decay), lr=o.lr, betas=o.betas, eps=o.eps, fused=True
        )
        self._fill_optimizer()

    def train_step(self, batches: Sequence[Batch], *, lr: float, eps: float | None = None) -> StepResult:
        """One AdamW step over ``batches``. DDP reduces gradients once, with the last; FSDP2 with each, as they
        would not be sharded until then."""
        import torch

        set_groups(self.optimizer.param_groups, lr, eps)
        loss = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            with self._accumulating(last=i == len(batches) - 1):
                part = self._loss(batch) / len(batches)
                part.backward()
            loss += part.detach()
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss=loss.item(), grad_norm=_whole(norm).item())

    def _clip(self) -> torch.Tensor:
        """Clip the gradients, and return their norm before."""
        from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_

        from jobs.nn.parallel import grad_norm

        parameters, clip = list(self.module.parameters()), self.stage.optimizer.clip or float("inf")
        if self.tensor is None:
            return clip_grad_norm_(parameters, clip, foreach=True)
        norm = grad_norm(parameters, self.tensor.group, whole=_whole)
        clip_grads_with_norm_(parameters, clip, norm, foreach=True)
        return norm

    def _loss(self, batch: Batch) -> torch.Tensor:
        with self._autocast():
            nll = self.replica(*inputs(self.module, batch, self.device))
        return self.loss_fn(nll, batch)

    def _accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Under DDP, leave gradients unreduced until the last micro-batch."""
        wait = not last and self.replica is not self.module  # DDP
        return self.replica.no_sync() if wait else nullcontext()

    def _tensors(self, p: torch.nn.Parameter) -> dict[Slot, torch.Tensor]:
        state = self.optimizer.state[p]
        return {"weight": p, **{slot: state[slot] for slot in ("exp_avg", "exp_avg_sq", "step")}}

    def _fill_optimizer(self) -> None:
        """Give every parameter its AdamW state, which torch would make at the first step: a load fills it."""
        import torch

        for group in self.optimizer.param_groups:
            for p in group["params"]:
                self.optimizer.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }


def _shard(module: Any, stage: StageSpec, ranks: Ranks, device: torch.device, data: Any) -> None:
    """FSDP2 over the group ``data`` (None: all ranks), a block at a time.

    ZeRO-2 keeps the weights gathered until the backward pass is done.
    """
    import torch
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = DeviceMesh.from_group(data, device.type) if data else init_device_mesh(device.type, (ranks.world,))
    low = torch.bfloat16 if stage.precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None)
    reshard = stage.parallel.zero == 3
    for block in module.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)


def _replicate(module: Any, ranks: Ranks, device: torch.device, data: Any) -> Any:
    """DDP over the group ``data`` (None: all ranks), where there is more than one rank in it."""
    from torch.nn.parallel import DistributedDataParallel

    if (data.size() if data else ranks.world) == 1:
        return module
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, process_group=data, gradient_as_bucket_view=True)


def _plain(name: str) -> str:
    """A parameter's name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


def _local(t: Any) -> torch.Tensor:
    """This rank's slice of a DTensor; a plain tensor as it is."""
    return t.to_local() if hasattr(t, "to_local") else t


def _whole(t: Any) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def _first_row(t: Any) -> int:
    """The first row of the tensor that this rank holds."""
    if not hasattr(t, "to_local"):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    return offset[0]
