"""Kernels with one program per row: norms, scaled inputs, and rows that are replaced by a slot's own."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from deltamux.deltas.backends.triton import step_records
from deltamux.deltas.backends.triton.step_records import StepRecords

_FIELDS: tl.constexpr = tl.constexpr(step_records.FIELDS)
_SLOT: tl.constexpr = tl.constexpr(step_records.SLOT)
_POSITION: tl.constexpr = tl.constexpr(step_records.POSITION)

WEIGHT = 1
BIAS = 2
"""Bits of what a slot changes of a norm."""
_WEIGHT: tl.constexpr = tl.constexpr(WEIGHT)
_BIAS: tl.constexpr = tl.constexpr(BIAS)
_BLOCK = 1024


@triton.jit
def _norm_kernel(
    x, y, weight, bias, changes, records, x_stride, y_stride, eps,
    FEATURES: tl.constexpr, CENTRES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(records + row * _FIELDS + _SLOT)
    if slot < 0:
        return
    changed = tl.load(changes + slot)
    if changed == 0:
        return
    f = tl.arange(0, BLOCK)
    inside = f < FEATURES
    value = tl.load(x + row * x_stride + f, mask=inside, other=0.0).to(tl.float32)
    if CENTRES:
        value = tl.where(inside, value - tl.sum(value, 0) / FEATURES, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, 0) / FEATURES + eps)
    vector = slot.to(tl.int64) * FEATURES + f
    result = tl.load(y + row * y_stride + f, mask=inside, other=0.0).to(tl.float32)
    if (changed & _WEIGHT) != 0:
        result += value * tl.load(weight + vector, mask=inside, other=0.0).to(tl.float32)
    if (changed & _BIAS) != 0:
        result += tl.load(bias + vector, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * y_stride + f, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _scale_kernel(x, factors, present, records, x_stride, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(records + row * _FIELDS + _SLOT)
    if slot < 0:
        return
    if tl.load(present + slot) == 0:
        return
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < FEATURES
    value = tl.load(x + row * x_stride + f, mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(factors + slot.to(tl.int64) * FEATURES + f, mask=inside, other=1.0).to(tl.float32)
    tl.store(x + row * x_stride + f, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _gather_kernel(values, lengths, records, y, slot_stride, y_stride, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64)
    record = records + row * _FIELDS
    position = tl.load(record + _POSITION)
    slot = tl.load(record + _SLOT)
    if (position < 0) | (slot < 0):
        return
    if position >= tl.load(lengths + slot):
        return
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = f < FEATURES
    at = slot.to(tl.int64) * slot_stride + position.to(tl.int64) * FEATURES + f
    tl.store(y + row * y_stride + f, tl.load(values + at, mask=inside), mask=inside)


def add_norm_change(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, changes: Tensor, step: StepRecords, *, centres: bool, eps: float
) -> None:
    """y += normalise(x) * weight + bias for each row with its slot's vectors, in place.

    Args:
        weight: [slots, features]; bias: the same; changes: [slots] int32, which of the two a slot changes.
    """
    rows, features = y.shape
    block = triton.next_power_of_2(features)
    _norm_kernel[(rows,)](
        x, y, weight, bias, changes, step.records, x.stride(0), y.stride(0), eps,
        FEATURES=features, CENTRES=centres, BLOCK=block, num_warps=min(16, max(4, block // 512)),
    )  # fmt: skip


def scale_rows(x: Tensor, factors: Tensor, present: Tensor, step: StepRecords) -> None:
    """Multiplies each row of `x` by its slot's factors, in place.

    Args:
        factors: [slots, features]; present: [slots] int32, not zero for slots that scale.
    """
    rows, features = x.shape
    _scale_kernel[(rows, triton.cdiv(features, _BLOCK))](
        x, factors, present, step.records, x.stride(0), FEATURES=features, BLOCK=_BLOCK
    )


def replace_virtual_rows(values: Tensor, lengths: Tensor, y: Tensor, step: StepRecords) -> None:
    """Writes each virtual token's own row, of its slot and position, into `y`.

    Args:
        values: [slots, positions, features]; lengths: [slots] int32, how many positions a slot has.
    """
    rows, features = y.shape
    _gather_kernel[(rows, triton.cdiv(features, _BLOCK))](
        values, lengths, step.records, y, values.stride(0), y.stride(0), FEATURES=features, BLOCK=_BLOCK
    )
