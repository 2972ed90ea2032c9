"""Dense: y += dW x, a full change of a projection's weight (full and top-layer fine-tuning)."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from deltamux.deltas.ops.base import Op, ReadTensor
from deltamux.deltas.ops.batch import OpBatch, SlotOps
from deltamux.deltas.ops.step import StepIndex, add_rows, bits
from deltamux.deltas.sites import LinearSite, Site, SiteKind


class DenseBatch(SlotOps["Dense"]):
    """Each slot's matrix over the slot's own rows: nothing is shared, so nothing is stacked."""

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        for slot in bits(active):
            rows = step.rows(slot)
            add_rows(y, rows, F.linear(x[rows], self._ops[slot].weight))


@dataclass(frozen=True, eq=False)
class Dense(Op):
    """y += weight x; `weight` [out_features, in_features] is the change, not the new value."""

    weight: Tensor

    name: ClassVar[str] = "dense"
    site_kind: ClassVar[SiteKind] = SiteKind.LINEAR
    batch: ClassVar[type[OpBatch]] = DenseBatch
    output_rows: ClassVar[frozenset[str] | None] = frozenset({"weight"})
    changes_weight: ClassVar[bool] = True

    def weighted(self, weight: float) -> Op:
        return Dense(self.weight * weight)

    def expected_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert isinstance(site, LinearSite)
        return {"weight": (site.out_features, site.in_features)}

    def apply(self, x: Tensor, y: Tensor, site: Site, *, training: bool = False) -> Tensor:
        return y + F.linear(x.to(self.weight.dtype), self.weight).to(y.dtype)

    def merge(self, site: Site, read: ReadTensor) -> dict[str, Tensor]:
        assert isinstance(site, LinearSite)
        name, change = f"{site.name}.weight", self.weight.float()
        return {name: read(name).float() + (change.t() if site.transposed else change)}
