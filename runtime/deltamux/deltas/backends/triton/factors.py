"""Factors of all slots on a projection's input (IA3): one launch."""

import torch
from torch import Tensor

from deltamux.deltas.backends.triton.rows import scale_rows
from deltamux.deltas.backends.triton.step_records import StepRecords


class FactorDeltas:
    """One vector per slot that its rows are multiplied by, in a buffer that never moves.

    Attributes:
        mask: bit i set when slot i has factors here.
    """

    def __init__(self, features: int, num_slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self._factors = torch.ones(num_slots, features, dtype=dtype, device=device)
        self._present = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.mask = 0

    def set(self, slot: int, factor: Tensor) -> None:
        """Multiplies a slot's factors by `factor` [features]."""
        own = self._factors[slot]
        own.copy_(own.float() * factor if self.mask & (1 << slot) else factor)
        self._present[slot].fill_(1)
        self.mask |= 1 << slot

    def reset(self, slot: int) -> None:
        """Empties a slot; what its buffer holds is not read again."""
        self._present[slot].fill_(0)
        self.mask &= ~(1 << slot)

    def apply(self, x: Tensor, step: StepRecords) -> None:
        """Multiplies the rows of `x` [rows, features] whose slot has factors, in place."""
        scale_rows(x, self._factors, self._present, step)
