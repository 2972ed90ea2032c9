"""Experts on a CPU (`experts.cpp`): products with their packed weights, and the batch of `LowRankExperts`."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from deltamux.deltas.backends.cpu import library
from deltamux.deltas.backends.cpu.slot_params import PREPACKED
from deltamux.deltas.ops import StepIndex
from deltamux.deltas.ops.low_rank_experts import ExpertRows, LowRankExperts, LowRankExpertsBatch
from deltamux.deltas.sites import Site

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


class SlotFactors(NamedTuple):
    """The op of one slot, as the kernel reads it.

    Attributes:
        a: [num_experts, rank, in]; b: [num_experts, rank, out], the op's own transposed.
    """

    a: Tensor
    b: Tensor
    scale: float

    @classmethod
    def of(cls, op: LowRankExperts) -> Self:
        """Returns an op's, made once."""
        made: Self | None = vars(op).get(PREPACKED)
        if made is None:
            made = vars(op)[PREPACKED] = cls(op.a.contiguous(), op.b.mT.contiguous(), op.scale)
        return made

    def record(self) -> tuple[int, ...]:
        """Returns a ``LowRankRow`` of experts.cpp for the first expert."""
        (scale,) = struct.unpack("q", struct.pack("d", self.scale))
        strides = (each[0].numel() * each.element_size() for each in (self.a, self.b))
        return (self.a.data_ptr(), self.b.data_ptr(), self.a.shape[1], scale, *strides)


class CPULowRankExperts(LowRankExpertsBatch):
    """Every row with the factors of its own expert and slot, in one call."""

    def __init__(self, site: Site, num_slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(site, num_slots, dtype, device)
        self._factors: dict[int, SlotFactors] = {}

    def _set(self, slot: int, op: Any) -> None:
        self._factors[slot] = SlotFactors.of(op.to(self.dtype))

    def _reset(self, slot: int) -> None:
        del self._factors[slot]

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        assert isinstance(step, ExpertRows)
        kernels = library.load()
        assert kernels is not None
        slots = [slot for slot, _, _ in step.row_ranges if active >> slot & 1]
        own = [step.own(slot) for slot in slots]
        counts = torch.tensor([each.stop - each.start for each in own])
        all_rows = int(counts.sum()) == len(y) and y.is_contiguous()
        rows = slice(None) if all_rows else torch.cat([torch.arange(each.start, each.stop) for each in own])
        own_x, own_y = (x.contiguous(), y) if all_rows else (x[rows], y[rows])
        records = torch.tensor([self._factors[slot].record() for slot in slots]).repeat_interleave(counts, dim=0)
        records[:, :2] += step.experts[rows].unsqueeze(1) * records[:, 4:]
        bfloat = int(y.dtype == torch.bfloat16)
        kernels.deltamux_expert_low_rank(
            own_x.data_ptr(), x.shape[1], own_y.data_ptr(), y.shape[1], len(records), records.data_ptr(), bfloat
        )
        if not all_rows:
            y[rows] = own_y
