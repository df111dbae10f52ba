"""One decoder for GPT-1, GPT-2, GPT-3 and what came after, driven by ModelSpec.

Sources: GPT-1 (Radford et al. 2018), GPT-2 (Radford et al. 2019, section 2.3), GPT-3 (Brown et al. 2020,
arXiv:2005.14165, section 2.1) with the banded attention of Sparse Transformers (arXiv:1904.10509);
RMSNorm arXiv:1910.07467, SwiGLU arXiv:2002.05202, RoPE arXiv:2104.09864, grouped-query attention
arXiv:2305.13245, parallel blocks as in GPT-J, selective recompute arXiv:2205.05198. Over tensor ranks it is
made of the layers of parallel.py.

Shape suffixes: B batch, T tokens, S tokens and those cached before them, H hidden, A heads, K key and value
heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jobs.nn import parallel
from jobs.nn.cut import Cut
from jobs.nn.losses import linear_cross_entropy
from jobs.nn.parallel import TensorGroup
from orchestrator.errors import ConfigError, DataError
from orchestrator.spec import ModelSpec

Recompute = Literal["none", "selective", "full"]


class GPT(nn.Module):
    """A decoder-only language model; ``spec.params`` is its number of parameters, exactly.

    Args:
        spec: sizes and variant.
        recompute: activations computed again in the backward pass: none; the attention core only, which
            pays where SDPA has no flash kernel (dropout on a CPU, banded layers); or whole blocks.
        tensor: the ranks that each layer is cut over; None: it is whole.

    Raises:
        ConfigError: heads do not divide what they split, or tensor ranks do not divide heads.
    """

    def __init__(self, spec: ModelSpec, *, recompute: Recompute = "none", tensor: TensorGroup | None = None) -> None:
        super().__init__()
        _check(spec, tensor)
        self.spec = spec
        self.embed = TokenEmbedding(spec, tensor)
        self.positions = Positions(spec, tensor) if spec.position == "learned" else None
        self.drop = Dropout(spec.dropout, tensor)
        self.blocks = nn.ModuleList(Block(spec, i, recompute, tensor) for i in range(spec.layers))
        self.norm = _norm(spec, tensor) if spec.norm_position == "pre" else None
        self.head = None if spec.tie_embeddings else Head(spec, tensor)

    inputs: tuple[str, ...] = ("tokens", "targets", "segments")  # of a batch, in the order forward takes them
    temperature = 1.0  # of softmax: logits are divided by it
    tokens: TensorGroup | None = None  # the ranks that share each row (ulysses.py); None: a row is whole

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        segments_BS: Tensor | None = None,
        cache: Sequence[Cache] | None = None,
    ) -> Tensor:
        """Logits (B, T, V); with ``targets``, their negative log-likelihoods (B, T) in fp32 instead.

        Args:
            segments_BS: a number for each token; a token sees those of its own number alone, and its position
                counts from the first of them. So a row may hold several texts, or padding before one.
            cache: one for each block; the S - T tokens before these are in it, and these are added.

        Where ranks share a row, tokens and targets are this rank's alone, and segments those of the whole row.
        """
        return self.to_vocabulary(self.hidden(tokens_BT, segments_BS, cache), targets_BT)

    def hidden(
        self, tokens_BT: Tensor, segments_BS: Tensor | None = None, cache: Sequence[Cache] | None = None
    ) -> Tensor:
        """Hidden states (B, T, H) behind the last norm."""
        new, mask, places_BT = tokens_BT.shape[1], None, None
        start = self.tokens.rank * new if self.tokens else cache[0].length if cache else 0
        if segments_BS is not None:
            mask = seen(segments_BS, segments_BS.shape[1] if self.tokens else new)
            places_BT = places(segments_BS)[:, start : start + new]
        elif start:
            places_BT = torch.arange(start, start + new, device=tokens_BT.device)[None]
        x_BTH = self.embed(tokens_BT)
        if self.positions is not None:
            x_BTH = self.positions(x_BTH, places_BT)
        x_BTH = self.drop(x_BTH)
        if mask is not None:
            mask = additive(mask, computed_in(x_BTH))
        for layer, block in enumerate(self.blocks):
            x_BTH = block(x_BTH, mask, cache[layer] if cache else None)
        return x_BTH if self.norm is None else self.norm(x_BTH)

    def body(self) -> list[nn.Module]:
        """What is between tokens and hidden states, each part fed by the one before: a pipeline cuts it."""
        parts = [self.embed, self.positions, self.drop, *self.blocks, self.norm]
        return [part for part in parts if part is not None]

    def to_vocabulary(self, x_BTH: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Hidden states to logits or negative log-likelihoods, as forward."""
        if self.temperature != 1:
            x_BTH = x_BTH / self.temperature
        if self.head is not None:
            return self.head(x_BTH, targets_BT)
        return self.embed(x_BTH, targets_BT, head=True)

    def compile_blocks(self) -> None:
        """Compile every block with torch.compile: identical blocks share the code of the first.

        Only their forward is replaced, so that hooks on a block (FSDP2's, ZeRO's) stay outside, and
        names of parameters stay as they are.
        """
        for block in self.blocks:
            cast(Block, block).compile_run()


