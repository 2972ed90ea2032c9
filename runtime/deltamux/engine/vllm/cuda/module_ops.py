"""`CudaModuleOps`: ops in static buffers that kernels read, and the rest in torch.

A linear module, packed or not, has one `LinearDeltas` for all its slices, so that LowRank, Scale and Bias cost it two
launches whatever the mix. From a slot's first op at a slice on that the buffers have no room for, its ops there apply
in torch, after the kernels: the order that its program has is kept.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deltamux.deltas import LinearSite, Op, ScaleInput
from deltamux.deltas.backends.module_batch import PackedSlice
from deltamux.deltas.backends.triton.factors import FactorDeltas
from deltamux.deltas.backends.triton.linear import LinearDeltas
from deltamux.deltas.backends.triton.step_records import StepRecords, records_of
from deltamux.deltas.ops import StepIndex
from deltamux.engine.vllm.cuda.profiles import GraphProfile, reserved_slot
from deltamux.engine.vllm.layers.module_ops import ModuleOps, OpGroup, group_ops


class BufferSizes(NamedTuple):
    """The sizes of static buffers.

    Attributes:
        max_rank: rank of LowRank and width of Bottleneck that a slot has room for; wider ops run in torch.
    """

    num_slots: int
    max_rank: int
    dtype: torch.dtype
    device: torch.device


class StaticBuffer(Protocol):
    """The parameters of all slots at a module of one slice, at addresses that stay."""

    @property
    def mask(self) -> int: ...
    def set(self, slot: int, op: Op) -> bool: ...
    def reset(self, slot: int) -> None: ...
    def apply(self, x: Tensor, y: Tensor, step: StepRecords, residual: Tensor | None = None) -> None: ...


class CudaModuleOps(ModuleOps, ABC):
    """The ops of a module in static buffers, and in torch what these have no room for."""

    def __init__(self, slices: Sequence[PackedSlice], sizes: BufferSizes) -> None:
        super().__init__(slices, sizes.num_slots, sizes.dtype, sizes.device)
        self.fast_path = None  # of the CPU's kernels
        self._in_torch = ModuleOps(slices, sizes.num_slots, sizes.dtype, sizes.device)
        self._spilled: set[tuple[int, int]] = set()  # (slot, index of the slice)

    def set(self, slot: int, groups: Iterable[OpGroup]) -> None:
        spilled: list[tuple[int, Op]] = []
        for index, op in ((index, op) for _, ops in groups for index, op in ops.items()):
            if (slot, index) in self._spilled or not self._set_buffer(slot, index, op):
                self._spilled.add((slot, index))
                spilled.append((index, op))
        self._in_torch.set(slot, group_ops(spilled))
        self._update_masks()

    def reset(self, slot: int) -> None:
        self._reset_buffer(slot)
        self._in_torch.reset(slot)
        self._spilled = {(other, index) for other, index in self._spilled if other != slot}
        self._update_masks()

    def apply(
        self, x: Tensor, y: Tensor, step: StepIndex, residual: Tensor | None = None, weights: StepIndex | None = None
    ) -> None:
        assert weights is None  # no program is merged on a device with these kernels
        self._launch(x, y, step, residual)
        if self._in_torch.mask & step.mask:
            self._in_torch.apply(x, y, step, residual)

    def change_input(self, x: Tensor, step: StepIndex) -> None:
        self._in_torch.change_input(x, step)

    @abstractmethod
    def warm_up(self, step: StepIndex) -> None:
        """Launches every kernel of this module once, on rows of its own, in a step that has no row of an adapter."""

    def profile(self, slot: int) -> GraphProfile | None:
        """Returns what a CUDA graph must hold for a slot's ops here; None where no graph can."""
        return None if any(slot == spilled for spilled, _ in self._spilled) else self._profile_of(slot)

    @abstractmethod
    def _set_buffer(self, slot: int, index: int, op: Op) -> bool:
        """Puts an op into a buffer; False, and no change, where there is no room for it."""

    @abstractmethod
    def _reset_buffer(self, slot: int) -> None: ...

    @abstractmethod
    def _launch(self, x: Tensor, y: Tensor, step: StepIndex, residual: Tensor | None) -> None: ...

    @abstractmethod
    def _profile_of(self, slot: int) -> GraphProfile: ...

    @abstractmethod
    def _update_masks(self) -> None:
        """Sets the masks to the slots with ops here, and the reserved ones of the profiles with kernels here."""


