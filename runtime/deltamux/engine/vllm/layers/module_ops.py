"""`ModuleOps`: the ops at one module of the engine, of all device slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltamux.deltas.backends.choice import module_batch
from deltamux.deltas.backends.cpu.ops import CPUModuleBatch
from deltamux.deltas.backends.cpu.slot_params import available
from deltamux.deltas.backends.module_batch import ModuleBatch, PackedSlice
from deltamux.deltas.ops import Op, StepIndex
from deltamux.deltas.sites import Site
from deltamux.engine.vllm.layers.fast_path.fast_path import FastPathModule, FastPathOp


class StageKind(NamedTuple):
    """The class of a stage's ops, and what they read."""

    op: type[Op]
    reads_residual: bool


class OpGroup(NamedTuple):
    """Ops of one kind that one adapter has at the slices of a module, at most one per slice.

    Attributes:
        ops: by index of the slice.
    """

    kind: StageKind
    ops: Mapping[int, Op]


def group_ops(ops: Iterable[tuple[int, Op]]) -> tuple[OpGroup, ...]:
    """Returns an adapter's (slice, op) at one module as few groups, which keep the order of the ops at each slice."""
    made: list[tuple[StageKind, dict[int, Op]]] = []
    last: dict[int, int] = {}
    for index, op in ops:
        kind, start = StageKind(type(op), op.reads_residual), last.get(index, -1) + 1
        at = next((i for i in range(start, len(made)) if made[i][0] == kind), len(made))
        if at == len(made):
            made.append((kind, {}))
        made[at][1][index] = op
        last[index] = at
    return tuple(OpGroup(*each) for each in made)


class OpStage(NamedTuple):
    """One kind of op at all slices of a module, batched over the slots."""

    kind: StageKind
    batch: ModuleBatch


class ModuleOps:
    """The stages of one module of the engine, in an order that keeps the order of every program's ops.

    Attributes:
        slices: the sites that the module packs.
        mask: bit i set when slot i has an op here; input_mask: when it has one that changes the input.
        fast_path: the ops as the fast path reads them; None where no CPU kernel runs.
    """

    def __init__(self, slices: Sequence[PackedSlice], num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slices = tuple(slices)
        self.mask = 0
        self.input_mask = 0
        self.fast_path = FastPathModule() if available(dtype, device) else None
        self._fallback_mask = 0
        self._make: Callable[[type[Op]], ModuleBatch] = lambda op: module_batch(op, slices, num_slots, dtype, device)
        self._stages: list[OpStage] = []

    def set(self, slot: int, groups: Iterable[OpGroup]) -> None:
        """Fills an empty slot; its groups apply in the order in which they come."""
        bit, start = 1 << slot, 0
        for kind, ops in groups:
            index = self._stage(kind, start)
            batch = self._stages[index].batch
            batch.set(slot, ops)
            start = index + 1
            self.mask |= bit
            if kind.op.changes_input:
                self.input_mask |= bit
            if not isinstance(batch, CPUModuleBatch):
                self._fallback_mask |= bit
        self._update_fast_path()

    def reset(self, slot: int) -> None:
        """Empties a slot at every slice; an empty slot may be reset again."""
        bit = 1 << slot
        if not self.mask & bit:
            return
        for stage in self._stages:
            stage.batch.reset(slot)
        self.mask &= ~bit
        self.input_mask &= ~bit
        self._fallback_mask &= ~bit
        self._update_fast_path()
        if not self.mask:
            self._stages.clear()
            self._update_fast_path_ops()

    def _stage(self, kind: StageKind, start: int) -> int:
        """Returns the first stage of a kind from `start` on; a new one at the end where there is none."""
        for index in range(start, len(self._stages)):
            if self._stages[index].kind == kind:
                return index
        self._stages.append(OpStage(kind, self._make(kind.op)))
        self._update_fast_path_ops()
        return len(self._stages) - 1

    def apply(
        self, x: Tensor, y: Tensor, step: StepIndex, residual: Tensor | None = None, weights: StepIndex | None = None
    ) -> None:
        """Applies every op of the module to its own rows of `y`, in place.

        Args:
            residual: the residual stream, which some ops read instead of `x`.
            weights: the rows of ops that change the module's weight, where they are not the step's: rows that it leaves
                out have the changed weight already.
        """
        for kind, batch in self._stages:
            rows = weights if weights is not None and kind.op.changes_weight else step
            if batch.mask & rows.mask and not kind.op.changes_input:
                batch.apply(residual if kind.reads_residual and residual is not None else x, y, rows)

    def change_input(self, x: Tensor, step: StepIndex) -> None:
        """Changes every slot's own rows of the module's input, in place."""
        for kind, batch in self._stages:
            if batch.mask & step.mask and kind.op.changes_input:
                batch.apply(x, x, step)

    def _update_fast_path_ops(self) -> None:
        if self.fast_path is not None:
            self.fast_path.set_ops(
                [
                    FastPathOp(batch.params, kind.reads_residual, kind.op.changes_input)
                    for kind, batch in self._stages
                    if isinstance(batch, CPUModuleBatch)
                ]
            )

    def _update_fast_path(self) -> None:
        if self.fast_path is not None:
            self.fast_path.set_slots(self.mask, self.input_mask, self._fallback_mask)


class SiteOps(NamedTuple):
    """The ops of one site: those of one slice of a module."""

    module: ModuleOps
    slice_index: int

    @property
    def site(self) -> Site:
        return self.module.slices[self.slice_index].site
