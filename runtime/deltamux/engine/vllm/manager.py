"""The delta manager: stands where vLLM's LoRA manager stood, and understands programs.

Two tiers live here. The host tier holds programs that are read, cast and checked (by a loader thread, off the step
loop) and keeps exactly what the engine's front end told it to keep. The device slots hold the programs of recent steps,
least recently used first out; putting one in place is all that a step ever does.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger

from deltamux.deltas import BaseModel, Program
from deltamux.deltas.kernels.tables import available
from deltamux.deltas.ops import Run, StepIndex, VirtualRows
from deltamux.engine.vllm.binding import Binding
from deltamux.engine.vllm.ports import IDLE, CurrentStep
from deltamux.errors import BaseMismatchError, FailedPreconditionError

logger = init_logger(__name__)


class ScheduledRequest(NamedTuple):
    """One request's share of a step.

    Attributes:
        program: id of its program, 0 for the base.
        start: position of its first token in this step.
        num_tokens: how many of its tokens are in this step.
    """

    program: int
    start: int
    num_tokens: int


class DeltaManager:
    """Programs of one worker, and which of them the running step uses."""

    def __init__(self, model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> None:
        if vllm_config.parallel_config.tensor_parallel_size > 1:
            raise FailedPreconditionError("deltas are not sharded yet: start the engine with tensor_parallel_size=1")
        lora_config = vllm_config.lora_config
        assert lora_config is not None
        self.num_slots = lora_config.max_loras
        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype)  # vLLM resolves "auto" before a worker starts
        self._dtype = dtype
        self._device = device
        self._current = CurrentStep()
        self.base = BaseModel.from_config(vllm_config.model_config.hf_config)
        self._binding = Binding(model, self.base, self._current, self.num_slots, self._dtype, device)
        self._has_kernels = available(dtype, device)  # compiles them, before the first step needs them
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="delta-loader")
        self._host: dict[int, Future[Program]] = {}
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._num_virtual_tokens = [0] * self.num_slots
        self._pinned: set[int] = set()
        self._lock = threading.Lock()

    # The host tier, driven by the engine's front end.

    def load(self, program_id: int, path: str) -> None:
        """Begins to read a compiled program; returns at once. Loading a program that is there does nothing."""
        with self._lock:
            if program_id not in self._host:
                self._host[program_id] = self._loader.submit(self._read, Path(path))

    def status(self, program_id: int) -> str:
        """Returns ``loading``, ``ready``, ``absent``, or ``failed: `` and the reason."""
        future = self._host.get(program_id)
        if future is None:
            return "absent"
        if not future.done():
            return "loading"
        error = future.exception()
        return "ready" if error is None else f"failed: {error}"

    def unload(self, program_id: int) -> None:
        """Drops a program from both tiers; its tensors are freed when this returns."""
        with self._lock:
            self._host.pop(program_id, None)
        self._pinned.discard(program_id)
        slot = self._slots.pop(program_id, None)
        if slot is not None:
            self._clear(slot)

    def pin(self, program_id: int, pinned: bool) -> None:
        """Keeps a program in its device slot as long as any other can make room, or no longer."""
        (self._pinned.add if pinned else self._pinned.discard)(program_id)

    def resident(self) -> dict[str, list[int]]:
        """Returns the program ids in each tier."""
        return {"host": sorted(self._host), "device": list(self._slots)}

    def _read(self, path: Path) -> Program:
        program = Program.load(path)
        for site, op in program:
            if (problem := self._binding.refusal(site, op)) is not None:
                raise BaseMismatchError(problem, metadata={"site": site})
        program.placed(self.base)
        # Only the cast program matters: what is finite in float32 may overflow in float16.
        program = program.to(self._dtype, "cpu")
        program.check_finite()
        if self._has_kernels:
            program.lay_out()
        return program

    # The step loop.

    def begin_step(self, requests: Sequence[ScheduledRequest]) -> None:
        """Makes the step's programs active: puts missing ones into slots, and indexes who owns each row."""
        # A program that is gone belongs to a request that has ended: vLLM runs one step ahead and discards its row.
        needed = {r.program for r in requests} & self._host.keys()
        for program_id in needed:
            self._activate(program_id, needed)
        self._current.index = self._index(requests) if needed else IDLE

    def _activate(self, program_id: int, needed: set[int]) -> None:
        if program_id in self._slots:
            self._slots.move_to_end(program_id)
            return
        slot = self._free_slot(needed)
        program = self._host[program_id].result()
        for site, op in program:
            self._binding.lanes[op.site_kind, site].place(slot, op.to(self._dtype, self._device))
        self._slots[program_id] = slot
        self._num_virtual_tokens[slot] = program.num_virtual_tokens

    def _free_slot(self, needed: set[int]) -> int:
        if len(self._slots) < self.num_slots:
            return next(slot for slot in range(self.num_slots) if slot not in self._slots.values())
        idle = [program_id for program_id in self._slots if program_id not in needed]
        victim = next((program_id for program_id in idle if program_id not in self._pinned), idle[0])
        slot = self._slots.pop(victim)
        self._clear(slot)
        return slot

    def _clear(self, slot: int) -> None:
        for lanes in self._binding.lanes.values():
            lanes.clear(slot)

    def _index(self, requests: Sequence[ScheduledRequest]) -> StepIndex:
        runs: list[Run] = []
        last: list[Run] = []
        virtual: list[tuple[int, int, int]] = []  # row, slot, position
        row = 0
        for request, (program_id, start, num_tokens) in enumerate(requests):
            slot = self._slots.get(program_id)
            if slot is not None:
                runs.append(Run(slot, row, row + num_tokens))
                last.append(Run(slot, request, request + 1))
                prefix = self._num_virtual_tokens[slot]
                virtual += [(row + p - start, slot, p) for p in range(start, min(prefix, start + num_tokens))]
            row += num_tokens
        last_rows = StepIndex(last, len(requests), self.num_slots, device=self._device)
        virtual_rows = self._virtual(virtual)
        return StepIndex(runs, row, self.num_slots, device=self._device, virtual=virtual_rows, last_rows=last_rows)

    def _virtual(self, entries: list[tuple[int, int, int]]) -> VirtualRows | None:
        if not entries:
            return None
        rows, slots, positions = torch.tensor(entries, device=self._device).unbind(1)
        mask = 0
        for _, slot, _ in entries:
            mask |= 1 << slot
        return VirtualRows(rows, slots, positions, mask)

    # What vLLM's runner asks of a LoRA manager while it profiles and captures: all of it runs as the base.

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    def add_dummy_lora(self, request: object, rank: int) -> bool:
        return True

    def supports_tower_connector_lora(self) -> bool:
        return False

    def set_active_adapters(self, requests: object, mapping: object) -> None:
        self._current.index = IDLE

    def remove_all_adapters(self) -> None:
        for program_id in list(self._slots):
            self._clear(self._slots.pop(program_id))
