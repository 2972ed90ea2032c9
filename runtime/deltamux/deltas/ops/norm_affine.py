"""NormAffine: a layer norm's weight and bias change (adapter tuning trains them; LN tuning, arXiv:2312.11420)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltamux.deltas.ops.base import Op, ReadTensor
from deltamux.deltas.ops.batch import OpBatch, SlotOps
from deltamux.deltas.ops.step import StepIndex, add_rows, bits
from deltamux.deltas.sites import NormForm, NormSite, Site, SiteKind
from deltamux.errors import NotMergeableError


def normalise(x: Tensor, site: NormSite) -> Tensor:
    """Returns x scaled to unit variance over its last dimension (and centred, for a layer norm), in float32."""
    x = x.float()
    if site.form is NormForm.LAYER:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + site.eps)


class NormAffineBatch(SlotOps["NormAffine"]):
    """The base's norm runs for all rows; a slot's own rows then get what its change of weight and bias adds."""

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        for slot in bits(active):
            rows = step.rows(slot)
            add_rows(y, rows, self._ops[slot].change(x[rows], self.site).to(y.dtype))


@dataclass(frozen=True, eq=False)
class NormAffine(Op):
    """y += normalise(x) * weight + bias.

    Being a change, it needs no copy of the base's weight, is the identity at zero, and adds up with others.

    Attributes:
        weight: [features], added to the norm's weight; None leaves the weight alone.
        bias: [features], added to the norm's bias (taken as zero where the base has none); None leaves it alone.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None

    name: ClassVar[str] = "norm_affine"
    site_kind: ClassVar[SiteKind] = SiteKind.NORM
    batch: ClassVar[type[OpBatch]] = NormAffineBatch

    def weighted(self, weight: float) -> Op:
        return NormAffine(**{name: tensor * weight for name, tensor in self.tensors().items()})

    def expected_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert isinstance(site, NormSite)
        return {"weight": (site.features,), "bias": (site.features,)}

    def change(self, x: Tensor, site: Site) -> Tensor:
        """Returns what is added to the norm's output for input `x`, in float32."""
        assert isinstance(site, NormSite)
        change = torch.zeros((), device=x.device)
        if self.weight is not None:
            change = change + normalise(x, site) * self.weight
        if self.bias is not None:
            change = change + self.bias
        return change.expand(x.shape)

    def apply(self, x: Tensor, y: Tensor, site: Site, *, training: bool = False) -> Tensor:
        return y + self.change(x, site).to(y.dtype)

    def merge(self, site: Site, read: ReadTensor) -> dict[str, Tensor]:
        merged: dict[str, Tensor] = {}
        for field, change in self.tensors().items():
            name = f"{site.name}.{field}"
            try:
                merged[name] = read(name).float() + change.float()
            except KeyError:
                raise NotMergeableError(
                    f"{site.name} of the base model has no {field} that could hold the adapter's",
                    metadata={"site": site.name},
                ) from None
        return merged
