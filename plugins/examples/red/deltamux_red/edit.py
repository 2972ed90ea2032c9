"""Edit: y = factor * y + bias at a sub-layer (RED, Wu et al. 2024, https://arxiv.org/abs/2402.15179)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltamux.deltas import BlockSite, Op, Site, SiteKind
from deltamux.deltas.ops import OpBatch, StepIndex


class EditBatch(OpBatch):
    """One pair of vectors per slot, applied to the slot's own rows."""

    def __init__(self, site: Site, num_slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(site, num_slots, dtype, device)
        self._ops: dict[int, Edit] = {}

    def _set(self, slot: int, op: Op) -> None:
        assert isinstance(op, Edit)
        self._ops[slot] = op

    def _reset(self, slot: int) -> None:
        del self._ops[slot]

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        for slot, op in self._ops.items():
            if active & (1 << slot):
                rows = step.rows(slot)
                y[rows] = torch.addcmul(op.bias, y[rows], op.factor)


@dataclass(frozen=True, eq=False)
class Edit(Op):
    """y = factor * y + bias; the identity at factor one and bias zero.

    Attributes:
        factor: [features].
        bias: [features].
    """

    factor: Tensor
    bias: Tensor

    name: ClassVar[str] = "edit"
    site_kind: ClassVar[SiteKind] = SiteKind.BLOCK
    batch: ClassVar[type[OpBatch]] = EditBatch

    def expected_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert isinstance(site, BlockSite)
        return {"factor": (site.features,), "bias": (site.features,)}

    def apply(self, x: Tensor, y: Tensor, site: Site, *, training: bool = False) -> Tensor:
        return y * self.factor.to(y.dtype) + self.bias.to(y.dtype)
