"""The batched life of ops: which rows of a step belong to which adapter, and what every op's batch class promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from deltamux.deltas.kernels.tables import Columns, Segments, Table
from deltamux.deltas.ops.base import Op
from deltamux.deltas.sites import Site

if TYPE_CHECKING:
    from deltamux.deltas.kernels.triton.table import StepTable


class Run(NamedTuple):
    """Consecutive rows of a step that belong to one slot."""

    slot: int
    start: int
    stop: int


class VirtualRows(NamedTuple):
    """Rows of a step that hold virtual tokens.

    Attributes:
        rows: [v] int64, positions in the step.
        slots: [v] int64, the slot of each.
        positions: [v] int64, which of its adapter's virtual tokens each one is.
    """

    rows: Tensor
    slots: Tensor
    positions: Tensor
    mask: int


class StackedColumns(NamedTuple):
    """Which slot each column of stacked parameters belongs to.

    Attributes:
        layout: (slot, its number of columns) in order; equal layouts have equal owners.
        owner: [columns] int64.
    """

    layout: tuple[tuple[int, int], ...]
    owner: Tensor

    @classmethod
    def of(cls, widths: Mapping[int, int], device: torch.device) -> StackedColumns:
        slots, counts = torch.tensor(list(widths)), torch.tensor(list(widths.values()))
        return cls(tuple(widths.items()), slots.repeat_interleave(counts).to(device))


class StepIndex:
    """Who owns each row of one step; built once a step, read by every site.

    Args:
        runs: the adapter rows in order; rows outside every run belong to the base.
        num_rows: rows of the step.
        num_slots: device slots of the engine.
        virtual: rows that hold virtual tokens, if any.
        last_rows: who owns the last row of each request, in order: the rows that the output head sees.
        table: holds the same for Triton's kernels; without one, it is made when a kernel asks.

    ``mask`` has bit i set when slot i has a row here, so that a site without work decides it with one ``&``.
    """

    def __init__(
        self,
        runs: Iterable[Run],
        num_rows: int,
        num_slots: int,
        *,
        device: torch.device | str = "cpu",
        virtual: VirtualRows | None = None,
        last_rows: StepIndex | None = None,
        table: StepTable | None = None,
    ) -> None:
        self.runs = tuple(runs)
        self.num_rows = num_rows
        self.num_slots = num_slots
        self.device = torch.device(device)
        self.virtual = virtual
        self.last_rows = last_rows
        self.mask = 0
        self._by_slot: dict[int, list[Run]] = {}
        for run in self.runs:
            self.mask |= 1 << run.slot
            self._by_slot.setdefault(run.slot, []).append(run)
        if table is not None:
            self.table = table
        self._rows: dict[int, slice | Tensor] = {}
        self._virtual: dict[int, tuple[Tensor, Tensor]] = {}
        self._foreign: dict[tuple[tuple[int, int], ...], Tensor] = {}

    @cached_property
    def slots(self) -> Tensor:
        """[num_rows] int64: each row's slot, `num_slots` for the base's rows."""
        slots = torch.full((self.num_rows,), self.num_slots, dtype=torch.int64)
        for slot, start, stop in self.runs:
            slots[start:stop] = slot
        return slots.to(self.device)

    @cached_property
    def table(self) -> StepTable:
        """The same for Triton's kernels, on the step's device."""
        from deltamux.deltas.kernels.triton.table import Owner, StepTable, VirtualToken

        table = StepTable(self.num_rows, self.num_slots, self.device)
        fields = self.virtual[:3] if self.virtual is not None else ()
        virtual = [VirtualToken(*entry) for entry in zip(*(field.tolist() for field in fields), strict=True)]
        table.fill([Owner(*run) for run in self.runs], self.num_rows, virtual)
        return table

    def rows(self, slot: int) -> slice | Tensor:
        """Returns a slot's rows: a slice where they are consecutive, else int64 positions."""
        if slot not in self._rows:
            runs = self._by_slot[slot]
            consecutive = all(a.stop == b.start for a, b in pairwise(runs))
            if consecutive:
                self._rows[slot] = slice(runs[0].start, runs[-1].stop)
            else:
                self._rows[slot] = torch.cat([torch.arange(r.start, r.stop) for r in runs]).to(self.device)
        return self._rows[slot]

    def foreign(self, columns: StackedColumns) -> Tensor:
        """Returns [num_rows, columns] bool: True where a stacked column is of another slot than the row's.

        Sites whose columns are laid out alike, as all those of the usual adapter are, share one mask a step.
        """
        mask = self._foreign.get(columns.layout)
        if mask is None:
            mask = self._foreign[columns.layout] = self.slots.unsqueeze(1) != columns.owner
        return mask

    def virtual_rows(self, slot: int) -> tuple[Tensor, Tensor]:
        """Returns the rows that hold a slot's virtual tokens, and which of them each one is: int64, [v] both."""
        if slot not in self._virtual:
            assert self.virtual is not None
            own = self.virtual.slots == slot
            self._virtual[slot] = (self.virtual.rows[own], self.virtual.positions[own])
        return self._virtual[slot]

    @cached_property
    def segments(self) -> Segments:
        """The adapters' rows, for the CPU kernels."""
        rows = {slot: [row for run in runs for row in range(*run[1:])] for slot, runs in self._by_slot.items()}
        return Segments(sorted(rows.items()))

    def count(self, slot: int) -> int:
        """Returns how many rows a slot has in this step."""
        return sum(run.stop - run.start for run in self._by_slot.get(slot, ()))


