"""KVPrefix: trained keys and values before a layer's own (prefix tuning, Li & Liang 2021, arXiv:2101.00190)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltamux.deltas.ops.base import Op, ReadTensor
from deltamux.deltas.ops.batch import OpBatch, SlotOps
from deltamux.deltas.ops.step import StepIndex, bits
from deltamux.deltas.sites import AttentionSite, Site, SiteKind
from deltamux.errors import NotMergeableError


class KVPrefixBatch(SlotOps["KVPrefix"]):
    """Keys and values of virtual tokens are replaced right before they enter the cache.

    Here `x` is the step's keys and `y` its values, both [rows, num_kv_heads * head_dim], and both change in place.
    """

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        if step.virtual is None or not active & step.virtual.mask:
            return
        for slot in bits(active & step.virtual.mask):
            rows, positions = step.virtual_rows(slot)
            prefix = self._ops[slot]
            x[rows] = prefix.key.flatten(1)[positions]
            y[rows] = prefix.value.flatten(1)[positions]


@dataclass(frozen=True, eq=False)
class KVPrefix(Op):
    """n keys and values that every token of a request attends to, at positions 0 to n-1.

    Keys are stored as the cache holds them: after the rotary embedding (as PEFT stores them).

    Attributes:
        key: [n, num_kv_heads, head_dim].
        value: [n, num_kv_heads, head_dim].
    """

    key: Tensor
    value: Tensor

    name: ClassVar[str] = "kv_prefix"
    site_kind: ClassVar[SiteKind] = SiteKind.ATTENTION
    batch: ClassVar[type[OpBatch]] = KVPrefixBatch

    def virtual_tokens(self) -> int:
        return self.key.shape[0]

    def expected_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert isinstance(site, AttentionSite)
        shape = (self.key.shape[0] if self.key.dim() else 0, site.num_kv_heads, site.head_dim)
        return {"key": shape, "value": shape}

    def merge(self, site: Site, read: ReadTensor) -> dict[str, Tensor]:
        raise NotMergeableError(
            f"the prefix at {site.name} is keys and values before the prompt's, not a change of any weight; serve it "
            "as an adapter instead",
            metadata={"site": site.name, "op": self.name},
        )
