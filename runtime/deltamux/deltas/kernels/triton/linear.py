"""LowRank, Scale and Bias of all slots at one linear module, fused over its parts: two launches, whatever the mix.

Any sequence of the three is y -> s * y + B A x + b: a further low rank adds its ranks, a scale multiplies what is
there, a bias adds. So a slot needs one description a part, and a module one shrink and one expand.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import gcd

import torch
from torch import Tensor

from deltamux.deltas.kernels.triton.launches import SHORT, TALL, Matrices, expand, shrink
from deltamux.deltas.kernels.triton.matrix import Flag, Meta
from deltamux.deltas.kernels.triton.table import StepTable
from deltamux.deltas.ops.base import Op
from deltamux.deltas.ops.bias import Bias
from deltamux.deltas.ops.low_rank import LowRank
from deltamux.deltas.ops.scale import Scale
from deltamux.deltas.sites import LinearSite


class LinearDeltas:
    """The parameters of all slots at one linear module, in buffers that never move.

    Args:
        parts: the projections that the module fuses, in the order of their columns.
        max_rank: ranks that a slot has room for at a part; its work is its own rank's, not this.

    Attributes:
        mask: bit i set when slot i has something here.
    """

    def __init__(
        self,
        parts: Sequence[LinearSite],
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        ends = list(accumulate(site.out_features for site in parts))
        self._spans = [slice(end - site.out_features, end) for site, end in zip(parts, ends, strict=True)]
        in_features = parts[0].in_features
        self._matrices = Matrices(
            a=torch.zeros(num_slots, len(parts), max_rank, in_features, dtype=dtype, device=device),
            b=torch.zeros(num_slots, max_rank, ends[-1], dtype=dtype, device=device),
            scale=torch.ones(num_slots, ends[-1], dtype=dtype, device=device),
            bias=torch.zeros(num_slots, ends[-1], dtype=dtype, device=device),
            inner_bias=None,
            meta=torch.zeros(num_slots, len(parts), Meta.VALUES, dtype=torch.int32, device=device),
            columns=column_spans(self._spans, device),
            aligned=gcd(16, *ends),
        )
        self.mask = 0
        self._ranked = 0
        self._ranks: dict[tuple[int, int], int] = {}
        self._flags: dict[tuple[int, int], int] = {}

    def place(self, slot: int, part: int, op: Op) -> bool:
        """Adds a slot's next op at a part, behind those that it has; False, and no change, where there is no room."""
        if isinstance(op, LowRank) and type(op) is LowRank:
            if not self._add_ranks(slot, part, op):
                return False
        elif isinstance(op, Scale):
            self._scale(slot, part, op.factor)
        elif isinstance(op, Bias):
            self._add_bias(slot, part, op.bias)
        else:
            return False
        self.mask |= 1 << slot
        return True

    def add_spans(self, width: int) -> None:
        """Makes launches possible whose programs finish spans of so many columns."""
        self._matrices.columns.setdefault(width, span_table(self._spans, width, self._matrices.a.device))

    def clear(self, slot: int) -> None:
        """Empties a slot; what its buffers hold is not read again."""
        for part in range(len(self._spans)):
            self._ranks.pop((slot, part), None)
            self._flags.pop((slot, part), None)
        self._matrices.meta[slot].zero_()
        self.mask &= ~(1 << slot)
        self._ranked &= ~(1 << slot)

    def apply(self, x: Tensor, y: Tensor, step: StepTable, active: int | None = None) -> None:
        """Changes `y` [rows, out of all parts] in place for the rows whose slot has something here.

        Args:
            active: slots with rows in this step; None launches every kernel, as a graph that is captured needs.
        """
        ranked = active is None or active & self._ranked
        expand(self._matrices, shrink(self._matrices, x, step, y) if ranked else None, y, step)

    def _add_ranks(self, slot: int, part: int, op: LowRank) -> bool:
        before = self._ranks.get((slot, part), 0)
        after = before + op.rank()
        if after > self._matrices.max_rank:
            return False
        self._matrices.a[slot, part, before:after] = op.a
        torch.mul(op.b.T, op.scale, out=self._matrices.b[slot, before:after, self._spans[part]])
        self._ranks[slot, part] = after
        self._matrices.meta[slot, part, Meta.RANK].fill_(after)
        if after:
            self._ranked |= 1 << slot
        return True

    def _scale(self, slot: int, part: int, factor: Tensor) -> None:
        columns, flags = self._spans[part], self._flags.get((slot, part), 0)
        assert self._matrices.scale is not None
        scale, bias = self._matrices.scale[slot, columns], self._matrices.bias[slot, columns]
        scale.copy_(scale.float() * factor if flags & Flag.SCALE else factor)
        if flags & Flag.BIAS:
            bias.copy_(bias.float() * factor)
        second = self._matrices.b[slot, : self._ranks.get((slot, part), 0), columns]
        second.copy_(second.float() * factor)
        self._flag(slot, part, Flag.SCALE)

    def _add_bias(self, slot: int, part: int, change: Tensor) -> None:
        bias = self._matrices.bias[slot, self._spans[part]]
        bias.copy_(bias.float() + change if self._flags.get((slot, part), 0) & Flag.BIAS else change)
        self._flag(slot, part, Flag.BIAS)

    def _flag(self, slot: int, part: int, flag: int) -> None:
        flags = self._flags[slot, part] = self._flags.get((slot, part), 0) | flag
        self._matrices.meta[slot, part, Meta.FLAGS].fill_(flags)


def column_spans(parts: Sequence[slice], device: torch.device | str) -> dict[int, Tensor]:
    """Returns the spans of each width that launches have."""
    return {width: span_table(parts, width, device) for width in (SHORT.span, TALL.span)}


def span_table(parts: Sequence[slice], width: int, device: torch.device | str) -> Tensor:
    """Returns [spans, 3] int32: part, first and end column of each span; the last of a part may be narrower."""
    spans = [
        (part, first, min(first + width, columns.stop))
        for part, columns in enumerate(parts)
        for first in range(columns.start, columns.stop, width)
    ]
    return torch.tensor(spans, dtype=torch.int32, device=device)
