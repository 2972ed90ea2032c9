"""`OpBatch`: one op at one site, batched over the adapters in all device slots."""

import warnings
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from deltamux.deltas.ops.base import Op
from deltamux.deltas.ops.step import StepIndex
from deltamux.deltas.sites import Site

OpT = TypeVar("OpT", bound=Op)

_FORMER_NAMES = {"place": "set", "clear": "reset", "_place": "_set", "_clear": "_reset"}
"""Former names of a batch's hooks, which plugins may still use."""


class OpBatch(ABC):
    """One op at one site, for the adapters in all device slots.

    Rows of other adapters and of the base are never touched: whatever a slot holds, even a NaN, stays in its own rows.

    Attributes:
        mask: bit i set when slot i has this op here.
    """

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Gives a subclass's hooks both their present and their former names, the latter for calls of `super()`."""
        super().__init_subclass__(**arguments)
        own = dict(vars(cls))
        for former, name in _FORMER_NAMES.items():
            if former in own and name not in own:
                message = f"{cls.__qualname__}.{former} is called {name} now: rename it"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                setattr(cls, name, own[former])
            elif name in own:
                setattr(cls, former, own[name])

    def __init__(self, site: Site, num_slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.site = site
        self.num_slots = num_slots
        self.dtype = dtype
        self.device = torch.device(device)
        self.mask = 0

    def set(self, slot: int, op: Op) -> None:
        """Puts an adapter's op, already in this batch's dtype and on its device, into a free slot."""
        self._set(slot, op)
        self.mask |= 1 << slot

    def reset(self, slot: int) -> None:
        """Empties a slot and drops its tensors; an empty slot may be reset again."""
        if self.mask & (1 << slot):
            self.mask &= ~(1 << slot)
            self._reset(slot)

    place, clear = set, reset  # the former names

    def apply(self, x: Tensor, y: Tensor, step: StepIndex) -> None:
        """Changes `y` [rows, features] in place for the rows whose slot has the op; `x` is the site's input."""
        active = self.mask & step.mask
        if active:
            self._apply(x, y, step, active)

    @abstractmethod
    def _set(self, slot: int, op: Op) -> None: ...

    @abstractmethod
    def _reset(self, slot: int) -> None: ...

    @abstractmethod
    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None: ...


class SlotOps(OpBatch, Generic[OpT]):
    """A batch that keeps the op of each slot as it is, for `_apply` to run over the slot's own rows."""

    def __init__(self, site: Site, num_slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(site, num_slots, dtype, device)
        self._ops: dict[int, OpT] = {}

    def _set(self, slot: int, op: Any) -> None:
        self._ops[slot] = op

    def _reset(self, slot: int) -> None:
        del self._ops[slot]
