"""The step that is running, as the layers read it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from deltamux.deltas.backends.cpu.slot_params import step_rows
from deltamux.deltas.ops import StepIndex
from deltamux.engine.vllm.layers.fast_path.fast_path import FastPathStep

IDLE = StepIndex((), 0, 0)
"""A step in which every row is the base's."""


def of_step(x: Tensor, step: StepIndex) -> Tensor:
    """Returns the rows of `x` that are the step's: all but those that CUDA graphs pad it with."""
    return x if x.shape[0] == step.num_rows else x[: step.num_rows]


class MergedStep(NamedTuple):
    """A step in which modules run with the merged weights of one program (see `auto_merge`).

    Attributes:
        others: rows of all others, which need the base's weights; None when there are none.
        weights: the step without the program's rows, for ops that change a weight.
    """

    others: slice | Tensor | None
    weights: StepIndex

    @classmethod
    def of(cls, step: StepIndex, slot: int) -> MergedStep:
        weights = StepIndex(
            (r for r in step.row_ranges if r.slot != slot), step.num_rows, step.num_slots, device=step.device
        )
        others = (step.slots != slot).nonzero().squeeze(1)
        if not len(others):
            return cls(None, weights)
        first, last = int(others[0]), int(others[-1])
        consecutive = last - first == len(others) - 1
        return cls(slice(first, last + 1) if consecutive else others, weights)


class CurrentStep:
    """The step that is running; one object shared by all layers of a model.

    Attributes:
        index: its rows by slot.
        merged: set where modules run with a program's merged weights.
        fast_path: the step as the fast path reads it.
    """

    def __init__(self) -> None:
        self.fast_path = FastPathStep()
        self.begin(IDLE)

    def begin(self, index: StepIndex, merged: MergedStep | None = None) -> None:
        """Sets the step that is running."""
        self.index, self.merged = index, merged
        if index.device.type == "cpu":
            self.fast_path.set(index.mask, index.derived(step_rows), fallback=merged is not None)
