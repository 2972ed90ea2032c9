"""The CPU kernels: compiled here, and equal to their twins in torch for every op that has one."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamux.deltas import (
    Bias,
    BlockRole,
    BlockSite,
    Bottleneck,
    GatedLowRank,
    LinearSite,
    LowRank,
    NormAffine,
    NormSite,
    Op,
    Scale,
    ScaleInput,
)
from deltamux.deltas.backends.choice import module_batch
from deltamux.deltas.backends.cpu import library
from deltamux.deltas.backends.cpu.ops import CPU_OPS, CPUModuleBatch, prepack, prepacked
from deltamux.deltas.backends.cpu.slot_params import PrepackedFactors, pack
from deltamux.deltas.backends.module_batch import ColumnRange, ModuleBatch, PackedSlice, PerSliceBatch
from deltamux.deltas.sites import NormForm
from deltamux_testing.steps import step_of

SLOTS = 5
WIDTH = 40
"""No multiple of 16 or 32, so that every kernel has a tail."""

SIZES = (48, 21, 24)
"""Columns of the slices of a packed module: full blocks, an odd tail, an even one."""


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def linear(size: int) -> LinearSite:
    return LinearSite(f"layer.{size}", WIDTH, size, True, False, 0, BlockRole.ATTENTION)


def packed_slices() -> list[PackedSlice]:
    firsts = [sum(SIZES[:i]) for i in range(len(SIZES))]
    return [PackedSlice(linear(size), ColumnRange(first, size)) for first, size in zip(firsts, SIZES, strict=True)]


BLOCK = BlockSite("layers.0.attention", WIDTH, BlockRole.ATTENTION, "q", "o", 0, "norm")


def norm(form: NormForm) -> list[PackedSlice]:
    return [PackedSlice(NormSite("layer.norm", WIDTH, form, 1e-5, True, 0), ColumnRange(0, WIDTH))]


def low_rank(seed: int, size: int) -> Op:
    rank = 1 + seed % 11
    return LowRank(draw(seed, rank, WIDTH), draw(seed + 1, size, rank), scale=0.5 + seed % 3)


def bottleneck(seed: int, size: int) -> Op:
    width = 1 + seed % 9
    return Bottleneck(
        draw(seed, width, WIDTH),
        draw(seed + 1, WIDTH, width),
        draw(seed + 2, width) if seed % 2 else None,
        draw(seed + 3, WIDTH) if seed % 3 else None,
        activation=("relu", "gelu", "gelu_new", "silu", "swish", "tanh", "sigmoid", "leaky_relu", "identity")[seed % 9],
        scale=0.5 + seed % 2,
        parallel=seed % 4 == 1,
        residual=seed % 4 == 2,
    )


def norm_affine(seed: int, size: int) -> Op:
    return NormAffine(
        draw(seed, size) if seed % 3 else None, draw(seed + 1, size) if seed % 2 or not seed % 3 else None
    )


CASES: dict[str, tuple[list[PackedSlice], Any]] = {
    "low_rank, packed": (packed_slices(), low_rank),
    "low_rank": (packed_slices()[:1], low_rank),
    "bias, packed": (packed_slices(), lambda seed, size: Bias(draw(seed, size))),
    "scale, packed": (packed_slices(), lambda seed, size: Scale(draw(seed, size))),
    "bottleneck": ([PackedSlice(BLOCK, ColumnRange(0, WIDTH))], bottleneck),
    "norm_affine, layer": (norm(NormForm.LAYER), norm_affine),
    "norm_affine, rms": (norm(NormForm.RMS), norm_affine),
}

steps = st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 9)), min_size=1, max_size=8)
"""A step's requests: (slot, or -1 for the base; rows)."""

index_of = partial(step_of, num_slots=SLOTS)


def twins(parts: list[PackedSlice], op: Op, dtype: torch.dtype) -> tuple[ModuleBatch, ModuleBatch]:
    """The kernel's batch, and the one in torch."""
    kernel = module_batch(type(op), parts, SLOTS, dtype, "cpu")
    assert isinstance(kernel, CPUModuleBatch), "these tests need a C++ compiler, as the engine itself does"
    return kernel, PerSliceBatch(parts, lambda site: type(op).batch(site, SLOTS, dtype, "cpu"))


def columns_of(part: PackedSlice) -> int:
    return part.columns.size


def filled(op: Op, value: float) -> Op:
    return op.of({name: torch.full_like(t, value) for name, t in op.tensors().items()}, op.attributes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("parts", "make"), CASES.values(), ids=CASES.keys())
