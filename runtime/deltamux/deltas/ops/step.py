"""The rows of a step, by device slot: what every batched op reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class RowRange(NamedTuple):
    """Consecutive rows of a step that belong to one slot."""

    slot: int
    start: int
    stop: int


class VirtualToken(NamedTuple):
    """One row that holds a virtual token; `position` is its place among its adapter's."""

    row: int
    slot: int
    position: int


class VirtualRows(NamedTuple):
    """Rows of a step that hold virtual tokens.

    Attributes:
        tokens: the virtual tokens, in host memory.
        rows: [v] int64, positions in the step.
        slots: [v] int64, the slot of each.
        positions: [v] int64, which of its adapter's virtual tokens each one is.
        mask: bit i set when slot i has one.
    """

    tokens: Sequence[VirtualToken]
    rows: Tensor
    slots: Tensor
    positions: Tensor
    mask: int

    @classmethod
    def of(
        cls, tokens: Sequence[VirtualToken], move: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> VirtualRows:
        """Returns the rows of at least one token; `move` brings a tensor to the step's device."""
        mask = 0
        for token in tokens:
            mask |= 1 << token.slot
        rows, slots, positions = move(torch.tensor(tokens)).unbind(1)
        return cls(tokens, rows, slots, positions, mask)


class StackedColumns(NamedTuple):
    """The owners of the columns of stacked parameters: slots.

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
    """The rows of one step by slot; built once per step, read at every site.

    Args:
        row_ranges: the adapters' rows in order; all other rows are the base's.
        num_rows: rows of the step.
        num_slots: device slots of the engine.
        virtual: rows that hold virtual tokens, if any.
        last_rows: the index of each request's last row, in order: the rows that the output head gets.

    ``mask`` has bit i set when slot i has a row here, so that a site without work decides it with one ``&``.
    """

    def __init__(
        self,
        row_ranges: Iterable[RowRange],
        num_rows: int,
        num_slots: int,
        *,
        device: torch.device | str = "cpu",
        virtual: VirtualRows | None = None,
        last_rows: StepIndex | None = None,
    ) -> None:
        self.row_ranges = tuple(row_ranges)
        self.num_rows = num_rows
        self.num_slots = num_slots
        self.device = torch.device(device)
        self.virtual = virtual
        self.last_rows = last_rows
        self.mask = 0
        self._by_slot: dict[int, list[RowRange]] = {}
        for each in self.row_ranges:
            self.mask |= 1 << each.slot
            self._by_slot.setdefault(each.slot, []).append(each)
        self._derived: dict[Callable[[StepIndex], Any], Any] = {}
        self._rows: dict[int, slice | Tensor] = {}
        self._virtual: dict[int, tuple[Tensor, Tensor]] = {}
        self._foreign: dict[tuple[tuple[int, int], ...], Tensor] = {}

    @cached_property
    def slots(self) -> Tensor:
        """[num_rows] int64: each row's slot, `num_slots` for the base's rows."""
        slots = torch.full((self.num_rows,), self.num_slots, dtype=torch.int64)
        for slot, start, stop in self.row_ranges:
            slots[start:stop] = slot
        return slots.to(self.device)

    def rows(self, slot: int) -> slice | Tensor:
        """Returns a slot's rows: a slice where they are consecutive, else int64 positions."""
        if slot not in self._rows:
            row_ranges = self._by_slot[slot]
            consecutive = all(a.stop == b.start for a, b in pairwise(row_ranges))
            if consecutive:
                self._rows[slot] = slice(row_ranges[0].start, row_ranges[-1].stop)
            else:
                self._rows[slot] = torch.cat([torch.arange(r.start, r.stop) for r in row_ranges]).to(self.device)
        return self._rows[slot]

    def foreign(self, columns: StackedColumns) -> Tensor:
        """Returns [num_rows, columns] bool: True where a stacked column is of another slot than the row's.

        Sites with equal layouts share one mask per step.
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

    def derived(self, make: Callable[[StepIndex], T]) -> T:
        """Returns `make(self)`, made once per step: the same rows in the form that a backend reads."""
        if make not in self._derived:
            self._derived[make] = make(self)
        made: T = self._derived[make]
        return made

    def set_derived(self, make: Callable[[StepIndex], T], made: T) -> None:
        """Sets what `derived` returns."""
        self._derived[make] = made

    def count(self, slot: int) -> int:
        """Returns the number of rows of a slot in this step."""
        return sum(each.stop - each.start for each in self._by_slot.get(slot, ()))


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
