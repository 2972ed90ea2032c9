"""Cases of the kernels, which `test_triton.py` runs in a process where they run on a CPU or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamux.deltas import (
    Bias,
    BlockRole,
    Bottleneck,
    Dense,
    LinearSite,
    LowRank,
    Op,
    Scale,
    SoftPrompt,
)
from deltamux.deltas.activations import ACTIVATIONS
from deltamux.deltas.backends.triton.bottleneck import BottleneckDeltas
from deltamux.deltas.backends.triton.linear import LinearDeltas
from deltamux.deltas.backends.triton.step_records import StepRecords
from deltamux.deltas.backends.triton.virtual import SoftPromptDeltas
from deltamux.deltas.ops.step import RowRange, VirtualToken
from deltamux.deltas.sites import BlockSite
from deltamux_testing.random_ops import BLOCK, FEATURES, MAKERS, SLOTS, draw, index_of, poisoned, steps
from deltamux_testing.steps import rows_of
from deltamux_testing.triton_batches import BUFFERS, buffer_batch
from deltamux_testing.triton_ops import (
    DEVICE,
    EMBEDDING,
    SIZES,
    alone,
    assert_close,
    moved,
    owners,
    parts,
    sequence,
)

DTYPES = [torch.float32, torch.bfloat16]


def filled(step: list[tuple[int, int]], **options: Any) -> StepRecords:
    made = StepRecords(400, SLOTS, DEVICE, **options)
    made.fill(*owners(step))
    return made


@pytest.mark.parametrize(
    ("dtype", "tall", "in_features"),
    [
        pytest.param(torch.float32, False, 1100, id="float32, short tiles, two splits"),
        pytest.param(torch.float32, True, 200, id="float32, tall tiles, one split"),
        pytest.param(torch.bfloat16, False, 200, id="bfloat16, short tiles, one split"),
        pytest.param(torch.bfloat16, True, 1100, id="bfloat16, tall tiles, one split of many columns"),
    ],
)
@settings(max_examples=5, deadline=None)
@given(step=steps, present=st.sets(st.integers(0, SLOTS - 1)), seed=st.integers(0, 1000), padding=st.integers(0, 9))
def test_a_packed_module_gives_each_row_its_own_adapters_ops_at_every_slice(
    dtype: torch.dtype, tall: bool, in_features: int, step: Any, present: set[int], seed: int, padding: int
) -> None:
    sites = parts(in_features)
    deltas = LinearDeltas(sites, SLOTS, 24, dtype, DEVICE)
    programs = {
        slot: [[moved(op, dtype) for op in sequence(seed + 100 * slot + i, site)] for i, site in enumerate(sites)]
        for slot in present
    }
    for slot, program in programs.items():
        for part, ops in enumerate(program):
            assert all(deltas.set(slot, part, op) for op in ops)
    records = filled(step, prefill_from=1 if tall else 1000)
    rows = sum(count for _, count in step) + padding
    x, before = (draw(seed + i, rows, n).to(DEVICE, dtype) for i, n in ((0, in_features), (1, sum(SIZES))))
    after = before.clone()
    deltas.apply(x, after, records)
    for slot, own in rows_of([*step, (-1, padding)]):
        column = 0
        for part, site in enumerate(sites):
            span = slice(column, column + site.out_features)
            expected = alone(programs[slot][part] if slot in programs else [], x[own], before[own, span], site)
            assert_close(after[own, span], expected, dtype)
            column += site.out_features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 16, 17, 64, 65, 100])
@pytest.mark.parametrize("features", [40, 1100], ids=["narrow", "several spans"])
def test_low_ranks_of_any_rank_and_width_are_multiplied(dtype: torch.dtype, rank: int, features: int) -> None:
    site = LinearSite("part", 48, features, True, False, 0, BlockRole.ATTENTION)
    deltas = LinearDeltas([site], SLOTS, 104, dtype, DEVICE)
    ops: dict[int, list[Op]] = {
        0: [LowRank(draw(1, rank, 48) * 0.1, draw(2, features, rank))],
        1: [Bias(draw(3, features))],
        2: [LowRank(draw(4, 3, 48) * 0.1, draw(5, features, 3))],
    }
    moved_ops = {slot: [moved(op, dtype) for op in own] for slot, own in ops.items()}
    for slot, own in moved_ops.items():
        assert all(deltas.set(slot, 0, op) for op in own)
    for tall in (False, True):
        x, before = draw(6, 9, 48).to(DEVICE, dtype), draw(7, 9, features).to(DEVICE, dtype)
        after = before.clone()
        deltas.apply(x, after, filled([(0, 3), (1, 2), (2, 4)], prefill_from=1 if tall else 1000))
        for slot, rows in ((0, slice(0, 3)), (1, slice(3, 5)), (2, slice(5, 9))):
            assert_close(after[rows], alone(moved_ops[slot], x[rows], before[rows], site), dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("in_step", [True, False], ids=["in the step", "resident only"])
def test_a_packed_modules_slot_that_is_not_finite_changes_no_row_but_its_own(value: float, in_step: bool) -> None:
    sites = parts(64)
    clean, spoilt = (LinearDeltas(sites, SLOTS, 24, torch.float32, DEVICE) for _ in range(2))
    for slot in range(4):
        for part, site in enumerate(sites):
            for op in sequence(slot + 7 * part, site):
                assert clean.set(slot, part, moved(op, torch.float32))
                assert spoilt.set(slot, part, moved(poisoned(op, value) if slot == 2 else op, torch.float32))
    records = filled([(3, 3), (0, 20), *([(2, 3)] if in_step else []), (-1, 3), (1, 3), (0, 2)])
    rows = 34 if in_step else 31
    x, y = draw(1, rows, 64).to(DEVICE), draw(2, rows, sum(SIZES)).to(DEVICE)
    if in_step:
        x[23:26] = value
    expected, actual = y.clone(), y.clone()
    clean.apply(x.nan_to_num(0, 0, 0), expected, records)
    spoilt.apply(x, actual, records)
    others = [row for row in range(rows) if not (in_step and 23 <= row < 26)]
    torch.testing.assert_close(actual[others], expected[others])


def test_a_slots_next_adapter_reads_nothing_of_the_one_before() -> None:
    sites = parts(64)
    deltas = LinearDeltas(sites, SLOTS, 24, torch.float32, DEVICE)
    for op in (LowRank(draw(1, 20, 64), draw(2, SIZES[0], 20)), Scale(draw(3, SIZES[0])), Bias(draw(4, SIZES[0]))):
        assert deltas.set(1, 0, moved(poisoned(op, float("nan")), torch.float32))
    deltas.reset(1)
    small = moved(LowRank(draw(5, 3, 64), draw(6, SIZES[0], 3)), torch.float32)
    assert deltas.set(1, 0, small)
    x, before = draw(7, 5, 64).to(DEVICE), draw(8, 5, sum(SIZES)).to(DEVICE)
    after = before.clone()
    deltas.apply(x, after, filled([(1, 5)]))
    torch.testing.assert_close(after[:, : SIZES[0]].cpu(), alone([small], x, before[:, : SIZES[0]], sites[0]))
    assert torch.equal(after[:, SIZES[0] :], before[:, SIZES[0] :])


def test_a_packed_module_refuses_what_it_has_no_room_or_no_formula_for() -> None:
    site = parts(64)[0]
    deltas = LinearDeltas([site], SLOTS, 4, torch.float32, DEVICE)
    assert deltas.set(0, 0, moved(LowRank(draw(1, 3, 64), draw(2, SIZES[0], 3)), torch.float32))
    assert not deltas.set(0, 0, moved(LowRank(draw(1, 2, 64), draw(2, SIZES[0], 2)), torch.float32))
    assert not deltas.set(1, 0, Dense(draw(1, SIZES[0], 64)))
    assert deltas.mask == 0b1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in MAKERS if type(MAKERS[name](0)[1]) in BUFFERS])
@settings(max_examples=5, deadline=None)
@given(step=steps, present=st.sets(st.integers(0, SLOTS - 1), min_size=1), seed=st.integers(0, 1000))
def test_a_static_buffer_gives_what_the_torch_batch_gives(
    name: str, dtype: torch.dtype, step: Any, present: set[int], seed: int
) -> None:
    site = MAKERS[name](0)[0]
    op = type(MAKERS[name](0)[1])
    kernels, oracle = buffer_batch(op)(site, SLOTS, dtype, DEVICE), op.batch(site, SLOTS, torch.float32, "cpu")
    for slot in present:
        one = MAKERS[name](seed + slot)[1].to(dtype, DEVICE)
        kernels.set(slot, one)
        oracle.set(slot, one.to(torch.float32, "cpu"))
    index = index_of(step)
    x, y = (draw(seed + i, index.num_rows, FEATURES).to(DEVICE, dtype) for i in range(2))
    expected = y.float().cpu()
    kernels.apply(x, y, index_on_device(step))
    oracle.apply(x.float().cpu(), expected, index)
    assert_close(y, expected, dtype)


def index_on_device(step: list[tuple[int, int]]) -> Any:
    index = index_of(step)
    return type(index)(index.row_ranges, index.num_rows, SLOTS, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_torchs(activation: str, dtype: torch.dtype) -> None:
    deltas = BottleneckDeltas(BLOCK, SLOTS, 16, dtype, DEVICE)
    op = Bottleneck(draw(1, 12, FEATURES), draw(2, FEATURES, 12), draw(3, 12), draw(4, FEATURES), activation)
    assert deltas.set(3, moved(op, dtype))
    x, before = (draw(seed, 9, FEATURES).to(DEVICE, dtype) for seed in (5, 6))
    after = before.clone()
    deltas.apply(x, after, filled([(3, 9)]))
    expected = alone([moved(op, dtype)], x, before, BLOCK)
    assert_close(after, expected, dtype)


@pytest.mark.parametrize(("dtype", "features"), [(torch.float32, 1100), (torch.bfloat16, 8)], ids=str)
@settings(max_examples=5, deadline=None)
@given(step=steps, seed=st.integers(0, 1000))
def test_sequential_parallel_and_residual_bottlenecks_share_one_launch(
    dtype: torch.dtype, features: int, step: Any, seed: int
) -> None:
    """Each reads its own stream; what another slot reads is not finite in its rows, and must not be seen."""
    site = BlockSite("layers.0.attention", features, BlockRole.ATTENTION, "q", "o", 0, "norm")
    deltas = BottleneckDeltas(site, SLOTS, 8, dtype, DEVICE)
    ops: dict[int, Bottleneck] = {}
    for slot in range(SLOTS - 1):
        width, small = 1 + (seed + slot) % 8, features**-0.5
        weights = (draw(seed + slot, width, features) * small, draw(seed + slot + 1, features, width))
        made = Bottleneck(*weights, activation="gelu", scale=0.5, parallel=slot % 2 == 0, residual=slot >= 2)
        ops[slot] = made.to(dtype, DEVICE)
        assert deltas.set(slot, ops[slot])
    rows = sum(count for _, count in step)
    x, stream, before = (draw(seed + i, rows, features).to(DEVICE, dtype) for i in range(3))
    for slot, own in rows_of(step):
        unread = x if slot in ops and (ops[slot].residual or not ops[slot].parallel) else stream
        unread[own] = float("nan")
    after = before.clone()
    deltas.apply(x, after, filled(step), residual=stream)
    for slot, own in rows_of(step):
        read = stream if slot in ops and ops[slot].residual else x
        expected = alone([ops[slot]] if slot in ops else [], read[own], before[own], site)
        assert_close(after[own], expected, dtype)


def test_a_bottleneck_that_is_too_wide_or_the_second_is_refused() -> None:
    deltas = BottleneckDeltas(BLOCK, SLOTS, 4, torch.float32, DEVICE)
    narrow, wide = (Bottleneck(draw(1, width, FEATURES), draw(2, FEATURES, width)) for width in (4, 5))
    assert not deltas.set(0, moved(wide, torch.float32))
    assert deltas.set(0, moved(narrow, torch.float32))
    assert not deltas.set(0, moved(narrow, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_longer_prompts_make_room_and_keep_the_shorter_ones(dtype: torch.dtype) -> None:
    deltas = SoftPromptDeltas(EMBEDDING, SLOTS, dtype, DEVICE)
    values = {slot: draw(slot, n, FEATURES).to(DEVICE, dtype) for slot, n in ((0, 2), (2, 5))}
    for slot, embedding in values.items():
        assert deltas.set(slot, SoftPrompt(embedding))
    records = StepRecords(8, SLOTS, DEVICE)
    tokens = [VirtualToken(0, 0, 0), VirtualToken(1, 0, 1), VirtualToken(5, 2, 3), VirtualToken(6, 2, 4)]
    records.fill([RowRange(0, 0, 3), RowRange(2, 5, 8)], 8, tokens)
    before = draw(20, 8, FEATURES).to(DEVICE, dtype)
    after = before.clone()
    deltas.apply(after, after, records)
    for token in tokens:
        assert torch.equal(after[token.row], values[token.slot][token.position])
    others = [row for row in range(8) if row not in {token.row for token in tokens}]
    assert torch.equal(after[others], before[others])
