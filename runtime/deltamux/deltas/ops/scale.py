"""Scale: y *= l at a linear; ScaleInput: x *= l before it (IA3, Liu et al. 2022, https://arxiv.org/abs/2205.05638)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltamux.deltas.ops.base import Op, ReadTensor
from deltamux.deltas.ops.batch import OpBatch, SlotOps
from deltamux.deltas.ops.step import StepIndex, bits
from deltamux.deltas.sites import LinearSite, Site, SiteKind


class ScaleBatch(SlotOps["Scale | ScaleInput"]):
    """One vector per slot, multiplied into the slot's own rows: of the output, or of the input's copy."""

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        for slot in bits(active):
            rows = step.rows(slot)
            if isinstance(rows, slice):
                y[rows] *= self._ops[slot].factor
            else:
                y.index_copy_(0, rows, y[rows] * self._ops[slot].factor)


@dataclass(frozen=True, eq=False)
class Scale(Op):
    """y *= factor, the bias included; `factor` is [out_features] and the identity at one."""

    factor: Tensor

    name: ClassVar[str] = "scale"
    site_kind: ClassVar[SiteKind] = SiteKind.LINEAR
    batch: ClassVar[type[OpBatch]] = ScaleBatch
    output_rows: ClassVar[frozenset[str] | None] = frozenset({"factor"})

    def expected_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert isinstance(site, LinearSite)
        return {"factor": (site.out_features,)}

    def apply(self, x: Tensor, y: Tensor, site: Site, *, training: bool = False) -> Tensor:
        return y * self.factor.to(y.dtype)

    def merge(self, site: Site, read: ReadTensor) -> dict[str, Tensor]:
        assert isinstance(site, LinearSite)
        weight, factor = read(f"{site.name}.weight").float(), self.factor.float()
        merged = {f"{site.name}.weight": weight * (factor if site.transposed else factor.unsqueeze(1))}
        if site.has_bias:
            merged[f"{site.name}.bias"] = read(f"{site.name}.bias").float() * factor
        return merged


@dataclass(frozen=True, eq=False)
class ScaleInput(Op):
    """x *= factor before the projection; `factor` is [in_features]."""

    factor: Tensor

    name: ClassVar[str] = "scale_input"
    site_kind: ClassVar[SiteKind] = SiteKind.LINEAR
    batch: ClassVar[type[OpBatch]] = ScaleBatch
    output_rows: ClassVar[frozenset[str] | None] = frozenset()
    changes_input: ClassVar[bool] = True

    def expected_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert isinstance(site, LinearSite)
        return {"factor": (site.in_features,)}

    def apply(self, x: Tensor, y: Tensor, site: Site, *, training: bool = False) -> Tensor:
        return y

    def apply_input(self, x: Tensor, site: Site) -> Tensor:
        return x * self.factor.to(x.dtype)

    def merge(self, site: Site, read: ReadTensor) -> dict[str, Tensor]:
        assert isinstance(site, LinearSite)
        name, factor = f"{site.name}.weight", self.factor.float()
        return {name: read(name).float() * (factor.unsqueeze(1) if site.transposed else factor)}
