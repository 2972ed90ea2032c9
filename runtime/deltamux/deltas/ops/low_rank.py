"""LowRank: y += s * B (A x), the weight delta of LoRA and its kin (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamux.deltas.ops.base import Op, ReadTensor
from deltamux.deltas.ops.batch import OpBatch
from deltamux.deltas.ops.step import StackedColumns, StepIndex, add_rows, bits
from deltamux.deltas.sites import LinearSite, Site, SiteKind

SEGMENT_ROWS = 12
"""Mean rows per adapter in a step from which one small GEMM per adapter beats one stacked GEMM for all."""


class LowRankBatch(OpBatch):
    """Many adapters' factors at one linear, each at its own rank.

    Few rows per adapter (decode): the factors of all slots are stacked, one GEMM shrinks all rows by all of them, the
    products with other slots' factors are set to zero, a second GEMM expands. Many rows per adapter (prefill), or only
    one adapter: one pair of GEMMs per adapter over its own rows.
    """

    def __init__(self, site: Site, num_slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(site, num_slots, dtype, device)
        self._factors: dict[int, _Factors] = {}
        self._stacked: _Stacked | None = None

    def _set(self, slot: int, op: Op) -> None:
        assert isinstance(op, LowRank)
        self._factors[slot] = _Factors(op.a, (op.b.t() * op.scale).contiguous())
        self._stacked = None

    def _reset(self, slot: int) -> None:
        del self._factors[slot]
        self._stacked = None

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        slots = list(bits(active))
        rows = sum(step.count(slot) for slot in slots)
        if len(slots) == 1 or rows >= SEGMENT_ROWS * len(slots):
            self._apply_segments(x, y, step, slots)
        else:
            self._apply_stacked(x, y, step)

    def _apply_segments(self, x: Tensor, y: Tensor, step: StepIndex, slots: list[int]) -> None:
        for slot in slots:
            a, b = self._factors[slot]
            rows = step.rows(slot)
            if isinstance(rows, slice):
                y[rows].addmm_(F.linear(x[rows], a), b)
            else:
                add_rows(y, rows, F.linear(x[rows], a) @ b)

    def _apply_stacked(self, x: Tensor, y: Tensor, step: StepIndex) -> None:
        stacked = self._stacked = self._stacked or _Stacked.of(self._factors)
        hidden = F.linear(x, stacked.a)
        y.addmm_(hidden.masked_fill_(step.foreign(stacked.columns), 0), stacked.b)


@dataclass(frozen=True, eq=False)
class LowRank(Op):
    """y += scale * B (A x).

    Attributes:
        a: [r, in_features].
        b: [out_features, r].
        dropout: probability that an input feature is zeroed while training.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    dropout: float = 0.0

    name: ClassVar[str] = "low_rank"
    site_kind: ClassVar[SiteKind] = SiteKind.LINEAR
    batch: ClassVar[type[OpBatch]] = LowRankBatch
    output_rows: ClassVar[frozenset[str] | None] = frozenset({"b"})
    changes_weight: ClassVar[bool] = True

    def rank(self) -> int:
        return self.a.shape[0]

    def weighted(self, weight: float) -> Self:
        return replace(self, scale=self.scale * weight)

    @classmethod
    def concatenated(cls, ops: Sequence[LowRank]) -> LowRank:
        """Returns the sum of several changes as one, of all their ranks."""
        if len(ops) == 1:
            return ops[0]
        return LowRank(torch.cat([op.a for op in ops]), torch.cat([op.scale * op.b for op in ops], dim=1))

    def products(self) -> dict[str, Tensor]:
        return {"scale * b": self.scale * self.b}

    def expected_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert isinstance(site, LinearSite)
        rank = self.a.shape[0] if self.a.dim() else 0
        return {"a": (rank, site.in_features), "b": (site.out_features, rank)}

    def apply(self, x: Tensor, y: Tensor, site: Site, *, training: bool = False) -> Tensor:
        x = F.dropout(x, self.dropout, training=training and self.dropout > 0)
        return y + self.change(x).to(y.dtype)

    def change(self, x: Tensor) -> Tensor:
        """Returns what is added to the projection's output, in the parameters' dtype."""
        return self.scale * F.linear(F.linear(x.to(self.a.dtype), self.a), self.b)

    def merge(self, site: Site, read: ReadTensor) -> dict[str, Tensor]:
        assert isinstance(site, LinearSite)
        name = f"{site.name}.weight"
        delta = self.scale * (self.b.float() @ self.a.float())
        return {name: read(name).float() + (delta.t() if site.transposed else delta)}


class _Factors(NamedTuple):
    a: Tensor  # [r, in]
    b: Tensor  # [r, out], already scaled


class _Stacked(NamedTuple):
    """The factors of all slots, stacked, at their own ranks."""

    a: Tensor  # [sum r, in]
    b: Tensor  # [sum r, out], finite: deselected columns are zero, and 0 * NaN would be NaN in all rows
    columns: StackedColumns

    @classmethod
    def of(cls, factors: dict[int, _Factors]) -> _Stacked:
        a = torch.cat([f.a for f in factors.values()])
        b = torch.cat([f.b for f in factors.values()]).nan_to_num_()
        return cls(a, b, StackedColumns.of({slot: f.a.shape[0] for slot, f in factors.items()}, a.device))
