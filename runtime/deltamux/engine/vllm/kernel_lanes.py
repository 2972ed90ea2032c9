"""Lanes on a device that has Triton's kernels: what fits stands in buffers that never move, the rest in ordinary lanes.

A linear module, fused or not, has one `LinearDeltas` for all its parts, so that LowRank, Scale and Bias cost it two
launches whatever the mix. From the first op on that does not fit, a slot's ops at that place go to ordinary lanes,
which apply behind the kernels: the order that its program has is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from deltamux.deltas import (
    BaseModel,
    BlockSite,
    EmbeddingSite,
    LinearSite,
    NormSite,
    Op,
    ScaleInput,
    SiteKind,
)
from deltamux.deltas.kernels.triton.bottleneck import BottleneckDeltas
from deltamux.deltas.kernels.triton.factors import FactorDeltas
from deltamux.deltas.kernels.triton.linear import LinearDeltas
from deltamux.deltas.kernels.triton.norm import NormDeltas
from deltamux.deltas.kernels.triton.table import StepTable
from deltamux.deltas.kernels.triton.virtual import SoftPromptDeltas
from deltamux.deltas.ops import StepIndex
from deltamux.deltas.ops.batched import Part
from deltamux.engine.vllm.binding import Binding
from deltamux.engine.vllm.lanes import Lanes, Round, rounds
from deltamux.engine.vllm.ports import CurrentStep


class Profile(IntEnum):
    """What a CUDA graph holds beside the base, and so which graph a step may replay.

    LINEAR holds the kernels of linear modules alone, since most adapters are LoRA and every launch of a kernel that has
    nothing to do costs its microseconds; ALL those of norms, sub-layers and scaled inputs as well.
    """

    BASE = 0
    LINEAR = 1
    ALL = 2


def capture_mask(profile: Profile, num_slots: int) -> int:
    """Returns the mask of a step that makes every place of a profile launch its kernels: bits beyond those of slots."""
    return ((1 << profile) - 1) << num_slots


def _capture_bit(profile: Profile, num_slots: int) -> int:
    return 1 << (num_slots + profile - 1) if profile else 0


class Room(NamedTuple):
    """What the kernels' buffers are made for.

    Attributes:
        max_rank: rank of LowRank and width of Bottleneck that a slot has room for; wider ops take ordinary lanes.
    """

    num_slots: int
    max_rank: int
    dtype: torch.dtype
    device: torch.device


class Fixed(Protocol):
    """The parameters of all slots at a module of one part, in buffers that never move."""

    @property
    def mask(self) -> int: ...
    def place(self, slot: int, op: Op) -> bool: ...
    def clear(self, slot: int) -> None: ...
    def apply(self, x: Tensor, y: Tensor, step: StepTable, residual: Tensor | None = None) -> None: ...


class KernelLanes(Lanes, ABC):
    """Lanes with kernels in front of the ordinary ones."""

    def __init__(self, parts: Sequence[Part], room: Room) -> None:
        super().__init__(parts, room.num_slots, room.dtype, room.device)
        self.door = None  # doors lead to the CPU's kernels
        self._rest = Lanes(parts, room.num_slots, room.dtype, room.device)
        self._spilled: set[tuple[int, int]] = set()  # (slot, part)

    def place(self, slot: int, given: Iterable[Round]) -> None:
        rest: list[tuple[int, Op]] = []
        for part, op in ((part, op) for _, ops in given for part, op in ops.items()):
            if (slot, part) in self._spilled or not self._fits(slot, part, op):
                self._spilled.add((slot, part))
                rest.append((part, op))
        self._rest.place(slot, rounds(rest))
        self._update()

    def clear(self, slot: int) -> None:
        self._empty(slot)
        self._rest.clear(slot)
        self._spilled = {(other, part) for other, part in self._spilled if other != slot}
        self._update()

    def apply(
        self, x: Tensor, y: Tensor, step: StepIndex, residual: Tensor | None = None, weights: StepIndex | None = None
    ) -> None:
        assert weights is None  # folding is for CPUs without these kernels
        self._launch(x, y, step, residual)
        if self._rest.mask & step.mask:
            self._rest.apply(x, y, step, residual)

    def change_input(self, x: Tensor, step: StepIndex) -> None:
        self._rest.change_input(x, step)

    @abstractmethod
    def warm_up(self, step: StepIndex) -> None:
        """Launches every kernel of this place once, on rows of its own, in a step that has no row of an adapter."""

    def profile(self, slot: int) -> Profile | None:
        """Returns what a CUDA graph must hold for a slot's ops here; None where no graph can."""
        return None if any(slot == spilled for spilled, _ in self._spilled) else self._needs(slot)

    @abstractmethod
    def _fits(self, slot: int, part: int, op: Op) -> bool:
        """Puts an op into the kernels' buffers; False where it is nothing for them."""

    @abstractmethod
    def _empty(self, slot: int) -> None: ...

    @abstractmethod
    def _launch(self, x: Tensor, y: Tensor, step: StepIndex, residual: Tensor | None) -> None: ...

    @abstractmethod
    def _needs(self, slot: int) -> Profile: ...

    @abstractmethod
    def _update(self) -> None:
        """Sets the masks to those of all that is placed, and the bits that a captured step asks for."""


