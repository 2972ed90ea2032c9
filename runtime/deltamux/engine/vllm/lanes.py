"""Lanes: the ops at one module of the engine, of all device slots, in the order in which they apply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltamux.deltas.batches import module_batch
from deltamux.deltas.kernels import doors
from deltamux.deltas.kernels.tables import available
from deltamux.deltas.ops import Op, StepIndex
from deltamux.deltas.ops.batched import KernelBatch, ModuleBatch, Part
from deltamux.deltas.sites import Site


class LaneKind(NamedTuple):
    """What the ops of one lane share."""

    op: type[Op]
    reads_residual: bool


class Lane(NamedTuple):
    """One op at all parts of a module, and how it reads."""

    kind: LaneKind
    batch: ModuleBatch


class Lanes:
    """The op batches of one module of the engine, in an order that keeps every program's own.

    Attributes:
        parts: the sites that the module fuses.
        mask: bit i set when slot i has an op here; input_mask: when it has one that changes the input.
        door: its ops for the doors of the CPU kernels; None where these do not run.
    """

    def __init__(self, parts: Sequence[Part], num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.parts = tuple(parts)
        self.mask = 0
        self.input_mask = 0
        self.door = doors.ModuleLanes() if available(dtype, device) else None
        self._python_mask = 0
        self._make: Callable[[type[Op]], ModuleBatch] = lambda op: module_batch(op, parts, num_slots, dtype, device)
        self._lanes: list[Lane] = []
        self._last: dict[int, dict[int, int]] = {}

    def place(self, slot: int, part: int, op: Op) -> None:
        """Adds a slot's next op at a part; ops of one slot at one part apply in the order in which they come."""
        kind, last = LaneKind(type(op), op.reads_residual), self._last.setdefault(slot, {})
        start = last.get(part, -1) + 1
        index = next((i for i in range(start, len(self._lanes)) if self._lanes[i].kind == kind), len(self._lanes))
        if index == len(self._lanes):
            self._lanes.append(Lane(kind, self._make(kind.op)))
            self._tell_door_lanes()
        batch = self._lanes[index].batch
        batch.place(slot, part, op)
        last[part] = index
        self.mask |= 1 << slot
        if op.changes_input:
            self.input_mask |= 1 << slot
        if not isinstance(batch, KernelBatch):
            self._python_mask |= 1 << slot
        self._tell_door()

    def clear(self, slot: int) -> None:
        """Empties a slot at every part; an empty slot may be cleared again."""
        if self._last.pop(slot, None) is None:
            return
        for lane in self._lanes:
            lane.batch.clear(slot)
        self.mask &= ~(1 << slot)
        self.input_mask &= ~(1 << slot)
        self._python_mask &= ~(1 << slot)
        self._tell_door()
        if not self._last:
            self._lanes.clear()
            self._tell_door_lanes()

    def apply(
        self, x: Tensor, y: Tensor, step: StepIndex, residual: Tensor | None = None, weights: StepIndex | None = None
    ) -> None:
        """Applies every op of the module to its own rows of `y`, in place; `residual` stands in for `x` where due.

        `weights` stands in for `step` at ops that change the module's weight: rows that it leaves out have it already.
        """
        for kind, batch in self._lanes:
            rows = weights if weights is not None and kind.op.changes_weight else step
            if batch.mask & rows.mask and not kind.op.changes_input:
                batch.apply(residual if kind.reads_residual and residual is not None else x, y, rows)

    def change_input(self, x: Tensor, step: StepIndex) -> None:
        """Changes every slot's own rows of the module's input, in place."""
        for kind, batch in self._lanes:
            if batch.mask & step.mask and kind.op.changes_input:
                batch.apply(x, x, step)

    def _tell_door_lanes(self) -> None:
        if self.door is not None:
            self.door.set_tables(
                [
                    doors.LaneTable(batch.table, kind.reads_residual, kind.op.changes_input)
                    for kind, batch in self._lanes
                    if isinstance(batch, KernelBatch)
                ]
            )

    def _tell_door(self) -> None:
        if self.door is not None:
            self.door.set_slots(self.mask, self.input_mask, self._python_mask)


class Place(NamedTuple):
    """Where the ops of one site go: one part of a module's lanes."""

    lanes: Lanes
    part: int

    @property
    def site(self) -> Site:
        return self.lanes.parts[self.part].site

    def place(self, slot: int, op: Op) -> None:
        self.lanes.place(slot, self.part, op)

    def clear(self, slot: int) -> None:
        """Empties the slot at the whole module."""
        self.lanes.clear(slot)
