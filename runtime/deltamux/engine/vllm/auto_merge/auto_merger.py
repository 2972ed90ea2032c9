"""`AutoMerger`: the program with most of the traffic is merged into a second copy of the weights that it changes.

The base's own packed weights stay as they are, so that unmerging frees the second ones and no arithmetic undoes
anything. In a step that is worth it the modules run with the second weights; rows of all others are then projected once
more with the base's, and get their own ops as before.

Merging reads the base's checkpoint in a thread, and no step waits for it. What touches the engine's weights (timing,
packing) happens between two steps, one module per step: oneDNN's scratch memory belongs to the thread that runs the
model. Packing costs about what the module itself costs in a step, timing some six times that, and both are done once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from deltamux.deltas import Program
from deltamux.deltas.ops import StepIndex
from deltamux.deltas.weights import WeightFiles
from deltamux.engine.vllm.auto_merge.memory import available_memory
from deltamux.engine.vllm.auto_merge.merged_weights import (
    MANY,
    MergeableModule,
    MergedWeight,
    WeightChange,
    changes_of,
    merge_change,
    mergeable_modules,
    time_module,
)
from deltamux.engine.vllm.auto_merge.policy import Action, Costs, Decision, MergePolicy
from deltamux.engine.vllm.layers.current_step import MergedStep
from deltamux.engine.vllm.layers.linear import LinearWithDeltas
from deltamux.engine.vllm.loading.loader import ProgramLoader

logger = init_logger(__name__)

RESERVE = 1 << 30
"""Bytes that must stay available in addition to twice the second weights."""
LOOSE = 0.02
"""Relative error up to which a checkpoint's weight is the one that the engine has loaded, in any dtype."""


