"""The embeddings of all slots' virtual tokens (SoftPrompt), gathered by row.

Steps that hold virtual tokens are never part of a CUDA graph, so this buffer may move: it grows with the longest
prompt.
"""

import torch
from torch import Tensor

from deltamux.deltas.backends.triton.rows import replace_virtual_rows
from deltamux.deltas.backends.triton.step_records import StepRecords
from deltamux.deltas.ops.base import Op
from deltamux.deltas.ops.soft_prompt import SoftPrompt
from deltamux.deltas.sites import EmbeddingSite


class SoftPromptDeltas:
    """The embeddings of all slots' virtual tokens, in a buffer that grows.

    Attributes:
        mask: bit i set when slot i has a prompt.
    """

    def __init__(self, site: EmbeddingSite, num_slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self._values = torch.zeros(num_slots, 0, site.features, dtype=dtype, device=device)
        self._lengths = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.mask = 0

    def set(self, slot: int, op: Op) -> bool:
        """Puts a slot's prompt in place; False, and no change, for another op or a second prompt."""
        if type(op) is not SoftPrompt or self.mask & (1 << slot):
            return False
        length = op.embedding.shape[0]
        self._grow(length)
        self._values[slot, :length] = op.embedding
        self._lengths[slot].fill_(length)
        self.mask |= 1 << slot
        return True

    def reset(self, slot: int) -> None:
        """Empties a slot; its values are not read again."""
        self._lengths[slot].fill_(0)
        self.mask &= ~(1 << slot)

    def apply(self, x: Tensor, y: Tensor, step: StepRecords, residual: Tensor | None = None) -> None:
        """Replaces the virtual tokens' rows of `y` [rows, features], the embedding's output, in place."""
        replace_virtual_rows(self._values, self._lengths, y, step)

    def _grow(self, length: int) -> None:
        slots, size, features = self._values.shape
        if length > size:
            grown = self._values.new_zeros(slots, length, features)
            grown[:, :size] = self._values
            self._values = grown
