"""Shrink and expand: two matrices of each slot, at the slot's own rank, around nothing (LowRank) or an activation.

Shrink computes the inner products of a tile's rows with its slot's first matrix, [rank, in]; expand multiplies those by
the second, [out, rank], and finishes the output: y = y * scale + products + bias. Bottleneck is the same pair with a
bias and an activation in front of the second product.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltamux.deltas.kernels.triton import interpreted, table
from deltamux.deltas.kernels.triton.table import StepTable

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


class Matrices(NamedTuple):
    """The parameters of all slots at one module, at addresses that stay.

    Attributes:
        a: [slots, parts, max_rank, in].
        b: [slots, out, max_rank]; the parts' columns one after the other.
        scale: [slots, out] or None; bias: [slots, out].
        inner_bias: [slots, max_rank] or None: the module has activations, and one part.
        meta: [slots, parts, Meta.VALUES] int32.
        columns: [blocks, 3] int32: part, first column and end column of each block of columns.
    """

    a: Tensor
    b: Tensor
    scale: Tensor | None
    bias: Tensor
    inner_bias: Tensor | None
    meta: Tensor
    columns: Tensor

    @property
    def parts(self) -> int:
        return self.a.shape[1]

    @property
    def max_rank(self) -> int:
        return self.a.shape[2]


COLUMNS = 128
"""Columns of the output that one program of expand finishes."""
EXPAND_RANKS = 16
"""Ranks that expand multiplies at once; the least that a tensor core does."""


class Cut(NamedTuple):
    """Into which programs a launch is cut: what an H200 was fastest with (`benchmarks.gpu.kernels`, ranks of 16).

    Attributes:
        ranks: of a slot, per program of shrink.
        inner: columns of the input that shrink multiplies at once, in 16 bits; in 32, shared memory has room for a
            quarter.
        split: columns of the input, at least, for each program of shrink: few tiles leave a GPU idle, many do not.
        max_splits: programs that share the input's columns, at most; their products are added up by expand.
        shrink_warps: of a program of shrink; expand_warps: of expand.
    """

    ranks: int
    inner: int
    split: int
    max_splits: int
    shrink_warps: int
    expand_warps: int

    def inner_columns(self, dtype: torch.dtype) -> int:
        return self.inner if dtype.itemsize == 2 else self.inner // 4

    def splits(self, features: int) -> int:
        return max(1, min(self.max_splits, features // self.split))


SHORT = Cut(ranks=16, inner=128, split=512, max_splits=8, shrink_warps=2, expand_warps=4)
TALL = Cut(ranks=32, inner=128, split=1024, max_splits=2, shrink_warps=4, expand_warps=8)


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
def _shrink_kernel(
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
def _expand_kernel(
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


def shrink(matrices: Matrices, x: Tensor, step: StepTable, y: Tensor, residual: Tensor | None = None) -> Tensor:
    """Returns the rows' products with their slots' first matrices, [splits, rows, parts * max_rank] float32.

    Rows stand in the table's order by slot; what lies beyond a slot's rank is never written. Where the module has
    activations, each slot reads what its description says of `x`, `residual` and `y`.
    """
    rows, features = x.shape
    max_rank, parts, cut = matrices.max_rank, matrices.parts, cut_of(step)
    splits, inner = cut.splits(features), cut.inner_columns(x.dtype)
    chunk = -(-features // (splits * inner)) * inner
    products = torch.empty(splits, rows, parts * max_rank, dtype=torch.float32, device=x.device)
    stream = x if residual is None else residual
    grid = (step.max_tiles(rows), parts * triton.cdiv(max_rank, cut.ranks), splits)
    _shrink_kernel[grid](
        x,
        stream,
        y,
        matrices.a,
        matrices.meta,
        step.records,
        products,
        x.stride(0),
        stream.stride(0),
        y.stride(0),
        products.stride(0),
        IN=features,
        PARTS=parts,
        MAX_RANK=max_rank,
        CHUNK=chunk,
        MIXED=matrices.inner_bias is not None,
        DOT=_dot_type(matrices.a.dtype),
        OVERLAPS=overlaps(x.device),
        BLOCK_ROWS=step.tile_rows,
        BLOCK_RANK=cut.ranks,
        BLOCK_IN=inner,
        num_warps=cut.shrink_warps,
    )
    return products


def expand(matrices: Matrices, products: Tensor | None, y: Tensor, step: StepTable) -> None:
    """Finishes the output in place: y = y * scale + products times the second matrices + bias, each row its slot's.

    Args:
        products: what `shrink` returned, launched just before; None where no slot with rows in this step has a rank.
    """
    max_rank = matrices.max_rank
    # Behind another kernel than shrink, it would read an output that is not yet written.
    early = {"launch_pdl": True} if products is not None and overlaps(y.device) else {}
    if products is None:
        products = y.new_empty((1, 1, 1), dtype=torch.float32)  # never read
    grid = (step.max_tiles(y.shape[0]), matrices.columns.shape[0])
    _expand_kernel[grid](
        products,
        matrices.b,
        matrices.bias if matrices.scale is None else matrices.scale,
        matrices.bias,
        matrices.bias if matrices.inner_bias is None else matrices.inner_bias,
        matrices.meta,
        matrices.columns,
        step.records,
        y,
        y.stride(0),
        products.stride(0),
        OUT=matrices.b.shape[1],
        PARTS=matrices.parts,
        MAX_RANK=max_rank,
        SPLITS=products.shape[0],
        SCALES=matrices.scale is not None,
        ACTIVATES=matrices.inner_bias is not None,
        DOT=_dot_type(matrices.b.dtype),
        OVERLAPS=bool(early),
        BLOCK_ROWS=step.tile_rows,
        BLOCK_RANK=EXPAND_RANKS,
        BLOCK_OUT=COLUMNS,
        num_warps=cut_of(step).expand_warps,
        num_stages=1,  # most loops have one turn, and a pipeline would keep every split's products in shared memory
        **early,
    )


@cache
def overlaps(device: torch.device) -> bool:
    """Tells whether expand's programs start while shrink's still work (programmatic dependent launch, from Hopper on).

    They ask for all that shrink does not write, and wait for it in front of its products. Shrink itself starts when all
    before it is over, so that the output which both find is complete.
    """
    return device.type == "cuda" and not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)


def cut_of(step: StepTable) -> Cut:
    """Returns how launches of a step are cut, by the height of its tiles."""
    return SHORT if step.tile_rows == table.SHORT_TILE else TALL


def _dot_type(dtype: torch.dtype) -> tl.dtype:
    """Returns the type that products are taken in; sums are float32 always.

    The interpreter multiplies the bits of bfloat16 as integers; float32 holds the same products exactly.
    """
    if interpreted():
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