@settings(max_examples=40, deadline=None)
@given(step=steps, present=st.sets(st.tuples(st.integers(0, SLOTS - 1), st.integers(0, 2))), seed=st.integers(0, 999))
def test_a_kernel_equals_its_torch_batch(
    parts: list[PackedSlice], make: Any, dtype: torch.dtype, step: list[tuple[int, int]], present: set[Any], seed: int
) -> None:
    kernel, twin = twins(parts, make(0, columns_of(parts[0])), dtype)
    for slot in range(SLOTS):
        own = (part for part in range(len(parts)) if (slot, part) in present)
        if ops := {part: make(seed + 7 * slot + part, columns_of(parts[part])).to(dtype) for part in own}:
            kernel.set(slot, ops)
            twin.set(slot, ops)
    index = index_of(step)
    x = draw(seed, index.num_rows, WIDTH).to(dtype)
    before = draw(seed + 1, index.num_rows, sum(map(columns_of, parts))).to(dtype)
    actual, expected = before.clone(), before.clone()
    kernel.apply(x, actual, index)
    twin.apply(x, expected, index)
    tolerance = 1e-5 if dtype is torch.float32 else 4e-2
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    base = [row for row, slot in enumerate(index.slots.tolist()) if slot == SLOTS]
    assert torch.equal(actual[base], before[base]), "the base's rows are never touched"


@settings(max_examples=40, deadline=None)
@given(step=steps, seed=st.integers(0, 999))
def test_a_row_gets_the_same_bits_whatever_else_is_in_the_batch(step: list[tuple[int, int]], seed: int) -> None:
    kernel, _ = twins(packed_slices(), low_rank(0, SIZES[0]), torch.bfloat16)
    for slot in range(SLOTS):
        ops = (low_rank(seed + 7 * slot + part, columns) for part, columns in enumerate(SIZES))
        kernel.set(slot, dict(enumerate(op.to(torch.bfloat16) for op in ops)))
    index = index_of(step)
    x, y = (draw(seed + n, index.num_rows, size).bfloat16() for n, size in enumerate((WIDTH, sum(SIZES))))
    mixed = y.clone()
    kernel.apply(x, mixed, index)
    for row, slot in enumerate(index.slots.tolist()):
        if slot < SLOTS:
            alone = y[row : row + 1].clone()
            kernel.apply(x[row : row + 1], alone, index_of([(slot, 1)]))
            assert torch.equal(alone, mixed[row : row + 1])


WIDE = 2048
"""Columns enough for a kernel to give work to several threads."""

