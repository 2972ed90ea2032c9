"""The choice of an op's batch at a module: that of the CPU kernels, or the op's own in torch.

Triton's kernels read static buffers, which the engine keeps by module (`engine.vllm.cuda`).
"""

from collections.abc import Sequence

import torch

from deltamux.deltas.backends.cpu import ops as cpu_ops
from deltamux.deltas.backends.cpu.experts import CPULowRankExperts
from deltamux.deltas.backends.cpu.slot_params import available
from deltamux.deltas.backends.module_batch import ModuleBatch, PackedSlice, PerSliceBatch
from deltamux.deltas.ops import LowRankExperts
from deltamux.deltas.ops.base import Op


def module_batch(
    op: type[Op], slices: Sequence[PackedSlice], num_slots: int, dtype: torch.dtype, device: torch.device | str
) -> ModuleBatch:
    """Returns the fastest batch of an op that runs here."""
    has_kernels = available(dtype, device)
    on_cpu = cpu_ops.module_batch(op, slices, num_slots, dtype) if has_kernels else None
    if on_cpu is not None:
        return on_cpu
    batch = CPULowRankExperts if has_kernels and op is LowRankExperts else op.batch
    return PerSliceBatch(slices, lambda site: batch(site, num_slots, dtype, device))
