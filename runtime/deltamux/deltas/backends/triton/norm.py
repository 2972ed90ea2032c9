"""NormAffine of all slots at one norm: one launch."""

import torch
from torch import Tensor

from deltamux.deltas.backends.triton.rows import BIAS, WEIGHT, add_norm_change
from deltamux.deltas.backends.triton.step_records import StepRecords
from deltamux.deltas.ops.base import Op
from deltamux.deltas.ops.norm_affine import NormAffine
from deltamux.deltas.sites import NormForm, NormSite


class NormDeltas:
    """The changes of weight and bias of all slots at one norm, in buffers that never move.

    Attributes:
        mask: bit i set when slot i has a change here.
    """

    def __init__(self, site: NormSite, num_slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self._site = site
        self._weight, self._bias = torch.zeros(2, num_slots, site.features, dtype=dtype, device=device).unbind(0)
        self._changes = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.mask = 0

    def set(self, slot: int, op: Op) -> bool:
        """Puts a slot's change in place; False, and nothing done, where it has one already."""
        if type(op) is not NormAffine or self.mask & (1 << slot):
            return False
        for buffer, change in ((self._weight, op.weight), (self._bias, op.bias)):
            if change is not None:
                buffer[slot] = change
        self._changes[slot].fill_(WEIGHT * (op.weight is not None) + BIAS * (op.bias is not None))
        self.mask |= 1 << slot
        return True

    def reset(self, slot: int) -> None:
        """Empties a slot; what its buffers hold is not read again."""
        self._changes[slot].fill_(0)
        self.mask &= ~(1 << slot)

    def apply(self, x: Tensor, y: Tensor, step: StepRecords, residual: Tensor | None = None) -> None:
        """Changes `y` [rows, features] in place for the rows whose slot has a change here.

        Args:
            x: what is normalised; residual: not read.
        """
        centres = self._site.form is NormForm.LAYER
        add_norm_change(x, y, self._weight, self._bias, self._changes, step, centres=centres, eps=self._site.eps)
