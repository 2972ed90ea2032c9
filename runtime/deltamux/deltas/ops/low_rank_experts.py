"""LowRankExperts: y_e += s * B_e (A_e x) for every expert e of a mixture, as PEFT's LoRA has it with target_parameters.

A row of such a site is a token at one of its experts: a token has as many rows as the router chooses experts for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from deltamux.deltas.ops.base import Op, ReadTensor
from deltamux.deltas.ops.batch import OpBatch, SlotOps
from deltamux.deltas.ops.step import RowRange, StepIndex, bits
from deltamux.deltas.sites import ExpertsSite, Site, SiteKind

SEGMENT_ROWS = 4
"""Mean rows of an adapter per expert from which two GEMMs per expert beat a batch of products over copied factors."""


class ExpertRows(StepIndex):
    """The rows of a step at the experts of a mixture.

    Args:
        row_ranges: rows by slot, at most one range for each.

    Attributes:
        experts: [num_rows] int64, each row's expert; sorted within each range.
    """

    def __init__(self, row_ranges: Sequence[RowRange], num_slots: int, experts: Tensor) -> None:
        super().__init__(row_ranges, len(experts), num_slots, device=experts.device)
        self.experts = experts


class LowRankExpertsBatch(SlotOps["LowRankExperts"]):
    """Each slot's own rows: a batch of products where an expert has few of them (decode), else expert by expert."""

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        assert isinstance(step, ExpertRows)
        for slot in bits(active):
            op, rows = self._ops[slot], step.rows(slot)
            assert isinstance(rows, slice)
            experts = step.experts[rows]
            if len(experts) < SEGMENT_ROWS * op.a.shape[0]:
                y[rows] += op.change(x[rows].unsqueeze(1), experts).squeeze(1).to(y.dtype)
            else:
                for expert, own in segments(experts, rows.start):
                    y[own] += op.change(x[own].unsqueeze(0), slice(expert, expert + 1))[0].to(y.dtype)


def segments(experts: Tensor, first: int = 0) -> Iterator[tuple[int, slice]]:
    """Yields each expert of sorted rows, and its rows, which are counted from `first`."""
    chosen, counts = torch.unique_consecutive(experts, return_counts=True)
    for expert, count in zip(chosen.tolist(), counts.tolist(), strict=True):
        yield expert, slice(first, first + count)
        first += count


@dataclass(frozen=True, eq=False)
class LowRankExperts(Op):
    """y_e += scale * B_e (A_e x), for every expert e.

    Attributes:
        a: [num_experts, r, in_features].
        b: [num_experts, out_features, r].
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0

    name: ClassVar[str] = "low_rank_experts"
    site_kind: ClassVar[SiteKind] = SiteKind.EXPERTS
    batch: ClassVar[type[OpBatch]] = LowRankExpertsBatch

    def rank(self) -> int:
        return self.a.shape[1]

    def weighted(self, weight: float) -> Self:
        return replace(self, scale=self.scale * weight)

    def products(self) -> dict[str, Tensor]:
        return {"scale * b": self.scale * self.b}

    def expected_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert isinstance(site, ExpertsSite)
        rank = self.a.shape[1] if self.a.dim() == 3 else 0
        return {"a": (site.num_experts, rank, site.in_features), "b": (site.num_experts, site.out_features, rank)}

    def apply(self, x: Tensor, y: Tensor, site: Site, *, training: bool = False) -> Tensor:
        """As `Op.apply`, with the rows of each expert apart: `x` and `y` are [num_experts, rows, features]."""
        return y + self.change(x).to(y.dtype)

    def change(self, x: Tensor, experts: Tensor | slice = slice(None)) -> Tensor:
        """Returns what is added to the outputs [n, rows, out_features], in the parameters' dtype.

        Args:
            x: inputs [n, rows, in_features] of n experts.
            experts: which ones; all in their order, where not given.
        """
        a, b = self.a[experts], self.b[experts]
        return self.scale * torch.bmm(torch.bmm(x.to(a.dtype), a.mT), b.mT)

    def merge(self, site: Site, read: ReadTensor) -> dict[str, Tensor]:
        assert isinstance(site, ExpertsSite)
        left, right = self.b.float(), self.a.float()
        if site.transposed:
            left, right = right.mT, left.mT
        return {site.name: torch.baddbmm(read(site.name).float(), left, right, alpha=self.scale)}
