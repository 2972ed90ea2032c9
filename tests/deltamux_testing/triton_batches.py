"""A plugin of pytest: every op's batch is the static buffer of its kernels, where it has one (see `test_triton.py`).

Of `test_batched.py` it leaves out what concerns no kernel: ops that have none, and how the torch batches choose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from deltamux.deltas import Bias, Bottleneck, LowRank, NormAffine, Op, Scale, ScaleInput, SoftPrompt
from deltamux.deltas.backends.triton.bottleneck import BottleneckDeltas
from deltamux.deltas.backends.triton.factors import FactorDeltas
from deltamux.deltas.backends.triton.linear import LinearDeltas
from deltamux.deltas.backends.triton.norm import NormDeltas
from deltamux.deltas.backends.triton.step_records import records_of
from deltamux.deltas.backends.triton.virtual import SoftPromptDeltas
from deltamux.deltas.ops import OpBatch, StepIndex
from deltamux.deltas.sites import Site

MAX_RANK = 16
BUFFERS: dict[type[Op], Callable[..., Any]] = {
    LowRank: lambda site, slots, *kind: LinearDeltas([site], slots, MAX_RANK, *kind),
    Scale: lambda site, slots, *kind: LinearDeltas([site], slots, MAX_RANK, *kind),
    Bias: lambda site, slots, *kind: LinearDeltas([site], slots, MAX_RANK, *kind),
    ScaleInput: lambda site, *rest: FactorDeltas(site.in_features, *rest),
    Bottleneck: lambda site, slots, *kind: BottleneckDeltas(site, slots, MAX_RANK, *kind),
    NormAffine: NormDeltas,
    SoftPrompt: SoftPromptDeltas,
}


class BufferBatch(OpBatch):
    """The static buffer of one op's kernels as its batch; a layer passes as `x` what a bottleneck reads."""

    op: type[Op]

    def __init__(self, site: Site, num_slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(site, num_slots, dtype, device)
        self.buffer = BUFFERS[self.op](site, num_slots, dtype, device)

    def _set(self, slot: int, op: Op) -> None:
        if isinstance(op, ScaleInput):
            self.buffer.set(slot, op.factor)
        else:
            assert self.buffer.set(*((slot, 0, op) if isinstance(self.buffer, LinearDeltas) else (slot, op)))

    def _reset(self, slot: int) -> None:
        self.buffer.reset(slot)

    def _apply(self, x: Tensor, y: Tensor, step: StepIndex, active: int) -> None:
        records = step.derived(records_of)
        if isinstance(self.buffer, LinearDeltas):
            self.buffer.apply(x, y, records, active)
        elif isinstance(self.buffer, FactorDeltas):
            self.buffer.apply(y, records)
        elif isinstance(self.buffer, SoftPromptDeltas) and (step.virtual is None or not active & step.virtual.mask):
            pass  # a layer calls it in steps with virtual tokens alone
        else:
            self.buffer.apply(x, y, records, x)


def buffer_batch(op: type[Op]) -> type[OpBatch]:
    """Returns the batch of an op's static buffer."""
    return type(f"{op.__name__}BufferBatch", (BufferBatch,), {"op": op})


def pytest_configure() -> None:
    settings.register_profile("interpreted", max_examples=20, deadline=None)
    settings.load_profile("interpreted")
    for op in BUFFERS:
        op.batch = buffer_batch(op)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if _concerns_kernels(getattr(item, "callspec", None))]
    assert items


def _concerns_kernels(parameters: Any) -> bool:
    if parameters is None:
        return True
    _, op = parameters.params["maker"](0)
    return parameters.params.get("path", "own choice") == "own choice" and type(op) in BUFFERS