class WholeLanes(KernelLanes):
    """Lanes of a norm, a sub-layer or the input embedding."""

    def __init__(self, part: Part, room: Room, fixed: Fixed, profile: Profile) -> None:
        super().__init__([part], room)
        self._fixed = fixed
        self._profile = profile
        self._capture = _capture_bit(profile, room.num_slots)
        self._shape = (part.columns.size, room)
        self._update()

    def warm_up(self, step: StepIndex) -> None:
        features, room = self._shape
        y = torch.zeros(step.num_rows, features, dtype=room.dtype, device=room.device)
        self._fixed.apply(y.clone(), y, step.table, y.clone())

    def _fits(self, slot: int, part: int, op: Op) -> bool:
        return self._fixed.place(slot, op)

    def _empty(self, slot: int) -> None:
        if self._fixed.mask & (1 << slot):
            self._fixed.clear(slot)

    def _launch(self, x: Tensor, y: Tensor, step: StepIndex, residual: Tensor | None) -> None:
        if (self._fixed.mask | self._capture) & step.mask:
            self._fixed.apply(x, y, step.table, residual)

    def _needs(self, slot: int) -> Profile:
        return self._profile

    def _update(self) -> None:
        self.mask = self._fixed.mask | self._rest.mask | self._capture


class LinearLanes(KernelLanes):
    """Lanes of a linear module, fused over its parts.

    Attributes:
        owns_input: nobody else reads the module's input, so that a kernel may change it in place.
    """

    def __init__(self, parts: Sequence[Part], room: Room) -> None:
        super().__init__(parts, room)
        sites = [part.site for part in parts if isinstance(part.site, LinearSite)]
        self._first = parts[0].columns.first
        self._end = parts[-1].columns.first + parts[-1].columns.size
        self._deltas = LinearDeltas(sites, *room)
        self._factors = FactorDeltas(sites[0].in_features, room.num_slots, room.dtype, room.device)
        self._shape = (sites[0].in_features, room)
        self._capture = _capture_bit(Profile.LINEAR, room.num_slots)
        self._capture_input = _capture_bit(Profile.ALL, room.num_slots)
        self.owns_input = False
        self._update()

    def warm_up(self, step: StepIndex) -> None:
        features, room = self._shape
        x, y = (
            torch.zeros(step.num_rows, columns, dtype=room.dtype, device=room.device)
            for columns in (features, self._end)
        )
        self._deltas.apply(x, y[:, self._first :], step.table)
        self._deltas.apply(x, y[:, self._first :], step.table, active=0)  # as where no slot of a step has a rank
        if self.owns_input:
            self._factors.apply(x, step.table)

    def own_input(self) -> None:
        """Says that nobody else reads the module's input."""
        self.owns_input = True
        self._update()

    def place(self, slot: int, given: Iterable[Round]) -> None:
        behind = []
        for each in given:
            # The input changes before the module runs, whatever stands before this op in the program.
            if each.kind.op is ScaleInput and self.owns_input:
                for op in each.ops.values():
                    assert isinstance(op, ScaleInput)
                    self._factors.place(slot, op.factor)
            else:
                behind.append(each)
        super().place(slot, behind)

    def change_input(self, x: Tensor, step: StepIndex) -> None:
        if (self._factors.mask | self._capture_input) & step.mask:
            self._factors.apply(x, step.table)
        super().change_input(x, step)

    def _fits(self, slot: int, part: int, op: Op) -> bool:
        return self._deltas.place(slot, part, op)

    def _empty(self, slot: int) -> None:
        for deltas in (self._deltas, self._factors):
            if deltas.mask & (1 << slot):
                deltas.clear(slot)

    def _launch(self, x: Tensor, y: Tensor, step: StepIndex, residual: Tensor | None) -> None:
        y = y[:, self._first : self._end]
        if self._capture & step.mask:
            self._deltas.apply(x, y, step.table)
        elif active := self._deltas.mask & step.mask:
            self._deltas.apply(x, y, step.table, active)

    def _needs(self, slot: int) -> Profile:
        return Profile.ALL if self._factors.mask & (1 << slot) else Profile.LINEAR

    def _update(self) -> None:
        self.input_mask = self._factors.mask | self._rest.input_mask
        if self.owns_input:
            self.input_mask |= self._capture_input
        self.mask = self._deltas.mask | self._factors.mask | self._rest.mask | self._capture


