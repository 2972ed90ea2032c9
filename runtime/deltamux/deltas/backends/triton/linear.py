"""LowRank, Scale and Bias of all slots at one linear module, over all its slices: two launches, whatever the mix.

Any sequence of the three is y -> s * y + B A x + b: a further low rank adds its ranks, a scale multiplies what is
there, a bias adds. So a slot needs one description per slice, and a module one shrink and one expand.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import gcd

import torch
from torch import Tensor

from deltamux.deltas.backends.triton.launches import DECODE, PREFILL, Matrices, expand, shrink
from deltamux.deltas.backends.triton.matrix import Flag, Meta
from deltamux.deltas.backends.triton.step_records import StepRecords
from deltamux.deltas.ops.base import Op
from deltamux.deltas.ops.bias import Bias
from deltamux.deltas.ops.low_rank import LowRank
from deltamux.deltas.ops.scale import Scale
from deltamux.deltas.sites import LinearSite


class LinearDeltas:
    """The parameters of all slots at one linear module, in buffers that never move.

    Args:
        slices: the projections that the module packs, in the order of their columns.
        max_rank: ranks that a slot has room for at a slice; its work is its own rank's, not this.

    Attributes:
        mask: bit i set when slot i has something here.
    """

    def __init__(
        self,
        slices: Sequence[LinearSite],
        num_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        ends = list(accumulate(site.out_features for site in slices))
        self._spans = [slice(end - site.out_features, end) for site, end in zip(slices, ends, strict=True)]
        in_features = slices[0].in_features
        self._matrices = Matrices(
            a=torch.zeros(num_slots, len(slices), max_rank, in_features, dtype=dtype, device=device),
            b=torch.zeros(num_slots, max_rank, ends[-1], dtype=dtype, device=device),
            scale=torch.ones(num_slots, ends[-1], dtype=dtype, device=device),
            bias=torch.zeros(num_slots, ends[-1], dtype=dtype, device=device),
            inner_bias=None,
            meta=torch.zeros(num_slots, len(slices), Meta.VALUES, dtype=torch.int32, device=device),
            columns=column_spans(self._spans, device),
            aligned=gcd(16, *ends),
        )
        self.mask = 0
        self._ranked = 0
        self._ranks: dict[tuple[int, int], int] = {}
        self._flags: dict[tuple[int, int], int] = {}

    def set(self, slot: int, slice_index: int, op: Op) -> bool:
        """Adds a slot's next op at a slice, after those that it has; False, and no change, where there is no room."""
        if isinstance(op, LowRank) and type(op) is LowRank:
            if not self._add_ranks(slot, slice_index, op):
                return False
        elif isinstance(op, Scale):
            self._scale(slot, slice_index, op.factor)
        elif isinstance(op, Bias):
            self._add_bias(slot, slice_index, op.bias)
        else:
            return False
        self.mask |= 1 << slot
        return True

    def add_spans(self, width: int) -> None:
        """Makes launches possible whose programs finish spans of so many columns."""
        self._matrices.columns.setdefault(width, span_table(self._spans, width, self._matrices.a.device))

    def reset(self, slot: int) -> None:
        """Empties a slot; what its buffers hold is not read again."""
        for slice_index in range(len(self._spans)):
            self._ranks.pop((slot, slice_index), None)
            self._flags.pop((slot, slice_index), None)
        self._matrices.meta[slot].zero_()
        self.mask &= ~(1 << slot)
        self._ranked &= ~(1 << slot)

    def apply(self, x: Tensor, y: Tensor, step: StepRecords, active: int | None = None) -> None:
        """Changes `y` [rows, out of all slices] in place for the rows whose slot has something here.

        Args:
            active: slots with rows in this step; None launches every kernel, as a graph that is captured needs.
        """
        ranked = active is None or active & self._ranked
        expand(self._matrices, shrink(self._matrices, x, step, y) if ranked else None, y, step)

    def _add_ranks(self, slot: int, slice_index: int, op: LowRank) -> bool:
        before = self._ranks.get((slot, slice_index), 0)
        after = before + op.rank()
        if after > self._matrices.max_rank:
            return False
        self._matrices.a[slot, slice_index, before:after] = op.a
        torch.mul(op.b.T, op.scale, out=self._matrices.b[slot, before:after, self._spans[slice_index]])
        self._ranks[slot, slice_index] = after
        self._matrices.meta[slot, slice_index, Meta.RANK].fill_(after)
        if after:
            self._ranked |= 1 << slot
        return True

    def _scale(self, slot: int, slice_index: int, factor: Tensor) -> None:
        columns, flags = self._spans[slice_index], self._flags.get((slot, slice_index), 0)
        assert self._matrices.scale is not None
        scale, bias = self._matrices.scale[slot, columns], self._matrices.bias[slot, columns]
        scale.copy_(scale.float() * factor if flags & Flag.SCALE else factor)
        if flags & Flag.BIAS:
            bias.copy_(bias.float() * factor)
        second = self._matrices.b[slot, : self._ranks.get((slot, slice_index), 0), columns]
        second.copy_(second.float() * factor)
        self._flag(slot, slice_index, Flag.SCALE)

    def _add_bias(self, slot: int, slice_index: int, change: Tensor) -> None:
        bias = self._matrices.bias[slot, self._spans[slice_index]]
        bias.copy_(bias.float() + change if self._flags.get((slot, slice_index), 0) & Flag.BIAS else change)
        self._flag(slot, slice_index, Flag.BIAS)

    def _flag(self, slot: int, slice_index: int, flag: int) -> None:
        flags = self._flags[slot, slice_index] = self._flags.get((slot, slice_index), 0) | flag
        self._matrices.meta[slot, slice_index, Meta.FLAGS].fill_(flags)


def column_spans(slices: Sequence[slice], device: torch.device | str) -> dict[int, Tensor]:
    """Returns the spans of each width that launches have."""
    return {width: span_table(slices, width, device) for width in (DECODE.span, PREFILL.span)}


def span_table(slices: Sequence[slice], width: int, device: torch.device | str) -> Tensor:
    """Returns [spans, 3] int32: slice, first and end column of each span; the last of a slice may be narrower."""
    spans = [
        (slice_index, first, min(first + width, columns.stop))
        for slice_index, columns in enumerate(slices)
        for first in range(columns.start, columns.stop, width)
    ]
    return torch.tensor(spans, dtype=torch.int32, device=device)
