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
"""Mean rows of an adapter per expert from which two GEMMs per expert beat products of copied factors."""


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

    def own(self, slot: int) -> slice:
        """Returns the rows of a slot that has any."""
        rows = self.rows(slot)
        assert isinstance(rows, slice)
        return rows


class LowRankExpertsBatch(SlotOps["LowRankExperts"]):
    """Each slot's own rows: expert by expert where an expert has many of them (prefill).

    Where it has few (decode), the factors of all rows are gathered, slot by slot, and multiplied in one batch for all
    slots of a rank.
    """

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        assert isinstance(step, ExpertRows)
        by_rank: dict[int, list[int]] = {}
        for slot in bits(active):
            op = self._ops[slot]
            if step.count(slot) < SEGMENT_ROWS * len(op.a):
                by_rank.setdefault(op.rank(), []).append(slot)
            else:
                for expert, own in segments(step.experts[step.rows(slot)], step.own(slot).start):
                    y[own] += op.change(x[own].unsqueeze(0), slice(expert, expert + 1))[0].to(y.dtype)
        for slots in by_rank.values():
            self._apply_gathered(x, y, step, slots)

    def _apply_gathered(self, x: Tensor, y: Tensor, step: ExpertRows, slots: list[int]) -> None:
        rows, ops = [step.own(slot) for slot in slots], [self._ops[slot] for slot in slots]
        a = torch.cat([op.a[step.experts[own]] for own, op in zip(rows, ops, strict=True)])
        b = torch.cat([op.b[step.experts[own]] for own, op in zip(rows, ops, strict=True)])
        inner = torch.bmm(a, torch.cat([x[own] for own in rows]).unsqueeze(2))
        counts = torch.tensor([own.stop - own.start for own in rows]).to(x.device)
        inner *= inner.new_tensor([op.scale for op in ops]).repeat_interleave(counts)[:, None, None]
        changes = torch.bmm(b, inner).squeeze(2)
        start = 0
        for own in rows:
            count = own.stop - own.start
            y[own] += changes[start : start + count]
            start += count


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
