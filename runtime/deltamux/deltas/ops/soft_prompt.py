"""SoftPrompt: trained embeddings before the prompt (prompt tuning, Lester et al. 2021, arXiv:2104.08691)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltamux.deltas.ops.base import Op, ReadTensor
from deltamux.deltas.ops.batch import OpBatch, SlotOps
from deltamux.deltas.ops.step import StepIndex, bits
from deltamux.deltas.sites import EmbeddingSite, Site, SiteKind
from deltamux.errors import BaseMismatchError, NotMergeableError


class SoftPromptBatch(SlotOps["SoftPrompt"]):
    """Embeddings of virtual tokens are replaced; `y` is the embedding's output, and changes in place."""

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        if step.virtual is None:
            return
        for slot in bits(active & step.virtual.mask):
            rows, positions = step.virtual_rows(slot)
            y[rows] = self._ops[slot].embedding[positions]


@dataclass(frozen=True, eq=False)
class SoftPrompt(Op):
    """n embeddings, at positions 0 to n-1; `embedding` is [n, hidden_size]."""

    embedding: Tensor

    name: ClassVar[str] = "soft_prompt"
    site_kind: ClassVar[SiteKind] = SiteKind.EMBEDDING
    batch: ClassVar[type[OpBatch]] = SoftPromptBatch

    def virtual_tokens(self) -> int:
        return self.embedding.shape[0]

    def expected_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert isinstance(site, EmbeddingSite)
        return {"embedding": (self.embedding.shape[0] if self.embedding.dim() else 0, site.features)}

    def check(self, site: Site) -> None:
        super().check(site)
        assert isinstance(site, EmbeddingSite)
        if not site.takes_embeddings:
            raise BaseMismatchError(
                "soft prompts are not served on this base: of token ids, as engines give them, it makes something else "
                f"before its first layer than of the embeddings of {site.name}, which PEFT gives it with a soft prompt",
                metadata={"site": site.name, "op": self.name},
            )

    def apply(self, x: Tensor, y: Tensor, site: Site, *, training: bool = False) -> Tensor:
        """Returns `y`: the caller's own tokens keep their embeddings; the executor puts the soft prompt before them."""
        return y

    def merge(self, site: Site, read: ReadTensor) -> dict[str, Tensor]:
        raise NotMergeableError(
            "a soft prompt is embeddings before the prompt, not a change of any weight; serve it as an adapter instead",
            metadata={"site": site.name, "op": self.name},
        )
