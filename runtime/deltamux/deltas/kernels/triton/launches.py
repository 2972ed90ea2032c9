"""Launches of shrink and expand: what they read of a module's slots, and into which programs they are cut."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltamux.deltas.kernels.triton import interpreted, table
from deltamux.deltas.kernels.triton.matrix import MANY_RANKS, expand_kernel, shrink_kernel
from deltamux.deltas.kernels.triton.table import StepTable


class Matrices(NamedTuple):
    """The parameters of all slots at one module, at addresses that stay.

    Attributes:
        a: [slots, parts, max_rank, in].
        b: [slots, max_rank, out]; the parts' columns one after the other.
        scale: [slots, out] or None; bias: [slots, out].
        inner_bias: [slots, max_rank] or None: the module has activations, and one part.
        meta: [slots, parts, Meta.VALUES] int32.
        columns: by the width of spans, [spans, 3] int32: part, first and end column of each span of columns.
        aligned: what divides all columns where a part begins or ends, 16 at most.
    """

    a: Tensor
    b: Tensor
    scale: Tensor | None
    bias: Tensor
    inner_bias: Tensor | None
    meta: Tensor
    columns: dict[int, Tensor]
    aligned: int

    @property
    def parts(self) -> int:
        return self.a.shape[1]

    @property
    def max_rank(self) -> int:
        return self.a.shape[2]


class Cut(NamedTuple):
    """Into which programs a launch is cut, by `benchmarks.gpu.search` on an H200 (docs/gpu.md).

    Attributes:
        ranks: of a slot, per program of shrink.
        inner: columns of the input that shrink multiplies at once, see `inner_columns`.
        split: columns of the input, at least, for each program of shrink: few tiles leave a GPU idle, many do not.
        max_splits: programs that share the input's columns, at most; their products are added up by expand.
        shrink_warps: of a program of shrink.
        span: columns of the output that one program of expand finishes, `columns` of them at a time.
        expand_warps: of a program of expand; stages: blocks of columns that are on their way to it.
    """

    ranks: int
    inner: int
    split: int
    max_splits: int
    shrink_warps: int
    columns: int
    span: int
    expand_warps: int
    stages: int

    def inner_columns(self, dtype: torch.dtype, *, mixed: bool) -> int:
        """Returns how many columns shrink multiplies at once: fewer of 32 bits, or of three inputs, have room."""
        return self.inner // (1 if dtype.itemsize == 2 else 4) // (2 if mixed else 1)

    def out_columns(self, dtype: torch.dtype) -> int:
        return self.columns if dtype.itemsize == 2 else self.columns // 2

    def splits(self, features: int) -> int:
        return max(1, min(self.max_splits, features // self.split))


SHORT = Cut(16, 128, split=512, max_splits=28, shrink_warps=2, columns=64, span=128, expand_warps=4, stages=1)
TALL = Cut(64, 128, split=1024, max_splits=2, shrink_warps=4, columns=64, span=512, expand_warps=4, stages=3)


def shrink(matrices: Matrices, x: Tensor, step: StepTable, y: Tensor, residual: Tensor | None = None) -> Tensor:
    """Returns the rows' products with their slots' first matrices, [splits, rows, parts * max_rank] float32.

    Rows stand in the table's order by slot; what lies beyond a slot's rank is never written. Where the module has
    activations, each slot reads what its description says of `x`, `residual` and `y`.
    """
    rows, features = x.shape
    max_rank, parts, cut = matrices.max_rank, matrices.parts, cut_of(step)
    mixed = matrices.inner_bias is not None
    splits, inner = cut.splits(features), cut.inner_columns(x.dtype, mixed=mixed)
    chunk = -(-features // (splits * inner)) * inner
    products = torch.empty(splits, rows, parts * max_rank, dtype=torch.float32, device=x.device)
    stream = x if residual is None else residual
    grid = (step.max_tiles(rows), parts * triton.cdiv(max_rank, cut.ranks), splits)
    early = {"launch_pdl": True} if overlaps(x.device) else {}
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
        features,
        chunk,
        parts,
        max_rank,
        MIXED=mixed,
        DOT=_dot_type(matrices.a.dtype),
        OVERLAPS=bool(early),
        BLOCK_ROWS=step.tile_rows,
        BLOCK_RANK=cut.ranks,
        BLOCK_IN=inner,
        num_warps=cut.shrink_warps,
        **early,
    )
    return products


def expand(matrices: Matrices, products: Tensor | None, y: Tensor, step: StepTable) -> None:
    """Finishes the output in place: y = y * scale + products times the second matrices + bias, each row its slot's.

    Args:
        products: what `shrink` returned, launched just before; None where no slot with rows in this step has a rank.
    """
    cut = cut_of(step)
    columns = matrices.columns[cut.span]
    # Behind another kernel than shrink, it would read an output that is not yet written.
    early = {"launch_pdl": True} if products is not None and overlaps(y.device) else {}
    if products is None:
        products = y.new_empty((1, 1, 1), dtype=torch.float32)  # never read
    expand_kernel[step.max_tiles(y.shape[0]), columns.shape[0]](
        products,
        matrices.b,
        matrices.bias if matrices.scale is None else matrices.scale,
        matrices.bias,
        matrices.bias if matrices.inner_bias is None else matrices.inner_bias,
        matrices.meta,
        columns,
        step.records,
        y,
        y.stride(0),
        products.stride(0),
        matrices.b.shape[2],
        matrices.parts,
        matrices.max_rank,
        SPLITS=products.shape[0],
        SCALES=matrices.scale is not None,
        ACTIVATES=matrices.inner_bias is not None,
        DOT=_dot_type(matrices.b.dtype),
        OVERLAPS=bool(early),
        WIDE=matrices.max_rank > MANY_RANKS,
        ALIGNED=matrices.aligned,
        BLOCK_ROWS=step.tile_rows,
        BLOCK_OUT=cut.out_columns(y.dtype),
        STAGES=cut.stages,
        num_warps=cut.expand_warps,
        **early,
    )


@cache
def overlaps(device: torch.device) -> bool:
    """Tells whether programs start while those of the launch before still work (programmatic dependent launch, from
    Hopper on).

    Shrink's wait for all that was launched before, and only then let expand's start: the output which both find is
    complete. Expand's wait for shrink in front of its products.
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
