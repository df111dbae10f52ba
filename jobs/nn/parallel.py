"""Layers cut over tensor ranks (Shoeybi et al. 2019, arXiv:1909.08053, section 3).

A column-parallel layer, which holds some rows of the matrix, opens a region in which every rank has other
features; a row-parallel layer closes it with a sum. In sequence parallel (Korthikanti et al. 2022,
arXiv:2205.05198, section 4.2.2) activations between the regions are cut too, along the tokens: a gather opens
a region, a reduce-scatter closes it. Nothing is padded: where ranks do not divide a dim, some hold a row more.

Shape suffixes as in gpt.py: B batch, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.nn.cut import Cut

TOKENS = 1  # the dim of (B, T, H) that sequence parallel cuts
ALL_GATHER = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor  # renamed in torch 2.13
REDUCE_SCATTER = getattr(td, "reduce_scatter_single", None) or td.reduce_scatter_tensor


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """The ranks that share each layer, as one of them sees it."""

    group: Any  # a torch.distributed.ProcessGroup
    rank: int  # of this process among them
    size: int
    sequence: bool = False  # cut activations along the tokens between the layers


def cuts(module: nn.Module) -> dict[str, Cut]:
    """The cut of each parameter that is cut, by its name."""
    found = {}
    for path, part in module.named_modules():
        for name, cut in getattr(part, "cuts", {}).items():
            found[f"{path}.{name}".lstrip(".")] = cut
    return found


def mark_cuts(module: nn.Module) -> None:
    """Set ``cut`` on every parameter that is cut: whatever makes a parameter anew (``to_empty``, FSDP2) loses it."""
    for name, cut in cuts(module).items():
        module.get_parameter(name).cut = cut  # type: ignore[attr-defined]


def whole_copy(
    module: nn.Module, make: Callable[[], nn.Module], tensor: TensorGroup | None, pipeline: Any = None
) -> nn.Module:
    """A module of ``make()`` with what all tensor ranks, and all ranks of the group ``pipeline``, have of ``module``.

    What a pipeline rank does not have is on `meta`. Collective; as large as the model, on every rank.
    """
    own = {name: p.detach() for name, p in module.named_parameters()}
    here = [name for name, p in own.items() if not p.is_meta]
    like = own[here[0]]
    everyone: list[list[str]] = [here]
    if pipeline is not None:
        everyone = [[] for _ in range(pipeline.size())]
        td.all_gather_object(everyone, here, group=pipeline)
    with torch.device("meta"):
        copy = make()
    copy.to_empty(device=like.device).train(module.training)
    cut_of = cuts(module)
    with torch.no_grad():
        for name, p in copy.named_parameters():
            part = own[name] if name in here else torch.empty_like(own[name], dtype=like.dtype, device=like.device)
            if pipeline is not None:
                owner = next(i for i, names in enumerate(everyone) if name in names)
                td.broadcast(part, group_src=owner, group=pipeline)
            p.copy_(_join(part, cut_of[name], tensor) if tensor and name in cut_of else part)
    return copy.requires_grad_(requires_grad=False)


def unsharded_copy(
    module: nn.Module, make: Callable[..., nn.Module], tensor: TensorGroup | None, dtype: torch.dtype | None = None
) -> nn.Module:
    """What this tensor rank has of ``module``, without what shards it over the data ranks, and without its hooks.

    Collective over the data ranks, a tensor at a time.
    """
    with torch.device("meta"):
        copy = make(tensor) if tensor else make()
    sharded = dict(module.named_parameters())
    with torch.no_grad():
        for path, part in copy.named_modules():
            for name in [name for name, _ in part.named_parameters(recurse=False)]:
                whole = _unsharded(sharded[f"{path}.{name}".lstrip(".")])
                setattr(part, name, nn.Parameter(whole.to(dtype or whole.dtype), requires_grad=False))
    return copy


def _unsharded(p: Any) -> Tensor:
    if hasattr(p, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([p]):
            return p.detach().clone()
    return p.full_tensor() if hasattr(p, "full_tensor") else p.detach()


def _join(own: Tensor, cut: Cut, tensor: TensorGroup) -> Tensor:
    shape = cut.whole_shape(own.shape)
    slices = [own.new_empty(replace(cut, index=i).local_shape(shape)) for i in range(cut.count)]
    slices[tensor.rank].copy_(own)
    for i, t in enumerate(slices):
        td.broadcast(t, group_src=i, group=tensor.group)
    return cut.join(slices)


# ------------------------------------------------------------------ communication with its gradient


class _Conjugate(torch.autograd.Function):
    """``there`` on the way forward, ``back`` on the gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, there, back = inputs
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return ctx.back(grads[0]), None, None


