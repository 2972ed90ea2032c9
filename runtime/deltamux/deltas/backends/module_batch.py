"""`ModuleBatch`: one op at a module of the engine, which may pack several sites into one projection."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from deltamux.deltas.ops.base import Op
from deltamux.deltas.ops.batch import OpBatch
from deltamux.deltas.ops.step import StepIndex
from deltamux.deltas.sites import Site


class ColumnRange(NamedTuple):
    """Columns of a module's output that belong to one of its slices."""

    first: int
    size: int


class PackedSlice(NamedTuple):
    """One site of a packed module (vLLM's ``packed_modules_mapping``), and its columns of the module's output."""

    site: Site
    columns: ColumnRange


class ModuleBatch(ABC):
    """One op at all slices of one module (query, key and value of ``qkv_proj``, say), for all device slots.

    Attributes:
        mask: bit i set when slot i has the op at any slice.
    """

    def __init__(self, slices: Sequence[PackedSlice]) -> None:
        self.slices = tuple(slices)
        self.mask = 0

    def set(self, slot: int, ops: Mapping[int, Op]) -> None:
        """Puts an adapter's ops by slice, already in this batch's dtype and on its device, into an empty slot."""
        self._set(slot, ops)
        self.mask |= 1 << slot

    def reset(self, slot: int) -> None:
        """Empties a slot at every slice and drops its tensors; an empty slot may be reset again."""
        if self.mask & (1 << slot):
            self.mask &= ~(1 << slot)
            self._reset(slot)

    @abstractmethod
    def apply(self, x: Tensor, y: Tensor, step: StepIndex) -> None:
        """Changes the module's output `y` in place; see `OpBatch.apply`."""

    @abstractmethod
    def _set(self, slot: int, ops: Mapping[int, Op]) -> None: ...

    @abstractmethod
    def _reset(self, slot: int) -> None: ...


class PerSliceBatch(ModuleBatch):
    """Every slice by an `OpBatch` of its own."""

    def __init__(self, slices: Sequence[PackedSlice], make: Callable[[Site], OpBatch]) -> None:
        super().__init__(slices)
        self._batches: dict[int, OpBatch] = {}
        self._make = make

    def apply(self, x: Tensor, y: Tensor, step: StepIndex) -> None:
        for index, batch in self._batches.items():
            if batch.mask & step.mask:
                first, size = self.slices[index].columns
                batch.apply(x, y if size == y.shape[1] else y[:, first : first + size], step)

    def _set(self, slot: int, ops: Mapping[int, Op]) -> None:
        for index, op in ops.items():
            if index not in self._batches:
                self._batches[index] = self._make(self.slices[index].site)
            self._batches[index].set(slot, op)

    def _reset(self, slot: int) -> None:
        for batch in self._batches.values():
            batch.reset(slot)