class Head(nn.Module):
    """The map from hidden states to the vocabulary, (V, H), without bias; a tensor rank holds some rows of it."""

    def __init__(self, spec: ModelSpec, tensor: TensorGroup | None = None) -> None:
        super().__init__()
        self.tensor = tensor
        self.cuts: dict[str, Cut] = {}
        rows = spec.vocab
        if tensor:
            self.cuts["weight"] = Cut(dim=0, parts=(spec.vocab,), index=tensor.rank, count=tensor.size)
            rows = self.cuts["weight"].width()
        self.weight = nn.Parameter(torch.empty(rows, spec.hidden))

    def forward(self, x_BTH: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits, or the targets' negative log-likelihoods, as GPT.forward."""
        if not self.tensor:
            if targets_BT is None:
                return F.linear(x_BTH, self.weight)
            return linear_cross_entropy(x_BTH, self.weight, targets_BT)
        x_BTH, cut = parallel.enter(x_BTH, self.tensor), self.cuts["weight"]
        if targets_BT is None:
            return parallel.gather_features(F.linear(x_BTH, self.weight), cut, self.tensor)
        return linear_cross_entropy(x_BTH, self.weight, targets_BT, group=self.tensor.group, cut=cut)


class TokenEmbedding(Head):
    """The token table (V, H), which a tied head reads through this module's own forward.

    So the hooks that gather sharded weights fire at both uses. It holds nothing but the tied tensor:
    DeepSpeed's universal checkpoints of pipelines are silently wrong otherwise.
    """

    def forward(self, x: Tensor, targets_BT: Tensor | None = None, *, head: bool = False) -> Tensor:
        """Embeddings (B, T, H) of tokens (B, T); with ``head``, as Head.forward.

        Raises:
            DataError: sequence parallel, and tensor ranks do not divide the tokens.
        """
        if head:
            return super().forward(x, targets_BT)
        if not self.tensor:
            return F.embedding(x, self.weight)
        if self.tensor.sequence and x.shape[1] % self.tensor.size:
            raise DataError(
                f"sequence parallel: {x.shape[1]} tokens do not split over {self.tensor.size} tensor ranks",
                hint="pad the sequence, or `parallel.sequence: false`",
            )
        start, stop = self.cuts["weight"].spans()[0]
        elsewhere_BT = (x < start) | (x >= stop)
        part_BTH = F.embedding((x - start).masked_fill(elsewhere_BT, 0), self.weight)
        return parallel.leave(part_BTH.masked_fill(elsewhere_BT[..., None], 0.0), self.tensor)


class Positions(nn.Module):
    """Learned positions (T, H), in a layer of their own."""

    def __init__(self, spec: ModelSpec, tensor: TensorGroup | None = None) -> None:
        super().__init__()
        self.tensor = tensor
        self.weight = nn.Parameter(torch.empty(spec.seq_len, spec.hidden))

    def forward(self, x_BTH: Tensor, places_BT: Tensor | None = None) -> Tensor:
        """Add the positions 0, 1, ..., or ``places``; in sequence parallel, those of this rank's tokens.

        Raises:
            DataError: there are more tokens than positions.
        """
        own, seq_len = x_BTH.shape[1], len(self.weight)
        slices, index = (self.tensor.size, self.tensor.rank) if self.tensor and self.tensor.sequence else (1, 0)
        tokens = own * slices
        if tokens > seq_len:
            raise DataError(
                f"a sequence of {tokens} tokens is longer than the model's {seq_len} positions",
                hint=f"cut it, or set `model.seq_len` to {tokens} before training",
            )
        weight, mine = parallel.replicated(self.weight, self.tensor), slice(index * own, (index + 1) * own)
        return x_BTH + (weight[mine] if places_BT is None else F.embedding(places_BT[:, mine], weight))


class Dropout(nn.Module):
    """Dropout between the layers: tensor ranks drop the same, or, each with its own tokens, not the same."""

    def __init__(self, p: float, tensor: TensorGroup | None) -> None:
        super().__init__()
        self.p, self.tensor = p, tensor if tensor and tensor.sequence else None

    def forward(self, x_BTH: Tensor) -> Tensor:
        """(B, T, H) to (B, T, H)."""
        if not (self.training and self.p):
            return x_BTH
        with parallel.apart(self.tensor, x_BTH.device):
            return F.dropout(x_BTH, self.p)


class Block(nn.Module):
    """Attention and feed-forward, each with its norm and residual; pre-norm, post-norm or parallel."""

    def __init__(self, spec: ModelSpec, layer: int, recompute: Recompute, tensor: TensorGroup | None) -> None:
        super().__init__()
        banded = spec.attention == "banded" or (spec.attention == "alternating" and layer % 2 == 1)
        window = spec.window if banded else None
        self.drop, self.post = Dropout(spec.dropout, tensor), spec.norm_position == "post"
        self.recompute = recompute == "full"
        self.norm1 = _norm(spec, tensor)
        self.attn = Attention(spec, window=window, recompute=recompute == "selective", tensor=tensor)
        self.norm2 = None if spec.parallel_block else _norm(spec, tensor)
        self.mlp = FeedForward(spec, tensor)

    def forward(self, x_BTH: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """(B, T, H) to (B, T, H); ``mask`` and ``cache`` as in Attention."""
        return _maybe_checkpoint(self.recompute, self.run, x_BTH, mask, cache)

    def run(self, x_BTH: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """What forward computes, and computes again under full recompute."""
        if self.norm2 is None:
            y_BTH = x_BTH if self.post else self.norm1(x_BTH)
            x_BTH = x_BTH + self.drop(self.attn(y_BTH, mask, cache) + self.mlp(y_BTH))
            return self.norm1(x_BTH) if self.post else x_BTH
        if self.post:
            x_BTH = self.norm1(x_BTH + self.drop(self.attn(x_BTH, mask, cache)))
            return self.norm2(x_BTH + self.drop(self.mlp(x_BTH)))
        x_BTH = x_BTH + self.drop(self.attn(self.norm1(x_BTH), mask, cache))
        return x_BTH + self.drop(self.mlp(self.norm2(x_BTH)))

    def compile_run(self) -> None:
        """See GPT.compile_blocks."""
        self.run = torch.compile(self.run)  # type: ignore[method-assign]


class Cache:
    """Keys and values of the tokens that one block has seen, for at most ``room`` tokens."""

    def __init__(self, room: int) -> None:
        self.room, self.length = room, 0
        self.keys = self.values = torch.empty(0)

    def add(self, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Remember these too; return all there are, (B, K, S, D)."""
        if not self.length:
            shape = (*k_BKTD.shape[:2], self.room, k_BKTD.shape[3])
            self.keys, self.values = k_BKTD.new_empty(shape), v_BKTD.new_empty(shape)
        start, self.length = self.length, self.length + k_BKTD.shape[2]
        self.keys[:, :, start : self.length], self.values[:, :, start : self.length] = k_BKTD, v_BKTD
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows of the batch alone."""
        self.keys, self.values = self.keys[rows], self.values[rows]


class Attention(nn.Module):
    """Causal self-attention; ``window`` is how many positions a query sees, its own included; None: all."""

    def __init__(
        self, spec: ModelSpec, *, window: int | None, recompute: bool, tensor: TensorGroup | None = None
    ) -> None:
        super().__init__()
        widths = [spec.hidden, spec.kv_hidden, spec.kv_hidden]
        self.tensor = tensor
        self.widths = [width // tensor.size for width in widths] if tensor else widths  # of this rank's heads
        self.head_dim, self.dropout = spec.head_dim, spec.dropout
        self.grouped = spec.kv_hidden != spec.hidden
        self.rope_theta = spec.rope_theta if spec.position == "rope" else None
        self.window, self.recompute = window, recompute
        self.across: Callable[..., Tensor] | None = None  # `attend` over ranks that share each row (ulysses.py)
        self.qkv = parallel.column(spec.hidden, widths, tensor, bias=spec.bias)
        self.proj = parallel.row(spec.hidden, spec.hidden, tensor, bias=spec.bias)

    def forward(self, x_BTH: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """(B, T, H) to (B, T, H).

        Args:
            mask: (B, 1, T, S), what each query sees besides what causality and the window say; bool or additive.
            cache: of the tokens before these, to which these are added.
        """
        q_BTAD, k_BTKD, v_BTKD = (
            part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x_BTH).split(self.widths, -1)
        )
        if self.across is None:
            y_BTAD = self.attend(q_BTAD, k_BTKD, v_BTKD, mask, cache)
        else:
            y_BTAD = self.across(q_BTAD, k_BTKD, v_BTKD, mask)
        return self.proj(y_BTAD.flatten(2))

    def attend(
        self, q_BTAD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Queries, keys and values of whole rows, of some heads or all, to their (B, T, A, D)."""
        start = cache.length if cache else 0
        q_BATD, k_BKTD, v_BKTD = (t.transpose(1, 2) for t in (q_BTAD, k_BTKD, v_BTKD))
        if self.rope_theta is not None:
            q_BATD, k_BKTD = rotate(q_BATD, self.rope_theta, start), rotate(k_BKTD, self.rope_theta, start)
        if cache is not None:
            k_BKTD, v_BKTD = cache.add(k_BKTD, v_BKTD)
        y_BATD = _maybe_checkpoint(self.recompute, self._core, q_BATD, k_BKTD, v_BKTD, mask)
        return y_BATD.transpose(1, 2)

    def _core(self, q_BATD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None) -> Tensor:
        new, tokens = q_BATD.shape[2], k_BKSD.shape[2]
        if self.window is not None and self.window < tokens:  # a dense layer may use the flash kernel
            band_TS = band(tokens, self.window, q_BATD.device, last=new)
            if mask is None:
                mask = band_TS
            else:
                mask = mask & band_TS if mask.dtype == torch.bool else mask.masked_fill(~band_TS, -math.inf)
        elif mask is None and 1 < new < tokens:
            mask = band(tokens, tokens, q_BATD.device, last=new)
        if self.grouped and mask is not None:  # the kernels that share keys take no mask
            k_BKSD, v_BKSD = (x.repeat_interleave(q_BATD.shape[1] // x.shape[1], 1) for x in (k_BKSD, v_BKSD))
        dropout = self.dropout if self.training else 0.0
        with parallel.apart(self.tensor if dropout else None, q_BATD.device):  # each rank has other heads
            return F.scaled_dot_product_attention(
                q_BATD,
                k_BKSD,
                v_BKSD,
                attn_mask=mask,
                is_causal=mask is None and new == tokens,
                dropout_p=dropout,
                enable_gqa=self.grouped and mask is None,
            )


class FeedForward(nn.Module):
    """Two matrices and an activation; SwiGLU's gate and value are the halves of ``up``."""

    def __init__(self, spec: ModelSpec, tensor: TensorGroup | None = None) -> None:
        super().__init__()
        self.activation = spec.activation
        parts = [spec.ffn, spec.ffn] if spec.activation == "swiglu" else [spec.ffn]
        self.up = parallel.column(spec.hidden, parts, tensor, bias=spec.bias)
        self.down = parallel.row(spec.ffn, spec.hidden, tensor, bias=spec.bias)

    def forward(self, x_BTH: Tensor) -> Tensor:
        """(B, T, H) to (B, T, H)."""
        return self.down(_ACTIVATIONS[self.activation](self.up(x_BTH)))


def _swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")  # (Hendrycks and Gimpel 2016, arXiv:1606.08415), OpenAI's in GPT-1 to 3


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "swiglu": _swiglu,
}


def band(tokens: int, window: int, device: torch.device, *, last: int | None = None) -> Tensor:
    """Mask (T, S), true where query i sees key j: i - window < j <= i; the ``last`` T queries, or all S."""
    key_S = torch.arange(tokens, device=device)
    query_T1 = key_S[-last if last else 0 :, None]
    return (key_S <= query_T1) & (key_S > query_T1 - window)


def seen(segments_BS: Tensor, tokens: int) -> Tensor:
    """Mask (B, 1, T, S), true where one of the last ``tokens`` queries sees a key: of its segment, not behind it."""
    same_BTS = segments_BS[:, -tokens:, None] == segments_BS[:, None, :]
    total = segments_BS.shape[1]
    return (same_BTS & band(total, total, segments_BS.device, last=tokens))[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as SDPA adds it to the scores: made once here, it is neither made nor kept by every layer."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype of products with ``x``: autocast's, where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def places(segments_BS: Tensor) -> Tensor:
    """How many tokens of its segment stand before each, (B, S); the tokens of a segment stand together."""
    index_S = torch.arange(segments_BS.shape[1], device=segments_BS.device)
    begins_BS = F.pad(segments_BS[:, 1:] != segments_BS[:, :-1], (1, 0), value=True)
    return index_S - torch.where(begins_BS, index_S, 0).cummax(1).values


def rotate(x_BATD: Tensor, theta: float, start: int = 0) -> Tensor:
    """Rotary positions from ``start``: dims d and d + D/2 turn by t theta^(-2d/D) (arXiv:2104.09864, as in GPT-NeoX).

    Only differences of positions count, so tokens of any segment may be turned by where they stand in the row.
    """
    tokens, dim = x_BATD.shape[-2:]
    rate_d = theta ** -(torch.arange(0, dim, 2, device=x_BATD.device, dtype=torch.float32) / dim)
    angle_Td = torch.outer(torch.arange(start, start + tokens, device=x_BATD.device, dtype=torch.float32), rate_d)
    cos_Td, sin_Td = angle_Td.cos().to(x_BATD.dtype), angle_Td.sin().to(x_BATD.dtype)
    a, b = x_BATD.chunk(2, -1)
    return torch.cat((a * cos_Td - b * sin_Td, b * cos_Td + a * sin_Td), -1)


def init_weights(model: GPT, seed: int) -> GPT:
    """Draw every parameter in full from a generator seeded by its name, and return the model.

    So neither world size nor layout nor the order of construction changes the start; a CPU and a GPU do
    differ. Matrices and embeddings are N(0, init_std), those that write to the residual stream divided
    by sqrt(2 L) under ``scaled_init`` (GPT-2, section 2.3); biases are 0, norms 1. Sharded parameters
    (FSDP2, deepspeed.zero.Init) keep their shard; that is collective. Parameters that tensor ranks cut
    keep their slice, and have their ``cut`` from here on.
    """
    parallel.mark_cuts(model)
    for name, p in model.named_parameters():
        if not p.is_meta:
            with torch.no_grad(), _whole(p) as (shape, fill):
                fill(draw(model.spec, seed, name, shape, p.device))
    return model


def draw(spec: ModelSpec, seed: int, name: str, shape: torch.Size, device: torch.device) -> Tensor:
    """The whole parameter ``name`` as a run of ``seed`` begins with it, in fp32."""
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    if "norm" in name:
        return torch.ones(shape, device=device)
    residual = spec.scaled_init and name.endswith(("attn.proj.weight", "mlp.down.weight"))
    std = spec.init_std / math.sqrt(2 * spec.layers) if residual else spec.init_std
    if name == "score.weight":  # of heads.Scorer (Stiennon et al. 2020, arXiv:2009.01325, as their code has it)
        std = 1 / math.sqrt(spec.hidden + 1)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8]) >> 1)
    return torch.empty(shape, device=device).normal_(0, std, generator=generator)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices and embeddings decay, biases and norms do not.

    By name, because a sharded parameter may have lost its dims.
    """
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.is_meta:  # another pipeline rank's
            continue
        (rest if name.endswith("bias") or "norm" in name else decay).append(p)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


@contextmanager
def _whole(p: nn.Parameter) -> Iterator[tuple[torch.Size, Callable[[Tensor], object]]]:
    """The full shape of a parameter, and a function that sets it from a full tensor, cut or sharded or not."""
    with _gathered(p) as (shape, fill):
        cut: Cut | None = getattr(p, "cut", None)
        yield (torch.Size(cut.whole_shape(shape)), lambda full: fill(cut.take(full))) if cut else (shape, fill)


@contextmanager
def _gathered(p: nn.Parameter) -> Iterator[tuple[torch.Size, Callable[[Tensor], object]]]:
    """The same, of what the data ranks share."""
    if hasattr(p, "ds_shape"):  # deepspeed.zero.Init: outside this context there is nothing to write to
        import deepspeed

        with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
            yield p.shape, p.copy_
    elif hasattr(p, "placements"):  # FSDP2
        from torch.distributed.tensor import DTensor, distribute_tensor

        d = cast(DTensor, p)
        yield (
            d.shape,
            lambda full: d.copy_(
                distribute_tensor(full, d.device_mesh, d.placements, src_data_rank=None)  # no communication
            ),
        )
    else:
        yield p.shape, p.copy_


def _maybe_checkpoint(recompute: bool, function: Callable[..., Tensor], *args: object) -> Tensor:
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


def _norm(spec: ModelSpec, tensor: TensorGroup | None) -> nn.Module:
    if tensor and tensor.sequence:
        if spec.norm == "rmsnorm":
            return parallel.RMSNorm(spec.hidden, spec.norm_eps, tensor)
        return parallel.LayerNorm(spec.hidden, spec.norm_eps, tensor, bias=spec.bias)
    if spec.norm == "rmsnorm":
        return nn.RMSNorm(spec.hidden, spec.norm_eps)
    return nn.LayerNorm(spec.hidden, spec.norm_eps, bias=spec.bias)


def _check(spec: ModelSpec, tensor: TensorGroup | None) -> None:
    kv_heads = spec.kv_heads or spec.heads
    for name, total, part in (("hidden", spec.hidden, spec.heads), ("heads", spec.heads, kv_heads)):
        if total % part:
            divisors = [d for d in range(1, total + 1) if total % d == 0]
            what = "heads" if name == "hidden" else "kv_heads"
            raise ConfigError(
                f"model: `{what}` = {part} does not divide `{name}` = {total}", hint=f"it may be one of {divisors}"
            )
    if tensor and kv_heads % tensor.size:
        raise ConfigError(
            f"model: {kv_heads} heads of keys and values do not split over {tensor.size} tensor ranks",
            hint="`parallel.tensor` divides `heads` and `kv_heads`",
        )
    if spec.position == "rope" and spec.head_dim % 2:
        raise ConfigError(
            f"model: rope turns pairs, and {spec.hidden} / {spec.heads} = {spec.head_dim} dims per head is odd",
            hint="choose `heads` so that `hidden / heads` is even",
        )