WIDE_PARTS = [PackedSlice(linear(WIDE), ColumnRange(0, WIDE)), PackedSlice(linear(96), ColumnRange(WIDE, 96))]
WIDE_OPS: dict[str, tuple[list[PackedSlice], Any]] = {
    "low_rank": (WIDE_PARTS, lambda seed, size: LowRank(draw(seed, 160, WIDTH), draw(seed + 1, size, 160))),
    "bias": (WIDE_PARTS, lambda seed, size: Bias(draw(seed, size))),
    "norm_affine": (
        [PackedSlice(NormSite("norm", WIDE, NormForm.RMS, 1e-5, True, 0), ColumnRange(0, WIDE))],
        lambda seed, size: NormAffine(draw(seed, size), draw(seed + 1, size)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [2, 40, 3000], ids=["columns", "tiles", "groups of tiles"])
@pytest.mark.parametrize(("parts", "make"), WIDE_OPS.values(), ids=WIDE_OPS.keys())
def test_however_threads_share_a_step_each_row_gets_what_it_gets_alone(
    parts: list[PackedSlice], make: Any, rows: int, dtype: torch.dtype
) -> None:
    kernel, twin = twins(parts, make(0, columns_of(parts[0])), dtype)
    for slot in range(2):
        ops = (make(7 * slot + number, columns_of(part)) for number, part in enumerate(parts))
        placed = dict(enumerate(op.to(dtype) for op in ops))
        for batch in (kernel, twin):
            batch.set(slot, placed)
    index = index_of([(0, rows // 2), (1, rows - rows // 2)])
    width = WIDE if isinstance(parts[0].site, NormSite) else WIDTH
    x, before = draw(1, rows, width).to(dtype), draw(2, rows, sum(map(columns_of, parts))).to(dtype)
    together, expected = before.clone(), before.clone()
    kernel.apply(x, together, index)
    twin.apply(x, expected, index)
    tolerance = 1e-4 if dtype is torch.float32 else 4e-2
    torch.testing.assert_close(together, expected, atol=tolerance, rtol=tolerance)
    for row in {0, rows // 2, rows - 1}:
        alone = before[row : row + 1].clone()
        kernel.apply(x[row : row + 1], alone, index_of([(int(index.slots[row]), 1)]))
        assert torch.equal(alone, together[row : row + 1])


@pytest.mark.parametrize(("parts", "make"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_slot_that_is_not_finite_changes_its_own_rows_alone(
    parts: list[PackedSlice], make: Any, value: float
) -> None:
    clean, _ = twins(parts, make(0, columns_of(parts[0])), torch.bfloat16)
    spoilt, _ = twins(parts, make(0, columns_of(parts[0])), torch.bfloat16)
    for slot in range(4):
        ops = [make(slot + part, columns.size).to(torch.bfloat16) for part, (_, columns) in enumerate(parts)]
        clean.set(slot, dict(enumerate(ops)))
        spoilt.set(slot, dict(enumerate(filled(op, value) for op in ops) if slot == 2 else enumerate(ops)))
    index = index_of([(0, 3), (1, 3), (2, 3), (-1, 3), (3, 3)])
    x, y = (draw(n, 15, size).bfloat16() for n, size in enumerate((WIDTH, sum(map(columns_of, parts)))))
    expected, actual = y.clone(), y.clone()
    clean.apply(x, expected, index)
    spoilt.apply(x, actual, index)
    others = [row for row in range(15) if not 6 <= row < 9]
    assert torch.equal(actual[others], expected[others])
    assert not actual[6:9].isfinite().all()


def test_a_scaled_input_changes_only_the_rows_of_its_own_adapter() -> None:
    site = linear(21)
    batch = module_batch(ScaleInput, [PackedSlice(site, ColumnRange(0, 21))], SLOTS, torch.float32, "cpu")
    op = ScaleInput(draw(1, WIDTH))
    batch.set(3, {0: op})
    index = index_of([(0, 2), (3, 2), (-1, 2)])
    before = draw(2, 6, WIDTH)
    after = before.clone()
    batch.apply(after, after, index)
    assert torch.equal(after[[0, 1, 4, 5]], before[[0, 1, 4, 5]])
    torch.testing.assert_close(after[2:4], op.apply_input(before[2:4], site))


def test_an_empty_slot_leaves_its_rows_alone_after_its_op_was_cleared() -> None:
    kernel, _ = twins(packed_slices(), low_rank(0, SIZES[0]), torch.float32)
    kernel.set(1, {0: low_rank(3, SIZES[0])})
    kernel.reset(1)
    kernel.reset(1)
    y = draw(1, 4, sum(SIZES))
    before = y.clone()
    kernel.apply(draw(2, 4, WIDTH), y, index_of([(1, 4)]))
    assert torch.equal(y, before)
    assert kernel.mask == 0


def test_an_op_derived_from_another_never_runs_the_others_kernel() -> None:
    class Doubled(LowRank):
        name = "doubled"

    assert Doubled not in CPU_OPS
    assert GatedLowRank not in CPU_OPS
    assert isinstance(module_batch(Doubled, packed_slices(), SLOTS, torch.float32, "cpu"), PerSliceBatch)


def test_packing_puts_pairs_of_ranks_after_each_other_and_pads_with_zeros() -> None:
    up = draw(1, 21, 5).bfloat16()
    packed = pack(up)
    assert packed.shape == (2, 3, 16, 2)
    for column in range(21):
        assert torch.equal(packed[column // 16, :, column % 16].flatten()[:5], up[column])
    assert packed.count_nonzero() == up.count_nonzero()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64 compilers")
@pytest.mark.parametrize("without", ["-mno-amx-bf16", "-mno-avx512bf16"])
def test_processors_with_fewer_instructions_compute_the_same(without: str, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "(twin or same_bits) and not affine and not scale", __file__],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            "CXX": f"{os.environ.get('CXX', 'g++')} {without}",
            "XDG_CACHE_HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
    assert list(tmp_path.rglob("rows-*.so")), "compiled for those processors"


@pytest.mark.slow
def test_the_library_is_compiled_once_and_kept(tmp_path: Path) -> None:
    first = library.build(tmp_path)
    compiled = first.stat().st_mtime_ns
    assert library.build(tmp_path) == first
    assert first.stat().st_mtime_ns == compiled
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "words"),
    [({"DELTAMUX_KERNELS": "torch"}, ""), ({"CXX": "false"}, "delta ops run in torch")],
    ids=["switched off", "no working compiler"],
)
def test_without_kernels_the_ops_run_in_torch_and_it_is_logged_once(
    environment: dict[str, str], words: str, tmp_path: Path
) -> None:
    code = (
        "import logging, torch; logging.basicConfig(); from deltamux.deltas.backends.cpu.slot_params import available;"
        "print([available(torch.float32, 'cpu') for _ in range(2)])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "[False, False]"
    assert ran.stderr.count("delta ops run in torch") == (1 if words else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_prepacked_together_are_what_each_is_alone(dtype: torch.dtype) -> None:
    shapes = [(4, 48, 1.5), (4, 48, 1.5), (3, 48, 1.5), (4, 21, 1.5), (4, 48, 0.3)]
    ops = [LowRank(draw(i, r, WIDTH), draw(i + 9, out, r), scale).to(dtype) for i, (r, out, scale) in enumerate(shapes)]
    prepack(ops)
    for op in ops:
        alone, together = prepacked(LowRank(op.a, op.b, op.scale)), prepacked(op)
        assert isinstance(alone, PrepackedFactors)
        assert isinstance(together, PrepackedFactors)
        assert torch.equal(alone.up, together.up)
        assert torch.equal(alone.down, together.down)
