"""LowRank and Bottleneck with a gate that is computed per token (UniPELT, Mao et al. 2022, arXiv:2110.07577).

    y += sigmoid(g . z + c) * change(z)

The paper averages its gate over the whole sequence, which a decoder cannot: the average would depend on tokens to come.
Here every token's gate depends on that token alone, so that a prompt's cache stays valid while the answer grows.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamux.deltas.ops.base import ReadTensor
from deltamux.deltas.ops.batch import OpBatch, SlotOps
from deltamux.deltas.ops.bottleneck import Bottleneck
from deltamux.deltas.ops.low_rank import LowRank
from deltamux.deltas.ops.step import StepIndex, add_rows, bits
from deltamux.deltas.sites import BlockSite, LinearSite, Site
from deltamux.errors import NotMergeableError


def gate(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns the gate's factor per token, [..., 1] in z's dtype."""
    opening: Tensor = torch.sigmoid(F.linear(z.to(weight.dtype), weight.unsqueeze(0), bias))
    return opening.to(z.dtype)


class GatedBatch(SlotOps["GatedLowRank | GatedBottleneck"]):
    """Each slot's own rows, gate and change alike."""

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        for slot in bits(active):
            rows, op = step.rows(slot), self._ops[slot]
            z = op.reads(x[rows], y[rows]) if isinstance(op, GatedBottleneck) else x[rows]
            add_rows(y, rows, op.change(z).to(y.dtype))


@dataclass(frozen=True, eq=False)
class GatedLowRank(LowRank):
    """y += sigmoid(gate_weight . x + gate_bias) * scale * B (A x).

    Attributes:
        gate_weight: [in_features].
        gate_bias: [1].
    """

    gate_weight: Tensor = field(kw_only=True)
    gate_bias: Tensor = field(kw_only=True)

    name: ClassVar[str] = "gated_low_rank"
    batch: ClassVar[type[OpBatch]] = GatedBatch
    output_rows: ClassVar[frozenset[str] | None] = frozenset({"b"})

    def expected_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert isinstance(site, LinearSite)
        return {**super().expected_shapes(site), "gate_weight": (site.in_features,), "gate_bias": (1,)}

    def change(self, x: Tensor) -> Tensor:
        return gate(x, self.gate_weight, self.gate_bias) * super().change(x)

    def merge(self, site: Site, read: ReadTensor) -> dict[str, Tensor]:
        raise NotMergeableError(
            f"the low-rank change at {site.name} has a gate that depends on the token, which no weight of "
            "the base can express; serve it as an adapter instead",
            metadata={"site": site.name, "op": self.name},
        )


@dataclass(frozen=True, eq=False)
class GatedBottleneck(Bottleneck):
    """y += sigmoid(gate_weight . z + gate_bias) * bottleneck(z), z as the bottleneck's.

    Attributes:
        gate_weight: [features].
        gate_bias: [1].
    """

    gate_weight: Tensor = field(kw_only=True)
    gate_bias: Tensor = field(kw_only=True)

    name: ClassVar[str] = "gated_bottleneck"
    batch: ClassVar[type[OpBatch]] = GatedBatch

    def expected_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert isinstance(site, BlockSite)
        return {**super().expected_shapes(site), "gate_weight": (site.features,), "gate_bias": (1,)}

    def change(self, z: Tensor) -> Tensor:
        return gate(z, self.gate_weight, self.gate_bias) * super().change(z)