class CudaSiteOps(CudaModuleOps):
    """The ops of a norm, a sub-layer or the input embedding."""

    def __init__(self, packed: PackedSlice, sizes: BufferSizes, buffer: StaticBuffer, profile: GraphProfile) -> None:
        super().__init__([packed], sizes)
        self._buffer = buffer
        self._profile = profile
        self._reserved = reserved_slot(profile, sizes.num_slots)
        self._features, self._sizes = packed.columns.size, sizes
        self._update_masks()

    def warm_up(self, step: StepIndex) -> None:
        y = torch.zeros(step.num_rows, self._features, dtype=self._sizes.dtype, device=self._sizes.device)
        self._buffer.apply(y.clone(), y, step.derived(records_of), y.clone())

    def _set_buffer(self, slot: int, index: int, op: Op) -> bool:
        return self._buffer.set(slot, op)

    def _reset_buffer(self, slot: int) -> None:
        if self._buffer.mask & (1 << slot):
            self._buffer.reset(slot)

    def _launch(self, x: Tensor, y: Tensor, step: StepIndex, residual: Tensor | None) -> None:
        if (self._buffer.mask | self._reserved) & step.mask:
            self._buffer.apply(x, y, step.derived(records_of), residual)

    def _profile_of(self, slot: int) -> GraphProfile:
        return self._profile

    def _update_masks(self) -> None:
        self.mask = self._buffer.mask | self._in_torch.mask | self._reserved


class CudaLinearOps(CudaModuleOps):
    """The ops of a linear module, of all its slices together.

    Attributes:
        owns_input: nothing else reads the module's input, so that a kernel may change it in place.
    """

    def __init__(self, slices: Sequence[PackedSlice], sizes: BufferSizes) -> None:
        super().__init__(slices, sizes)
        sites = [each.site for each in slices if isinstance(each.site, LinearSite)]
        self._first = slices[0].columns.first
        self._end = slices[-1].columns.first + slices[-1].columns.size
        self._deltas = LinearDeltas(sites, *sizes)
        self._factors = FactorDeltas(sites[0].in_features, sizes.num_slots, sizes.dtype, sizes.device)
        self._in_features, self._sizes = sites[0].in_features, sizes
        self._reserved = reserved_slot(GraphProfile.LINEAR, sizes.num_slots)
        self._reserved_input = reserved_slot(GraphProfile.ALL, sizes.num_slots)
        self.owns_input = False
        self._update_masks()

    def warm_up(self, step: StepIndex) -> None:
        dtype, device = self._sizes.dtype, self._sizes.device
        x, y = (torch.zeros(step.num_rows, n, dtype=dtype, device=device) for n in (self._in_features, self._end))
        records = step.derived(records_of)
        self._deltas.apply(x, y[:, self._first :], records)
        self._deltas.apply(x, y[:, self._first :], records, active=0)  # as where no slot of a step has a rank
        if self.owns_input:
            self._factors.apply(x, records)

    def own_input(self) -> None:
        """Sets `owns_input`."""
        self.owns_input = True
        self._update_masks()

    def set(self, slot: int, groups: Iterable[OpGroup]) -> None:
        others = []
        for group in groups:
            # The input changes before the module runs, whatever the program has before this op.
            if group.kind.op is ScaleInput and self.owns_input:
                for op in group.ops.values():
                    assert isinstance(op, ScaleInput)
                    self._factors.set(slot, op.factor)
            else:
                others.append(group)
        super().set(slot, others)

    def change_input(self, x: Tensor, step: StepIndex) -> None:
        if (self._factors.mask | self._reserved_input) & step.mask:
            self._factors.apply(x, step.derived(records_of))
        super().change_input(x, step)

    def _set_buffer(self, slot: int, index: int, op: Op) -> bool:
        return self._deltas.set(slot, index, op)

    def _reset_buffer(self, slot: int) -> None:
        for buffer in (self._deltas, self._factors):
            if buffer.mask & (1 << slot):
                buffer.reset(slot)

    def _launch(self, x: Tensor, y: Tensor, step: StepIndex, residual: Tensor | None) -> None:
        y = y[:, self._first : self._end]
        if self._reserved & step.mask:
            self._deltas.apply(x, y, step.derived(records_of))
        elif active := self._deltas.mask & step.mask:
            self._deltas.apply(x, y, step.derived(records_of), active)

    def _profile_of(self, slot: int) -> GraphProfile:
        return GraphProfile.ALL if self._factors.mask & (1 << slot) else GraphProfile.LINEAR

    def _update_masks(self) -> None:
        self.input_mask = self._factors.mask | self._in_torch.input_mask
        if self.owns_input:
            self.input_mask |= self._reserved_input
        self.mask = self._deltas.mask | self._factors.mask | self._in_torch.mask | self._reserved