def enter(x_BTH: Tensor, tensor: TensorGroup) -> Tensor:
    """Open a region: the whole activation on every rank. Its gradient is the sum over the ranks."""
    if tensor.sequence:
        return _Conjugate.apply(x_BTH, lambda x: _gather(x, tensor), lambda g: _reduce_scatter(g, tensor))
    return share(x_BTH, tensor)


def leave(x_BTH: Tensor, tensor: TensorGroup) -> Tensor:
    """Close a region: the sum over the ranks; in sequence parallel, each keeps its own tokens of it."""
    if tensor.sequence:
        return _Conjugate.apply(x_BTH, lambda x: _reduce_scatter(x, tensor), lambda g: _gather(g, tensor))
    return _Conjugate.apply(x_BTH, lambda x: _all_reduce(x, tensor), _same)


def share(x: Tensor, tensor: TensorGroup) -> Tensor:
    """The same tensor, its gradient summed over the ranks, each of which uses it for other features or tokens."""
    return _Conjugate.apply(x, _same, lambda g: _all_reduce(g, tensor))


def gather_features(x: Tensor, cut: Cut, tensor: TensorGroup) -> Tensor:
    """All features of ``x``, whose last dim is cut by ``cut``; what follows is the same on all ranks."""
    widest = max(cut.width(i) for i in range(cut.count))

    def there(x: Tensor) -> Tensor:
        padded = F.pad(x, (0, widest - x.shape[-1]))
        return torch.cat([t[..., : cut.width(i)] for i, t in enumerate(_all_gather(padded, tensor))], -1)

    start, stop = cut.spans()[0]
    return _Conjugate.apply(x, there, lambda g: g[..., start:stop].contiguous())


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def _all_reduce(x: Tensor, tensor: TensorGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    td.all_reduce(total, group=tensor.group)
    return total


def _all_gather(x: Tensor, tensor: TensorGroup) -> Tensor:
    """Every rank's ``x``, along a new first dim."""
    slices = x.new_empty(tensor.size * x.shape[0], *x.shape[1:])
    ALL_GATHER(slices, x.contiguous(), group=tensor.group)
    return slices.unflatten(0, (tensor.size, -1))


def _gather(x: Tensor, tensor: TensorGroup) -> Tensor:
    return _all_gather(x, tensor).movedim(0, TOKENS).flatten(TOKENS, TOKENS + 1)


def _reduce_scatter(x: Tensor, tensor: TensorGroup) -> Tensor:
    slices = x.unflatten(TOKENS, (tensor.size, -1)).movedim(TOKENS, 0).contiguous()
    own = torch.empty_like(slices[0])
    REDUCE_SCATTER(own, slices.flatten(0, 1), group=tensor.group)
    return own


# ------------------------------------------------------------------ layers


def column(width: int, parts: Sequence[int], tensor: TensorGroup | None, *, bias: bool) -> nn.Module:
    """A linear layer of ``width`` features to blocks of ``parts`` features, each cut over the tensor ranks."""
    return ColumnLinear(width, parts, tensor, bias=bias) if tensor else nn.Linear(width, sum(parts), bias=bias)


def row(width: int, out: int, tensor: TensorGroup | None, *, bias: bool) -> nn.Module:
    """A linear layer of ``width`` features, cut over the tensor ranks, to ``out``."""
    return RowLinear(width, out, tensor, bias=bias) if tensor else nn.Linear(width, out, bias=bias)


class ColumnLinear(nn.Module):
    """Some rows of the matrix (out, in): every rank computes other features of the whole input."""

    def __init__(self, width: int, parts: Sequence[int], tensor: TensorGroup, *, bias: bool) -> None:
        super().__init__()
        cut = Cut(dim=0, parts=tuple(parts), index=tensor.rank, count=tensor.size)
        self.tensor = tensor
        self.weight = nn.Parameter(torch.empty(cut.width(), width))
        self.bias = nn.Parameter(torch.empty(cut.width())) if bias else None
        self.cuts = {"weight": cut, "bias": cut} if bias else {"weight": cut}

    def forward(self, x_BTH: Tensor) -> Tensor:
        """(B, T, in) to this rank's (B, T, out)."""
        return F.linear(enter(x_BTH, self.tensor), self.weight, self.bias)


class RowLinear(nn.Module):
    """Some columns of the matrix (out, in): every rank holds other features of the input. The bias is whole."""

    def __init__(self, width: int, out: int, tensor: TensorGroup, *, bias: bool) -> None:
        super().__init__()
        cut = Cut(dim=1, parts=(width,), index=tensor.rank, count=tensor.size)
        self.tensor = tensor
        self.weight = nn.Parameter(torch.empty(out, cut.width()))
        self.bias = nn.Parameter(torch.empty(out)) if bias else None
        self.cuts = {"weight": cut}

    def forward(self, x: Tensor) -> Tensor:
        """This rank's (B, T, in) to (B, T, out)."""
        y_BTH = leave(F.linear(x, self.weight), self.tensor)
        return y_BTH if self.bias is None else y_BTH + replicated(self.bias, self.tensor).to(y_BTH.dtype)


def replicated(p: nn.Parameter, tensor: TensorGroup | None) -> Tensor:
    """A parameter that every rank holds whole, at its use between the regions.

    In sequence parallel the ranks use it on other tokens each, and without the sum of its gradients they
    would drift apart without a sign of it.
    """
    return share(p, tensor) if tensor and tensor.sequence else p


class LayerNorm(nn.LayerNorm):
    """A layer norm of this rank's tokens."""

    def __init__(self, width: int, eps: float, tensor: TensorGroup, *, bias: bool) -> None:
        super().__init__(width, eps, bias=bias)
        self.tensor = tensor

    def forward(self, x_BTH: Tensor) -> Tensor:
        """(B, T, H) to (B, T, H)."""
        bias = None if self.bias is None else replicated(self.bias, self.tensor)
        return F.layer_norm(x_BTH, self.normalized_shape, replicated(self.weight, self.tensor), bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """An RMS norm of this rank's tokens."""

    def __init__(self, width: int, eps: float, tensor: TensorGroup) -> None:
        super().__init__(width, eps)
        self.tensor = tensor

    def forward(self, x_BTH: Tensor) -> Tensor:
        """(B, T, H) to (B, T, H)."""
        return F.rms_norm(x_BTH, tuple(self.normalized_shape), replicated(self.weight, self.tensor), self.eps)


# ------------------------------------------------------------------ randomness, and the norm


@contextmanager
def apart(tensor: TensorGroup | None, device: torch.device) -> Iterator[None]:
    """Inside, random numbers differ between tensor ranks; outside, they are equal.

    For dropout where activations are cut. The seed is drawn from the common stream of the CPU, so there is
    no further state to save, and what recompute replays, it replays.
    """
    if tensor is None:
        yield
        return
    seed = int(torch.randint(2**62, ())) + tensor.rank
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.manual_seed(seed)
        yield


def mark_counted(parameters: Iterable[nn.Parameter], tensor: TensorGroup | None) -> None:
    """Set ``tensor_model_parallel`` on the parameters whose gradient this rank adds to the norm: each once.

    The name is Megatron's, and DeepSpeed looks for it. There it marks what is cut; but DeepSpeed's fp32 norm
    of ZeRO-0 does not know ``ds_pipe_replicated``, tied weights on a later pipeline stage, and counts them twice.
    """
    for p in parameters:
        once = hasattr(p, "cut") or tensor is None or tensor.rank == 0
        p.tensor_model_parallel = once and not getattr(p, "ds_pipe_replicated", False)  # type: ignore[attr-defined]


def grad_norm(parameters: Iterable[nn.Parameter], group: Any, whole: Callable[[Any], Tensor] = lambda t: t) -> Tensor:
    """2-norm of the gradient of the whole model. Collective.

    Args:
        group: the ranks over which the model's parts are spread; None: it is whole.
        whole: makes a tensor of a norm that is spread over the data ranks (FSDP2's are).
    """
    grads = [p.grad for p in parameters if p.grad is not None and getattr(p, "tensor_model_parallel", True)]
    square = whole(nn.utils.get_total_norm(grads)).float() ** 2
    if group is not None:
        td.all_reduce(square, group=group)
    return square.sqrt()
