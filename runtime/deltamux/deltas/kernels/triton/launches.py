"""Launches of shrink and expand: what they read of a module's slots, and into which programs they are cut."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltamux.deltas.kernels.triton import interpreted, table
from deltamux.deltas.kernels.triton.matrix import expand_kernel, shrink_kernel
from deltamux.deltas.kernels.triton.table import StepTable


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
    """Into which programs a launch is cut, by a search on an H200 in bfloat16 with ranks of 16 (docs/gpu.md).

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
    shrink_kernel[grid](
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
    expand_kernel[grid](
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
