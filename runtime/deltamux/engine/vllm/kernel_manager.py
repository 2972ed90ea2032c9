"""The delta manager of a device that has kernels: the same programs and slots, in buffers that never move."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from vllm.config import VllmConfig

from deltamux.deltas import Program
from deltamux.deltas.kernels.triton.table import Owner, StepTable, VirtualToken
from deltamux.deltas.ops import StepIndex
from deltamux.deltas.ops.batched import bits
from deltamux.engine.vllm.kernel_lanes import KernelBinding, Profile, Room, capture_mask
from deltamux.engine.vllm.manager import DeltaManager, ScheduledRequest
from deltamux.engine.vllm.ports import IDLE, CurrentStep


class KernelDeltaManager(DeltaManager):
    """Fills the step's table beside its index, and knows which CUDA graph a step may replay.

    Attributes:
        table: who owns each row of the step that is active, for the kernels.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(model, vllm_config, device)
        max_rows = vllm_config.scheduler_config.max_num_batched_tokens
        largest_graph = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self.table = StepTable(max_rows, self.num_slots, device, tall_from=max(512, largest_graph) + 1)
        self._profiles: dict[int, Profile | None] = {}
        self._warm_up(max_rows)

    def _bind(self, model: nn.Module, vllm_config: VllmConfig) -> KernelBinding:
        assert vllm_config.lora_config is not None
        room = Room(self.num_slots, vllm_config.lora_config.max_lora_rank, self._dtype, self._device)
        binding = KernelBinding(model, self.base, self._current, room)
        self._kernels = binding
        return binding

    def _new_folding(self, vllm_config: VllmConfig) -> None:
        """Folds nothing: the kernels' launches, not the deltas' bytes, are what a step on a GPU is made of."""

    def _warm_up(self, max_rows: int) -> None:
        """Has Triton compile what a step may launch, for short and for tall tiles, before a request waits for it."""
        for num_rows in {1, min(max_rows, self.table.tall_from)}:
            with self.capturing(Profile.ALL, num_rows):
                self._kernels.warm_up(self._current.index)

    @property
    def current(self) -> CurrentStep:
        """The step that is active, as the ports see it."""
        return self._current

    def profile(self) -> Profile | None:
        """Returns what a CUDA graph must hold to serve the step that is active; None where no graph can."""
        step, needed = self._current.index, Profile.BASE
        if step.virtual is not None:
            return None
        for slot in bits(step.mask):
            profile = self._profiles[slot]
            if profile is None:
                return None
            needed = max(needed, profile)
        return needed

    @contextmanager
    def capturing(self, profile: Profile, num_rows: int) -> Iterator[None]:
        """Makes a step active in which no row has an adapter, and yet all kernels of a profile are launched."""
        self._last = None  # its table is overwritten
        if profile is Profile.BASE:
            self._current.begin(IDLE)
        else:
            self.table.fill((), num_rows)
            self._current.begin(CapturedStep(profile, num_rows, self.table))
        try:
            yield
        finally:
            self._current.begin(IDLE)

    def _activate(self, program_id: int, program: Program, needed: Collection[int]) -> None:
        placed = program_id not in self._slots
        super()._activate(program_id, program, needed)
        if placed:
            slot = self._slots[program_id]
            self._profiles[slot] = self._kernels.profile(slot)

    def _index(self, requests: Sequence[ScheduledRequest]) -> StepIndex:
        index = super()._index(requests)
        index.table = self.table
        self.table.fill((Owner(*run) for run in index.runs), index.num_rows, self._virtual_tokens(requests))
        return index

    def _virtual_tokens(self, requests: Sequence[ScheduledRequest]) -> Iterator[VirtualToken]:
        row = 0
        for program_id, start, num_tokens in requests:
            slot = self._slots.get(program_id)
            if slot is not None:
                end = min(self._num_virtual_tokens[slot], start + num_tokens)
                yield from (VirtualToken(row + p - start, slot, p) for p in range(start, end))
            row += num_tokens


class CapturedStep(StepIndex):
    """A step that every place of a profile takes for its own; whose the rows are, only the table says."""

    def __init__(self, profile: Profile, num_rows: int, table: StepTable, last_rows: StepIndex | None = None) -> None:
        super().__init__((), num_rows, table.num_slots, device=table.device, last_rows=last_rows, table=table)
        self.mask = capture_mask(profile, table.num_slots)
