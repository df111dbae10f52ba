"""Cross-entropy of a linear head that never holds fp32 logits of the whole batch.

At GPT-3's vocabulary the logits are the largest activation: 4 s b v bytes in fp32 (Korthikanti et
al. 2022, arXiv:2205.05198, section 4.3), and plain PyTorch holds them twice more on the way back.
Here they exist in the compute dtype only, are turned into their own gradient in place, and beyond
``LOGITS_BYTES`` are computed in chunks and again in the backward pass (as in Wijmans et al. 2024,
arXiv:2411.09009, without its kernel). Per-token gradients may be anything: PPO weights tokens.
Where tensor ranks cut the vocabulary, none sees another's logits: they share three numbers a token, its
largest logit, its sum of exponentials and its target's logit (arXiv:1909.08053, section 3).

Shape suffixes: N tokens, n tokens of one chunk, H hidden, V vocabulary (padded, where said so; this rank's).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from jobs.nn.cut import Cut

LOGITS_BYTES = 2**31  # logits up to here are kept for the backward pass, and no chunk is larger
CACHE_BYTES = 2**20  # softmax on a CPU works in pieces that stay in its cache
CUDA_ROWS = 64  # cuBLAS is slow unless the vocabulary is a multiple (Karpathy's nanoGPT: 50257 -> 50304)


def linear_cross_entropy(
    hidden: Tensor,
    weight_VH: Tensor,
    targets: Tensor,
    *,
    logits_bytes: int = LOGITS_BYTES,
    pad_to: int | None = None,
    group: Any = None,
    cut: Cut | None = None,
) -> Tensor:
    """Negative log-likelihood of ``targets`` under softmax(hidden weight^T), in fp32 (fp64 for fp64).

    Args:
        hidden: (..., H), what the head reads.
        weight_VH: the head, or the token embedding it is tied to. Both are cast as autocast would.
        targets: (...) int64, each in the vocabulary; the result has their shape.
        logits_bytes: above this, logits are computed in chunks and again in the backward pass.
        pad_to: the vocabulary is padded to a multiple of it for the matrix products; None: by device.
        group: the ranks over which the vocabulary is cut; None: ``weight_VH`` holds all of it. The gradient of
            ``hidden`` is then this rank's part of a sum. Collective.
        cut: with ``group``, how: ``weight_VH`` is this rank's slice of it.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight_VH = hidden.to(dtype), weight_VH.to(dtype)
    if pad_to is None:
        pad_to = CUDA_ROWS if device == "cuda" else 1
    with torch.autocast(device, enabled=False):
        part = None if cut is None else _Part.of(cut, group)
        return _LinearCrossEntropy.apply(hidden, weight_VH, targets, logits_bytes, pad_to, part)


