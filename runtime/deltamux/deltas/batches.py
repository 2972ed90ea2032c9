"""Which batch does an op's work on a device: the CPU kernels', Triton's, or the op's own in torch.

It stands above ops and kernels, so that neither has to know what there is beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltamux.deltas.kernels import triton
from deltamux.deltas.kernels.tables import available
from deltamux.deltas.ops.base import Op
from deltamux.deltas.ops.batched import KernelBatch, ModuleBatch, OpBatch, Part, PerPart


def module_batch(
    op: type[Op], parts: Sequence[Part], num_slots: int, dtype: torch.dtype, device: torch.device | str
) -> ModuleBatch:
    """Returns the fastest batch of an op that can run here."""
    if op.has_kernel and available(dtype, device):
        table = op.table(parts[0].site, [part.columns for part in parts], num_slots, dtype)
        return KernelBatch(parts, table)
    batch = batch_class(op.batch, device)
    return PerPart(parts, lambda site: batch(site, num_slots, dtype, device))


def batch_class(kind: type[OpBatch], device: torch.device | str) -> type[OpBatch]:
    """Returns the class that does a batch's work on a device: `kind` itself, or its subclass that launches kernels."""
    if not triton.available(device):
        return kind
    from deltamux.deltas.kernels.triton.batches import KERNEL_BATCHES  # imports Triton

    return KERNEL_BATCHES.get(kind, kind)
