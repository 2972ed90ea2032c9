"""DenseHead: a full change of the output head's weight (full fine-tuning)."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from deltamux.deltas.ops.base import Op, ReadTensor
from deltamux.deltas.ops.batch import OpBatch
from deltamux.deltas.ops.dense import DenseBatch
from deltamux.deltas.sites import HeadSite, Site, SiteKind


@dataclass(frozen=True, eq=False)
class DenseHead(Op):
    """logits += weight x; `weight` [vocab_size, in_features] is the change, not the new value.

    Where the base ties its head to the embedding, merging needs the same change of the embedding: see `merge_program`.
    """

    weight: Tensor

    name: ClassVar[str] = "dense_head"
    site_kind: ClassVar[SiteKind] = SiteKind.HEAD
    batch: ClassVar[type[OpBatch]] = DenseBatch

    def weighted(self, weight: float) -> Op:
        return DenseHead(self.weight * weight)

    def expected_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert isinstance(site, HeadSite)
        return {"weight": (site.vocab_size, site.in_features)}

    def apply(self, x: Tensor, y: Tensor, site: Site, *, training: bool = False) -> Tensor:
        return y + F.linear(x.to(self.weight.dtype), self.weight).to(y.dtype)

    def merge(self, site: Site, read: ReadTensor) -> dict[str, Tensor]:
        name = f"{site.name}.weight"
        return {name: read(name).float() + self.weight.float()}
