"""What the CPU kernels read: a step's rows by slot, and per module a table of what each slot holds.

A table owns no arithmetic. It keeps the tensors that its entries point to, so that a pointer never outlives its tensor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamux.deltas.kernels import library
from deltamux.deltas.kernels.library import Mask, Rows, load

DTYPES = (torch.float32, torch.bfloat16)
LANES = 16
"""Columns of one block of packed factors; see ``kLanes`` in products.h."""

ACTIVATIONS = ("identity", "relu", "gelu", "gelu_new", "silu", "tanh", "sigmoid", "leaky_relu")
"""Activations that the kernels know, by their code."""

FROM_X, FROM_Y, FROM_SUM = range(3)
"""What a shrink reads: the site's input, its output, or their sum."""


def available(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Returns whether the kernels can serve tensors of this kind here; compiles them when first asked."""
    return torch.device(device).type == "cpu" and dtype in DTYPES and load() is not None


class Segments:
    """Rows of a step, grouped by slot, where the kernels can read them."""

    def __init__(self, rows: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Takes (slot, its rows) of every slot that takes part."""
        slots = [slot for slot, _ in rows]
        starts = [0]
        flat: list[int] = []
        for _, own in rows:
            flat += own
            starts.append(len(flat))
        self._arrays = [(ctypes.c_int32 * len(values))(*values) for values in (slots, starts, flat)]
        self.struct = Rows(len(slots), *(ctypes.addressof(array) for array in self._arrays))


class Columns(NamedTuple):
    """Columns of a module's output that belong to one of its parts."""

    first: int
    size: int


@dataclass(frozen=True, eq=False)
class Factors:
    """One low-rank map, as the kernels read it: y += up . f(down . z + down_bias) + up_bias.

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
    def of(cls, down: Tensor, up: Tensor, **rest: Any) -> Factors:
        """Takes the expansion `up` as [out, rank], already scaled, and packs it."""
        return cls(down.contiguous(), pack(up), **rest)

    @cached_property
    def words(self) -> tuple[int, ...]:
        """What the table holds of it: pointers and sizes."""
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
    if out % LANES or rank % 2:
        up = F.pad(up, (0, rank % 2, 0, -out % LANES))
    return up.reshape(*many, -(-out // LANES), LANES, -(-rank // 2), 2).transpose(-2, -3).contiguous()


@dataclass(frozen=True, eq=False)
class Vectors:
    """Two float32 vectors, either of them absent: a factor or weight, and a bias."""

    factor: Tensor | None = None
    bias: Tensor | None = None

    @cached_property
    def words(self) -> tuple[int, ...]:
        """What the table holds of it: pointers."""
        return tuple(0 if vector is None else vector.data_ptr() for vector in (self.factor, self.bias))


Entry = Factors | Vectors
"""What a table holds of one slot at one part."""


class Table:
    """int64 entries of one size, by slot and part, and the tensors behind them.

    Attributes:
        struct: the table as the kernels read it; it stays where it is, and holds what this object keeps alive.
    """

    kernel: ClassVar[int]
    """See ``Kernel`` in rows.h."""

    entry_size: ClassVar[int]

    def __init__(self, parts: Sequence[Columns], num_slots: int, dtype: torch.dtype, **fields: Any) -> None:
        loaded = load()
        assert loaded is not None
        self._library = loaded
        self._entries = (ctypes.c_int64 * (num_slots * len(parts) * self.entry_size))()
        self._num_parts = len(parts)
        flat = [number for columns in parts for number in columns]
        self._parts = (ctypes.c_int32 * len(flat))(*flat)
        self._held: dict[int, Mapping[int, Entry]] = {}
        self._absent = (0,) * self.entry_size
        self._slots = Mask()
        self.struct = library.Table(
            kernel=self.kernel,
            bfloat=dtype is torch.bfloat16,
            held=ctypes.pointer(self._slots),
            entries=ctypes.addressof(self._entries),
            parts=ctypes.addressof(self._parts),
            num_parts=len(parts),
            **fields,
        )

    def put(self, slot: int, entries: Mapping[int, Entry]) -> None:
        """Sets what a slot holds, by part; at parts that are left out it holds nothing."""
        self._held[slot] = entries
        words: list[int] = []
        for part in range(self._num_parts):
            words += entries[part].words if part in entries else self._absent
        start = slot * len(words)
        self._entries[start : start + len(words)] = words  # type: ignore[assignment]  # ctypes takes plain ints
        self._slots.set(self._slots.value | 1 << slot)

    def drop(self, slot: int) -> None:
        """Forgets what a slot holds, and frees it: words of slots outside the mask are never read."""
        del self._held[slot]
        self._slots.set(self._slots.value & ~(1 << slot))

    def run(self, x: Tensor, y: Tensor, segments: Segments) -> None:
        """Changes `y` [rows, features] in place, of input `x` [rows, width]; rows of both are contiguous."""
        self._library.deltamux_apply(self.struct, segments.struct, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0))


class ShrinkExpand(Table):
    """y[:, columns of a part] += up . f(down . z + bias) + bias for every slot's own rows; holds `Factors`."""

    kernel, entry_size = 0, 7

    def __init__(self, width: int, parts: Sequence[Columns], num_slots: int, dtype: torch.dtype) -> None:
        super().__init__(parts, num_slots, dtype, width=width)


class Affine(Table):
    """y[:, columns of a part] = y * factor + bias for every slot's own rows; holds `Vectors`."""

    kernel, entry_size = 1, 2


class NormChange(Table):
    """y += normalise(x) * factor + bias for every slot's own rows; holds `Vectors`."""

    kernel, entry_size = 2, 2

    def __init__(
        self, width: int, eps: float, parts: Sequence[Columns], num_slots: int, dtype: torch.dtype, *, centred: bool
    ) -> None:
        super().__init__(parts, num_slots, dtype, width=width, eps=eps, centred=centred)