def masked_mean(nll: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``nll`` where ``mask`` is not 0, weighted by it; 0 if it is 0 everywhere."""
    mask = mask.to(nll.dtype)
    return (nll * mask).sum() / mask.sum().clamp(min=torch.finfo(nll.dtype).tiny)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        hidden, weight_VH, targets, logits_bytes, pad_to, part = inputs
        hidden_NH, targets_N = hidden.flatten(0, -2), targets.flatten()
        nll = torch.empty(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        nll_N = nll.view(-1)
        log_z_N = torch.empty_like(nll_N if part else nll_N[:0])
        padded_VH = _pad(weight_VH, pad_to)
        widest = part.widest + -part.widest % pad_to if part else len(padded_VH)
        rows = max(1, logits_bytes // (widest * padded_VH.element_size()))
        logits_nV = None
        for chunk in _slices(len(targets_N), rows):
            logits_nV = _logits(hidden_NH[chunk], padded_VH, len(weight_VH))
            if part is None:
                _token_nll(logits_nV, targets_N[chunk], nll_N[chunk])
            else:
                part.token_nll(logits_nV, targets_N[chunk], nll_N[chunk], log_z_N[chunk])
        kept_NV = logits_nV if rows >= len(targets_N) else None
        ctx.save_for_backward(hidden, weight_VH, targets, nll, log_z_N, kept_NV)
        ctx.rows, ctx.pad_to, ctx.part = rows, pad_to, part
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight_VH, targets, nll, log_z_N, kept_NV = ctx.saved_tensors
        hidden_NH, targets_N, nll_N, grad_N = hidden.flatten(0, -2), targets.flatten(), nll.view(-1), grad.flatten()
        padded_VH = _pad(weight_VH, ctx.pad_to)
        grad_hidden_NH = torch.empty_like(hidden_NH)
        grad_weight_VH = None
        for chunk in _slices(len(targets_N), ctx.rows):
            logits_nV = _logits(hidden_NH[chunk], padded_VH, len(weight_VH)) if kept_NV is None else kept_NV
            if ctx.part is None:
                _to_gradient(logits_nV, targets_N[chunk], nll_N[chunk], grad_N[chunk])
            else:
                ctx.part.to_gradient(logits_nV, targets_N[chunk], nll_N[chunk], log_z_N[chunk], grad_N[chunk])
            torch.mm(logits_nV, padded_VH, out=grad_hidden_NH[chunk])
            part_VH = logits_nV.t() @ hidden_NH[chunk]
            if grad_weight_VH is None:
                grad_weight_VH = part_VH if kept_NV is not None else part_VH.to(nll.dtype)  # chunks are summed in fp32
            else:
                grad_weight_VH += part_VH
        if grad_weight_VH is None:  # there were no tokens
            grad_weight_VH = torch.zeros_like(weight_VH)
        grad_weight_VH = grad_weight_VH[: len(weight_VH)].to(weight_VH.dtype)
        return grad_hidden_NH.view(hidden.shape), grad_weight_VH, None, None, None, None


@dataclass(frozen=True)
class _Part:
    """Rows ``first`` to ``first + rows`` of a vocabulary that is cut over ``group``."""

    group: Any
    first: int
    rows: int
    widest: int  # rows of the rank that has most: ranks take chunks alike, or their sums would not meet

    @classmethod
    def of(cls, cut: Cut, group: Any) -> _Part:
        """What ``cut`` says of this rank."""
        widest = max(cut.width(i) for i in range(cut.count))
        return cls(group, cut.spans()[0][0], cut.width(), widest)

    def token_nll(self, logits_nV: Tensor, targets_n: Tensor, nll_n: Tensor, log_z_n: Tensor) -> None:
        """Fill ``log_z_n`` with log sum exp(logits) over the whole vocabulary, and ``nll_n``. Collective."""
        top_n = logits_nV.amax(1).to(nll_n.dtype)
        td.all_reduce(top_n, td.ReduceOp.MAX, group=self.group)
        sums_2n = torch.empty(2, len(nll_n), dtype=nll_n.dtype, device=nll_n.device)  # of exp(logits - top), of targets
        for piece in _pieces(logits_nV):
            torch.sum((logits_nV[piece] - top_n[piece, None]).exp_(), 1, out=sums_2n[0, piece])
        row_n, here_n = self._rows_of(targets_n)
        sums_2n[1] = logits_nV.gather(1, row_n[:, None])[:, 0].to(nll_n.dtype).masked_fill(~here_n, 0.0)
        td.all_reduce(sums_2n, group=self.group)
        torch.add(sums_2n[0].log(), top_n, out=log_z_n)
        torch.sub(log_z_n, sums_2n[1], out=nll_n)

    def to_gradient(self, logits_nV: Tensor, targets_n: Tensor, nll_n: Tensor, log_z_n: Tensor, grad_n: Tensor) -> None:
        """As ``_to_gradient``, of these rows."""
        for piece in _pieces(logits_nV):
            p_nV = (logits_nV[piece] - log_z_n[piece, None]).exp_()
            torch.mul(p_nV, grad_n[piece, None], out=logits_nV[piece])
            del p_nV  # or it would lie beside the next piece's
        row_n, here_n = self._rows_of(targets_n)
        at_target_n = (torch.expm1(-nll_n) * grad_n).to(logits_nV.dtype)
        others_n = logits_nV.gather(1, row_n[:, None])[:, 0]
        logits_nV.scatter_(1, row_n[:, None], torch.where(here_n, at_target_n, others_n)[:, None])

    def _rows_of(self, targets_n: Tensor) -> tuple[Tensor, Tensor]:
        """The row of each target among these, any row where it is elsewhere; and whether it is here."""
        row_n = targets_n - self.first
        here_n = (row_n >= 0) & (row_n < self.rows)
        return row_n.masked_fill(~here_n, 0), here_n


def _pad(weight_VH: Tensor, multiple: int) -> Tensor:
    missing = -len(weight_VH) % multiple
    return F.pad(weight_VH, (0, 0, 0, missing)) if missing else weight_VH


def _logits(hidden_nH: Tensor, padded_VH: Tensor, vocab: int) -> Tensor:
    logits_nV = hidden_nH @ padded_VH.t()
    if len(padded_VH) > vocab:
        logits_nV[:, vocab:] = float("-inf")  # so that softmax gives what is padded no weight
    return logits_nV


def _slices(rows: int, step: int) -> Iterator[slice]:
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _pieces(logits_nV: Tensor) -> Iterator[slice]:
    """Row slices whose fp32 copy is small: in a CPU's cache, or 0.5 GB on a GPU."""
    limit = CACHE_BYTES if logits_nV.device.type == "cpu" else 2**29
    return _slices(len(logits_nV), max(1, limit // (4 * logits_nV.shape[1])))


def _token_nll(logits_nV: Tensor, targets_n: Tensor, nll_n: Tensor) -> None:
    """Fill ``nll_n`` with log sum exp(logits) - logits[target]."""
    for piece in _pieces(logits_nV):
        log_p = F.log_softmax(logits_nV[piece], dim=-1, dtype=nll_n.dtype)
        torch.neg(log_p.gather(1, targets_n[piece, None])[:, 0], out=nll_n[piece])
        del log_p  # or it would lie beside the next piece's


def _to_gradient(logits_nV: Tensor, targets_n: Tensor, nll_n: Tensor, grad_n: Tensor) -> None:
    """Turn logits into the gradient (softmax - onehot(target)) * grad, in place.

    Softmax is rounded to the logits' dtype; the target's entry is exp(-nll) - 1 in fp32, because
    p - 1 would cancel in bf16.
    """
    for piece in _pieces(logits_nV):
        p_nV = F.softmax(logits_nV[piece], dim=-1)
        torch.mul(p_nV, grad_n[piece, None], out=logits_nV[piece])  # in fp32: a rounded factor would bias
        del p_nV  # or it would lie beside the next piece's
    at_target_n = torch.expm1(-nll_n) * grad_n
    logits_nV.scatter_(1, targets_n[:, None], at_target_n[:, None].to(logits_nV.dtype))
