"""ModuleOps: adapters that have their ops in different orders each keep their own in one step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deltamux.deltas import Bias, BlockRole, LinearSite, LowRank, Op, Scale
from deltamux.deltas.backends.module_batch import ColumnRange, PackedSlice
from deltamux.engine.vllm.layers.module_ops import ModuleOps, group_ops
from deltamux_testing.steps import step_of

SIZES = (5, 3)
SLOTS = 3
SLICES = [
    PackedSlice(
        LinearSite(f"index-{i}", 4, size, False, False, 0, BlockRole.FEED_FORWARD), ColumnRange(sum(SIZES[:i]), size)
    )
    for i, size in enumerate(SIZES)
]

ops = st.tuples(st.sampled_from(range(len(SIZES))), st.sampled_from([Bias, Scale]), st.integers(-3, 3))
programs = st.lists(st.lists(ops, max_size=6), min_size=1, max_size=SLOTS)
"""By adapter: (index, op, its value at every column) in the order in which they apply."""


def made(program: list[tuple[int, type[Op], int]]) -> list[tuple[int, Op]]:
    fields = {Bias: "bias", Scale: "factor"}
    return [(index, kind.of({fields[kind]: torch.full((SIZES[index],), float(v))}, {})) for index, kind, v in program]


def alone(program: list[tuple[int, Op]], y: Tensor) -> Tensor:
    """What one op after the other makes of an output."""
    y = y.clone()
    for index, op in program:
        first, size = SLICES[index].columns
        y[:, first : first + size] = op.apply(y, y[:, first : first + size], SLICES[index].site)
    return y


@given(program=st.lists(ops, max_size=8))
def test_groups_keep_the_order_at_each_slice_and_have_one_kind_and_one_op_per_slice(
    program: list[tuple[int, type[Op], int]],
) -> None:
    given = made(program)
    arranged = group_ops(given)
    for index in range(len(SIZES)):
        assert [r.ops[index] for r in arranged if index in r.ops] == [op for at, op in given if at == index]
    assert all(type(op) is r.kind.op for r in arranged for op in r.ops.values())


@given(first=programs, then=programs)
def test_adapters_come_and_go_and_every_row_gets_its_own_ops_in_order(
    first: list[list[tuple[int, type[Op], int]]], then: list[list[tuple[int, type[Op], int]]]
) -> None:
    ops = ModuleOps(SLICES, SLOTS, torch.float32, torch.device("cpu"))
    for generation in (first, then):
        placed = [made(program) for program in generation]
        for slot, program in enumerate(placed):
            ops.set(slot, group_ops(program))
        y = torch.randn(2 * SLOTS, sum(SIZES))
        expected = torch.cat([alone(p, y[2 * s : 2 * s + 2]) for s, p in enumerate(placed)])
        rows = len(expected)
        ops.apply(torch.zeros(rows, 4), y := y[:rows].clone(), step_of([(s, 2) for s in range(len(placed))], SLOTS))
        torch.testing.assert_close(y, expected)
        for slot in range(SLOTS):
            ops.reset(slot)
        assert ops.mask == ops.input_mask == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # with CPU kernels, and without
@pytest.mark.parametrize("index", range(len(SIZES)))
def test_a_module_of_which_one_part_takes_deltas_changes_that_part_alone(index: int, dtype: torch.dtype) -> None:
    ops = ModuleOps(SLICES[index : index + 1], SLOTS, dtype, torch.device("cpu"))
    change = LowRank(torch.ones(1, 4), torch.ones(SIZES[index], 1)).to(dtype)
    ops.set(0, group_ops([(0, change)]))
    x, y = torch.ones(2, 4, dtype=dtype), torch.zeros(2, sum(SIZES), dtype=dtype)
    ops.apply(x, y, step_of([(0, 2)], SLOTS))
    first, size = SLICES[index].columns
    expected = torch.zeros_like(y)
    expected[:, first : first + size] = 4
    torch.testing.assert_close(y, expected)
