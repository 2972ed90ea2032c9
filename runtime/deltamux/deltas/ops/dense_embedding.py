"""DenseEmbedding: a full change of the input embedding's table (full fine-tuning)."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from deltamux.deltas.ops.base import Op, ReadTensor
from deltamux.deltas.ops.batch import OpBatch, SlotOps
from deltamux.deltas.ops.step import StepIndex, add_rows, bits
from deltamux.deltas.sites import EmbeddingSite, Site, SiteKind


class DenseEmbeddingBatch(SlotOps["DenseEmbedding"]):
    """Each slot's table, looked up for the slot's own rows; here `x` holds token ids [rows] int64."""

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        for slot in bits(active):
            rows = step.rows(slot)
            add_rows(y, rows, F.embedding(x[rows], self._ops[slot].weight))


@dataclass(frozen=True, eq=False)
class DenseEmbedding(Op):
    """y += weight[token]; `weight` [vocab_size, features] is the change, not the new value."""

    weight: Tensor

    name: ClassVar[str] = "dense_embedding"
    site_kind: ClassVar[SiteKind] = SiteKind.EMBEDDING
    batch: ClassVar[type[OpBatch]] = DenseEmbeddingBatch

    def weighted(self, weight: float) -> Op:
        return DenseEmbedding(self.weight * weight)

    def expected_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert isinstance(site, EmbeddingSite)
        return {"weight": (site.vocab_size, site.features)}

    def apply(self, x: Tensor, y: Tensor, site: Site, *, training: bool = False) -> Tensor:
        return y + F.embedding(x, self.weight).to(y.dtype)

    def merge(self, site: Site, read: ReadTensor) -> dict[str, Tensor]:
        name = f"{site.name}.weight"
        return {name: read(name).float() + self.weight.float()}
