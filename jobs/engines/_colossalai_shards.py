"""Where ColossalAI's plugins keep the fp32 weights and AdamW's moments of each parameter, and how to bring them back.

Its own checkpoints leave the fp32 weights of ZeRO with bf16 out, and with them a resumed run is another run; so what
a rank holds is handed out here, tensor by tensor, as views that may be written to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn

from jobs.nn.cut import Cut
from jobs.runtime.pieces import Piece


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What this rank holds of one parameter: a range of the flattened tensor of its tensor rank."""

    name: str
    shape: tuple[int, ...]  # of this tensor rank's tensor
    master: Tensor  # fp32 weights; may end in padding
    state: dict[str, Tensor]  # of AdamW: exp_avg and exp_avg_sq, as master, and step
    start: int = 0
    cut: Cut | None = None

    def pieces(self) -> Iterator[Piece]:
        """The same, as a checkpoint has it; nothing where there is padding alone."""
        size = min(self.master.numel(), torch.Size(self.shape).numel() - self.start)
        if size <= 0:
            return
        for slot in ("weight", "exp_avg", "exp_avg_sq"):
            data = (self.master if slot == "weight" else self.state[slot]).detach().view(-1)[:size]
            yield Piece(name=self.name, slot=slot, shape=self.shape, data=data, start=self.start, cut=self.cut)
        yield Piece(name=self.name, slot="step", shape=(1,), data=self.state["step"].view(1))


@dataclass(kw_only=True)
class Whole:
    """DDP, and HybridParallel without ZeRO: every data rank holds all that its tensor and pipeline rank does."""

    module: nn.Module
    optimizer: Any
    split: bool = False  # over the data ranks

    def __iter__(self) -> Iterator[Shard]:
        masters = getattr(self.optimizer, "working_to_master_map", {})  # with bf16
        for name, p in self.module.named_parameters():
            master = masters.get(p, p)
            state = _state(self.optimizer, master)
            yield Shard(name=name, shape=tuple(p.shape), master=master, state=state, cut=getattr(p, "cut", None))

    def spread(self) -> None:
        """Round the fp32 weights to the ones that compute."""
        for p, master in getattr(self.optimizer, "working_to_master_map", {}).items():
            p.detach().copy_(master)


@dataclass(kw_only=True)
class Zero:
    """LowLevelZero: each data rank holds a slice of every flattened parameter, padded to equal length."""

    module: nn.Module
    optimizer: Any
    split: bool = True

    def __iter__(self) -> Iterator[Shard]:
        for name, p in self.module.named_parameters():
            master = self.optimizer.working_to_master_param[id(p)]
            start = td.get_rank(self.optimizer.param_to_pg[p]) * master.numel()
            state = _state(self.optimizer, master)
            cut = getattr(p, "cut", None)
            yield Shard(name=name, shape=tuple(p.shape), master=master, state=state, start=start, cut=cut)

    def spread(self) -> None:
        """Gather the weights that compute from the fp32 slices, as a step does."""
        for p in self.module.parameters():
            whole = self.optimizer._working_param_to_padded_working_param[p]
            own = self.optimizer.working_to_master_param[id(p)].to(p.dtype)
            td.all_gather_into_tensor(whole, own, group=self.optimizer.param_to_pg[p])


@dataclass(kw_only=True)
class Gemini:
    """Gemini: parameters fill chunks one after the other, and each data rank holds a slice of every chunk."""

    model: Any  # GeminiDDP
    optimizer: Any
    split: bool = True
    steps: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # HybridAdam counts in Python

    def __iter__(self) -> Iterator[Shard]:
        o = self.optimizer
        for i, fake in o.id_to_fake_params.items():  # a parameter of which this rank has something
            p, (low, high) = o.id_to_real_params[i], o.param_to_range[fake]
            master = o.param_to_chunk16[fake].paired_chunk.payload[low:high]
            state = o.optim.state[fake]
            if not state:
                state |= {"step": 0, "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
            self.steps[fake] = torch.tensor(float(state["step"]))
            yield Shard(
                name=self.model.param2name[p],
                shape=tuple(p.shape),
                master=master,
                state={**state, "step": self.steps[fake]},
                start=int(o.get_offsets(i)[1]),  # of numpy, from the search for a chunk size
            )

    def spread(self) -> None:
        """Round the fp32 chunks to those that compute, and hand the counts back."""
        for fake, step in self.steps.items():
            self.optimizer.optim.state[fake]["step"] = int(step)
        for chunk in self.optimizer.chunk16_set:
            chunk.optim_update()


def _state(optimizer: Any, master: Tensor) -> dict[str, Tensor]:
    """AdamW's state of ``master``, which torch would make at the first step: a load fills it."""
    state: dict[str, Tensor] = optimizer.optim.state[master]
    if not state:
        state["step"] = torch.zeros((), device=master.device)
        state |= {"exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
    return state
