"""Rows of virtual tokens: keys and values (KVPrefix) and embeddings (SoftPrompt) of all slots, gathered by row.

Steps that hold virtual tokens are never part of a CUDA graph, so these buffers may move: they grow with the longest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltamux.deltas.kernels.triton.rows import replace_virtual_rows
from deltamux.deltas.kernels.triton.table import StepTable
from deltamux.deltas.ops.base import Op
from deltamux.deltas.ops.soft_prompt import SoftPrompt
from deltamux.deltas.sites import EmbeddingSite


class VirtualRowDeltas:
    """The rows of all slots' virtual tokens, of one tensor or of two alike.

    Attributes:
        mask: bit i set when slot i has virtual tokens here.
    """

    def __init__(
        self, features: int, tensors: int, num_slots: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._values = torch.zeros(tensors, num_slots, 0, features, dtype=dtype, device=device)
        self._lengths = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.mask = 0

    def place(self, slot: int, *values: Tensor) -> None:
        """Puts a slot's rows in place, each tensor [positions, features]."""
        length = values[0].shape[0]
        self._grow(length)
        for buffer, value in zip(self._values, values, strict=True):
            buffer[slot, :length] = value
        self._lengths[slot].fill_(length)
        self.mask |= 1 << slot

    def clear(self, slot: int) -> None:
        """Empties a slot; what its buffers hold is not read again."""
        self._lengths[slot].fill_(0)
        self.mask &= ~(1 << slot)

    def apply(self, ys: tuple[Tensor, ...], step: StepTable) -> None:
        """Replaces the virtual tokens' rows of each of `ys` [rows, features] by their slot's own, in place."""
        pair = (self._values[1], ys[1]) if len(ys) > 1 else None
        replace_virtual_rows(self._values[0], self._lengths, ys[0], step, pair)

    def _grow(self, length: int) -> None:
        tensors, slots, room, features = self._values.shape
        if length > room:
            grown = self._values.new_zeros(tensors, slots, length, features)
            grown[:, :, :room] = self._values
            self._values = grown


class SoftPromptDeltas:
    """The embeddings of all slots' virtual tokens.

    Attributes:
        mask: bit i set when slot i has a prompt.
    """

    def __init__(self, site: EmbeddingSite, num_slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self._rows = VirtualRowDeltas(site.features, 1, num_slots, dtype, device)

    @property
    def mask(self) -> int:
        return self._rows.mask

    def place(self, slot: int, op: Op) -> bool:
        """Puts a slot's prompt in place; False, and nothing done, for another op or a second prompt."""
        if type(op) is not SoftPrompt or self.mask & (1 << slot):
            return False
        self._rows.place(slot, op.embedding)
        return True

    def clear(self, slot: int) -> None:
        self._rows.clear(slot)

    def apply(self, x: Tensor, y: Tensor, step: StepTable, residual: Tensor | None = None) -> None:
        """Replaces the virtual tokens' rows of `y` [rows, features], the embedding's output, in place."""
        self._rows.apply((y,), step)
