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
            add_rows(y, rows, self._ops[slot].change(x[rows], self.site))


@dataclass(frozen=True, eq=False)
class DenseEmbedding(Op):
    """y += scale * weight[token], with the site's scale.

    Attributes:
        weight: [vocab_size, features], the change, not the new value.
    """

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
        return y + self.change(x, site).to(y.dtype)

    def change(self, ids: Tensor, site: Site) -> Tensor:
        """Returns what is added to the embeddings of `ids`."""
        assert isinstance(site, EmbeddingSite)
        change = F.embedding(ids, self.weight)
        return change if site.scale == 1.0 else change * site.scale

    def merge(self, site: Site, read: ReadTensor) -> dict[str, Tensor]:
        name = f"{site.name}.weight"
        return {name: read(name).float() + self.weight.float()}
