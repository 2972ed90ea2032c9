"""Shrink and expand: two matrices of each slot, at the slot's own rank, around nothing (LowRank) or an activation.

Shrink computes the inner products of a tile's rows with its slot's first matrix, [rank, in]; expand multiplies those by
the second, [out, rank], and finishes the output: y = y * scale + products + bias. Bottleneck is the same pair with a
bias and an activation before the second product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltamux.deltas.backends.triton import step_records

# Fields of a step's records (see `step_records`) and of a slot's description (see `Meta`).
_FIELDS: tl.constexpr = tl.constexpr(step_records.FIELDS)
_ROW: tl.constexpr = tl.constexpr(step_records.ROW)
_TILE_SLOT: tl.constexpr = tl.constexpr(step_records.TILE_SLOT)
_TILE_START: tl.constexpr = tl.constexpr(step_records.TILE_START)
_TILE_COUNT: tl.constexpr = tl.constexpr(step_records.TILE_COUNT)


class Meta:
    """The description of a slot at a slice of a module: four int32 values, all zero for nothing."""

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
    """Bits of `Meta.SOURCE`: shrink reads the sum of those that are set."""

    INPUT = 1
    RESIDUAL = 2
    OUTPUT = 4


FEW_RANKS = 16
"""Ranks that expand multiplies at once where a slot has no more; the least that a tensor core does."""
MANY_RANKS = 64
"""The same for other slots; one that has yet more multiplies them in turns, anew for every block of columns."""

_FEW_RANKS: tl.constexpr = tl.constexpr(FEW_RANKS)
_MANY_RANKS: tl.constexpr = tl.constexpr(MANY_RANKS)
_META: tl.constexpr = tl.constexpr(Meta.VALUES)
_SCALE: tl.constexpr = tl.constexpr(Flag.SCALE)
_BIAS: tl.constexpr = tl.constexpr(Flag.BIAS)
_INNER_BIAS: tl.constexpr = tl.constexpr(Flag.INNER_BIAS)
_INPUT: tl.constexpr = tl.constexpr(Source.INPUT)
_RESIDUAL: tl.constexpr = tl.constexpr(Source.RESIDUAL)
_OUTPUT: tl.constexpr = tl.constexpr(Source.OUTPUT)


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


@triton.jit(do_not_specialize=["slices"])
def shrink_kernel(
    x, residual, y, a, meta, records, products, x_stride, residual_stride, y_stride, split_stride, features, chunk,
    slices, max_rank,
    MIXED: tl.constexpr, DOT: tl.constexpr, OVERLAPS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles, slices x blocks of ranks, splits of the input's columns)."""
    if OVERLAPS:
        # All that was launched before is over now, and expand, which may start, finds the output complete.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    record = records + tl.program_id(0) * _FIELDS
    slot = tl.load(record + _TILE_SLOT)
    if slot < 0:
        return
    slice_index = tl.program_id(1) % slices
    first_rank = tl.program_id(1) // slices * BLOCK_RANK
    described = meta + (slot * slices + slice_index) * _META
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
    weights = a + ((slot * slices + slice_index).to(tl.int64) * max_rank + n[None, :]) * features
    if MIXED:
        # A slot reads none of the rows of what its source leaves out: they may not be finite.
        source = tl.load(described + 2)
        of_x = m < tl.where((source & _INPUT) > 0, count, 0)
        of_residual = m < tl.where((source & _RESIDUAL) > 0, count, 0)
        of_y = m < tl.where((source & _OUTPUT) > 0, count, 0)
    total = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
    begin = tl.program_id(2) * chunk
    for k0 in range(begin, min(begin + chunk, features), BLOCK_IN):
        k = k0 + tl.arange(0, BLOCK_IN)
        inside = (k < features)[None, :]
        at_x = x + rows[:, None] * x_stride + k[None, :]
        if MIXED:
            at_residual = residual + rows[:, None] * residual_stride + k[None, :]
            at_y = y + rows[:, None] * y_stride + k[None, :]
            z = tl.load(at_x, mask=of_x[:, None] & inside, other=0.0).to(tl.float32)
            z += tl.load(at_residual, mask=of_residual[:, None] & inside, other=0.0).to(tl.float32)
            z += tl.load(at_y, mask=of_y[:, None] & inside, other=0.0).to(tl.float32)
        else:
            z = tl.load(at_x, mask=own[:, None] & inside, other=0.0)
        w = tl.load(weights + k[:, None], mask=(k < features)[:, None] & ranked[None, :], other=0.0)
        total += tl.dot(z.to(DOT), w.to(DOT), input_precision="ieee")
    into = products + tl.program_id(2).to(tl.int64) * split_stride
    into += (start + m)[:, None].to(tl.int64) * (slices * max_rank) + slice_index * max_rank + n[None, :]
    tl.store(into, total, mask=own[:, None] & ranked[None, :])


