"""Cases of the kernels over many steps: step records, slots that are set and reset while steps run, and graphs.

`test_triton.py` runs them where it runs those of `triton_cases.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamux.deltas import Bias, Bottleneck, Scale, SoftPrompt
from deltamux.deltas.backends.triton import step_records
from deltamux.deltas.backends.triton.bottleneck import BottleneckDeltas
from deltamux.deltas.backends.triton.factors import FactorDeltas
from deltamux.deltas.backends.triton.linear import LinearDeltas
from deltamux.deltas.backends.triton.step_records import StepRecords
from deltamux.deltas.backends.triton.virtual import SoftPromptDeltas
from deltamux_testing.device_transfers import DeviceTransfers
from deltamux_testing.random_ops import BLOCK, FEATURES, MAKERS, SLOTS, draw
from deltamux_testing.steps import rows_of
from deltamux_testing.triton_batches import BUFFERS, buffer_batch
from deltamux_testing.triton_ops import DEVICE, EMBEDDING, SIZES, alone, assert_close, moved, owners, parts, sequence

many_steps = st.lists(st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 30)), max_size=9), min_size=1)


@settings(max_examples=60, deadline=None)
@given(many=many_steps.filter(lambda many: len(many) < 8), prefill_from=st.sampled_from([1, 60, 1000]))
def test_step_records_hold_the_slot_of_each_row_and_nothing_of_earlier_steps(many: Any, prefill_from: int) -> None:
    made = StepRecords(300, SLOTS, DEVICE, prefill_from=prefill_from)
    address = made.records.data_ptr()
    for step in many:
        runs, num_rows = owners(step)
        made.fill(runs, num_rows)
        assert made.records.data_ptr() == address
        records = made.records.cpu().numpy()
        expected = np.full(300, -1)
        for slot, start, stop in runs:
            expected[start:stop] = slot
        assert np.array_equal(records[:, step_records.SLOT], expected)
        tiles = [record for record in records if record[step_records.TILE_SLOT] >= 0]
        assert len(tiles) <= made.max_tiles(num_rows)
        assert (records[len(tiles) :, step_records.TILE_SLOT] == -1).all()
        seen: list[int] = []
        for record in tiles:
            start, count = record[step_records.TILE_START], record[step_records.TILE_COUNT]
            assert 0 < count <= made.tile_rows
            rows = records[start : start + count, step_records.ROW].tolist()
            assert (expected[rows] == record[step_records.TILE_SLOT]).all()
            seen += rows
        assert sorted(seen) == np.flatnonzero(expected >= 0).tolist()


def test_what_was_launched_for_many_rows_serves_a_step_of_few() -> None:
    """As a CUDA graph does: the launch is the same, and the table says which programs have work."""
    sites = parts(64)
    deltas = LinearDeltas(sites, SLOTS, 24, torch.float32, DEVICE)
    ops = {slot: [moved(op, torch.float32) for op in sequence(slot + 3, sites[0])] for slot in range(SLOTS)}
    for slot, program in ops.items():
        assert all(deltas.set(slot, 0, op) for op in program)
    records = StepRecords(64, SLOTS, DEVICE)
    for step in ([(0, 20), (1, 20)], [(5, 1), (-1, 2), (1, 1)], []):
        records.fill(*owners(step))
        x, before = draw(1, 64, 64).to(DEVICE), draw(2, 64, sum(SIZES)).to(DEVICE)
        after = before.clone()
        deltas.apply(x, after, records)
        for slot, own in rows_of([*step, (-1, 64 - sum(count for _, count in step))]):
            expected = alone(ops.get(slot, []), x[own], before[own, : SIZES[0]], sites[0])
            assert_close(after[own, : SIZES[0]], expected, torch.float32)


@pytest.mark.parametrize("name", [name for name in MAKERS if type(MAKERS[name](0)[1]) in BUFFERS])
def test_arriving_and_leaving_read_nothing_of_the_device_and_write_nothing_from_the_host(name: str) -> None:
    site, op = MAKERS[name](0)
    made = buffer_batch(type(op))(site, SLOTS, torch.bfloat16, "meta")
    ops = [MAKERS[name](seed)[1].to(torch.bfloat16, "meta") for seed in range(SLOTS)]
    with DeviceTransfers() as crossings:
        for slot, one in enumerate(ops):
            made.set(slot, one)
        for slot in range(SLOTS):
            made.reset(slot)
    assert not crossings.ops


def test_prompts_and_factors_of_inputs_arrive_and_leave_without_asking_the_device() -> None:
    short, long, factor = (draw(1, n, FEATURES).to("meta", torch.bfloat16) for n in (2, 5, 1))
    prompts = SoftPromptDeltas(EMBEDDING, SLOTS, torch.bfloat16, "meta")
    factors = FactorDeltas(FEATURES, SLOTS, torch.bfloat16, "meta")
    with DeviceTransfers() as crossings:
        for slot, embedding in enumerate((short, long)):
            assert prompts.set(slot, SoftPrompt(embedding))
            factors.set(slot, factor[0])
            factors.set(slot, factor[0])
        for slot in range(2):
            prompts.reset(slot)
            factors.reset(slot)
    assert not crossings.ops


def test_any_sequence_of_ops_is_set_at_a_packed_module_without_reading_the_device() -> None:
    sites = parts(64)
    deltas = LinearDeltas(sites, SLOTS, 24, torch.bfloat16, "meta")
    programs = [
        [[op.to(torch.bfloat16, "meta") for op in sequence(seed + i, site)] for i, site in enumerate(sites)]
        for seed in range(SLOTS)
    ]
    with DeviceTransfers() as crossings:
        for slot, program in enumerate(programs):
            assert all(deltas.set(slot, part, op) for part, ops in enumerate(program) for op in ops)
            deltas.reset(slot)
    assert not crossings.ops


if DEVICE == "cuda":

    def test_neither_a_step_nor_an_arrival_waits_for_the_device() -> None:
        site = parts(64)[0]
        deltas = LinearDeltas([site], SLOTS, 24, torch.float32, DEVICE)
        bottlenecks = BottleneckDeltas(BLOCK, SLOTS, 16, torch.float32, DEVICE)
        records = StepRecords(64, SLOTS, DEVICE)
        ops = [moved(op, torch.float32) for op in (Scale(draw(1, SIZES[0])), Bias(draw(2, SIZES[0])))]
        wide = moved(Bottleneck(draw(3, 12, FEATURES), draw(4, FEATURES, 12), draw(5, 12)), torch.float32)
        x, y, z = (torch.zeros(20, n, device=DEVICE) for n in (64, SIZES[0], FEATURES))
        deltas.apply(x, y, records)  # compiles
        bottlenecks.apply(z, z.clone(), records)
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert all(deltas.set(1, 0, op) for op in ops)
            assert bottlenecks.set(1, wide)
            records.fill(*owners([(1, 20)]))
            deltas.apply(x, y, records)
            bottlenecks.apply(z, z.clone(), records)
            deltas.reset(1)
            bottlenecks.reset(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_one_captured_graph_serves_other_steps_other_adapters_and_none() -> None:
        sites = parts(64)
        deltas = LinearDeltas(sites, SLOTS, 24, torch.float32, DEVICE)
        records = StepRecords(64, SLOTS, DEVICE)
        x, y = (torch.zeros(64, n, device=DEVICE) for n in (64, sum(SIZES)))
        deltas.apply(x, y, records)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            deltas.apply(x, y, records)
        for seed, step in enumerate(([(0, 20), (1, 20)], [(2, 1), (-1, 2), (1, 1)], [])):
            deltas.reset(1)
            ops = [moved(op, torch.float32) for op in sequence(seed + 3, sites[0])]
            assert all(deltas.set(1, 0, op) for op in ops)
            records.fill(*owners(step))
            x.copy_(draw(seed, 64, 64))
            before = draw(seed + 1, 64, sum(SIZES)).to(DEVICE)
            y.copy_(before)
            graph.replay()
            for slot, own in rows_of(step):
                expected = alone(ops if slot == 1 else [], x[own], before[own, : SIZES[0]], sites[0])
                assert_close(y[own, : SIZES[0]], expected, torch.float32)
            rest = sum(count for _, count in step)
            assert torch.equal(y[rest:], before[rest:])
