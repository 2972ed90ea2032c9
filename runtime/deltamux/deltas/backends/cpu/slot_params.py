"""The CPU kernels' input: a step's rows by slot, and the parameters of all slots at a module.

`SlotParams` keeps the tensors that its words point to, so that a pointer never outlives its tensor.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamux.deltas.backends.cpu.library import Mask, SlotParamsStruct, StepRowsStruct, load
from deltamux.deltas.backends.module_batch import ColumnRange
from deltamux.deltas.ops.step import StepIndex

DTYPES = (torch.float32, torch.bfloat16)
BLOCK_COLUMNS = 16
"""Columns of one block of packed factors; see ``kLanes`` in products.h."""

PREPACKED = "_prepacked"
"""Attribute under which an op keeps its parameters as its kernel reads them."""

FROM_X, FROM_Y, FROM_SUM = range(3)
"""What a shrink reads: the site's input, its output, or their sum."""


def available(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Returns whether the kernels can serve tensors of this kind here; compiles them when first called."""
    return torch.device(device).type == "cpu" and dtype in DTYPES and load() is not None


class StepRows:
    """Rows of a step, grouped by slot, where the kernels can read them."""

    def __init__(self, rows: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Takes (slot, its rows) of every slot with rows."""
        slots = [slot for slot, _ in rows]
        starts = [0]
        flat: list[int] = []
        for _, own in rows:
            flat += own
            starts.append(len(flat))
        self._arrays = [(ctypes.c_int32 * len(values))(*values) for values in (slots, starts, flat)]
        self.struct = StepRowsStruct(len(slots), *(ctypes.addressof(array) for array in self._arrays))


def step_rows(step: StepIndex) -> StepRows:
    """Returns the adapters' rows of a step; made once per step by ``step.derived(step_rows)``."""
    by_slot: dict[int, list[int]] = {}
    for slot, start, stop in step.row_ranges:
        by_slot.setdefault(slot, []).extend(range(start, stop))
    return StepRows(sorted(by_slot.items()))


@dataclass(frozen=True, eq=False)
class PrepackedFactors:
    """One low-rank map in the kernels' layout: y += up . f(down . z + down_bias) + up_bias.

    Attributes:
        down: [rank, in], float32 or bfloat16, contiguous.
        up: what `pack` returns of the scaled expansion.
        down_bias: [rank] float32; up_bias: [out] float32, scaled.
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    activation: int = 0
    reads: int = FROM_X

    @classmethod
    def of(cls, down: Tensor, up: Tensor, **rest: Any) -> Self:
        """Packs the expansion `up` [out, rank], which is scaled already."""
        return cls(down.contiguous(), pack(up), **rest)

    @cached_property
    def words(self) -> tuple[int, ...]:
        """Pointers and sizes, as `SlotParams` holds them."""
        biases = (0 if bias is None else bias.data_ptr() for bias in (self.down_bias, self.up_bias))
        return (self.down.data_ptr(), self.up.data_ptr(), self.down.shape[0], *biases, self.activation, self.reads)


def pack(up: Tensor) -> Tensor:
    """Returns one expansion [out, rank], or many [..., out, rank], in the kernels' order.

    float32: [..., rank, out]. bfloat16: [..., out / 16, rank / 2, 16, 2], both rounded up and filled with zeros: 16
    columns by pairs of ranks, as the processor's dot products of bfloat16 pairs read them.
    """
    if up.dtype is torch.float32:
        return up.transpose(-1, -2).contiguous()
    *many, out, rank = up.shape
    if out % BLOCK_COLUMNS or rank % 2:
        up = F.pad(up, (0, rank % 2, 0, -out % BLOCK_COLUMNS))
    return up.reshape(*many, -(-out // BLOCK_COLUMNS), BLOCK_COLUMNS, -(-rank // 2), 2).transpose(-2, -3).contiguous()


@dataclass(frozen=True, eq=False)
class PrepackedVectors:
    """Two float32 vectors, either of them absent: a factor or weight, and a bias."""

    factor: Tensor | None = None
    bias: Tensor | None = None

    @cached_property
    def words(self) -> tuple[int, ...]:
        """Pointers, as `SlotParams` holds them."""
        return tuple(0 if vector is None else vector.data_ptr() for vector in (self.factor, self.bias))


Prepacked = PrepackedFactors | PrepackedVectors
"""The parameters of one op, as a kernel reads them."""


class SlotParams:
    """The parameters of all slots at one module, for one kernel: int64 words by slot and slice, and their tensors.

    Attributes:
        struct: the parameters as the kernels read them, at an address that stays.
    """

    kernel: ClassVar[int]
    """See ``Kernel`` in rows.h."""

    num_words: ClassVar[int]

    def __init__(self, slices: Sequence[ColumnRange], num_slots: int, dtype: torch.dtype, **fields: Any) -> None:
        loaded = load()
        assert loaded is not None
        self._library = loaded
        self._words = (ctypes.c_int64 * (num_slots * len(slices) * self.num_words))()
        self._num_slices = len(slices)
        flat = [number for columns in slices for number in columns]
        self._slices = (ctypes.c_int32 * len(flat))(*flat)
        self._held: dict[int, Mapping[int, Prepacked]] = {}
        self._absent = (0,) * self.num_words
        self._slots = Mask()
        self.struct = SlotParamsStruct(
            kernel=self.kernel,
            bfloat=dtype is torch.bfloat16,
            held=ctypes.pointer(self._slots),
            words=ctypes.addressof(self._words),
            slices=ctypes.addressof(self._slices),
            num_slices=len(slices),
            **fields,
        )

    def set(self, slot: int, prepacked: Mapping[int, Prepacked]) -> None:
        """Sets a slot's parameters, by slice; at slices that are left out it has none."""
        self._held[slot] = prepacked
        words: list[int] = []
        for index in range(self._num_slices):
            words += prepacked[index].words if index in prepacked else self._absent
        start = slot * len(words)
        self._words[start : start + len(words)] = words  # type: ignore[assignment]  # ctypes takes plain ints
        self._slots.set(self._slots.value | 1 << slot)

    def reset(self, slot: int) -> None:
        """Frees a slot's parameters; words of slots outside the mask are never read."""
        del self._held[slot]
        self._slots.set(self._slots.value & ~(1 << slot))

    def apply(self, x: Tensor, y: Tensor, rows: StepRows) -> None:
        """Changes `y` [rows, features] in place, of input `x` [rows, width]; rows of both are contiguous."""
        self._library.deltamux_apply(self.struct, rows.struct, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0))


class ShrinkExpand(SlotParams):
    """y[:, columns of a slice] += up . f(down . z + bias) + bias for each slot's rows; holds `PrepackedFactors`."""

    kernel, num_words = 0, 7

    def __init__(self, width: int, slices: Sequence[ColumnRange], num_slots: int, dtype: torch.dtype) -> None:
        super().__init__(slices, num_slots, dtype, width=width)


class Affine(SlotParams):
    """y[:, columns of a slice] = y * factor + bias for every slot's own rows; holds `PrepackedVectors`."""

    kernel, num_words = 1, 2


class NormChange(SlotParams):
    """y += normalise(x) * factor + bias for every slot's own rows; holds `PrepackedVectors`."""

    kernel, num_words = 2, 2

    def __init__(
        self,
        width: int,
        eps: float,
        slices: Sequence[ColumnRange],
        num_slots: int,
        dtype: torch.dtype,
        *,
        centred: bool,
    ) -> None:
        super().__init__(slices, num_slots, dtype, width=width, eps=eps, centred=centred)
