"""Launches of shrink and expand: what they read of a module's slots, and how they are split into programs."""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltamux.deltas.backends.triton import interpreted, step_records
from deltamux.deltas.backends.triton.matrix import MANY_RANKS, expand_kernel, shrink_kernel
from deltamux.deltas.backends.triton.step_records import StepRecords


class Matrices(NamedTuple):
    """The parameters of all slots at one module, at addresses that stay.

    Attributes:
        a: [slots, slices, max_rank, in].
        b: [slots, max_rank, out]; the slices' columns one after the other.
        scale: [slots, out] or None; bias: [slots, out].
        inner_bias: [slots, max_rank] or None: the module has activations, and one slice.
        meta: [slots, slices, Meta.VALUES] int32.
        columns: by the width of spans, [spans, 3] int32: slice, first and end column of each span of columns.
        aligned: what divides all columns where a slice begins or ends, 16 at most.
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
    def slices(self) -> int:
        return self.a.shape[1]

    @property
    def max_rank(self) -> int:
        return self.a.shape[2]


class LaunchConfig(NamedTuple):
    """The split of a launch into programs, by `benchmarks.gpu.search` on an H200 (docs/results.md).

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


DECODE = LaunchConfig(16, 128, split=512, max_splits=28, shrink_warps=2, columns=64, span=128, expand_warps=4, stages=1)
PREFILL = LaunchConfig(
    64, 128, split=1024, max_splits=2, shrink_warps=4, columns=64, span=512, expand_warps=4, stages=3
)


def shrink(matrices: Matrices, x: Tensor, step: StepRecords, y: Tensor, residual: Tensor | None = None) -> Tensor:
    """Returns the rows' products with their slots' first matrices, [splits, rows, slices * max_rank] float32.

    Rows are in the records' order by slot; what lies beyond a slot's rank is never written. Where the module has
    activations, each slot reads those of `x`, `residual` and `y` that its source (`Meta`) has.
    """
    rows, features = x.shape
    max_rank, slices, config = matrices.max_rank, matrices.slices, launch_config(step)
    mixed = matrices.inner_bias is not None
    splits, inner = config.splits(features), config.inner_columns(x.dtype, mixed=mixed)
    chunk = -(-features // (splits * inner)) * inner
    products = torch.empty(splits, rows, slices * max_rank, dtype=torch.float32, device=x.device)
    stream = x if residual is None else residual
    grid = (step.max_tiles(rows), slices * triton.cdiv(max_rank, config.ranks), splits)
    early = {"launch_pdl": True} if overlaps(x.device) else {}
    shrink_kernel[grid](
        x, stream, y, matrices.a, matrices.meta, step.records, products, x.stride(0), stream.stride(0), y.stride(0),
        products.stride(0), features, chunk, slices, max_rank,
        MIXED=mixed, DOT=_dot_type(matrices.a.dtype), OVERLAPS=bool(early), BLOCK_ROWS=step.tile_rows,
        BLOCK_RANK=config.ranks, BLOCK_IN=inner, num_warps=config.shrink_warps, **early,
    )  # fmt: skip
    return products


def expand(matrices: Matrices, products: Tensor | None, y: Tensor, step: StepRecords) -> None:
    """Finishes the output in place: y = y * scale + products times the second matrices + bias, each row its slot's.

    Args:
        products: what `shrink` returned, launched just before; None where no slot with rows in this step has a rank.
    """
    config = launch_config(step)
    columns = matrices.columns[config.span]
    # After another kernel than shrink, it would read an output that is not yet written.
    early = {"launch_pdl": True} if products is not None and overlaps(y.device) else {}
    if products is None:
        products = y.new_empty((1, 1, 1), dtype=torch.float32)  # never read
    expand_kernel[step.max_tiles(y.shape[0]), columns.shape[0]](
        products, matrices.b, matrices.bias if matrices.scale is None else matrices.scale, matrices.bias,
        matrices.bias if matrices.inner_bias is None else matrices.inner_bias, matrices.meta, columns, step.records, y,
        y.stride(0), products.stride(0), matrices.b.shape[2], matrices.slices, matrices.max_rank,
        SPLITS=products.shape[0], SCALES=matrices.scale is not None, ACTIVATES=matrices.inner_bias is not None,
        DOT=_dot_type(matrices.b.dtype), OVERLAPS=bool(early), WIDE=matrices.max_rank > MANY_RANKS,
        ALIGNED=matrices.aligned, BLOCK_ROWS=step.tile_rows, BLOCK_OUT=config.out_columns(y.dtype),
        STAGES=config.stages, num_warps=config.expand_warps, **early,
    )  # fmt: skip


@cache
def overlaps(device: torch.device) -> bool:
    """Returns whether programs start while those of the launch before still work (programmatic dependent launch, from
    Hopper on).

    Shrink's wait for all that was launched before, and only then let expand's start: the output which both find is
    complete. Expand's wait for shrink before they read its products.
    """
    return device.type == "cuda" and not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_config(step: StepRecords) -> LaunchConfig:
    """Returns how launches of a step are split, by the height of its tiles."""
    return DECODE if step.tile_rows == step_records.DECODE_TILE else PREFILL


def _dot_type(dtype: torch.dtype) -> tl.dtype:
    """Returns the type that products are taken in; sums are float32 always.

    The interpreter multiplies the bits of bfloat16 as integers; float32 holds the same products exactly.
    """
    if interpreted():
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
