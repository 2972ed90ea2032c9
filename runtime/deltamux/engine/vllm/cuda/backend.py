"""`CudaBackend`: Triton's kernels over static buffers, and the CUDA graph that a step may replay."""

from collections.abc import Iterator
from contextlib import contextmanager

from deltamux.deltas.backends.triton.step_records import StepRecords, records_of
from deltamux.deltas.ops import StepIndex
from deltamux.deltas.ops.step import bits
from deltamux.deltas.program import Program
from deltamux.engine.vllm.cuda.binding import CudaBinding
from deltamux.engine.vllm.cuda.module_ops import BufferSizes
from deltamux.engine.vllm.cuda.profiles import GraphProfile, captured_slots
from deltamux.engine.vllm.layers.current_step import IDLE
from deltamux.engine.vllm.worker.backend import LoadedModel


class CudaBackend:
    """The `DeltaBackend` of GPUs.

    Attributes:
        records: the rows of the step that is active, for the kernels.
    """

    # A step on a GPU is made of launches, not of the deltas' bytes, which merging would save.
    merges = False

    def __init__(self, loaded: LoadedModel) -> None:
        config = loaded.config
        assert config.lora_config is not None
        max_rows = config.scheduler_config.max_num_batched_tokens
        largest_graph = config.compilation_config.max_cudagraph_capture_size or 0
        self.current = loaded.current
        self.records = StepRecords(max_rows, loaded.num_slots, loaded.device, prefill_from=max(512, largest_graph) + 1)
        sizes = BufferSizes(loaded.num_slots, config.lora_config.max_lora_rank, loaded.dtype, loaded.device)
        self.binding: CudaBinding = CudaBinding(loaded.model, loaded.base, loaded.current, loaded.probes, sizes)
        self._profiles: dict[int, GraphProfile | None] = {}
        self._warm_up(max_rows)

    def prepack(self, program: Program) -> None:
        pass

    def slot_loaded(self, slot: int) -> None:
        self._profiles[slot] = self.binding.profile(slot)

    def step_indexed(self, index: StepIndex) -> None:
        index.set_derived(records_of, self.records)
        self.records.fill(index.row_ranges, index.num_rows, index.virtual.tokens if index.virtual is not None else ())

    def profile(self) -> GraphProfile | None:
        """Returns what a CUDA graph must hold to serve the step that is active; None where no graph can."""
        step, needed = self.current.index, GraphProfile.BASE
        if step.virtual is not None:
            return None
        for slot in bits(step.mask):
            profile = self._profiles[slot]
            if profile is None:
                return None
            needed = max(needed, profile)
        return needed

    @contextmanager
    def capturing(self, profile: GraphProfile, num_rows: int) -> Iterator[None]:
        """Makes a step active in which no row has an adapter, and yet all kernels of a profile are launched.

        It overwrites the records: the index of the step before must not be used again.
        """
        if profile is GraphProfile.BASE:
            self.current.begin(IDLE)
        else:
            self.records.fill((), num_rows)
            self.current.begin(CapturedStep(profile, num_rows, self.records))
        try:
            yield
        finally:
            self.current.begin(IDLE)

    def _warm_up(self, max_rows: int) -> None:
        """Compiles the kernels that a step may launch, for both heights of tiles, before a request waits for it."""
        for num_rows in {1, min(max_rows, self.records.prefill_from)}:
            with self.capturing(GraphProfile.ALL, num_rows):
                self.binding.warm_up(self.current.index)


class CapturedStep(StepIndex):
    """A step that all modules of a profile take part in; its rows by slot are in the records alone."""

    def __init__(
        self, profile: GraphProfile, num_rows: int, records: StepRecords, last_rows: StepIndex | None = None
    ) -> None:
        super().__init__((), num_rows, records.num_slots, device=records.device, last_rows=last_rows)
        self.set_derived(records_of, records)
        self.mask = captured_slots(profile, records.num_slots)
