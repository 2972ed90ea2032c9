"""Shrink and expand: two matrices of each slot, at the slot's own rank, around nothing (LowRank) or an activation.

Shrink computes the inner products of a tile's rows with its slot's first matrix, [rank, in]; expand multiplies those by
the second, [out, rank], and finishes the output: y = y * scale + products + bias. Bottleneck is the same pair with a
bias and an activation in front of the second product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltamux.deltas.kernels.triton import table

# What the kernels know of a step's records and of a slot's description; see `table` and `Meta`.
_FIELDS: tl.constexpr = tl.constexpr(table.FIELDS)
_ROW: tl.constexpr = tl.constexpr(table.ROW)
_TILE_SLOT: tl.constexpr = tl.constexpr(table.TILE_SLOT)
_TILE_START: tl.constexpr = tl.constexpr(table.TILE_START)
_TILE_COUNT: tl.constexpr = tl.constexpr(table.TILE_COUNT)


class Meta:
    """What a slot has at a part of a module: four int32 values, all zero for nothing."""

    RANK = 0
    FLAGS = 1
    SOURCE = 2
    ACTIVATION = 3
    VALUES = 4


class Flag:
    """Bits of `Meta.FLAGS`."""

    SCALE = 1
    BIAS = 2
    INNER_BIAS = 4


class Source:
    """What shrink reads, `Meta.SOURCE`: bits, of which the ones that are set are added up."""

    INPUT = 1
    RESIDUAL = 2
    OUTPUT = 4


_META: tl.constexpr = tl.constexpr(Meta.VALUES)
_SCALE: tl.constexpr = tl.constexpr(Flag.SCALE)
_BIAS: tl.constexpr = tl.constexpr(Flag.BIAS)
_INNER_BIAS: tl.constexpr = tl.constexpr(Flag.INNER_BIAS)
_INPUT: tl.constexpr = tl.constexpr(Source.INPUT)
_RESIDUAL: tl.constexpr = tl.constexpr(Source.RESIDUAL)
_OUTPUT: tl.constexpr = tl.constexpr(Source.OUTPUT)

ACTIVATION_CODES = {
    "identity": 0,
    "relu": 1,
    "gelu": 2,
    "gelu_new": 3,
    "silu": 4,
    "swish": 4,
    "tanh": 5,
    "sigmoid": 6,
    "leaky_relu": 7,
}


@triton.jit
def _activated(h, code):
    """One activation for the whole program, chosen by the slot's code; what is not finite stays so."""
    if code == 1:
        h = tl.where(h < 0, 0.0, h)
    if code == 2:
        h = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    if code == 3:
        h = h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    if code == 4:
        h = h * tl.sigmoid(h)
    if code == 5:
        h = 2.0 * tl.sigmoid(2.0 * h) - 1.0
    if code == 6:
        h = tl.sigmoid(h)
    if code == 7:
        h = tl.where(h < 0, 0.01 * h, h)
    return h