@triton.jit
def _hidden(
    products, split_stride, inner_bias, described, own, r, rank, max_rank,
    SPLITS: tl.constexpr, UNROLLED: tl.constexpr, ACTIVATES: tl.constexpr,
):  # fmt: skip
    """Returns expand's factors, float32: the sum of shrink's splits at `products` [rows, ranks], and its activation."""
    # All the room for ranks is loaded, since loads are wide then; what lies beyond the slot's own was never written.
    there = own[:, None] & (r < tl.where(rank > 0, max_rank, 0))[None, :]
    h = tl.load(products, mask=there, other=0.0)
    if UNROLLED:
        for split in tl.static_range(1, SPLITS):
            h += tl.load(products + split * split_stride, mask=there, other=0.0)
    else:  # the registers have room for a few at a time
        for split in tl.range(1, SPLITS, loop_unroll_factor=4):
            h += tl.load(products + split * split_stride, mask=there, other=0.0)
    h = tl.where((r < rank)[None, :], h, 0.0)
    if ACTIVATES:
        if (tl.load(described + 1) & _INNER_BIAS) != 0:
            h += tl.load(inner_bias + r, mask=r < rank, other=0.0).to(tl.float32)[None, :]
        h = _activated(h, tl.load(described + 3))
    return h


@triton.jit
def _store(at_y, result, total, own, n, end, flags, scale, bias, SCALES: tl.constexpr):
    """Stores result * scale + total + bias at columns `n`, scale and bias where the slot's flags have them."""
    if SCALES:
        scaled = n < tl.where((flags & _SCALE) != 0, end, 0)
        result *= tl.load(scale + n, mask=scaled, other=1.0).to(tl.float32)[None, :]
    result += total
    biased = n < tl.where((flags & _BIAS) != 0, end, 0)
    result += tl.load(bias + n, mask=biased, other=0.0).to(tl.float32)[None, :]
    tl.store(at_y, result.to(at_y.dtype.element_ty), mask=own[:, None] & (n < end)[None, :])


