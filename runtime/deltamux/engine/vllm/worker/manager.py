"""`DeltaManager`: in place of vLLM's LoRA manager, with programs of any method."""

from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.v1.worker.block_table import BlockTable

from deltamux.deltas import BaseModel, Program
from deltamux.engine.vllm.auto_merge.auto_merger import AutoMerger
from deltamux.engine.vllm.layers.current_step import IDLE, CurrentStep
from deltamux.engine.vllm.layers.probes import Probes
from deltamux.engine.vllm.loading.blocks import in_one_block, on_device
from deltamux.engine.vllm.loading.loader import ProgramLoader
from deltamux.engine.vllm.prefixes import known_prefix, slot_mapping
from deltamux.engine.vllm.worker.backend import DeltaBackend, LoadedModel
from deltamux.engine.vllm.worker.lora_interface import LoRAManagerInterface
from deltamux.engine.vllm.worker.slots import PreparedProgram, SlotTable
from deltamux.engine.vllm.worker.step import ScheduledRequest, StepIndexer, rows_of
from deltamux.errors import FailedPreconditionError


class DeltaManager(LoRAManagerInterface):
    """The programs of one worker: in host memory, in device slots, and in the running step.

    The loader's threads read the programs that the front end sends into host memory, off the step loop; a step loads
    what it needs from there into slots.

    Attributes:
        current: the step that is running, as the layers read it.
        support: which ops the base takes.
    """

    def __init__(
        self, model: nn.Module, vllm_config: VllmConfig, device: torch.device, backend: type[DeltaBackend]
    ) -> None:
        if vllm_config.parallel_config.tensor_parallel_size > 1:
            raise FailedPreconditionError("deltas are not sharded yet: start the engine with tensor_parallel_size=1")
        lora_config = vllm_config.lora_config
        assert lora_config is not None
        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype)  # vLLM resolves "auto" before a worker starts
        self.base = _base(vllm_config)
        self.current = CurrentStep()
        probes = Probes(self.base.files, dtype, device, quantised=vllm_config.quant_config is not None)
        loaded = LoadedModel(model, self.base, vllm_config, dtype, device, lora_config.max_loras, self.current, probes)
        self.backend = backend(loaded)
        self.loader = ProgramLoader(self._read)
        self.table = SlotTable(loaded.num_slots)
        self.indexer = StepIndexer(self.table, device)
        self._binding = self.backend.binding
        self.support = self._binding.support()
        self._dtype, self._device = dtype, device
        self._prepared: WeakKeyDictionary[Program, PreparedProgram] = WeakKeyDictionary()
        self._merger: AutoMerger | None = None
        if self.backend.merges:
            linears = self._binding.linears.values()
            self._merger = AutoMerger.of(vllm_config, linears, dtype, loaded.num_slots, self.loader, self.table.slots)

    # Host memory, driven by the engine's front end.

    def unload(self, program_id: int) -> None:
        """Drops a program from host memory and from its slot, unmerged first.

        Its tensors are freed when this returns, or as soon as the merge of one module that is under way ends.
        """
        self.loader.drop(program_id)
        if self._merger is not None:
            self._merger.drop_gone()
        self.table.pin(program_id, False)
        self.table.evict(program_id)

    def resident(self) -> dict[str, list[int]]:
        """Returns the program ids in host memory, in slots in the order in which they came, and of merged weights."""
        merged = self._merger.merged if self._merger is not None else None
        return {
            "host": self.loader.ids(),
            "device": [p for p in self.table.slots if p in self.loader.ready],
            "merged": [] if merged is None else [merged],
        }

    def _read(self, path: Path, sha256: str) -> Program:
        program = Program.load(path, sha256)
        program.placed(self.base)
        self.support.check(program)
        program = self._binding.adapted(program)
        # Only the cast program matters: what is finite in float32 may overflow in float16.
        program = in_one_block(program, self._dtype, pinned=self._device.type == "cuda")
        self.backend.prepack(program)
        if self._device.type == "cpu":  # elsewhere the parameters that a slot takes are still to be copied there
            self._prepared[program] = self._prepare(program)
        return program

    def _prepare(self, program: Program) -> PreparedProgram:
        placements = self._binding.group_by_module(program)
        prefix = known_prefix(program, self.base)
        return PreparedProgram(placements, program.num_virtual_tokens, program.num_bytes(), prefix)

    # The step loop.

    def begin_step(self, requests: Sequence[ScheduledRequest]) -> None:
        """Makes the step's programs active: loads missing ones into slots, and sets the rows of each slot."""
        ready = self.loader.ready
        for program_id in [p for p in self.table.slots if p not in ready]:
            self.table.evict(program_id)
        # A program that is gone belongs to a request that has ended: vLLM runs one step ahead and discards its row.
        # Looked up once: the loader's threads may drop others at any time.
        needed = {p: program for p in {r.program_id for r in requests} if (program := ready.get(p)) is not None}
        for program_id, program in needed.items():
            self._load_into_slot(program_id, program, needed)
        index = IDLE
        if needed:
            index, new = self.indexer.index(requests)
            if new:
                self.backend.step_indexed(index)
        merged = None if self._merger is None else self._merger.begin_step(rows_of(requests), index)
        self._binding.intercept(index.virtual is not None)
        self.current.begin(index, merged)

    def write_prefixes(self, requests: Sequence[ScheduledRequest], table: BlockTable) -> None:
        """Writes the known prefix of every request that begins right after it; see `prefixes`.

        Args:
            table: rows of cache blocks, one for each of the step's requests.
        """
        for row, request in enumerate(requests):
            slot = self.table.slots.get(request.program_id, -1)
            program = self.table[slot]
            if slot >= 0 and program.prefix is not None and request.start == program.num_virtual_tokens:
                blocks = table.block_table.np[row]
                where = self.indexer.moved(slot_mapping(blocks, table.block_size, request.start))
                for site, prefix in program.prefix.items():
                    self._binding.attentions[site].write(prefix, where)

    @property
    def writes_prefixes(self) -> bool:
        """Whether known prefixes can be written into the cache here, instead of being computed."""
        return all(attention.can_write for attention in self._binding.attentions.values())

    def _load_into_slot(self, program_id: int, program: Program, needed: dict[int, Program]) -> None:
        def prepare() -> PreparedProgram:
            return self._prepared.get(program) or self._prepare(on_device(program, self._device))

        slot = self.table.use(program_id, prepare, needed)
        if slot is not None:
            self.backend.slot_loaded(slot)

    # vLLM's model runner.

    def set_active_adapters(self, requests: object, mapping: object) -> None:
        self.current.begin(IDLE)
        if self._merger is not None:
            self._merger.idle()

    def remove_all_adapters(self) -> None:
        for program_id in list(self.table.slots):
            self.table.evict(program_id)


def _base(config: VllmConfig) -> BaseModel:
    """Returns the base; without weights where the engine drew random ones."""
    model = config.model_config
    if config.load_config.load_format == "dummy":
        return BaseModel.from_config(model.hf_config)
    return BaseModel.from_checkpoint(model.hf_config, model.model)
