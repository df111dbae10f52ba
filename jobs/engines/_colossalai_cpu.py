"""ColossalAI 0.5.0 on CPU ranks: what it asks of a GPU, answered by the CPU. Used only where there is no CUDA.

Nothing of ColossalAI is copied or edited on disk; names of its modules are replaced in this process. Each
replacement says what would fail without it. Collectives are gloo's, numbers are computed by ColossalAI's own code.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any


def install() -> None:
    """Make ColossalAI run on this machine's CPU; a second call changes nothing."""
    from colossalai.accelerator import api

    if getattr(api, "_on_cpu_ranks", False):
        return
    api._on_cpu_ranks = True
    api.set_accelerator(_accelerator())
    _torch()
    _gemini()
    _adam()


def _accelerator() -> Any:
    """An accelerator that is the CPU. ColossalAI's own raises for all that has no meaning there."""
    import torch
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator

    class CpuRanks(CpuAccelerator):
        def __init__(self) -> None:
            super().__init__()
            self._name = "cuda"  # ZeRO refuses any other name, and Gemini keeps no shards on one

        def current_device(self) -> Any:
            return torch.device("cpu")

        def synchronize(self, device: Any = None) -> None:
            pass

        def empty_cache(self) -> None:
            pass

        def reset_peak_memory_stats(self, device: Any = None) -> None:
            pass

        def get_rng_state(self, device: Any = None) -> Any:
            return torch.get_rng_state()

        def set_rng_state(self, new_state: Any, device: Any = None) -> None:
            torch.set_rng_state(new_state)

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

        def Stream(self, *args: Any, **kwargs: Any) -> Any:
            return _Stream()

        def current_stream(self, device: Any = None) -> Any:
            return _Stream()

        def stream(self, stream_: Any) -> Any:
            return nullcontext()

    return CpuRanks()


class _Stream:
    """Work on a CPU is done when the call returns: there is nothing to wait for."""

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _torch() -> None:
    """What ColossalAI calls of torch that a CPU build lacks."""
    import torch
    import torch.distributed as td

    # ZeRO tells the allocator which stream uses a gradient bucket.
    setattr(torch.Tensor, "record_stream", lambda self, stream: None)  # noqa: B010
    # The pipelines ask whether the backend is Huawei's; the function exists with torch_npu only.
    if not hasattr(td, "is_hccl_available"):
        setattr(td, "is_hccl_available", lambda: False)  # noqa: B010


def _gemini() -> None:
    """Gemini keeps a chunk's shard on the GPU or, offloaded, on the CPU; here what it calls the GPU is the CPU."""
    import torch
    from colossalai.zero.gemini.chunk.chunk import Chunk

    Chunk.shard_device = property(lambda self: torch.device("cuda"), lambda self, device: None)
    Chunk.shard_move = lambda self, device, force_copy=False, non_blocking=False: None


def _adam() -> None:
    """HybridAdam without its compiled kernel, and with clipping.

    For bf16 gradients of CPU tensors it calls ``torch_adam_update``, which is not told ``div_scale``: gradients
    would silently not be clipped. (The same happens to what Gemini offloads from a GPU.)
    """
    from colossalai.kernel.kernel_loader import CPUAdamLoader
    from colossalai.nn.optimizer import HybridAdam

    class NoKernel:
        """In the place of a kernel that would compile for minutes; bf16 gradients never come to it."""

        name, priority = "none", 0

        def is_available(self) -> bool:
            return True

        def assert_compatible(self) -> None:
            pass

        def load(self) -> Any:
            return self

        def CPUAdamOptimizer(self, *args: Any) -> None:
            return None

    CPUAdamLoader.REGISTRY = [NoKernel]
    step, update = HybridAdam.step, HybridAdam.torch_adam_update

    def clipped_step(self: Any, closure: Any = None, div_scale: float = -1) -> Any:
        self.div_scale = div_scale
        return step(self, closure, div_scale)

    def clipped_update(self: Any, data: Any, grad: Any, *rest: Any) -> None:
        grad = grad.to(data.dtype)
        update(self, data, grad / self.div_scale if self.div_scale > 0 else grad, *rest)

    HybridAdam.step, HybridAdam.torch_adam_update = clipped_step, clipped_update
