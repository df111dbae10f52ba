"""DeepSpeed: ZeRO 0-3 with CPU offload (Rajbhandari et al. 2020, arXiv:1910.02054; arXiv:2101.06840), over the layers
of jobs/nn/parallel.py where tensor ranks share them. Its pipelines: _pipeline.py.

The optimizer is torch's AdamW, handed over by us: DeepSpeed's own would compile for minutes and differ
from the torch engine's in the last bits. Checkpoints are pieces of its fp32 weights and moments, in the format
of every engine; DeepSpeed's own, which are pickles and fit one layout, are not used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs.engines import OUR_LAYERS, StepResult, draw_weights, inputs, set_groups
from jobs.runtime import dist
from jobs.runtime.job import Ranks
from jobs.runtime.mesh import Place, place
from jobs.runtime.pieces import Piece, Slot
from orchestrator.spec import BF16_SUMS, Limits, Refusal, StageSpec, summed

if TYPE_CHECKING:
    import torch

    from jobs.engines import Batch, LossFn, Make

LIMITS = Limits(
    refused=(
        Refusal(
            when={"kind": ("sft", "reward"), "pipeline": (True,)},
            why="pipeline ranks hand on hidden states alone, not which text of a row they belong to",
            instead="`pipeline: 1`, with `zero` or `tensor` to spread the weights",
        ),
        Refusal(
            when={"kind": ("compare", "dpo", "ppo"), "pipeline": (True,)},
            why="sampling, and comparing with a reference, go through all layers at once",
            instead="`pipeline: 1`, with `zero` or `tensor` to spread the weights",
        ),
        Refusal(
            when={"offload": ("optimizer",), "zero": (0,)},
            why="offload comes with ZeRO's shards",
            instead="`zero: 1`, `2` or `3`",
        ),
        Refusal(when={"offload": ("all",), "zero": (0, 1, 2)}, why="only ZeRO-3 shards weights", instead="`zero: 3`"),
        Refusal(
            when={"pipeline": (True,), "zero": (2, 3)},
            why="DeepSpeed's pipelines need whole gradients and weights on every rank",
            instead="`zero: 1`",
        ),
        Refusal(
            when={"pipeline": (True,), "precision": ("bf16",), "zero": (0,)},
            why="in bf16 it does not resume bit for bit there",
            instead="`zero: 1`",
        ),
        Refusal(
            when={"tensor": (True,), "precision": ("bf16",), "zero": (0,)},
            why="in bf16 it clips there by a norm that misses what is cut (measured: 21% off)",
            instead="`zero: 1`",
        ),
        Refusal(
            when={"pipeline": (True,), "offload": ("optimizer", "all")},
            why="a pipeline with its optimizer on the CPU has not been shown to compute the same",
            instead="`offload: none`",
        ),
        Refusal(
            when={"pipeline": (True,), "compile": (True,)},
            why="a compiled block in a pipeline has not been shown to compute the same",
            instead="`compile: false`",
        ),
        *OUR_LAYERS,
        Refusal(
            when={"ulysses": (True,), "tensor": (True,)},
            why="an exchange of heads that tensor ranks share has not been shown to compute the same",
            instead="`tensor: 1`, or `ulysses: 1` with `sequence: true`",
        ),
        Refusal(
            when={"ulysses": (True,), "pipeline": (True,)},
            why="DeepSpeed's pipelines know no ranks that share a sequence",
            instead="`pipeline: 1`, with `zero: 3` to spread the weights",
        ),
        Refusal(
            when={"ulysses": (True,), "compile": (True,)},
            why="torch.compile has not been shown to keep the exchange inside a block",
            instead="`compile: false`",
        ),
        Refusal(
            when={"ulysses": (True,), "kind": ("reward", "compare", "dpo", "ppo")},
            why="a sequence shared by ranks has been shown equal for pretrain and sft alone",
            instead="`ulysses: 1`",
        ),
        Refusal(
            when={"compile": (True,), "zero": (3,)},
            why="a compiled block has not been shown to work with the hooks that gather its weights",
            instead="`compile: false`, `zero: 2`, or `engine: torch`",
        ),
        Refusal(when={"interleave": (True,)}, why="its pipelines hold one chunk a rank", instead="`interleave: 1`"),
    ),
    bf16_sums={"pipeline": (False,), "zero": (0, 1)},
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
        "pipeline.pipe_partitioned",
        "pipeline.grad_partitioned",
        "pipeline.stages",
        "pipeline.seed_layers",
        "pipeline.activation_checkpoint_interval",
        "checkpoint",
    ),
    allowed={  # https://www.deepspeed.ai/docs/config-json/; held against plain PyTorch by test_engines
        "zero_optimization.reduce_bucket_size": "how many gradients are summed at once",
        "zero_optimization.allgather_bucket_size": "how many weights are gathered at once",
        "zero_optimization.overlap_comm": "when gradients are summed",
        "zero_optimization.contiguous_gradients": "where gradients lie in memory",
        "zero_optimization.sub_group_size": "how many weights ZeRO-3 updates at once",
        "zero_optimization.stage3_prefetch_bucket_size": "how many weights are gathered ahead",
        "zero_optimization.stage3_param_persistence_threshold": "which small weights stay gathered",
        "zero_optimization.stage3_model_persistence_threshold": "how many small weights stay gathered",
        "zero_optimization.stage3_max_live_parameters": "how many weights are gathered at a time",
        "pipeline.partition": "which blocks a pipeline rank holds: `uniform` (as many on each) or `parameters`",
        "wall_clock_breakdown": "prints times",
        "comms_logger": "prints collectives",
        "flops_profiler": "prints operations",
    },
    choices={
        "zero_optimization.overlap_comm": (True, False),
        "zero_optimization.contiguous_gradients": (True, False),
        "pipeline.partition": ("uniform", "parameters"),
        "wall_clock_breakdown": (True, False),
    },
)


def build(make: Make, stage: StageSpec, ranks: Ranks, loss_fn: LossFn) -> DeepSpeedEngine:
    """The model of ``make`` under ZeRO or in a pipeline, with its optimizer. Collective."""
    if stage.parallel.pipeline > 1:
        from jobs.engines._pipeline import PipelineEngine

        return PipelineEngine(make, stage, ranks, loss_fn)
    return DeepSpeedEngine(make, stage, ranks, loss_fn)


def config(stage: StageSpec, ranks: Ranks) -> dict[str, Any]:
    """The DeepSpeed JSON: what the plan says, and under it what the user passes through.

    Keys: https://www.deepspeed.ai/docs/config-json/.
    """
    p = stage.parallel
    turns = summed(stage, place(ranks.rank, ranks.world, p).data_size)
    zero: dict[str, Any] = {"stage": p.zero}
    if p.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if p.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    plan = {
        "train_batch_size": stage.global_batch * p.ulysses,  # to DeepSpeed, ranks that share a row are data ranks
        "train_micro_batch_size_per_gpu": p.micro_batch,
        "gradient_clipping": 0.0 if clips_itself(stage) else stage.optimizer.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,  # the loop prints
        "bf16": {"enabled": stage.precision == "bf16"},
        "zero_optimization": zero,
        # Partitioned, tensor peers send each a part of an activation that they all hold: not so in sequence parallel.
        "pipeline": {"pipe_partitioned": not p.sequence, "grad_partitioned": not p.sequence},
    }
    user = dict(stage.engine_config)
    many = p.zero >= 2 and turns > BF16_SUMS
    if stage.precision == "bf16" and (p.pipeline > 1 or many):  # of a sum of many in bf16, some would be lost
        user = _merge({"data_types": {"grad_accum_dtype": "fp32"}}, user)
    return _merge(user, plan)


def clips_itself(stage: StageSpec) -> bool:
    """Whether we clip: in fp32 with ZeRO-0, DeepSpeed reports no norm, and counts tied and whole weights wrongly."""
    return stage.parallel.zero == 0 and stage.precision == "fp32"


class DeepSpeedEngine:
    """A ``deepspeed.DeepSpeedEngine`` behind the engine protocol."""

    module: Any

    def __init__(self, make: Make, stage: StageSpec, ranks: Ranks, loss_fn: LossFn) -> None:
        import torch

        self.stage, self.ranks, self.loss_fn = stage, ranks, loss_fn
        self.device = dist.start(ranks)
        deepspeed = _import(ranks)
        from jobs.nn import ulysses
        from jobs.nn.gpt import decay_groups, init_weights
        from jobs.nn.parallel import mark_counted

        self.place = place(ranks.rank, ranks.world, stage.parallel)
        self.tokens = dist.token_group(ranks, stage.parallel)
        self.make, self.tensor, self.norm = make, dist.tensor_group(ranks, stage.parallel), torch.zeros(())
        settings = config(stage, ranks)
        model, self.grid = self._build(settings)
        init_weights(self.module, stage.seed)
        if self.tokens:
            ulysses.spread(self.module, self.tokens)
        held = [p for p in self.module.parameters() if not p.is_meta]
        mark_counted(held, self.tensor)
        if stage.compile:
            self.module.compile_blocks()
        o = stage.optimizer
        on_cpu = self.device.type == "cpu" or stage.parallel.offload != "none"
        groups = [g for g in decay_groups(self.module, o.weight_decay) if g["params"]]  # a pipeline stage may lack one
        # `train_step` sets lr. To allocate the moments ZeRO-0 in bf16 steps without gradients: it must change nothing.
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=o.betas, eps=o.eps, fused=not on_cpu)
        if clips_itself(stage):
            optimizer.register_step_pre_hook(lambda *_: self._clip(held))
        mpu = None if stage.parallel.pipeline > 1 else self.grid  # a pipeline brings its own
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=mpu)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
        if stage.precision == "bf16":  # DeepSpeed made its fp32 weights of the bf16 ones
            draw_weights(self, stage.seed, self.device)

    def _build(self, settings: dict[str, Any]) -> tuple[Any, Any]:
        """Make ``module``, its weights still to be drawn; return what DeepSpeed runs, and its grid of ranks, if any."""
        import deepspeed
        import torch

        grid = None
        if self.tensor:
            from deepspeed.runtime.pipe.topology import PipelineParallelGrid

            with redirect_stdout(None):  # it prints every rank's coordinates
                grid = PipelineParallelGrid(topology=topology(self.place))
        make = partial(self.make, self.tensor) if self.tensor else self.make
        if self.stage.parallel.zero == 3:
            data = grid.get_data_parallel_group() if grid else None
            with deepspeed.zero.Init(config_dict_or_path=settings, data_parallel_group=data, mpu=grid):
                self.module = make()
        else:
            with torch.device("meta"):
                self.module = make()
            self.module.to_empty(device=self.device)
        return self.module, grid

    def _clip(self, parameters: list[torch.nn.Parameter]) -> None:
        """Clip the gradients, and keep their norm before."""
        import torch

        from jobs.nn.parallel import grad_norm

        self.norm = grad_norm(parameters, self.grid.get_model_parallel_group() if self.grid else None)
        torch.nn.utils.clip_grads_with_norm_(parameters, self.stage.optimizer.clip or float("inf"), self.norm)

    def train_step(self, batches: Sequence[Batch], *, lr: float, eps: float | None = None) -> StepResult:
        """One AdamW step over ``batches``; their number may differ from step to step (a batch ramp)."""
        import torch

        self._prepare_step(len(batches), lr, eps)
        loss = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            self.engine.set_gradient_accumulation_boundary(last)  # its own count goes wrong when the batch grows
            part = self.loss_fn(self._run(batch), batch)
            self.engine.backward(part)
            loss += part.detach() / len(batches)
            self.engine.step()
        return StepResult(loss=loss.item(), grad_norm=self._norm())

    def _prepare_step(self, turns: int, lr: float, eps: float | None) -> None:
        """Set the learning rate, and how many micro-batches come."""
        set_groups(self.engine.optimizer.param_groups, lr, eps)
        p = self.stage.parallel
        self.engine.set_train_batch_size(turns * p.micro_batch * self.place.data_size * p.ulysses)

    def _run(self, batch: Batch) -> torch.Tensor:
        """What the module makes of this data rank's batch, (B, T); of ranks that share its rows, each does a part."""
        from jobs.nn import ulysses

        mine = ulysses.own(batch, self.tokens) if self.tokens else batch
        out: torch.Tensor = self.engine(*inputs(self.module, mine, self.device))
        return ulysses.joined(out, self.tokens) if self.tokens else out

    def _norm(self) -> float:
        """The gradients' norm of the last step."""
        return float(self.norm if clips_itself(self.stage) else self.engine.get_global_grad_norm())

    def forward(self, batch: Batch) -> torch.Tensor:
        """Negative log-likelihoods (B, T) of this rank's batch, fp32, without gradients."""
        import torch

        training = self.module.training
        self.engine.eval()
        try:
            with torch.no_grad():
                return self._run(batch)
        finally:
            self.engine.train(training)

    @contextmanager
    def gathered(self) -> Iterator[torch.nn.Module]:
        """The whole module on every rank; under tensor parallel a copy."""
        import deepspeed

        from jobs.nn.parallel import whole_copy
        from jobs.nn.ulysses import alone

        sharded = self.stage.parallel.zero == 3
        whole = deepspeed.zero.GatheredParameters(list(self.module.parameters())) if sharded else nullcontext()
        with whole, alone(self.module):
            yield whole_copy(self.module, self.make, self.tensor) if self.tensor else self.module

    @contextmanager
    def sampler(self) -> Iterator[Any]:
        """The module itself; under ZeRO-3, whose hooks gather with all data ranks at every layer, a copy."""
        from jobs.nn.parallel import unsharded_copy
        from jobs.nn.ulysses import alone

        with alone(self.module):
            yield unsharded_copy(self.module, self.make, self.tensor) if self.stage.parallel.zero == 3 else self.module

    def pieces(self) -> list[Piece]:
        """Whole fp32 tensors (ZeRO-0), or what this rank's partition holds of the fp32 masters and moments."""
        found: list[Piece] = []
        masters = dict(self._masters())
        for name, p in self.module.named_parameters():
            fragment = None if p.is_meta else self._fragment(p, masters)
            if fragment is None:
                continue
            flat, offset, start, count = fragment
            state = self._state(flat)
            tensors: dict[Slot, Any] = {"weight": flat, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            for slot, value in tensors.items():
                data = value.detach().view(-1).narrow(0, offset, count)
                shape = tuple(getattr(p, "ds_shape", p.shape))
                piece = Piece(name=name, slot=slot, shape=shape, data=data, start=start, cut=getattr(p, "cut", None))
                found.append(piece)
            found.append(Piece(name=name, slot="step", shape=(1,), data=state["step"].view(1)))
        return found

    def filled(self) -> None:
        """Copy the fp32 weights to where the forward pass reads them, on every rank."""
        optimizer = self.engine.optimizer
        if self.stage.parallel.zero == 3:
            optimizer.checkpoint_event_prologue()  # no weight is gathered now
            for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
                optimizer.fp16_partitioned_groups_flat[i].data.copy_(flat.data)
                optimizer._unflatten_partitioned_parameters(i)
            optimizer.checkpoint_event_epilogue()  # the small ones stay gathered
        elif hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
        else:
            for p, master in self._masters():
                p.data.copy_(master.data)

    def _fragment(self, p: Any, masters: dict[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, int, int, int] | None:
        """Where this rank keeps ``p`` in fp32: flat tensor, offset in it, first element of ``p``, and how many.

        None where it holds nothing of it. These are internals of DeepSpeed 0.19.8, which pyproject.toml pins.
        """
        optimizer = self.engine.optimizer
        if hasattr(p, "ds_id"):  # ZeRO-3: an equal part of every parameter, the last of them padded
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
            start = optimizer._get_param_partition_rank(p) * size
            count = min(size, p.ds_numel - start)
            return (optimizer.fp32_partitioned_groups_flat[group], offset, start, count) if count > 0 else None
        if not hasattr(p, "_hp_mapping"):
            return masters.get(p, p), 0, 0, p.numel()
        at = p._hp_mapping  # an equal part of all parameters on end
        if at is None:
            return None
        flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
        there, here = at.hp_fragment_address, at.lp_fragment_address
        return flats[at.param_group_index], there.start, here.start, there.numel

    def _masters(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each bf16 weight with its fp32 one, where both are whole (ZeRO-0)."""
        optimizer = self.engine.optimizer
        if not hasattr(optimizer, "fp32_groups"):
            return
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            yield from zip(low, high, strict=True)

    def _state(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """AdamW's state of a tensor it steps; made here where there was no step yet, as torch would."""
        import torch

        state: dict[str, torch.Tensor] = self.engine.basic_optimizer.state[flat]
        if not state:
            on = flat.device if self.engine.basic_optimizer.defaults["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=on)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
        return state


def topology(place: Place) -> Any:
    """DeepSpeed's own name for our order of ranks (jobs/runtime/mesh.py)."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    return PipeModelDataParallelTopology(num_pp=place.pipeline_size, num_mp=place.tensor_size, num_dp=place.data_size)


def _import(ranks: Ranks) -> Any:
    """Import DeepSpeed as the machine needs it, and hand it the process group that runs already."""
    import torch

    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _absent("mlflow"):  # its autotuner, which nobody calls, would cost every rank a second and 150 MB for it
        import deepspeed

    if not torch.cuda.is_available():
        # The shared-memory all-reduce of the CPU accelerator crashes without AVX-512; an empty table of
        # compatible ops leaves it out. An internal of 0.19.8, which pyproject.toml pins.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


@contextmanager
def _absent(package: str) -> Iterator[None]:
    """Let an import of ``package`` fail meanwhile, as if it were not installed, unless it is there already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid upon ``under``, section by section."""
    merged = dict(under)
    for key, value in over.items():
        below = under.get(key)
        merged[key] = _merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged
