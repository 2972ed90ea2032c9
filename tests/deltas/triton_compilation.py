"""Compiles every kernel to machine code, with the types and constants of a model of 8 billion parameters.

`test_triton.py` runs this in a process of its own. It shows that Triton takes the kernels and that they fit a
multiprocessor; what they compute is for the other cases.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltamux.deltas.backends.triton import launches, matrix, rows, step_records

SHARED_BYTES = 99 * 1024
"""Shared memory that a program may use on the smallest of today's GPUs (compute capability 8.6 and 8.9)."""

VALUES = {
    torch.float32: ("fp32", tl.float32),
    torch.float16: ("fp16", tl.float16),
    torch.bfloat16: ("bf16", tl.bfloat16),
}
INDICES = {"meta", "columns", "records", "changes", "present", "lengths"}
SCALARS = {"x_stride", "residual_stride", "y_stride", "more_y_stride", "split_stride", "slot_stride"}
SCALARS |= {"features", "chunk", "slices", "max_rank", "out_features"}


class Target(NamedTuple):
    capability: int
    tile_rows: int


BUILDS = [
    pytest.param(torch.bfloat16, Target(80, step_records.DECODE_TILE), id="bfloat16, 8.0, short tiles"),
    pytest.param(torch.bfloat16, Target(90, step_records.PREFILL_TILE), id="bfloat16, 9.0, tall tiles"),
    pytest.param(torch.float16, Target(89, step_records.PREFILL_TILE), id="float16, 8.9, tall tiles"),
    pytest.param(torch.float32, Target(89, step_records.PREFILL_TILE), id="float32, 8.9, tall tiles"),
]
"""Each type and each target once; float32 in tall tiles takes the most shared memory."""


def compiled(
    kernel: Any, dtype: torch.dtype, target: Target, num_warps: int = 4, num_stages: int = 3, **constants: Any
) -> Any:
    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in SCALARS:
            return "i32"
        return {"products": "*fp32", "eps": "fp32"}.get(name) or ("*i32" if name in INDICES else f"*{VALUES[dtype][0]}")

    signature = {name: type_of(name) for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # As Triton finds a large model's pointers and strides at run time, which makes loads as wide as they can be.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] in "*i"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", target.capability, 32), options=options)
    assert made.metadata.shared <= SHARED_BYTES
    assert made.asm["cubin"]
    return made


@pytest.mark.parametrize(("dtype", "target"), BUILDS)
@pytest.mark.parametrize("bottleneck", [False, True], ids=["fused linear", "bottleneck"])
def test_shrink_and_expand_compile_to_tensor_cores(dtype: torch.dtype, target: Target, bottleneck: bool) -> None:
    config = launches.DECODE if target.tile_rows == step_records.DECODE_TILE else launches.PREFILL
    common = {"DOT": VALUES[dtype][1], "OVERLAPS": target.capability >= 90, "BLOCK_ROWS": target.tile_rows}
    made = [
        compiled(
            matrix.shrink_kernel,
            dtype,
            target,
            **common,
            MIXED=bottleneck,
            BLOCK_RANK=config.ranks,
            BLOCK_IN=config.inner_columns(dtype, mixed=bottleneck),
            num_warps=config.shrink_warps,
        ),
        compiled(
            matrix.expand_kernel,
            dtype,
            target,
            **common,
            SPLITS=config.splits(4096),
            SCALES=not bottleneck,
            ACTIVATES=bottleneck,
            WIDE=True,
            ALIGNED=16,
            BLOCK_OUT=config.out_columns(dtype),
            STAGES=config.stages,
            num_warps=config.expand_warps,
        ),
    ]
    if dtype is not torch.float32:
        assert all("mma" in one.asm["ptx"] for one in made)


@pytest.mark.parametrize(("dtype", "target"), BUILDS[::3])
def test_the_kernels_of_rows_compile(dtype: torch.dtype, target: Target) -> None:
    for centres in (False, True):
        compiled(rows._norm_kernel, dtype, target, FEATURES=4096, CENTRES=centres, BLOCK=4096)
    compiled(rows._scale_kernel, dtype, target, FEATURES=4096, BLOCK=1024)
    compiled(rows._gather_kernel, dtype, target, FEATURES=1024, BLOCK=1024)
