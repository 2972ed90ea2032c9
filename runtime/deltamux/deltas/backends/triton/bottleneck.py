"""Bottleneck of all slots at one sub-layer: shrink reads what each slot reads, expand activates and adds.

Two launches and not one: one program per tile would stream both matrices through one multiprocessor, while split by the
features and by the columns they use all of them. The activation, both biases and the sum are in the second.
"""

from math import gcd

import torch
from torch import Tensor

from deltamux.deltas.activations import ACTIVATION_CODES
from deltamux.deltas.backends.triton.launches import Matrices, expand, shrink
from deltamux.deltas.backends.triton.linear import column_spans
from deltamux.deltas.backends.triton.matrix import Flag, Meta, Source
from deltamux.deltas.backends.triton.step_records import StepRecords
from deltamux.deltas.ops.base import Op
from deltamux.deltas.ops.bottleneck import Bottleneck
from deltamux.deltas.sites import BlockSite


class BottleneckDeltas:
    """One module per slot at one sub-layer, in buffers that never move.

    Args:
        max_width: the widest that there is room for; a slot's work is its own width's.

    Attributes:
        mask: bit i set when slot i has a module here.
    """

    def __init__(
        self, site: BlockSite, num_slots: int, max_width: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        features = site.features
        self._matrices = Matrices(
            a=torch.zeros(num_slots, 1, max_width, features, dtype=dtype, device=device),
            b=torch.zeros(num_slots, max_width, features, dtype=dtype, device=device),
            scale=None,
            bias=torch.zeros(num_slots, features, dtype=dtype, device=device),
            inner_bias=torch.zeros(num_slots, max_width, dtype=dtype, device=device),
            meta=torch.zeros(num_slots, 1, Meta.VALUES, dtype=torch.int32, device=device),
            columns=column_spans([slice(0, features)], device),
            aligned=gcd(16, features),
        )
        self.mask = 0

    def set(self, slot: int, op: Op) -> bool:
        """Puts a slot's module in place; False, and no change, where it is no plain one, too wide, or the second."""
        if type(op) is not Bottleneck or op.rank() > self._matrices.max_rank or self.mask & (1 << slot):
            return False
        matrices, width = self._matrices, op.rank()
        assert matrices.inner_bias is not None
        matrices.a[slot, 0, :width] = op.down_weight
        torch.mul(op.up_weight.T, op.scale, out=matrices.b[slot, :width])
        if op.down_bias is not None:
            matrices.inner_bias[slot, :width] = op.down_bias
        if op.up_bias is not None:
            torch.mul(op.up_bias, op.scale, out=matrices.bias[slot])
        # Number by number: a fill is one launch, where a copy of a tensor of the host would wait for the device.
        for field, value in enumerate(_description(op)):
            matrices.meta[slot, 0, field].fill_(value)
        self.mask |= 1 << slot
        return True

    def reset(self, slot: int) -> None:
        """Empties a slot; what its buffers hold is not read again."""
        self._matrices.meta[slot].zero_()
        self.mask &= ~(1 << slot)

    def apply(self, x: Tensor, y: Tensor, step: StepRecords, residual: Tensor | None = None) -> None:
        """Changes `y` [rows, features] in place for the rows whose slot has a module here.

        Args:
            x: the sub-layer's input; residual: the residual stream before its norm, where a slot reads it.
        """
        expand(self._matrices, shrink(self._matrices, x, step, y, residual), y, step)


def _description(op: Bottleneck) -> list[int]:
    flags = Flag.INNER_BIAS * (op.down_bias is not None) + Flag.BIAS * (op.up_bias is not None)
    stream = Source.RESIDUAL if op.residual else Source.INPUT
    source = stream if op.parallel else Source.OUTPUT | (stream if op.residual else 0)
    return [op.rank(), flags, source, ACTIVATION_CODES[op.activation]]
