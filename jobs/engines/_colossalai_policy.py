"""How shardformer cuts our model: a Policy for jobs/nn/gpt.py, over tensor ranks and pipeline stages.

The module is whole and on `meta` when the policy gets it; linear layers become ColossalAI's, the token table becomes
our own vocabulary-parallel one, and a stage keeps only the layers it holds. Parameters keep their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as td
from colossalai.shardformer.layer import FusedLinear1D_Col, Linear1D_Row
from colossalai.shardformer.policies.base_policy import (
    ModulePolicyDescription,
    Policy,
    SubModuleReplacementDescription,
)
from torch import Tensor, nn

from jobs.nn import parallel
from jobs.nn.cut import Cut
from jobs.nn.gpt import GPT, Attention, FeedForward, Head, additive, computed_in, places, seen
from jobs.nn.parallel import TensorGroup
from orchestrator.spec import ModelSpec


class GPTPolicy(Policy):
    """The policy of one engine.

    Args:
        dtype, device: where parameters come to lie once each rank holds its share; nothing draws them yet.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.dtype, self.device = dtype, device
        self.tied: list[dict[int, Tensor]] = []

    def config_sanity_check(self) -> None:
        """Nothing: `orch plan` has checked."""

    def preprocess(self) -> nn.Module:
        """The model as it is."""
        return self.model

    def postprocess(self) -> nn.Module:
        """Memory for what this rank holds, and no more."""
        self.model.to(self.dtype).to_empty(device=self.device)
        for tied in self.tied:
            tied.update(dict.fromkeys(tied, self.model.embed.weight))  # memory came with another Parameter
        for layer in self.model.modules():
            if isinstance(layer, FusedLinear1D_Col):
                self._mark(layer, 0, layer.split_sizes, "weight", "bias")
            elif isinstance(layer, Linear1D_Row):
                self._mark(layer, 1, [layer.in_features], "weight")
        parallel.mark_cuts(self.model)
        for p in self.model.parameters():
            if hasattr(p, "cut"):  # its gradient norm takes what has no layout for a copy; fused layers give none
                p.dist_layout = None
        return self.model

    def module_policy(self) -> dict[Any, ModulePolicyDescription]:
        """Which layers are replaced by which, and the forward pass of a stage."""
        kind = type(self.model)
        found: dict[Any, ModulePolicyDescription] = {kind: ModulePolicyDescription()}
        if self.shard_config.enable_tensor_parallelism:
            found |= self._tensor_layers()
        stages = self.pipeline_stage_manager
        if stages is not None:
            held = self._held_blocks()
            if stages.is_interleave:
                stages.stage_indices = held
            found[kind].method_replacement = {"forward": partial(stage_forward, stages=stages, held=held[0])}
        return found

    def _tensor_layers(self) -> dict[Any, ModulePolicyDescription]:
        """Column-parallel into a block's two halves, row-parallel out of them, the vocabulary by rows."""
        spec, group = self.model.spec, self.shard_config.tensor_parallel_process_group
        tensor = TensorGroup(group=group, rank=td.get_rank(group), size=td.get_world_size(group))
        widths = [spec.hidden, spec.kv_hidden, spec.kv_hidden]
        parts = [spec.ffn] * (2 if spec.activation == "swiglu" else 1)
        table = {"spec": spec, "tensor": tensor}
        return {
            Attention: ModulePolicyDescription(
                attribute_replacement={"widths": [width // tensor.size for width in widths], "tensor": tensor},
                sub_module_replacement=[
                    _replace("qkv", FusedLinear1D_Col, split_sizes=widths),
                    _replace("proj", Linear1D_Row),
                ],
            ),
            FeedForward: ModulePolicyDescription(
                sub_module_replacement=[
                    _replace("up", FusedLinear1D_Col, split_sizes=parts),
                    _replace("down", Linear1D_Row),
                ]
            ),
            type(self.model): ModulePolicyDescription(
                sub_module_replacement=[
                    _replace("embed", VocabParallel, **table),
                    _replace("head", VocabParallel, **table),
                ]
            ),
        }

    def get_held_layers(self) -> list[nn.Module]:
        """What this pipeline rank holds; a tied table lies on the first and the last."""
        model, stages = self.model, self.pipeline_stage_manager
        held = [model.blocks[i] for start, stop in self._held_blocks() for i in range(start, stop)]
        if stages.is_first_stage(ignore_chunk=True):
            held += [model.embed, model.positions]
        if stages.is_last_stage(ignore_chunk=True):
            held += [model.norm, model.head or model.embed]
        return [layer for layer in held if layer is not None]

    def get_shared_params(self) -> list[dict[int, Tensor]]:
        """The tied table: ColossalAI sums its gradients over the stages that hold it."""
        stages = self.pipeline_stage_manager
        if stages is not None and self.model.head is None:
            self.tied = [{0: self.model.embed.weight, stages.num_stages - 1: self.model.embed.weight}]
        return self.tied

    def _mark(self, layer: Any, dim: int, parts: Sequence[int], *names: str) -> None:
        """Say how the parameters ``names`` of one of ColossalAI's layers are cut."""
        group = self.shard_config.tensor_parallel_process_group
        cut = Cut(dim=dim, parts=tuple(parts), index=td.get_rank(group), count=td.get_world_size(group))
        layer.cuts = {name: cut for name in names if getattr(layer, name, None) is not None}

    def _held_blocks(self) -> list[tuple[int, int]]:
        """From which block to which, for each chunk of this pipeline rank."""
        stages = self.pipeline_stage_manager
        found = stages.get_stage_index(stages.distribute_layers(len(self.model.blocks)))
        return [(int(start), int(stop)) for start, stop in (found if stages.is_interleave else [found])]


class VocabParallel:
    """Our own table of tokens cut over tensor ranks, in the place of the whole one.

    ColossalAI's pads the vocabulary, and has no cross-entropy per token.
    """

    @staticmethod
    def from_native_module(module: Head, process_group: Any, *, spec: ModelSpec, tensor: TensorGroup) -> nn.Module:
        """The same kind of table, with this rank's rows of it; what shardformer calls."""
        with torch.device("meta"):
            return type(module)(spec, tensor)


def _replace(suffix: str, layer: Any, **kwargs: Any) -> SubModuleReplacementDescription:
    return SubModuleReplacementDescription(suffix=suffix, target_module=layer, kwargs=kwargs, ignore_if_not_exist=True)


def stage_forward(
    self: GPT,
    tokens: Tensor,
    targets: Tensor | None = None,
    segments: Tensor | None = None,
    hidden: Tensor | None = None,
    stage_index: tuple[int, int] | None = None,
    *,
    stages: Any,
    held: tuple[int, int],
    **_: Any,
) -> dict[str, Tensor] | Tensor:
    """GPT.forward from one stage's first layer to its last: hidden states, or what the whole model returns.

    Every stage is given the batch, whose other keys are for the loss, and the ``hidden`` of the stage before.
    """
    mask, places_BT = None, None
    if segments is not None:
        mask, places_BT = seen(segments, segments.shape[1]), places(segments)
    if hidden is None:  # the first stage
        x_BTH = self.embed(tokens)
        if self.positions is not None:
            x_BTH = self.positions(x_BTH, places_BT)
        x_BTH = self.drop(x_BTH)
    else:
        x_BTH = hidden
    if mask is not None:
        mask = additive(mask, computed_in(x_BTH))
    start, stop = stage_index or held
    for block in self.blocks[start:stop]:
        x_BTH = block(x_BTH, mask)
    if not stages.is_last_stage():
        return {"hidden": x_BTH}
    return self.to_vocabulary(x_BTH if self.norm is None else self.norm(x_BTH), targets)
