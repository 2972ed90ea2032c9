"""`OpBatch` classes that launch kernels: they stand in for the torch ones of their ops on a device that has kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamux.deltas.kernels.triton.bottleneck import BottleneckDeltas
from deltamux.deltas.kernels.triton.factors import FactorDeltas
from deltamux.deltas.kernels.triton.linear import LinearDeltas
from deltamux.deltas.kernels.triton.norm import NormDeltas
from deltamux.deltas.kernels.triton.virtual import SoftPromptDeltas, VirtualRowDeltas
from deltamux.deltas.ops.base import Op
from deltamux.deltas.ops.batched import OpBatch, StepIndex
from deltamux.deltas.ops.bias import BiasBatch
from deltamux.deltas.ops.bottleneck import BottleneckBatch
from deltamux.deltas.ops.kv_prefix import KVPrefix, KVPrefixBatch
from deltamux.deltas.ops.low_rank import LowRankBatch
from deltamux.deltas.ops.norm_affine import NormAffineBatch
from deltamux.deltas.ops.scale import Scale, ScaleBatch, ScaleInput
from deltamux.deltas.ops.soft_prompt import SoftPromptBatch
from deltamux.deltas.sites import AttentionSite, BlockSite, EmbeddingSite, LinearSite, NormSite, Site

FIRST_RANK = 16
"""Ranks that a batch has room for at first; it makes room for more when they come."""


class _RankedBatch(OpBatch):
    """Ops with an inner dimension: their buffers are made anew, twice as wide, when a wider op comes."""

    def __init__(self, site: Site, num_slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(site, num_slots, dtype, device)
        self._placed: dict[int, Op] = {}
        self._make(FIRST_RANK)

    def _make(self, max_rank: int) -> None:
        raise NotImplementedError

    def _fits(self, slot: int, op: Op) -> bool:
        raise NotImplementedError

    def _place(self, slot: int, op: Op) -> None:
        self._placed[slot] = op
        if not self._fits(slot, op):
            self._make(1 << (max(placed.rank() for placed in self._placed.values()) - 1).bit_length())
            for other, placed in self._placed.items():
                assert self._fits(other, placed)


class KernelLowRankBatch(_RankedBatch, LowRankBatch):
    """LowRank by shrink and expand."""

    def _make(self, max_rank: int) -> None:
        assert isinstance(self.site, LinearSite)
        self._deltas = LinearDeltas([self.site], self.num_slots, max_rank, self.dtype, self.device)

    def _fits(self, slot: int, op: Op) -> bool:
        return self._deltas.place(slot, 0, op)

    def _clear(self, slot: int) -> None:
        del self._placed[slot]
        self._deltas.clear(slot)

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        self._deltas.apply(x, y, step.table, active)


class KernelBottleneckBatch(_RankedBatch, BottleneckBatch):
    """Bottleneck by shrink and expand. A port hands over as `x` what the op reads: one tensor is both streams here."""

    def _make(self, max_rank: int) -> None:
        assert isinstance(self.site, BlockSite)
        self._deltas = BottleneckDeltas(self.site, self.num_slots, max_rank, self.dtype, self.device)

    def _fits(self, slot: int, op: Op) -> bool:
        return self._deltas.place(slot, op)

    def _clear(self, slot: int) -> None:
        del self._placed[slot]
        self._deltas.clear(slot)

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        self._deltas.apply(x, y, step.table, residual=x)


class KernelBiasBatch(BiasBatch):
    """Bias by expand."""

    def __init__(self, site: Site, num_slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(site, num_slots, dtype, device)
        assert isinstance(site, LinearSite)
        self._deltas = LinearDeltas([site], num_slots, 1, dtype, device)

    def _place(self, slot: int, op: Op) -> None:
        assert self._deltas.place(slot, 0, op)

    def _clear(self, slot: int) -> None:
        self._deltas.clear(slot)

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        self._deltas.apply(x, y, step.table, active)


class KernelScaleBatch(ScaleBatch):
    """Scale and ScaleInput, whose vectors are of the site's output or of its input."""

    _deltas: FactorDeltas | None = None

    def _place(self, slot: int, op: Op) -> None:
        assert isinstance(op, Scale | ScaleInput)
        if self._deltas is None:
            self._deltas = FactorDeltas(op.factor.shape[0], self.num_slots, self.dtype, self.device)
        self._deltas.place(slot, op.factor)

    def _clear(self, slot: int) -> None:
        assert self._deltas is not None
        self._deltas.clear(slot)

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        assert self._deltas is not None
        self._deltas.apply(y, step.table)


class KernelNormAffineBatch(NormAffineBatch):
    """NormAffine by one kernel."""

    def __init__(self, site: Site, num_slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(site, num_slots, dtype, device)
        assert isinstance(site, NormSite)
        self._deltas = NormDeltas(site, num_slots, dtype, device)

    def _place(self, slot: int, op: Op) -> None:
        assert self._deltas.place(slot, op)

    def _clear(self, slot: int) -> None:
        self._deltas.clear(slot)

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        self._deltas.apply(x, y, step.table)


class KernelKVPrefixBatch(KVPrefixBatch):
    """KVPrefix by one gather for keys and values."""

    def __init__(self, site: Site, num_slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(site, num_slots, dtype, device)
        assert isinstance(site, AttentionSite)
        self._deltas = VirtualRowDeltas(site.num_kv_heads * site.head_dim, 2, num_slots, dtype, device)

    def _place(self, slot: int, op: Op) -> None:
        assert isinstance(op, KVPrefix)
        self._deltas.place(slot, op.key.flatten(1), op.value.flatten(1))

    def _clear(self, slot: int) -> None:
        self._deltas.clear(slot)

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        if step.virtual is not None and active & step.virtual.mask:
            self._deltas.apply((x, y), step.table)


class KernelSoftPromptBatch(SoftPromptBatch):
    """SoftPrompt by one gather."""

    def __init__(self, site: Site, num_slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(site, num_slots, dtype, device)
        assert isinstance(site, EmbeddingSite)
        self._deltas = SoftPromptDeltas(site, num_slots, dtype, device)

    def _place(self, slot: int, op: Op) -> None:
        assert self._deltas.place(slot, op)

    def _clear(self, slot: int) -> None:
        self._deltas.clear(slot)

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        if step.virtual is not None and active & step.virtual.mask:
            self._deltas.apply(x, y, step.table)


KERNEL_BATCHES: dict[type[OpBatch], type[OpBatch]] = {
    LowRankBatch: KernelLowRankBatch,
    BottleneckBatch: KernelBottleneckBatch,
    BiasBatch: KernelBiasBatch,
    ScaleBatch: KernelScaleBatch,
    NormAffineBatch: KernelNormAffineBatch,
    KVPrefixBatch: KernelKVPrefixBatch,
    SoftPromptBatch: KernelSoftPromptBatch,
}
"""What stands in for which; the other ops' torch batches run on every device."""
