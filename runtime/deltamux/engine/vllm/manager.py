"""The delta manager: stands where vLLM's LoRA manager stood, and understands programs.

Two tiers live here. The host tier holds programs that are read, cast and checked (by a loader thread, off the step
loop) and keeps exactly what the engine's front end told it to keep. The device slots hold the programs of recent steps,
and give up the one that is worth least (see `residency`); putting one in place is all that a step ever does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.worker.block_table import BlockTable

from deltamux.deltas import BaseModel, KVPrefix, Program
from deltamux.deltas.kernels.tables import available
from deltamux.deltas.ops import Run, StepIndex, VirtualRows
from deltamux.engine.vllm.binding import Binding, Placing
from deltamux.engine.vllm.folding import Folding
from deltamux.engine.vllm.loading import ProgramLoader, on_device, packed
from deltamux.engine.vllm.merging import foldable
from deltamux.engine.vllm.ports import IDLE, CurrentStep
from deltamux.engine.vllm.prefixes import cache_slots, known_prefix
from deltamux.engine.vllm.residency import Residency
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


class Arrival(NamedTuple):
    """What putting a program into a slot needs to know of it.

    Attributes:
        prefix: by attention, where nothing has to be computed for it; see `known_prefix`.
    """

    placings: tuple[Placing, ...]
    num_virtual_tokens: int
    num_bytes: int
    prefix: Mapping[str, KVPrefix] | None


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
        self._binding = self._bind(model, vllm_config)
        self._has_kernels = available(dtype, device)  # compiles them, before the first step needs them
        self.loader = ProgramLoader(self._read)
        self._slots: dict[int, int] = {}
        self._residency: Residency[int] = Residency(self.num_slots)
        self._placed: list[tuple[Placing, ...]] = [()] * self.num_slots
        self._arrivals: WeakKeyDictionary[Program, Arrival] = WeakKeyDictionary()
        self._num_virtual_tokens = [0] * self.num_slots
        self._prefixes: dict[int, Mapping[str, KVPrefix]] = {}
        self._pinned: set[int] = set()
        self._last: tuple[list[int], StepIndex] | None = None
        self._folding = self._new_folding(vllm_config)

    def _bind(self, model: nn.Module, vllm_config: VllmConfig) -> Binding:
        return Binding(model, self.base, self._current, self.num_slots, self._dtype, self._device)

    # The host tier, driven by the engine's front end.

    def unload(self, program_id: int) -> None:
        """Drops a program from both tiers, unfolded first.

        Its tensors are freed when this returns, or as soon as the merge of one module that is under way ends.
        """
        self.loader.drop(program_id)
        if self._folding is not None:
            self._folding.drop_gone()
        self._pinned.discard(program_id)
        self._vacate(program_id)

    def pin(self, program_id: int, pinned: bool) -> None:
        """Keeps a program in its device slot as long as any other can make room, or no longer."""
        (self._pinned.add if pinned else self._pinned.discard)(program_id)
        if program_id in self._slots:
            self._residency.pin(program_id, pinned)

    def bound(self) -> list[tuple[str, str]]:
        """Returns kind and name of every site that takes ops."""
        return [(str(kind), name) for kind, name in self._binding.lanes]

    def resident(self) -> dict[str, list[int]]:
        """Returns the program ids in each tier, those in slots in the order in which they came, and which is folded."""
        folded = self._folding.folded if self._folding is not None else None
        return {
            "host": self.loader.ids(),
            "device": [p for p in self._slots if p in self.loader.ready],
            "folded": [] if folded is None else [folded],
        }

    def _new_folding(self, vllm_config: VllmConfig) -> Folding | None:
        """Returns what folds dominant programs; None where it is not wanted, or no module here can be folded."""
        given = vllm_config.additional_config
        if not isinstance(given, dict) or not given.get("fold_dominant"):
            return None
        modules = foldable(self._binding.linears.values())
        checkpoint = vllm_config.model_config.model
        return Folding(modules, checkpoint, self._dtype, self.num_slots, self.loader, self._slots) if modules else None

    def _read(self, path: Path, sha256: str) -> Program:
        program = Program.load(path, sha256)
        for site, op in program:
            if (problem := self._binding.refusal(site, op)) is not None:
                raise BaseMismatchError(problem, metadata={"site": site})
        program.placed(self.base)
        # Only the cast program matters: what is finite in float32 may overflow in float16.
        program = packed(program, self._dtype, pinned=self._device.type == "cuda")
        if self._has_kernels:
            program.lay_out()
        if self._device.type == "cpu":  # elsewhere the parameters that a slot takes are still to be copied there
            self._arrivals[program] = self._arrival(program)
        return program

    def _arrival(self, program: Program) -> Arrival:
        placings = self._binding.arrange(program)
        return Arrival(placings, program.num_virtual_tokens, program.num_bytes(), known_prefix(program, self.base))

    # The step loop.

    def begin_step(self, requests: Sequence[ScheduledRequest]) -> None:
        """Makes the step's programs active: puts missing ones into slots, and indexes who owns each row."""
        ready = self.loader.ready
        for program_id in [p for p in self._slots if p not in ready]:
            self._vacate(program_id)
        # A program that is gone belongs to a request that has ended: vLLM runs one step ahead and discards its row.
        # Looked up once: the loader thread may drop others at any time.
        needed = {p: program for p in {r.program for r in requests} if (program := ready.get(p)) is not None}
        for program_id, program in needed.items():
            self._activate(program_id, program, needed)
        index = self._cached_index(requests) if needed else IDLE
        folded = None if self._folding is None else self._folding.begin_step(_rows(requests), index)
        self._binding.intercept(index.virtual is not None)
        self._current.begin(index, folded)

    def write_prefixes(self, requests: Sequence[ScheduledRequest], table: BlockTable) -> None:
        """Writes the known prefix of every request that begins right behind it; see `prefixes`.

        Args:
            table: rows of cache blocks, one for each of the step's requests.
        """
        for row, request in enumerate(requests):
            slot = self._slots.get(request.program, -1)
            if slot in self._prefixes and request.start == self._num_virtual_tokens[slot]:
                where = self._moved(cache_slots(table.block_table.np[row], table.block_size, request.start))
                for site, prefix in self._prefixes[slot].items():
                    self._binding.attentions[site].write(prefix, where)

    @property
    def writes_prefixes(self) -> bool:
        """Whether known prefixes can be written into the cache here, instead of being computed."""
        return all(port.can_write for port in self._binding.attentions.values())

    def _activate(self, program_id: int, program: Program, needed: Collection[int]) -> None:
        self._residency.use(program_id)
        if program_id in self._slots:
            return
        slot = self._free_slot(needed)
        arrival = self._arrivals.get(program) or self._arrival(on_device(program, self._device))
        self._slots[program_id] = slot
        self._residency.pin(program_id, program_id in self._pinned)
        self._residency.charge(program_id, arrival.num_bytes)
        for lanes, rounds in arrival.placings:
            lanes.place(slot, rounds)
        self._placed[slot] = arrival.placings
        self._num_virtual_tokens[slot] = arrival.num_virtual_tokens
        if arrival.prefix is not None:
            self._prefixes[slot] = arrival.prefix
        self._last = None

    def _free_slot(self, needed: Collection[int]) -> int:
        if len(self._slots) == self.num_slots:
            victim = self._residency.victim(needed)
            if victim is None:
                victim = self._residency.victim(needed, pinned_too=True)
            assert victim is not None  # the scheduler plans no step with more programs than slots
            self._vacate(victim)
        taken = set(self._slots.values())
        return next(slot for slot in range(self.num_slots) if slot not in taken)

    def _vacate(self, program_id: int) -> None:
        """Empties the slot of a program, if it has one."""
        slot = self._slots.pop(program_id, None)
        self._residency.remove(program_id)
        if slot is not None:
            for lanes, _ in self._placed[slot]:
                lanes.clear(slot)
            self._placed[slot] = ()
            self._num_virtual_tokens[slot] = 0
            self._prefixes.pop(slot, None)
            self._last = None

    def _cached_index(self, requests: Sequence[ScheduledRequest]) -> StepIndex:
        """Returns the last step's index where it says the same: the same requests in the same slots, all decoding."""
        programs = [r.program for r in requests]
        prefix = max(self._num_virtual_tokens)
        decoding = all(r.num_tokens == 1 and r.start >= prefix for r in requests)
        if decoding and self._last is not None and self._last[0] == programs:
            return self._last[1]
        index = self._index(requests)
        self._last = (programs, index) if decoding else None
        return index

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
        rows, slots, positions = self._moved(torch.tensor(entries)).unbind(1)
        mask = 0
        for _, slot, _ in entries:
            mask |= 1 << slot
        return VirtualRows(rows, slots, positions, mask)

    # A step queues its copies to a GPU and never waits: programs lie in pinned memory, small tensors are pinned.

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor if self._device.type == "cpu" else tensor.pin_memory().to(self._device, non_blocking=True)

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
        self._current.begin(IDLE)
        if self._folding is not None:
            self._folding.idle()

    def remove_all_adapters(self) -> None:
        for program_id in list(self._slots):
            self._vacate(program_id)


def _rows(requests: Sequence[ScheduledRequest]) -> dict[int, int]:
    """Returns how many rows of a step each program has, 0 for the base's."""
    rows: dict[int, int] = {}
    for program_id, _, num_tokens in requests:
        rows[program_id] = rows.get(program_id, 0) + num_tokens
    return rows