@triton.jit
def _expand_at_once(
    products, split_stride, inner_bias, described, b, scale, bias, at_rows, own, first, end, out_features, rank,
    max_rank, flags,
    RANKS: tl.constexpr, SPLITS: tl.constexpr, SCALES: tl.constexpr, ACTIVATES: tl.constexpr, DOT: tl.constexpr,
    OVERLAPS: tl.constexpr, BLOCK_OUT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Expand for a slot of RANKS ranks at most: what is multiplied stays where it is, and columns stream past."""
    r = tl.arange(0, RANKS)
    # The first block is loaded before the wait, so that its latency passes while shrink still works.
    n = first + tl.arange(0, BLOCK_OUT)
    result = tl.load(at_rows + n[None, :], mask=own[:, None] & (n < end)[None, :], other=0.0)
    at_w = b + r[:, None] * out_features
    w = tl.load(at_w + n[None, :], mask=(r < rank)[:, None] & (n < end)[None, :], other=0.0)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    at = products + r[None, :]
    h = _hidden(
        at, split_stride, inner_bias, described, own, r, rank, max_rank, SPLITS, RANKS <= _FEW_RANKS, ACTIVATES
    ).to(DOT)
    total = tl.dot(h, w.to(DOT), input_precision="ieee")
    _store(at_rows + n[None, :], result.to(tl.float32), total, own, n, end, flags, scale, bias, SCALES)
    for n0 in tl.range(first + BLOCK_OUT, end, BLOCK_OUT, num_stages=STAGES):
        n = n0 + tl.arange(0, BLOCK_OUT)
        result = tl.load(at_rows + n[None, :], mask=own[:, None] & (n < end)[None, :], other=0.0)
        w = tl.load(at_w + n[None, :], mask=(r < rank)[:, None] & (n < end)[None, :], other=0.0)
        total = tl.dot(h, w.to(DOT), input_precision="ieee")
        _store(at_rows + n[None, :], result.to(tl.float32), total, own, n, end, flags, scale, bias, SCALES)


@triton.jit(do_not_specialize=["slices"])
def expand_kernel(
    products, b, scale, bias, inner_bias, meta, columns, records, y, y_stride, split_stride, out_features, slices,
    max_rank,
    SPLITS: tl.constexpr, SCALES: tl.constexpr, ACTIVATES: tl.constexpr, DOT: tl.constexpr, OVERLAPS: tl.constexpr,
    WIDE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles, spans of columns)."""
    record = records + tl.program_id(0) * _FIELDS
    slot = tl.load(record + _TILE_SLOT)
    if slot < 0:
        return
    span = columns + tl.program_id(1) * 3
    slice_index = tl.load(span)
    described = meta + (slot * slices + slice_index) * _META
    rank = tl.load(described)
    flags = tl.load(described + 1)
    if (rank == 0) & (flags == 0):
        return
    start = tl.load(record + _TILE_START)
    m = tl.arange(0, BLOCK_ROWS)
    own = m < tl.load(record + _TILE_COUNT)
    rows = tl.load(records + (start + m) * _FIELDS + _ROW, mask=own, other=0).to(tl.int64)
    # Numbers that come from memory are as aligned as `ALIGNED`; loads and stores are as wide as that.
    first = tl.multiple_of(tl.load(span + 1), ALIGNED)
    end = tl.multiple_of(tl.load(span + 2), ALIGNED)
    at_rows = y + rows[:, None] * y_stride
    wide = slot.to(tl.int64) * out_features
    products += (start + m)[:, None].to(tl.int64) * (slices * max_rank) + slice_index * max_rank
    inner_bias += slot * max_rank
    b += wide * max_rank
    scale += wide
    bias += wide
    if rank <= _FEW_RANKS:
        _expand_at_once(
            products, split_stride, inner_bias, described, b, scale, bias, at_rows, own, first, end, out_features, rank,
            max_rank, flags,
            _FEW_RANKS, SPLITS, SCALES, ACTIVATES, DOT, OVERLAPS, BLOCK_OUT, STAGES,
        )  # fmt: skip
    elif (not WIDE) or rank <= _MANY_RANKS:
        _expand_at_once(
            products, split_stride, inner_bias, described, b, scale, bias, at_rows, own, first, end, out_features, rank,
            max_rank, flags,
            _MANY_RANKS, SPLITS, SCALES, ACTIVATES, DOT, OVERLAPS, BLOCK_OUT, STAGES,
        )  # fmt: skip
    else:
        if OVERLAPS:
            tl.extra.cuda.gdc_wait()
        for n0 in range(first, end, BLOCK_OUT):
            n = n0 + tl.arange(0, BLOCK_OUT)
            inside = n < end
            at_y = at_rows + n[None, :]
            result = tl.load(at_y, mask=own[:, None] & inside[None, :], other=0.0)
            total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
            for r0 in range(0, rank, 32):
                r = r0 + tl.arange(0, 32)
                at = products + r[None, :]
                h = _hidden(at, split_stride, inner_bias, described, own, r, rank, max_rank, SPLITS, False, ACTIVATES)
                at_w = b + r[:, None].to(tl.int64) * out_features + n[None, :]
                w = tl.load(at_w, mask=(r < rank)[:, None] & inside[None, :], other=0.0)
                total += tl.dot(h.to(DOT), w.to(DOT), input_precision="ieee")
            _store(at_y, result.to(tl.float32), total, own, n, end, flags, scale, bias, SCALES)
