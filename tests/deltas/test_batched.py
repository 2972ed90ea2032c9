"""The batched form of every op: a mixed step equals each adapter alone, whatever the other slots hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltamux.deltas import (
    AttentionSite,
    DenseEmbedding,
    KVPrefix,
    LowRank,
    Op,
    ScaleInput,
    SoftPrompt,
)
from deltamux.deltas.ops import OpBatch, RowRange, StepIndex, VirtualRows, low_rank
from deltamux.deltas.ops import bottleneck as bottlenecks
from deltamux.deltas.ops.step import VirtualToken
from deltamux.deltas.sites import EmbeddingSite
from deltamux_testing.random_ops import (
    FEATURES,
    LINEAR,
    MAKERS,
    SLOTS,
    draw,
    factors,
    index_of,
    poisoned,
    steps,
)
from deltamux_testing.steps import rows_of

EXAMPLES = min(40, settings().max_examples)
"""Fewer where kernels are interpreted, which is slow (`deltamux_testing.triton_batches`)."""


@pytest.fixture(params=["own choice", "segments", "stacked"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes ops with two ways through a step take one of them, whatever the step looks like."""
    name: str = request.param
    if name != "own choice":
        for module in (low_rank, bottlenecks):
            monkeypatch.setattr(module, "SEGMENT_ROWS", 0 if name == "segments" else 1 << 40)
    return name


