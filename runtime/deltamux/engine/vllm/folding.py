"""Folds the program that dominates the traffic into a second copy of the weights that it changes.

The base's own packed weights stay as they are, so that unfolding frees the second ones and no arithmetic undoes
anything. In a step that is worth it the modules run with the second weights; rows of all others are then projected once
more with the base's, and get their own ops as ever.

Merging reads the base's checkpoint in a thread, and no step waits for it. What touches the engine's
weights (timing, packing) happens between two steps, one module at a time: oneDNN's scratch memory belongs to the thread
that runs the model. Packing costs about what the module itself costs in a step, timing some six times that, and both
are done once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from vllm.logger import init_logger

from deltamux.deltas import Program
from deltamux.deltas.ops import StepIndex
from deltamux.deltas.weights import WeightFiles
from deltamux.engine.vllm.dominance import Action, Costs, Decision, Dominance
from deltamux.engine.vllm.loading import ProgramLoader
from deltamux.engine.vllm.memory import available_memory
from deltamux.engine.vllm.merging import MANY, Change, Merged, Module, changes_of, merged, timed
from deltamux.engine.vllm.ports import FoldedStep

logger = init_logger(__name__)

RESERVE = 1 << 30
"""Bytes that must stay available beside twice the second weights."""
LOOSE = 0.02
"""Relative error up to which a checkpoint's weight is the one that the engine has loaded, in any dtype."""


class Folding:
    """Which program is folded, and what is under way; driven by `begin_step`, and never fails it.

    Args:
        modules: those that can fold.
        checkpoint: directory or Hugging Face id of the base's weights.
        loader: has the programs in host memory; one that is gone from there is unfolded.
        slots: device slot by program, as the manager keeps it.
        available: returns the bytes that the process can still take.

    Attributes:
        folded: the program whose weights are there; None: none.
    """

    def __init__(
        self,
        modules: Sequence[Module],
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
        self._dominance = Dominance()
        self._files: WeightFiles | None = None
        self._thread = ThreadPoolExecutor(1, "delta-folding", initializer=loader.step_aside)
        self._stopped = False
        self._program: int | None = None  # measured, merged or folded
        self._work: Iterator[None] | None = None
        self._merging: Future[Merged] | None = None
        self._changes: list[Change] = []  # whose second weights are there
        self._selected = False
        self._last: tuple[StepIndex, int, FoldedStep | None] | None = None  # of the folded program, in this slot
        self.folded: int | None = None

    def begin_step(self, rows: Mapping[int, int], index: StepIndex) -> FoldedStep | None:
        """Takes the rows of each program in the step to come, 0 for the base's; returns how it is folded, or None.

        The addresses of the weights are those that the step needs when this returns.
        """
        if self._stopped:
            return None
        try:
            self._advance(rows)
        except Exception:
            logger.exception("folding has failed and is off from now on")
            self._stopped = True
            self._unfold("it has failed")
        return self._folded_step(index)

    def idle(self) -> None:
        """A step in which every row is the base's, outside the traffic."""
        self._select(False)

    def drop_gone(self) -> None:
        """Unfolds the program if it is in host memory no longer, and keeps nothing of it."""
        if self._program is not None and self._program not in self._loader.ready:
            self._unfold("it is unloaded")
            self._dominance.keep(self._loader.ready)

    def _advance(self, rows: Mapping[int, int]) -> None:
        self.drop_gone()
        programs = {program: count for program, count in rows.items() if program}
        self._begin(self._dominance.observe(programs, sum(rows.values())))
        if self._work is not None and next(self._work, self) is self:
            self._work = None
            self._program = self.folded

    def _begin(self, decision: Decision) -> None:
        if decision.action is Action.NOTHING:
            return
        if decision.action is Action.UNFOLD:
            self._unfold("others have the traffic")
        elif (program := self._loader.ready.get(decision.program)) is None:
            self._dominance.postpone()
        else:
            self._program = decision.program
            self._work = (self._measure if decision.action is Action.MEASURE else self._fold)(self._program, program)
        self._dominance.keep(self._loader.ready)

    def _folded_step(self, index: StepIndex) -> FoldedStep | None:
        slot = self._slots.get(self.folded) if self.folded is not None else None
        if slot is None:
            self._select(False)
            return None
        # The same object says the same: the manager keeps the index while the same requests decode.
        if self._last is None or self._last[0] is not index or self._last[1] != slot:
            self._last = (index, slot, FoldedStep.of(index, slot) if self._worthwhile(index, slot) else None)
        self._select(self._last[2] is not None)
        return self._last[2]

    def _worthwhile(self, index: StepIndex, slot: int) -> bool:
        assert self.folded is not None
        costs, own = self._dominance.costs(self.folded), index.count(slot)
        return costs is not None and costs.worthwhile(own, index.num_rows - own)

    def _select(self, folded: bool) -> None:
        if folded != self._selected:
            for change in self._changes:
                linear = change.module.linear
                (linear.select_second if folded else linear.select_base)()
            self._selected = folded

    # One module a step.

    def _measure(self, number: int, program: Program) -> Iterator[None]:
        """Times the program's ops against the base's projections, wherever they can fold."""
        parts = []
        for change in changes_of(self._modules, program):
            if (slot := self._slots.get(number)) is None:
                self._dominance.postpone()  # its traffic has ended
                return
            parts.append(timed(change.module, slot, self._num_slots, self._dtype))
            yield
        costs = Costs.total(parts)
        self._dominance.measured(number, costs)
        logger.info("program %d would save %.0f %% if it were folded", number, 100 * costs.gain(MANY, 0))

    def _fold(self, number: int, program: Program) -> Iterator[None]:
        changes = changes_of(self._modules, program)
        size = sum(change.module.num_weights for change in changes) * self._dtype.itemsize
        if self._available() < 2 * size + RESERVE:
            logger.warning_once("program %d is not folded: there is no room for %d MiB", number, size >> 20)
            self._dominance.postpone()
            return
        for change in changes:
            self._merging = self._thread.submit(self._merge, change)
            while not self._merging.done():
                yield
            if (problem := self._take(change, self._merging)) is not None:
                self._unfold(problem)
                self._dominance.refuse(number)
                return
            yield
        self._merging = None
        self.folded = number
        logger.info("program %d is folded: %d modules, %d MiB", number, len(changes), size >> 20)

    def _take(self, change: Change, merging: Future[Merged]) -> str | None:
        """Packs a merged weight; returns why it cannot be."""
        if (error := merging.exception()) is not None:
            return f"{type(error).__name__}: {error}"
        port, linear = change.module
        weight, x, expected = merging.result()
        difference = (linear.product(x).float() - expected).norm() / expected.norm()
        if not difference < LOOSE:
            return f"the engine's weight at {change.module.sites[0].name} is not the checkpoint's"
        linear.set_second(weight)
        port.base = linear.base
        self._changes.append(change)
        return None

    def _merge(self, change: Change) -> Merged:
        """Runs in the thread."""
        self._files = self._files or WeightFiles.locate(self._checkpoint)
        return merged(change, self._files.read, self._dtype)

    def _unfold(self, reason: str) -> None:
        """Goes back to the base's weights everywhere, frees the second ones, and ends what is under way.

        A merge that has begun ends by itself, and for nothing: it holds the tensors of one module until then.
        """
        self._select(False)
        for change in self._changes:
            change.module.port.base = None
            change.module.linear.drop_second()
        if self._merging is not None:
            self._merging.cancel()
        logger.info("program %s is not folded, or no longer: %s", self._program, reason)
        self._changes, self._last = [], None
        self._program = self._work = self._merging = self.folded = None