@triton.jit
def shrink_kernel(
    x,
    residual,
    y,
    a,
    meta,
    records,
    products,
    x_stride,
    residual_stride,
    y_stride,
    split_stride,
    IN: tl.constexpr,
    PARTS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    MIXED: tl.constexpr,
    DOT: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Grid: (tiles, parts x blocks of ranks, splits of the input's columns)."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
    record = records + tl.program_id(0) * _FIELDS
    slot = tl.load(record + _TILE_SLOT)
    if slot < 0:
        return
    part = tl.program_id(1) % PARTS
    first_rank = tl.program_id(1) // PARTS * BLOCK_RANK
    described = meta + (slot * PARTS + part) * _META
    rank = tl.load(described)
    if first_rank >= rank:
        return
    start = tl.load(record + _TILE_START)
    m = tl.arange(0, BLOCK_ROWS)
    count = tl.load(record + _TILE_COUNT)
    own = m < count
    rows = tl.load(records + (start + m) * _FIELDS + _ROW, mask=own, other=0).to(tl.int64)
    n = first_rank + tl.arange(0, BLOCK_RANK)
    ranked = n < rank
    weights = a + ((slot * PARTS + part).to(tl.int64) * MAX_RANK + n[None, :]) * IN
    if MIXED:
        # A slot reads none of the rows of what its source leaves out: they may not be finite.
        source = tl.load(described + 2)
        of_x = m < tl.where((source & _INPUT) > 0, count, 0)
        of_residual = m < tl.where((source & _RESIDUAL) > 0, count, 0)
        of_y = m < tl.where((source & _OUTPUT) > 0, count, 0)
    total = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
    begin = tl.program_id(2) * CHUNK
    for k0 in range(begin, min(begin + CHUNK, IN), BLOCK_IN):
        k = k0 + tl.arange(0, BLOCK_IN)
        inside = (k < IN)[None, :]
        at_x = x + rows[:, None] * x_stride + k[None, :]
        if MIXED:
            at_residual = residual + rows[:, None] * residual_stride + k[None, :]
            at_y = y + rows[:, None] * y_stride + k[None, :]
            z = tl.load(at_x, mask=of_x[:, None] & inside, other=0.0).to(tl.float32)
            z += tl.load(at_residual, mask=of_residual[:, None] & inside, other=0.0).to(tl.float32)
            z += tl.load(at_y, mask=of_y[:, None] & inside, other=0.0).to(tl.float32)
        else:
            z = tl.load(at_x, mask=own[:, None] & inside, other=0.0)
        w = tl.load(weights + k[:, None], mask=(k < IN)[:, None] & ranked[None, :], other=0.0)
        total += tl.dot(z.to(DOT), w.to(DOT), input_precision="ieee")
    into = products + tl.program_id(2).to(tl.int64) * split_stride
    into += (start + m)[:, None].to(tl.int64) * (PARTS * MAX_RANK) + part * MAX_RANK + n[None, :]
    tl.store(into, total, mask=own[:, None] & ranked[None, :])


@triton.jit
def expand_kernel(
    products,
    b,
    scale,
    bias,
    inner_bias,
    meta,
    columns,
    records,
    y,
    y_stride,
    split_stride,
    OUT: tl.constexpr,
    PARTS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALES: tl.constexpr,
    ACTIVATES: tl.constexpr,
    DOT: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Grid: (tiles, blocks of columns)."""
    record = records + tl.program_id(0) * _FIELDS
    slot = tl.load(record + _TILE_SLOT)
    if slot < 0:
        return
    block = columns + tl.program_id(1) * 3
    part = tl.load(block)
    described = meta + (slot * PARTS + part) * _META
    rank = tl.load(described)
    flags = tl.load(described + 1)
    if (rank == 0) & (flags == 0):
        return
    start = tl.load(record + _TILE_START)
    m = tl.arange(0, BLOCK_ROWS)
    own = m < tl.load(record + _TILE_COUNT)
    rows = tl.load(records + (start + m) * _FIELDS + _ROW, mask=own, other=0).to(tl.int64)
    n = tl.load(block + 1) + tl.arange(0, BLOCK_OUT)
    inside = n < tl.load(block + 2)
    vectors = slot.to(tl.int64) * OUT + n
    # What does not depend on shrink is asked for first, so that its latency passes while shrink still works.
    at_y = y + rows[:, None] * y_stride + n[None, :]
    result = tl.load(at_y, mask=own[:, None] & inside[None, :], other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    for r0 in range(0, rank, BLOCK_RANK):
        r = r0 + tl.arange(0, BLOCK_RANK)
        ranked = r < rank
        w = tl.load(b + vectors[None, :] * MAX_RANK + r[:, None], mask=ranked[:, None] & inside[None, :], other=0.0)
        if OVERLAPS:
            tl.extra.cuda.gdc_wait()
        at = products + (start + m)[:, None].to(tl.int64) * (PARTS * MAX_RANK) + part * MAX_RANK + r[None, :]
        h = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            h += tl.load(at + split * split_stride, mask=own[:, None] & ranked[None, :], other=0.0)
        if ACTIVATES:
            if (flags & _INNER_BIAS) != 0:
                h += tl.load(inner_bias + slot * MAX_RANK + r, mask=ranked, other=0.0).to(tl.float32)[None, :]
            h = _activated(h, tl.load(described + 3))
        total += tl.dot(h.to(DOT), w.to(DOT), input_precision="ieee")
    if SCALES:
        if (flags & _SCALE) != 0:
            result *= tl.load(scale + vectors, mask=inside, other=1.0).to(tl.float32)[None, :]
    result += total
    if (flags & _BIAS) != 0:
        result += tl.load(bias + vectors, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(at_y, result.to(y.dtype.element_ty), mask=own[:, None] & inside[None, :])
