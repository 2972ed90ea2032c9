"""Lanes: the ops at one module of the engine, of all device slots, in the order in which they apply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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


class Round(NamedTuple):
    """Ops of one kind that one adapter has at the parts of a module, at most one a part.

    Attributes:
        ops: by part.
    """

    kind: LaneKind
    ops: Mapping[int, Op]


def rounds(ops: Iterable[tuple[int, Op]]) -> tuple[Round, ...]:
    """Returns an adapter's (part, op) at one module as few rounds, which keep the order of the ops at each part."""
    made: list[tuple[LaneKind, dict[int, Op]]] = []
    last: dict[int, int] = {}
    for part, op in ops:
        kind, start = LaneKind(type(op), op.reads_residual), last.get(part, -1) + 1
        index = next((i for i in range(start, len(made)) if made[i][0] == kind), len(made))
        if index == len(made):
            made.append((kind, {}))
        made[index][1][part] = op
        last[part] = index
    return tuple(Round(*each) for each in made)


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

    def place(self, slot: int, given: Iterable[Round]) -> None:
        """Fills an empty slot; its rounds apply in the order in which they come."""
        bit, start = 1 << slot, 0
        for kind, ops in given:
            index = self._lane(kind, start)
            batch = self._lanes[index].batch
            batch.place(slot, ops)
            start = index + 1
            self.mask |= bit
            if kind.op.changes_input:
                self.input_mask |= bit
            if not isinstance(batch, KernelBatch):
                self._python_mask |= bit
        self._tell_door()

    def clear(self, slot: int) -> None:
        """Empties a slot at every part; an empty slot may be cleared again."""
        bit = 1 << slot
        if not self.mask & bit:
            return
        for lane in self._lanes:
            lane.batch.clear(slot)
        self.mask &= ~bit
        self.input_mask &= ~bit
        self._python_mask &= ~bit
        self._tell_door()
        if not self.mask:
            self._lanes.clear()
            self._tell_door_lanes()

    def _lane(self, kind: LaneKind, start: int) -> int:
        """Returns the first lane of a kind from `start` on; the last one, a new lane, where there is none."""
        for index in range(start, len(self._lanes)):
            if self._lanes[index].kind == kind:
                return index
        self._lanes.append(Lane(kind, self._make(kind.op)))
        self._tell_door_lanes()
        return len(self._lanes) - 1

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