def bits(mask: int) -> Iterator[int]:
    """Yields the positions of a mask's set bits, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def add_rows(y: Tensor, rows: slice | Tensor, delta: Tensor) -> None:
    """Adds `delta` [n, features] to the given rows of `y`, in place; no other row is read or written."""
    if isinstance(rows, slice):
        y[rows] += delta
    else:
        y.index_add_(0, rows, delta)


class OpBatch(ABC):
    """One op at one site, for the adapters in all device slots.

    Rows of other adapters and of the base are never touched: whatever a slot holds, even a NaN, stays in its own rows.

    Attributes:
        mask: bit i set when slot i has this op here.
    """

    def __init__(self, site: Site, num_slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.site = site
        self.num_slots = num_slots
        self.dtype = dtype
        self.device = torch.device(device)
        self.mask = 0

    def place(self, slot: int, op: Op) -> None:
        """Puts an adapter's op, already in this batch's dtype and on its device, into a free slot."""
        self._place(slot, op)
        self.mask |= 1 << slot

    def clear(self, slot: int) -> None:
        """Empties a slot and drops its tensors; an empty slot may be cleared again."""
        if self.mask & (1 << slot):
            self.mask &= ~(1 << slot)
            self._clear(slot)

    def apply(self, x: Tensor, y: Tensor, step: StepIndex) -> None:
        """Changes `y` [rows, features] in place for the rows whose slot has the op; `x` is the site's input."""
        active = self.mask & step.mask
        if active:
            self._apply(x, y, step, active)

    @abstractmethod
    def _place(self, slot: int, op: Op) -> None: ...

    @abstractmethod
    def _clear(self, slot: int) -> None: ...

    @abstractmethod
    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None: ...


class Part(NamedTuple):
    """One of the sites whose modules the engine runs as one, and its columns of that module's output."""

    site: Site
    columns: Columns


class ModuleBatch(ABC):
    """One op at all parts of one module (query, key and value of a fused projection, say), for all device slots.

    Attributes:
        mask: bit i set when slot i has the op at any part.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.mask = 0

    def place(self, slot: int, ops: Mapping[int, Op]) -> None:
        """Puts an adapter's ops by part, already in this batch's dtype and on its device, into a slot that is empty."""
        self._place(slot, ops)
        self.mask |= 1 << slot

    def clear(self, slot: int) -> None:
        """Empties a slot at every part and drops its tensors; an empty slot may be cleared again."""
        if self.mask & (1 << slot):
            self.mask &= ~(1 << slot)
            self._clear(slot)

    @abstractmethod
    def apply(self, x: Tensor, y: Tensor, step: StepIndex) -> None:
        """Changes the module's output `y` in place; see `OpBatch.apply`."""

    @abstractmethod
    def _place(self, slot: int, ops: Mapping[int, Op]) -> None: ...

    @abstractmethod
    def _clear(self, slot: int) -> None: ...


class PerPart(ModuleBatch):
    """Every part by the op's own batch in torch: the twin of the kernels, and the only way for ops without one."""

    def __init__(self, parts: Sequence[Part], make: Callable[[Site], OpBatch]) -> None:
        super().__init__(parts)
        self._batches: dict[int, OpBatch] = {}
        self._make = make

    def apply(self, x: Tensor, y: Tensor, step: StepIndex) -> None:
        for part, batch in self._batches.items():
            if batch.mask & step.mask:
                first, size = self.parts[part].columns
                batch.apply(x, y if len(self.parts) == 1 else y[:, first : first + size], step)

    def _place(self, slot: int, ops: Mapping[int, Op]) -> None:
        for part, op in ops.items():
            if part not in self._batches:
                self._batches[part] = self._make(self.parts[part].site)
            self._batches[part].place(slot, op)

    def _clear(self, slot: int) -> None:
        for batch in self._batches.values():
            batch.clear(slot)


class KernelBatch(ModuleBatch):
    """All parts in one call of the CPU kernels, each row with what its own adapter holds."""

    def __init__(self, parts: Sequence[Part], table: Table) -> None:
        super().__init__(parts)
        self.table = table

    def apply(self, x: Tensor, y: Tensor, step: StepIndex) -> None:
        if self.mask & step.mask:
            self.table.run(x, y, step.segments)

    def _place(self, slot: int, ops: Mapping[int, Op]) -> None:
        self.table.put(slot, {part: op.entry for part, op in ops.items()})

    def _clear(self, slot: int) -> None:
        self.table.drop(slot)