def batch_of(kind: type[Op], site: Any, ops: dict[int, Any]) -> OpBatch:
    """Returns a batch of a kind of ops, with the given ones in their slots."""
    batch: OpBatch = kind.batch(site, SLOTS, torch.float32, "cpu")
    for slot, op in ops.items():
        batch.set(slot, op)
    return batch


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
# The path is the same for all examples of one parameter, which is what the health check asks about.
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(step=steps, present=st.sets(st.integers(0, SLOTS - 1)), seed=st.integers(0, 1000))
def test_a_mixed_step_equals_each_adapter_alone(
    maker: Any, step: list[tuple[int, int]], present: set[int], seed: int
) -> None:
    site = maker(0)[0]
    ops = {slot: maker(seed + slot)[1] for slot in present}
    batch = batch_of(type(maker(0)[1]), site, ops)
    index = index_of(step)
    x, before = draw(seed, index.num_rows, FEATURES), draw(seed + 1, index.num_rows, FEATURES)
    after = before.clone()
    batch.apply(x, after, index)
    for slot, own in rows_of(step):
        expected = ops[slot].apply(x[own], before[own], site) if slot in ops else before[own]
        torch.testing.assert_close(after[own], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("rows", [1, 40], ids=["decode", "prefill"])
def test_one_adapters_rows_never_reach_anothers(maker: Any, rows: int) -> None:
    """Slot 2 computes nothing but NaN, which must not reach other slots or the base."""
    site, _ = maker(0)
    ops = {slot: maker(slot)[1] for slot in range(4)}
    clean, spoilt = (batch_of(type(ops[0]), site, ops) for _ in range(2))
    step = [(0, rows), (1, rows), (2, rows), (-1, rows), (3, rows)]
    index = index_of(step)
    x, y = draw(1, index.num_rows, FEATURES), draw(2, index.num_rows, FEATURES)
    x[2 * rows : 3 * rows] = float("nan")
    expected, actual = y.clone(), y.clone()
    clean.apply(draw(1, index.num_rows, FEATURES), expected, index)
    spoilt.apply(x, actual, index)
    others = [r for r in range(index.num_rows) if not 2 * rows <= r < 3 * rows]
    torch.testing.assert_close(actual[others], expected[others])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("in_step", [True, False], ids=["in the step", "resident only"])
def test_a_slot_that_is_not_finite_changes_its_own_rows_alone(maker: Any, value: float, in_step: bool) -> None:
    site, _ = maker(0)
    ops = {slot: maker(slot)[1] for slot in range(4)}
    clean = batch_of(type(ops[0]), site, ops)
    spoilt = batch_of(type(ops[0]), site, ops | {2: poisoned(ops[2], value)})
    index = index_of([(0, 3), (1, 3), *([(2, 3)] if in_step else []), (-1, 3), (3, 3)])
    x, y = draw(1, index.num_rows, FEATURES), draw(2, index.num_rows, FEATURES)
    expected, actual = y.clone(), y.clone()
    clean.apply(x, expected, index)
    spoilt.apply(x, actual, index)
    others = [row for row in range(index.num_rows) if not (in_step and 6 <= row < 9)]
    torch.testing.assert_close(actual[others], expected[others])


@given(step=steps, present=st.sets(st.integers(0, SLOTS - 1)), seed=st.integers(0, 1000))
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_scaled_input_is_each_adapters_own(step: list[tuple[int, int]], present: set[int], seed: int) -> None:
    ops = {slot: ScaleInput(draw(seed + slot, FEATURES)) for slot in present}
    batch = batch_of(ScaleInput, LINEAR, ops)
    index = index_of(step)
    before = draw(seed, index.num_rows, FEATURES)
    after = before.clone()
    batch.apply(after, after, index)
    for slot, own in rows_of(step):
        expected = ops[slot].apply_input(before[own], LINEAR) if slot in ops else before[own]
        torch.testing.assert_close(after[own], expected)


@given(step=steps, present=st.sets(st.integers(0, SLOTS - 1)), seed=st.integers(0, 1000))
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_changed_embedding_is_each_adapters_own(step: list[tuple[int, int]], present: set[int], seed: int) -> None:
    site = EmbeddingSite("embed", 16, FEATURES)
    ops = {slot: DenseEmbedding(draw(seed + slot, 16, FEATURES)) for slot in present}
    batch = batch_of(DenseEmbedding, site, ops)
    index = index_of(step)
    ids, before = torch.arange(index.num_rows) % 16, draw(seed, index.num_rows, FEATURES)
    after = before.clone()
    batch.apply(ids, after, index)
    for slot, own in rows_of(step):
        expected = ops[slot].apply(ids[own], before[own], site) if slot in ops else before[own]
        torch.testing.assert_close(after[own], expected)


def test_an_empty_slot_leaves_its_rows_alone_after_its_op_was_cleared() -> None:
    site, op = factors(3)
    batch = batch_of(LowRank, site, {1: op})
    batch.reset(1)
    batch.reset(1)
    y = draw(1, 4, FEATURES)
    before = y.clone()
    batch.apply(draw(2, 4, FEATURES), y, index_of([(1, 4)]))
    assert torch.equal(y, before)
    assert batch.mask == 0


def two_prefixed_requests() -> StepIndex:
    """Requests of slots 0 and 2, among the base's rows: the second continues its prefix at its third virtual token."""
    virtual = VirtualRows.of(
        [VirtualToken(0, 0, 0), VirtualToken(1, 0, 1), VirtualToken(5, 2, 2), VirtualToken(6, 2, 3)]
    )
    return StepIndex([RowRange(0, 0, 3), RowRange(2, 5, 8)], 8, SLOTS, virtual=virtual)


def test_virtual_rows_and_no_others_get_their_adapters_keys_and_values() -> None:
    site = AttentionSite("layers.0.attention", "attn", 2, 3, 0)
    prefixes = {slot: KVPrefix(draw(slot, 4, 2, 3), draw(slot + 9, 4, 2, 3)) for slot in (0, 2)}
    batch = batch_of(KVPrefix, site, prefixes | {1: poisoned(prefixes[0], float("nan"))})
    index = two_prefixed_requests()
    key, value = draw(20, 8, 6), draw(21, 8, 6)
    new_key, new_value = key.clone(), value.clone()
    batch.apply(new_key, new_value, index)
    for row, slot, position in ((0, 0, 0), (1, 0, 1), (5, 2, 2), (6, 2, 3)):
        assert torch.equal(new_key[row], prefixes[slot].key[position].flatten())
        assert torch.equal(new_value[row], prefixes[slot].value[position].flatten())
    for row in (2, 3, 4, 7):
        assert torch.equal(new_key[row], key[row])
        assert torch.equal(new_value[row], value[row])


def test_virtual_rows_and_no_others_get_their_adapters_embeddings() -> None:
    site = EmbeddingSite("embed", 16, FEATURES)
    prompts = {slot: SoftPrompt(draw(slot, 4, FEATURES)) for slot in (0, 2)}
    batch = batch_of(SoftPrompt, site, prompts | {1: poisoned(prompts[0], float("nan"))})
    before = draw(20, 8, FEATURES)
    after = before.clone()
    batch.apply(torch.zeros(8), after, two_prefixed_requests())
    for row, slot, position in ((0, 0, 0), (1, 0, 1), (5, 2, 2), (6, 2, 3)):
        assert torch.equal(after[row], prompts[slot].embedding[position])
    for row in (2, 3, 4, 7):
        assert torch.equal(after[row], before[row])
