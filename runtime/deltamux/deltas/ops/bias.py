"""Bias: y += b at a linear, also where the base has no bias (BitFit, Ben Zaken et al. 2021, arXiv:2106.10199)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltamux.deltas.ops.base import Op, ReadTensor
from deltamux.deltas.ops.batch import OpBatch, SlotOps
from deltamux.deltas.ops.step import StepIndex, add_rows, bits
from deltamux.deltas.sites import LinearSite, Site, SiteKind
from deltamux.errors import NotMergeableError


class BiasBatch(SlotOps["Bias"]):
    """One vector per slot, added to the slot's own rows."""

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        for slot in bits(active):
            rows = step.rows(slot)
            vector = self._ops[slot].bias
            add_rows(y, rows, vector if isinstance(rows, slice) else vector.expand(rows.shape[0], -1))


@dataclass(frozen=True, eq=False)
class Bias(Op):
    """y += bias; `bias` [out_features] is the change, not the new value."""

    bias: Tensor

    name: ClassVar[str] = "bias"
    site_kind: ClassVar[SiteKind] = SiteKind.LINEAR
    batch: ClassVar[type[OpBatch]] = BiasBatch
    output_rows: ClassVar[frozenset[str] | None] = frozenset({"bias"})

    def weighted(self, weight: float) -> Op:
        return Bias(self.bias * weight)

    def expected_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert isinstance(site, LinearSite)
        return {"bias": (site.out_features,)}

    def apply(self, x: Tensor, y: Tensor, site: Site, *, training: bool = False) -> Tensor:
        return y + self.bias.to(y.dtype)

    def merge(self, site: Site, read: ReadTensor) -> dict[str, Tensor]:
        name = f"{site.name}.bias"
        try:
            return {name: read(name).float() + self.bias.float()}
        except KeyError:
            raise NotMergeableError(
                f"{site.name} of the base model has no bias that could hold the adapter's", metadata={"site": site.name}
            ) from None
