"""Experts on a CPU (`experts.cpp`): products with their packed weights, and the batch of `LowRankExperts`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltamux.deltas.backends.cpu import library
from deltamux.deltas.ops import StepIndex
from deltamux.deltas.ops.low_rank_experts import ExpertRows, LowRankExpertsBatch

BLOCK = 16
"""Outputs of a block of packed weights."""


def expert_products(x: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """Returns what each expert makes of its rows, [n, out] in the dtype of `x`; needs the kernels (`available`).

    Args:
        x: rows [n, in], sorted by expert.
        weights: [experts, out, in], each expert's in blocks [out / 16, in, 16].
        starts: [experts + 1] int64, where each expert's rows begin.
    """
    kernels = library.load()
    assert kernels is not None
    experts, out, width = weights.shape
    assert x.shape[1] == width
    assert x.dtype == weights.dtype
    assert weights.is_contiguous()
    x, y = x.contiguous(), x.new_empty(len(x), out)
    bfloat = int(x.dtype == torch.bfloat16)
    kernels.deltamux_expert_products(
        x.data_ptr(), width, weights.data_ptr(), out, starts.data_ptr(), experts, y.data_ptr(), bfloat
    )
    return y


class CPULowRankExperts(LowRankExpertsBatch):
    """Every row with the factors of its own expert and slot, in one call."""

    def _set(self, slot: int, op: Any) -> None:
        super()._set(slot, op.to(self.dtype))  # contiguous, as its factors are read by their addresses

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        assert isinstance(step, ExpertRows)
        kernels = library.load()
        assert kernels is not None
        slots = [slot for slot, _, _ in step.row_ranges if active >> slot & 1]
        width, out = x.shape[1], y.shape[1]
        rows = torch.cat([torch.arange(own.start, own.stop) for own in map(step.own, slots)])
        all_rows = len(rows) == len(y) and y.is_contiguous()
        own_x, own_y = (x.contiguous(), y) if all_rows else (x[rows], y[rows])
        factors = self._factors(slots, step, width, out)
        bfloat = int(y.dtype == torch.bfloat16)
        kernels.deltamux_expert_low_rank(
            own_x.data_ptr(), width, own_y.data_ptr(), out, len(rows), factors.data_ptr(), bfloat
        )
        if not all_rows:
            y[rows] = own_y

    def _factors(self, slots: list[int], step: ExpertRows, width: int, out: int) -> Tensor:
        """Returns [rows, 4] int64, a ``LowRankRow`` of experts.cpp for each row of the slots."""
        size = self.dtype.itemsize
        made = []
        for slot in slots:
            op, experts = self._ops[slot], step.experts[step.own(slot)]
            rank = op.rank()
            own = torch.empty(len(experts), 4, dtype=torch.int64)
            own[:, 0] = experts * (rank * width * size) + op.a.data_ptr()
            own[:, 1] = experts * (rank * out * size) + op.b.data_ptr()
            own[:, 2] = rank
            own[:, 3:].view(torch.float64)[:] = op.scale
            made.append(own)
        return torch.cat(made)