class AutoMerger:
    """The merged program, and the work under way; driven by `begin_step`, which it never fails.

    Args:
        modules: those that can merge.
        checkpoint: directory or Hugging Face id of the base's weights.
        loader: has the programs in host memory; one that is gone from there is unmerged.
        slots: device slot by program id.
        available: returns the bytes that the process can still take.

    Attributes:
        merged: id of the program whose merged weights are there; None: none.
    """

    def __init__(
        self,
        modules: Sequence[MergeableModule],
        checkpoint: str,
        dtype: torch.dtype,
        num_slots: int,
        loader: ProgramLoader,
        slots: Mapping[int, int],
        available: Callable[[], int] = available_memory,
    ) -> None:
        self._modules = modules
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._num_slots = num_slots
        self._loader = loader
        self._slots = slots
        self._available = available
        self._policy = MergePolicy()
        self._files: WeightFiles | None = None
        self._thread = ThreadPoolExecutor(1, "delta-merging", initializer=loader.step_aside)
        self._stopped = False
        self._program_id: int | None = None  # under measurement, being merged, or merged
        self._work: Iterator[None] | None = None
        self._merging: Future[MergedWeight] | None = None
        self._changes: list[WeightChange] = []  # whose second weights are there
        self._selected = False
        self._last: tuple[StepIndex, int, MergedStep | None] | None = None  # of the merged program, in this slot
        self.merged: int | None = None

    @classmethod
    def of(
        cls,
        config: VllmConfig,
        linears: Iterable[LinearWithDeltas],
        dtype: torch.dtype,
        num_slots: int,
        loader: ProgramLoader,
        slots: Mapping[int, int],
    ) -> Self | None:
        """Returns the merger of an engine's configuration; None where no module can be merged."""
        given = config.additional_config
        if not isinstance(given, dict) or not given.get("auto_merge"):
            return None
        modules = mergeable_modules(linears)
        return cls(modules, config.model_config.model, dtype, num_slots, loader, slots) if modules else None

    def begin_step(self, rows: Mapping[int, int], index: StepIndex) -> MergedStep | None:
        """Counts the next step's rows of each program, 0 for the base's; returns how it runs merged, or None.

        The addresses of the weights are those that the step needs when this returns.
        """
        if self._stopped:
            return None
        try:
            self._advance(rows)
        except Exception:
            logger.exception("merging has failed and is off from now on")
            self._stopped = True
            self._unmerge("it has failed")
        return self._merged_step(index)

    def idle(self) -> None:
        """Begins a step in which every row is the base's, outside the traffic."""
        self._select(False)

    def drop_gone(self) -> None:
        """Unmerges the program if it is in host memory no longer, and keeps nothing of it."""
        if self._program_id is not None and self._program_id not in self._loader.ready:
            self._unmerge("it is unloaded")
            self._policy.keep(self._loader.ready)

    def _advance(self, rows: Mapping[int, int]) -> None:
        self.drop_gone()
        programs = {program_id: count for program_id, count in rows.items() if program_id}
        self._begin(self._policy.observe(programs, sum(rows.values())))
        if self._work is not None and next(self._work, self) is self:
            self._work = None
            self._program_id = self.merged

    def _begin(self, decision: Decision) -> None:
        if decision.action is Action.NOTHING:
            return
        if decision.action is Action.UNMERGE:
            self._unmerge("others have the traffic")
        elif (program := self._loader.ready.get(decision.program_id)) is None:
            self._policy.postpone()
        else:
            self._program_id = decision.program_id
            self._work = (self._measure if decision.action is Action.MEASURE else self._merge)(
                self._program_id, program
            )
        self._policy.keep(self._loader.ready)

    def _merged_step(self, index: StepIndex) -> MergedStep | None:
        slot = self._slots.get(self.merged) if self.merged is not None else None
        if slot is None:
            self._select(False)
            return None
        # The same object means the same step: the indexer keeps it while the same requests decode.
        if self._last is None or self._last[0] is not index or self._last[1] != slot:
            self._last = (index, slot, MergedStep.of(index, slot) if self._worthwhile(index, slot) else None)
        self._select(self._last[2] is not None)
        return self._last[2]

    def _worthwhile(self, index: StepIndex, slot: int) -> bool:
        assert self.merged is not None
        costs, own = self._policy.costs(self.merged), index.count(slot)
        return costs is not None and costs.worthwhile(own, index.num_rows - own)

    def _select(self, merged: bool) -> None:
        if merged != self._selected:
            for change in self._changes:
                linear = change.module.linear
                (linear.select_second if merged else linear.select_base)()
            self._selected = merged

    # One module per step.

    def _measure(self, program_id: int, program: Program) -> Iterator[None]:
        """Times the program's ops against the base's projections, wherever they can merge."""
        costs_by_module = []
        for change in changes_of(self._modules, program):
            if (slot := self._slots.get(program_id)) is None:
                self._policy.postpone()  # its traffic has ended
                return
            costs_by_module.append(time_module(change.module, slot, self._num_slots, self._dtype))
            yield
        costs = Costs.total(costs_by_module)
        self._policy.measured(program_id, costs)
        logger.info("program %d would save %.0f %% if it were merged", program_id, 100 * costs.gain(MANY, 0))

    def _merge(self, program_id: int, program: Program) -> Iterator[None]:
        changes = changes_of(self._modules, program)
        size = sum(change.module.num_weights for change in changes) * self._dtype.itemsize
        if self._available() < 2 * size + RESERVE:
            logger.warning_once("program %d is not merged: there is no room for %d MiB", program_id, size >> 20)
            self._policy.postpone()
            return
        for change in changes:
            self._merging = self._thread.submit(self._merge_change, change)
            while not self._merging.done():
                yield
            if (problem := self._take(change, self._merging)) is not None:
                self._unmerge(problem)
                self._policy.refuse(program_id)
                return
            yield
        self._merging = None
        self.merged = program_id
        logger.info("program %d is merged: %d modules, %d MiB", program_id, len(changes), size >> 20)

    def _take(self, change: WeightChange, merging: Future[MergedWeight]) -> str | None:
        """Packs a merged weight; returns why it cannot be."""
        if (error := merging.exception()) is not None:
            return f"{type(error).__name__}: {error}"
        layer, linear = change.module
        weight, x, expected = merging.result()
        difference = (linear.product(x).float() - expected).norm() / expected.norm()
        if not difference < LOOSE:
            return f"the engine's weight at {change.module.sites[0].name} is not the checkpoint's"
        linear.set_second(weight)
        layer.base = linear.base
        self._changes.append(change)
        return None

    def _merge_change(self, change: WeightChange) -> MergedWeight:
        """Runs in the thread."""
        self._files = self._files or WeightFiles.locate(self._checkpoint)
        return merge_change(change, self._files.read, self._dtype)

    def _unmerge(self, reason: str) -> None:
        """Goes back to the base's weights everywhere, frees the second ones, and ends what is under way.

        A merge that has begun ends by itself, and its result is dropped: it holds the tensors of one module until then.
        """
        self._select(False)
        for change in self._changes:
            change.module.layer.base = None
            change.module.linear.drop_second()
        if self._merging is not None:
            self._merging.cancel()
        logger.info("program %s is not merged, or no longer: %s", self._program_id, reason)
        self._changes, self._last = [], None
        self._program_id = self._work = self._merging = self.merged = None
