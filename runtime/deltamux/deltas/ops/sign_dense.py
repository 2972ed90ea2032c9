"""SignDense: a full change kept as one bit per weight and one scale (BitDelta, Liu et al. 2024, arXiv:2402.10193)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamux.deltas.ops.base import Op, ReadTensor
from deltamux.deltas.ops.batch import OpBatch
from deltamux.deltas.ops.dense import Dense, DenseBatch
from deltamux.deltas.sites import LinearSite, Site, SiteKind


def pack_signs(weight: Tensor) -> Tensor:
    """Returns the signs of a matrix [out, in] as bits, [out, ceil(in / 8)] uint8; zero counts as positive."""
    bits = F.pad((weight >= 0).to(torch.uint8), (0, -weight.shape[1] % 8)).view(weight.shape[0], -1, 8)
    return (bits << _shifts(weight.device)).sum(-1, dtype=torch.uint8)


def unpack_signs(signs: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """Returns [out, in_features] of ones and minus ones."""
    bits = (signs.unsqueeze(-1) >> _shifts(signs.device)) & 1
    return (bits.view(signs.shape[0], -1)[:, :in_features].to(dtype) * 2).sub_(1)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


class SignDenseBatch(DenseBatch):
    """A device slot holds the unpacked matrix; files, store and host memory hold a sixteenth of it."""

    def _set(self, slot: int, op: Op) -> None:
        assert isinstance(op, SignDense)
        assert isinstance(self.site, LinearSite)
        self._ops[slot] = Dense(op.weight(self.site.in_features, self.dtype))


@dataclass(frozen=True, eq=False)
class SignDense(Op):
    """y += scale * sign x.

    Attributes:
        signs: [out_features, ceil(in_features / 8)] uint8; see `pack_signs`.
        scale: what every weight changes by, up or down.
    """

    signs: Tensor
    scale: float = 1.0

    name: ClassVar[str] = "sign_dense"
    site_kind: ClassVar[SiteKind] = SiteKind.LINEAR
    batch: ClassVar[type[OpBatch]] = SignDenseBatch
    output_rows: ClassVar[frozenset[str] | None] = frozenset({"signs"})
    changes_weight: ClassVar[bool] = True
    packed: ClassVar[frozenset[str]] = frozenset({"signs"})

    def weighted(self, weight: float) -> Op:
        return SignDense(self.signs, self.scale * weight)

    def expected_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert isinstance(site, LinearSite)
        return {"signs": (site.out_features, -(-site.in_features // 8))}

    def weight(self, in_features: int, dtype: torch.dtype) -> Tensor:
        """Returns the change as a matrix, [out_features, in_features]."""
        return self.scale * unpack_signs(self.signs, in_features, dtype)

    def apply(self, x: Tensor, y: Tensor, site: Site, *, training: bool = False) -> Tensor:
        return y + F.linear(x, self.weight(x.shape[-1], x.dtype)).to(y.dtype)

    def merge(self, site: Site, read: ReadTensor) -> dict[str, Tensor]:
        assert isinstance(site, LinearSite)
        name, change = f"{site.name}.weight", self.weight(site.in_features, torch.float32)
        return {name: read(name).float() + (change.t() if site.transposed else change)}