class KernelBinding(Binding):
    """A binding whose modules have kernels wherever their kind has."""

    def __init__(self, model: nn.Module, base: BaseModel, current: CurrentStep, room: Room) -> None:
        self._room = room
        super().__init__(model, base, current, room.num_slots, room.dtype, room.device)
        for port in self.linears.values():
            # As the port does it: what ends a sub-layer is the only reader of its input.
            if port.writes is not None and isinstance(port.lanes, LinearLanes) and len(port.lanes.parts) == 1:
                port.lanes.own_input()

    def warm_up(self, step: StepIndex) -> None:
        """Launches every kernel of every place once; `step` has no row of an adapter."""
        for lanes in {id(place.lanes): place.lanes for place in self.lanes.values()}.values():
            if isinstance(lanes, KernelLanes):
                lanes.warm_up(step)

    def profile(self, slot: int) -> Profile | None:
        """Returns what a CUDA graph must hold for the ops in a slot; None where no graph can."""
        needed = Profile.BASE
        for (kind, _), place in self.lanes.items():
            # Keys and values belong to virtual tokens, whose steps run in no graph; logits are computed outside of all.
            if not place.lanes.mask & (1 << slot) or kind in (SiteKind.ATTENTION, SiteKind.HEAD):
                continue
            at = place.lanes.profile(slot) if isinstance(place.lanes, KernelLanes) else None
            if at is None:
                return None
            needed = max(needed, at)
        return needed

    def _make_lanes(self, *parts: Part) -> Lanes:
        room, site = self._room, parts[0].site
        made = (room.num_slots, room.dtype, room.device)
        if isinstance(site, NormSite):
            return WholeLanes(parts[0], room, NormDeltas(site, *made), Profile.ALL)
        if isinstance(site, BlockSite):
            return WholeLanes(parts[0], room, BottleneckDeltas(site, *room), Profile.ALL)
        if isinstance(site, EmbeddingSite):
            return WholeLanes(parts[0], room, SoftPromptDeltas(site, *made), Profile.BASE)
        adjoin = all(sum(before.columns) == after.columns.first for before, after in pairwise(parts))
        return LinearLanes(parts, room) if isinstance(site, LinearSite) and adjoin else super()._make_lanes(*parts)
