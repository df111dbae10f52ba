"""ColossalAI 0.5.0 (Li et al. 2021, arXiv:2110.14883): DDP, ZeRO-1 and 2, Gemini, tensor parallel, pipelines.

The plan chooses the plugin: `zero: 1` and `2` LowLevelZero, `zero: 3` Gemini, `tensor` and `pipeline` HybridParallel
with 1F1B or interleaved stages, and nothing of it TorchDDP; DDP in bf16 is HybridParallel's, as TorchDDP has none.
All train our own model, cut by our own shardformer policy, from the same weights as any other engine. AdamW is
torch's, but for Gemini, which takes only ColossalAI's HybridAdam (the same update). In bf16 gradients are reduced and
summed in bf16; weights and moments are kept in fp32.

Tested on CPU ranks (gloo), with `_colossalai_cpu.py` in the place of a GPU. On GPUs the same code runs without it,
which is not proven yet: ColossalAI pins torch 2.5 or older, and HybridAdam compiles its kernel at first use.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from jobs.engines import StepResult, draw_weights, inputs, set_groups
from jobs.runtime import dist
from jobs.runtime.job import Ranks
from jobs.runtime.mesh import place
from jobs.runtime.pieces import Piece
from orchestrator.errors import ConfigError
from orchestrator.spec import Limits, Refusal, StageSpec

if TYPE_CHECKING:
    import torch

    from jobs.engines import Batch, LossFn, Make

LIMITS = Limits(
    refused=(
        *(
            Refusal(
                when={"kind": ("sft", "reward", "compare", "dpo", "ppo"), axis: (True,)},
                why=f"tuning has not been shown equal over {axis} ranks of it",
                instead=f"`{axis}: 1`, with `zero` to spread the weights, or `engine: deepspeed`",
            )
            for axis in ("tensor", "pipeline")
        ),
        Refusal(when={"zero": (3,), "precision": ("fp32",)}, why="Gemini has no fp32", instead="`precision: bf16`"),
        Refusal(when={"zero": (3,), "tensor": (True,)}, why="Gemini runs alone here", instead="`zero: 0`, `1` or `2`"),
        Refusal(when={"zero": (3,), "pipeline": (True,)}, why="Gemini has no pipeline", instead="`zero: 0` or `1`"),
        Refusal(
            when={"zero": (2,), "pipeline": (True,)},
            why="its pipelines sum gradients whole on every data rank",
            instead="`zero: 0` or `1`",
        ),
        *(
            Refusal(
                when={"zero": (1, 2), axis: (True,), "precision": ("fp32",)},
                why=f"its ZeRO beside {words} parallel has no fp32",
                instead="`precision: bf16`, or `zero: 0`",
            )
            for axis, words in (("tensor", "tensor"), ("pipeline", "pipeline"))
        ),
        Refusal(
            when={"offload": ("optimizer", "all")},
            why="HybridAdam does not clip the bf16 gradients of what lies on the CPU, and says nothing of it",
            instead="`offload: none`, or `engine: deepspeed`",
        ),
        Refusal(
            when={"sequence": (True,)},
            why="its sequence parallel hangs or computes something else",
            instead="`sequence: false`, or `engine: deepspeed`",
        ),
        Refusal(
            when={"ulysses": (True,)},
            why="it has no exchange of tokens for heads here",
            instead="`ulysses: 1`, or `engine: deepspeed`",
        ),
        Refusal(
            when={"interleave": (True,), "pipeline": (False,)},
            why="chunks are of a pipeline",
            instead="`interleave: 1`, or `pipeline: 2` and more",
        ),
        Refusal(
            when={"compile": (True,)},
            why="torch.compile has not been shown to work with its hooks and layers",
            instead="`compile: false`, or `engine: torch`",
        ),
    ),
    full_pipeline=True,
    bf16_sums={},
)
VERSION = "0.5.0"
CHUNK = 32  # 2^20 elements: Gemini's default least size of a chunk


def build(make: Make, stage: StageSpec, ranks: Ranks, loss_fn: LossFn) -> ColossalEngine:
    """The model of ``make`` under the plugin that the plan asks for, with its optimizer. Collective."""
    return ColossalEngine(make, stage, ranks, loss_fn)


class ColossalEngine:
    """A boosted model and optimizer behind the engine protocol."""

    def __init__(self, make: Make, stage: StageSpec, ranks: Ranks, loss_fn: LossFn) -> None:
        import torch

        _check_version()
        p = stage.parallel
        self.make, self.stage, self.loss_fn = make, stage, loss_fn
        self.place = place(ranks.rank, ranks.world, p)
        self.device = dist.start(ranks)
        _prepare()
        self.dtype = torch.bfloat16 if stage.precision == "bf16" else torch.float32
        self.gemini = p.zero == 3
        self.pipelined = p.pipeline > 1
        self.hybrid = p.tensor > 1 or self.pipelined or (p.zero == 0 and stage.precision == "bf16")
        with torch.device("meta"):
            self.module: Any = make()
        self.plugin = self._hybrid_plugin() if self.hybrid else self._plugin()
        self._boost()
        draw_weights(self, stage.seed, self.device)

    def train_step(self, batches: Sequence[Batch], *, lr: float, eps: float | None = None) -> StepResult:
        """One AdamW step over ``batches``; their number may differ from step to step (a batch ramp)."""
        set_groups(self.optimizer.param_groups, lr, eps)
        loss = self._pipeline(batches) if self.pipelined else self._accumulate(batches)
        if self.hybrid or self.stage.parallel.zero:
            self.optimizer.step()
            norm = self.optimizer.get_grad_norm()
        else:  # TorchDDPPlugin leaves clipping to its user
            norm = self.optimizer.clip_grad_by_norm(self._clip, foreach=True)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(loss=loss.item(), grad_norm=float(norm))

    def forward(self, batch: Batch) -> torch.Tensor:
        """Negative log-likelihoods (B, T) of this data rank's batch, fp32, without gradients; on its peers too."""
        import torch

        training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                return self._pipeline_nll(batch) if self.pipelined else self._nll(batch)
        finally:
            self.module.train(training)

    @contextmanager
    def gathered(self) -> Iterator[torch.nn.Module]:
        """The whole module on every rank; a copy where ranks hold parts of it."""
        if self.gemini or self.place.tensor_size * self.place.pipeline_size > 1:
            yield self._whole_copy()
        else:
            yield self.module

    def sampler(self) -> AbstractContextManager[Any]:
        """The whole module."""
        return self.gathered()

    def pieces(self) -> list[Piece]:
        """fp32 weights and AdamW's state, as far as this rank holds them."""
        return [piece for shard in self.shards for piece in shard.pieces()]

    def filled(self) -> None:
        """Bring the weights that compute in line with the fp32 ones."""
        self.shards.spread()

    def _nll(self, batch: Batch) -> torch.Tensor:
        nll: torch.Tensor = self.model(*inputs(self.module, batch, self.device))
        return nll

    def _accumulate(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Mean loss of ``batches``, their gradients summed."""
        import torch

        loss = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            with self._accumulating(last=i == len(batches) - 1):
                part = self.loss_fn(self._nll(batch), batch) / len(batches)
                self.optimizer.backward(part)
            loss += part.detach()
        return loss

    def _accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Leave gradients unreduced until the last micro-batch, where they are not sharded."""
        wait = not last and self.stage.parallel.zero < 2 and self.place.data_size > 1
        return self.plugin.no_sync(self.model, self.optimizer) if wait else nullcontext()

    def _pipeline(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Mean loss of ``batches``, on all stages, their gradients reduced."""
        import torch

        whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        self._schedule(len(batches), rows=len(whole["tokens"]))
        done = self.plugin.execute_pipeline(iter([whole]), self.model, self.loss_fn, self.optimizer, return_loss=True)
        return self._from_last_stage(done["loss"], ())

    def _pipeline_nll(self, batch: Batch) -> torch.Tensor:
        """``_nll`` through all stages. Interleaved, micro-batches come in rounds of as many as there are stages."""
        rows, times = len(batch["tokens"]), self.place.pipeline_size if self.stage.parallel.interleave > 1 else 1
        whole = {key: t.repeat(times, *[1] * (t.dim() - 1)) for key, t in batch.items()}
        self._schedule(times, rows=rows * times)
        done = self.plugin.scheduler.forward_backward_step(  # the plugin's own would reduce gradients
            self.model, iter([whole]), lambda nll, _: nll.mean(), return_outputs=True
        )
        nll = done["outputs"]
        return self._from_last_stage(None if nll is None else nll[:rows], batch["targets"].shape)

    def _schedule(self, micro_batches: int, *, rows: int) -> None:
        """Tell the schedule what comes: it wants every batch like the first, and remembers the shape of activations."""
        s = self.plugin.scheduler
        setattr(s, "num_microbatch" if self.stage.parallel.interleave > 1 else "num_microbatches", micro_batches)
        s.microbatch_size, s.last_batch_size = rows // micro_batches, rows
        s.enable_metadata_cache = s.send_tensor_metadata = s.send_grad_metadata = True
        s.tensor_metadata_recv = s.grad_metadata_recv = None

    def _from_last_stage(self, value: torch.Tensor | None, shape: Sequence[int]) -> torch.Tensor:
        import torch
        import torch.distributed as td

        t = torch.empty(tuple(shape), device=self.device) if value is None else value.float().contiguous()
        td.broadcast(t, group_src=self.place.pipeline_size - 1, group=self.plugin.pp_group)
        return t

    @property
    def _clip(self) -> float:
        return self.stage.optimizer.clip or math.inf  # ColossalAI computes no norm where it does not clip

    def _plugin(self) -> Any:
        from colossalai.booster import plugin

        zero, common = self.stage.parallel.zero, {"precision": self.stage.precision, "max_norm": self._clip}
        if zero == 0:
            return plugin.TorchDDPPlugin(gradient_as_bucket_view=True)
        if zero < 3:
            return plugin.LowLevelZeroPlugin(stage=zero, **common)
        # A model smaller than a chunk would be gathered whole at every use.
        chunk = min(CHUNK, sum(p.numel() for p in self.module.parameters()) / 8 / 2**20)
        at_once = self.stage.parallel.micro_batch * self.place.data_size
        return plugin.GeminiPlugin(
            min_chunk_size_m=chunk,
            search_range_m=chunk,
            enable_gradient_accumulation=self.stage.global_batch > at_once or bool(self.stage.options.get("ptx_coef")),
            enable_async_reduce=self.device.type == "cuda",  # it pins memory
            **common,
        )

    def _hybrid_plugin(self) -> Any:
        from colossalai.booster import plugin

        from jobs.engines._colossalai_policy import GPTPolicy

        p = self.stage.parallel
        made = plugin.HybridParallelPlugin(
            tp_size=p.tensor,
            pp_size=p.pipeline,
            zero_stage=p.zero,
            pp_style="interleaved" if p.interleave > 1 else "1f1b",
            num_model_chunks=p.interleave,
            microbatch_size=p.micro_batch,
            overlap_p2p=False,  # interleaved, it hangs otherwise
            dp_outside=False,
            precision=self.stage.precision,
            max_norm=self._clip,
            custom_policy=GPTPolicy(self.dtype, self.device),
        )
        here = tuple(int(i) for i in made.pg_mesh.coordinate())
        assert here == (self.place.pipeline, self.place.data, self.place.tensor, 0), (here, self.place)
        return made

    def _boost(self) -> None:
        """Give parameters memory, then hand module and optimizer to the plugin."""
        import torch
        from colossalai.booster import Booster

        from jobs.engines import _colossalai_shards as shards
        from jobs.nn.gpt import decay_groups

        booster, model = Booster(plugin=self.plugin), self.module
        if self.hybrid:
            model, *_ = booster.boost(model)  # cut first: the policy makes parameters anew
        elif self.gemini:
            _imagine(model, self.device)
        else:
            model.to(self.dtype).to_empty(device=self.device)
        o = self.stage.optimizer
        groups = decay_groups(self.module, o.weight_decay)
        settings: dict[str, Any] = {"lr": o.lr, "betas": o.betas, "eps": o.eps}
        if self.gemini:
            from colossalai.nn.optimizer import HybridAdam

            optimizer: Any = HybridAdam(groups, **settings)
        else:
            optimizer = torch.optim.AdamW(groups, fused=True, **settings)
        self.model, self.optimizer, *_ = booster.boost(model, optimizer)
        if self.gemini:
            self.model._logger = logging.getLogger(__name__)  # its own walks the stack for a line that nobody reads
            self.shards: Any = shards.Gemini(model=self.model, optimizer=self.optimizer)
        else:
            kind = shards.Zero if self.stage.parallel.zero else shards.Whole
            self.shards = kind(module=self.module, optimizer=self.optimizer)

    def _whole_copy(self) -> torch.nn.Module:
        """A copy of the whole module, each element from one of the ranks that have it. As large as the model."""
        import torch
        import torch.distributed as td

        with torch.device("meta"):
            copy = self.make()
        copy.to(self.dtype).to_empty(device=self.device).train(self.module.training)
        held = {piece.name: piece for piece in self.pieces() if piece.slot == "weight" and self._speaks_for(piece)}
        with torch.no_grad():
            for name, p in copy.named_parameters():
                whole = torch.zeros(p.shape, device=self.device)
                if name in held:
                    _put(held[name], whole)
                td.all_reduce(whole)
                p.copy_(whole)
        return copy.requires_grad_(requires_grad=False)

    def _speaks_for(self, piece: Piece) -> bool:
        """Whether this rank, of those that hold the same elements, is the one to give them."""
        at = self.place
        tied = piece.name == "embed.weight" and at.pipeline > 0  # the first stage has it too
        return (self.shards.split or at.data == 0) and (piece.cut is not None or at.tensor == 0) and not tied


def _check_version() -> None:
    hint = "`pip install --no-deps -r constraints-colossalai.txt`, in a step of its own: it asks for another torch"
    try:
        found = version("colossalai")
    except PackageNotFoundError:
        raise ConfigError("engine `colossalai`: ColossalAI is not installed", hint=hint) from None
    if found != VERSION:
        raise ConfigError(
            f"engine `colossalai` is written for ColossalAI {VERSION}, and {found} is installed", hint=hint
        )


def _prepare() -> None:
    """Import ColossalAI without its warnings; where there is no GPU, let the CPU answer for one."""
    import torch

    warnings.filterwarnings("ignore", category=FutureWarning, module="colossalai|torch.distributed")  # of torch's names
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that are imported for nothing
        import colossalai.booster.plugin  # noqa: F401
    if not torch.cuda.is_available():
        from jobs.engines import _colossalai_cpu

        _colossalai_cpu.install()


def _imagine(module: torch.nn.Module, device: torch.device) -> None:
    """Parameters of full shape that take no memory: Gemini copies each into its chunk before it looks at the next."""
    import torch

    zero = torch.zeros((), device=device)
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            setattr(part, name, torch.nn.Parameter(zero.expand(p.shape)))


def _put(piece: Piece, whole: torch.Tensor) -> None:
    """Write what ``piece`` has into its place in ``whole``, which is zero elsewhere."""
    import torch

    local = torch.zeros(math.prod(piece.shape), device=whole.device)
    local[piece.start : piece.start + piece.data.numel()] = piece.data
    local = local.view(piece.shape)
    if piece.cut is None:
        whole.copy_(local)
        return
    spans, dim = piece.cut.spans(), piece.cut.dim
    for (start, stop), part in zip(spans, local.split([stop - start for start, stop in spans], dim), strict=True):
        whole.narrow(dim, start, stop - start).copy_(part)
