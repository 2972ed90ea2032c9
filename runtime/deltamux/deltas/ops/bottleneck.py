"""Bottleneck: the adapter module of adapter tuning.

Sequential, y += s * (W_up f(W_down y + b_down) + b_up): Houlsby et al. 2019, https://arxiv.org/abs/1902.00751.
Parallel, the same of the sub-layer's input x: He et al. 2021, https://arxiv.org/abs/2110.04366.
Reading the residual stream h, as AdapterHub places both: of h + y (sequential) or of h (parallel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamux.deltas.activations import ACTIVATIONS
from deltamux.deltas.ops.base import Op, ReadTensor
from deltamux.deltas.ops.batch import OpBatch
from deltamux.deltas.ops.step import StackedColumns, StepIndex, add_rows, bits
from deltamux.deltas.sites import BlockSite, Site, SiteKind
from deltamux.errors import BaseMismatchError, InvalidAdapterError, NotMergeableError

SEGMENT_ROWS = 12
"""Mean rows per adapter in a step from which one pair of GEMMs per adapter beats the stacked pair."""


class BottleneckBatch(OpBatch):
    """Each slot's module runs over its own rows; decode steps stack the modules of one activation into two GEMMs."""

    def __init__(self, site: Site, num_slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(site, num_slots, dtype, device)
        self._ops: dict[int, Bottleneck] = {}
        self._stacks: list[_Stack] | None = None

    def _set(self, slot: int, op: Op) -> None:
        assert isinstance(op, Bottleneck)
        self._ops[slot] = op
        self._stacks = None

    def _reset(self, slot: int) -> None:
        del self._ops[slot]
        self._stacks = None

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        slots = list(bits(active))
        rows = sum(step.count(slot) for slot in slots)
        if len(slots) == 1 or rows >= SEGMENT_ROWS * len(slots):
            for slot in slots:
                own = step.rows(slot)
                op = self._ops[slot]
                add_rows(y, own, op.change(op.reads(x[own], y[own])))
            return
        before = y.clone() if any(not op.parallel for op in self._ops.values()) else y
        self._stacks = self._stacks or _Stack.all_of(self._ops)
        for stack in self._stacks:
            stack.add(stack.op.reads(x, before), y, step)


@dataclass(frozen=True, eq=False)
class Bottleneck(Op):
    """y += scale * (W_up f(W_down z + b_down) + b_up), z = y (sequential) or the sub-layer's input x (parallel).

    With `residual`, x is the residual stream before the sub-layer's norm, and a sequential z = x + y.

    Attributes:
        down_weight: [width, features].
        down_bias: [width] or None.
        up_weight: [features, width].
        up_bias: [features] or None.
        activation: a key of ACTIVATIONS.
    """

    down_weight: Tensor
    up_weight: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    activation: str = "relu"
    scale: float = 1.0
    parallel: bool = False
    residual: bool = False

    name: ClassVar[str] = "bottleneck"
    site_kind: ClassVar[SiteKind] = SiteKind.BLOCK
    batch: ClassVar[type[OpBatch]] = BottleneckBatch

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            raise InvalidAdapterError(f"unknown activation {self.activation!r}; known: {known}")

    def rank(self) -> int:
        return self.down_weight.shape[0]

    @property
    def reads_residual(self) -> bool:
        return self.residual

    def reads(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns z, of the site's input (or the residual stream) and the sub-layer's output."""
        if self.parallel:
            return x
        return x + y if self.residual else y

    def check(self, site: Site) -> None:
        super().check(site)
        if self.residual and isinstance(site, BlockSite) and site.norm is None:
            raise BaseMismatchError(
                f"the bottleneck at {site.name} reads the residual stream, which this base does not normalise "
                "before each sub-layer: the adapter was made for another base",
                metadata={"site": site.name, "parameter": "residual"},
            )

    def products(self) -> dict[str, Tensor]:
        up = {"scale * up_weight": self.scale * self.up_weight}
        return up if self.up_bias is None else {**up, "scale * up_bias": self.scale * self.up_bias}

    def expected_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        assert isinstance(site, BlockSite)
        width = self.down_weight.shape[0] if self.down_weight.dim() else 0
        return {
            "down_weight": (width, site.features),
            "down_bias": (width,),
            "up_weight": (site.features, width),
            "up_bias": (site.features,),
        }

    def change(self, z: Tensor) -> Tensor:
        """Returns what is added to the sub-layer's output, in z's dtype."""
        hidden = ACTIVATIONS[self.activation](F.linear(z.to(self.down_weight.dtype), self.down_weight, self.down_bias))
        return (self.scale * F.linear(hidden, self.up_weight, self.up_bias)).to(z.dtype)

    def apply(self, x: Tensor, y: Tensor, site: Site, *, training: bool = False) -> Tensor:
        return y + self.change(self.reads(x, y))

    def merge(self, site: Site, read: ReadTensor) -> dict[str, Tensor]:
        raise NotMergeableError(
            f"the bottleneck at {site.name} holds a nonlinearity ({self.activation}) between its two projections, "
            "which no weight of the base can express; serve it as an adapter instead",
            metadata={"site": site.name, "op": self.name},
        )


class _Stack(NamedTuple):
    """The modules of all slots that share activation and input, next to each other, at their own widths."""

    op: Bottleneck  # any of them, for what they share
    down: Tensor  # [sum width, features]
    down_bias: Tensor  # [sum width]
    up: Tensor  # [sum width, features], scaled, and finite: 0 * NaN would be NaN in all rows
    up_bias: Tensor  # [slots + 1, features], scaled; zero for slots outside the stack and for the base
    columns: StackedColumns

    @classmethod
    def all_of(cls, ops: dict[int, Bottleneck]) -> list[_Stack]:
        groups: dict[tuple[str, bool, bool], dict[int, Bottleneck]] = {}
        for slot, op in ops.items():
            groups.setdefault((op.activation, op.parallel, op.residual), {})[slot] = op
        return [cls._of(group) for group in groups.values()]

    @classmethod
    def _of(cls, ops: dict[int, Bottleneck]) -> _Stack:
        op = next(iter(ops.values()))
        first = op.down_weight
        up_bias = first.new_zeros(max(ops) + 2, first.shape[1])
        for slot, op in ops.items():
            if op.up_bias is not None:
                up_bias[slot] = op.up_bias * op.scale
        biases = [op.down_bias if op.down_bias is not None else first.new_zeros(op.rank()) for op in ops.values()]
        return cls(
            op,
            torch.cat([op.down_weight for op in ops.values()]),
            torch.cat(biases),
            torch.cat([op.up_weight.t() * op.scale for op in ops.values()]).nan_to_num_(),
            up_bias,
            StackedColumns.of({slot: op.rank() for slot, op in ops.items()}, first.device),
        )

    def add(self, z: Tensor, y: Tensor, step: StepIndex) -> None:
        """Adds each row's own module to `y` in place; products with other slots' are set to zero."""
        hidden = ACTIVATIONS[self.op.activation](F.linear(z, self.down, self.down_bias))
        y.addmm_(hidden.masked_fill(step.foreign(self.columns), 0), self.up)
        y += self.up_bias[step.slots.clamp(max=self.up_bias.shape[0] - 1)]
