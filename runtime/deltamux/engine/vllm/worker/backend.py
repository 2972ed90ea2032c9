"""`DeltaBackend`: the part of the delta manager that differs by device."""

from typing import NamedTuple, Protocol

import torch
from torch import nn
from vllm.config import VllmConfig

from deltamux.deltas import BaseModel
from deltamux.deltas.backends.cpu import ops as cpu_ops
from deltamux.deltas.backends.cpu.slot_params import available
from deltamux.deltas.ops import StepIndex
from deltamux.deltas.program import Program
from deltamux.engine.vllm.layers.binding import Binding
from deltamux.engine.vllm.layers.current_step import CurrentStep
from deltamux.engine.vllm.layers.probes import Probes


class LoadedModel(NamedTuple):
    """The model of a worker, and what the engine was started with.

    Attributes:
        current: the step that is running, shared by all layers.
    """

    model: nn.Module
    base: BaseModel
    config: VllmConfig
    dtype: torch.dtype
    device: torch.device
    num_slots: int
    current: CurrentStep
    probes: Probes


class DeltaBackend(Protocol):
    """The layers of a model on one kind of device, and the work after a change of a slot or a step.

    Attributes:
        binding: the layers with deltas.
        merges: whether a program may be merged into second weights here; see `auto_merge`.
    """

    @property
    def binding(self) -> Binding: ...
    @property
    def merges(self) -> bool: ...

    def __init__(self, loaded: LoadedModel) -> None: ...

    def prepack(self, program: Program) -> None:
        """Lays a program's parameters out as the kernels read them; called off the step loop."""

    def slot_loaded(self, slot: int) -> None:
        """Called when a program was loaded into a slot."""

    def step_indexed(self, index: StepIndex) -> None:
        """Called with each new index of a step, before the step runs."""


class CPUBackend:
    """The CPU kernels where they run, else torch; on any device."""

    merges = True

    def __init__(self, loaded: LoadedModel) -> None:
        kind = (loaded.num_slots, loaded.dtype, loaded.device)
        self.binding = Binding(loaded.model, loaded.base, loaded.current, loaded.probes, *kind)
        self._has_kernels = available(loaded.dtype, loaded.device)  # compiles them, before the first step needs them

    def prepack(self, program: Program) -> None:
        if self._has_kernels:
            cpu_ops.prepack(op for _, op in program)

    def slot_loaded(self, slot: int) -> None:
        pass

    def step_indexed(self, index: StepIndex) -> None:
        pass
