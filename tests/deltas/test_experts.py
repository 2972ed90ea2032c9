"""LoRA at the experts of a mixture: every form equals a dense change of each expert's weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from bases.configs import base_config, save_base
from deltamux.deltas import BaseModel, ExpertsSite, LowRank, LowRankExperts, Op, Program, attached, merge_program
from deltamux.deltas.backends.cpu.experts import BLOCK, CPULowRankExperts, expert_products
from deltamux.deltas.ops import OpBatch, RowRange, low_rank_experts
from deltamux.deltas.ops.low_rank_experts import ExpertRows
from deltamux.errors import BaseMismatchError

EXPERTS, INPUTS, OUTPUTS, SLOTS = 5, 8, 6, 6
SITE = ExpertsSite("layers.0.experts.up", EXPERTS, INPUTS, OUTPUTS, transposed=False, is_declared=True, layer=0)
IDS = torch.tensor([[5, 17, 99, 200, 3], [4, 8, 15, 16, 23]])
EXAMPLES = min(40, settings().max_examples)

steps = st.dictionaries(
    st.integers(0, SLOTS - 1), st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=40), min_size=1
)
"""The experts of each slot's rows."""


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(seed: int, site: ExpertsSite = SITE) -> LowRankExperts:
    rank = 1 + seed % 4
    a = draw(seed, site.num_experts, rank, site.in_features)
    return LowRankExperts(a, draw(seed + 1, site.num_experts, site.out_features, rank), 0.5 + seed % 3)


def dense(op: LowRankExperts) -> Tensor:
    """The changes of all experts' weights, [num_experts, out, in]."""
    return op.scale * torch.einsum("eor,eri->eoi", op.b, op.a)


def rows_at(step: dict[int, list[int]]) -> ExpertRows:
    ranges: list[RowRange] = []
    experts: list[int] = []
    for slot, chosen in step.items():
        ranges.append(RowRange(slot, len(experts), len(experts) + len(chosen)))
        experts += sorted(chosen)
    return ExpertRows(ranges, SLOTS, torch.tensor(experts))


BATCHES: dict[str, type[OpBatch]] = {"torch": LowRankExperts.batch, "kernel": CPULowRankExperts}


def applied(kind: str, ops: dict[int, Any], x: Tensor, y: Tensor, rows: ExpertRows) -> Tensor:
    batch = BATCHES[kind](SITE, SLOTS, torch.float32, "cpu")
    for slot, op in ops.items():
        batch.set(slot, op)
    after = y.clone()
    batch.apply(x, after, rows)
    return after


@pytest.mark.parametrize(
    ("kind", "segment_rows"),
    [("torch", 0), ("torch", low_rank_experts.SEGMENT_ROWS), ("torch", 1 << 40), ("kernel", 0)],
)
@settings(max_examples=EXAMPLES, deadline=None)
@given(step=steps, present=st.sets(st.integers(0, SLOTS - 1)), seed=st.integers(0, 1000))
def test_a_mixed_step_equals_dense_changes_of_each_adapters_experts(
    kind: str, segment_rows: int, step: dict[int, list[int]], present: set[int], seed: int
) -> None:
    rows, ops = rows_at(step), {slot: factors(seed + slot) for slot in present}
    x, y = draw(seed, rows.num_rows, INPUTS), draw(seed + 1, rows.num_rows, OUTPUTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank_experts, "SEGMENT_ROWS", segment_rows)
        after = applied(kind, ops, x, y, rows)
    for slot, start, stop in rows.row_ranges:
        expected = y[start:stop]
        if slot in ops:
            chosen = dense(ops[slot])[rows.experts[start:stop]]
            expected = expected + torch.einsum("noi,ni->no", chosen, x[start:stop])
        torch.testing.assert_close(after[start:stop], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("count", [1, 40], ids=["decode", "prefill"])
def test_what_is_not_finite_stays_in_its_own_rows(kind: str, count: int) -> None:
    rows = rows_at({slot: [0, 3] * count for slot in range(4)})
    x, y = draw(1, rows.num_rows, INPUTS), draw(2, rows.num_rows, OUTPUTS)
    ops = {slot: factors(slot) for slot in range(4)}
    own = slice(4 * count, 6 * count)  # of slot 2
    spoilt = x.clone()
    spoilt[own] = float("nan")
    poisoned = ops | {2: LowRankExperts(torch.full_like(ops[2].a, float("inf")), ops[2].b)}
    others = [row for row in range(rows.num_rows) if not own.start <= row < own.stop]
    expected = applied(kind, ops, x, y, rows)
    torch.testing.assert_close(applied(kind, poisoned, spoilt, y, rows)[others], expected[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[0, 1, 2, 3, 4], [9, 0, 8, 25, 7]])
def test_the_kernel_multiplies_each_experts_rows_by_its_packed_weight(dtype: torch.dtype, counts: list[int]) -> None:
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    starts = torch.searchsorted(experts, torch.arange(len(counts) + 1))
    x, weights = draw(1, len(experts), 13).to(dtype), draw(2, len(counts), 48, 13).to(dtype)
    packed = weights.view(len(counts), 3, BLOCK, 13).mT.reshape(weights.shape)
    expected = torch.einsum("noi,ni->no", weights[experts].float(), x.float())
    found = expert_products(x, packed, starts)
    torch.testing.assert_close(found, expected.to(dtype))
    alone = expert_products(x[-1:], packed, torch.tensor([*[0] * len(counts), 1]))
    assert torch.equal(found[-1:], alone), "a row's sums do not depend on others"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_takes_any_rank_and_rows_of_others_between(dtype: torch.dtype) -> None:
    rows = ExpertRows([RowRange(0, 0, 3), RowRange(2, 3, 5), RowRange(1, 5, 9)], SLOTS, torch.tensor([0, 1, 1] * 3))
    batch = CPULowRankExperts(SITE, SLOTS, dtype, "cpu")
    ops = {0: factors(2), 1: LowRankExperts(0.1 * draw(7, EXPERTS, 300, INPUTS), draw(8, EXPERTS, OUTPUTS, 300), 0.5)}
    ops = {slot: op.to(dtype) for slot, op in ops.items()}
    for slot, op in ops.items():
        batch.set(slot, op)
    x, y = draw(1, 9, INPUTS).to(dtype), draw(2, 9, OUTPUTS).to(dtype)
    after = y.clone()
    batch.apply(x, after, rows)
    assert torch.equal(after[3:5], y[3:5])
    for slot, own in ((0, slice(0, 3)), (1, slice(5, 9))):
        op = ops[slot].to(torch.float32)
        expected = y[own].float() + torch.einsum("noi,ni->no", dense(op)[rows.experts[own]], x[own].float())
        torch.testing.assert_close(after[own].float(), expected, atol=0.05, rtol=0.05)


def test_apply_changes_every_experts_rows_by_its_own_factors() -> None:
    op, x, y = factors(3), draw(1, EXPERTS, 7, INPUTS), draw(2, EXPERTS, 7, OUTPUTS)
    torch.testing.assert_close(op.apply(x, y, SITE), y + x @ dense(op).mT)


@pytest.mark.parametrize("transposed", [False, True])
def test_merging_adds_the_dense_changes_as_the_parameter_is_stored(transposed: bool) -> None:
    site = ExpertsSite("e.up", EXPERTS, INPUTS, OUTPUTS, transposed=transposed, is_declared=True, layer=0)
    before, op = draw(1, EXPERTS, *((INPUTS, OUTPUTS) if transposed else (OUTPUTS, INPUTS))), factors(3)
    change = dense(op).mT if transposed else dense(op)
    torch.testing.assert_close(op.merge(site, {"e.up": before}.__getitem__), {"e.up": before + change})


def test_factors_of_another_number_of_experts_are_refused() -> None:
    other = ExpertsSite("e.up", EXPERTS + 1, INPUTS, OUTPUTS, transposed=False, is_declared=True, layer=0)
    with pytest.raises(BaseMismatchError, match="made for another base"):
        factors(1, other).check(SITE)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_an_attached_program_computes_with_merged_experts_and_leaves_the_base(name: str, tmp_path: Path) -> None:
    directory = save_base(tmp_path, name)
    base = BaseModel.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    model.eval()
    before, order = model(IDS).logits, list(model.state_dict())
    ops: list[tuple[str, Op]] = [(site.name, _small(factors(3, site))) for site in base.experts]
    routers = ((s.name, LowRank(0.1 * draw(4, 2, s.in_features), draw(5, s.out_features, 2))) for s in base.routers)
    program = Program.of([*ops, *routers])
    with attached(model, base, program):
        changed = model(IDS).logits
        changed.square().sum().backward()
    trained = [tensor for _, op in program for tensor in op.tensors().values() if tensor.requires_grad]
    assert len(trained) == 2 * len(base.experts)
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in trained)
    assert not torch.allclose(changed, before, atol=1e-2), "the program must be visible"
    assert torch.equal(model(IDS).logits, before)
    assert list(model.state_dict()) == order
    with torch.no_grad():
        for parameter, weight in merge_program(program, base).items():
            model.get_parameter(parameter).copy_(weight)
        torch.testing.assert_close(model(IDS).logits, changed)


def _small(op: LowRankExperts) -> LowRankExperts:
    return LowRankExperts((0.1 * op.a).requires_grad_(), op.b.requires_grad_(), op.scale)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_parameter_of_many_stored_tensors_is_read_and_written_as_transformers_does(name: str, tmp_path: Path) -> None:
    """Some bases store each expert's projections apart, in two halves; others as they are in memory."""
    directory = save_base(tmp_path, name)
    files = BaseModel.from_pretrained(directory).files
    assert files is not None
    parameters = dict(AutoModelForCausalLM.from_pretrained(directory).named_parameters())
    for site in BaseModel.from_config(base_config(name)).experts:
        whole = parameters[site.name].detach()
        assert torch.equal(files.read(site.name), whole)
        assert torch.equal(files.experts(site.name, [3, 1]), whole[[3, 1]])
        stored = files.as_stored(site.name, whole)
        assert {stored_name for _, stored_name in files.places(site.name)} == set(stored)
        assert all(torch.equal(files.read(part), tensor) for part, tensor in stored.items())


@pytest.mark.parametrize(
    ("name", "transposed", "is_declared"),
    [("olmoe", False, True), ("gpt_oss", True, True), ("llama4_text", True, False)],
)
def test_the_projections_of_experts_are_sites_in_the_order_of_their_parameters(
    name: str, transposed: bool, is_declared: bool
) -> None:
    base = BaseModel.from_config(base_config(name))
    last = [site for site in base.experts if site.layer == 1]
    assert [site.name.rpartition(".")[2] for site in last] == ["gate_up_proj", "down_proj"]
    assert [(site.in_features, site.out_features) for site in last] == [(64, 256), (128, 64)]
    assert {(site.transposed, site.is_declared) for site in base.experts} == {(transposed, is_declared)}


def test_a_router_is_a_site_apart_from_the_projections_that_are_modules() -> None:
    base = BaseModel.from_config(base_config("qwen3_moe"))
    assert [site.name for site in base.routers] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert not any(site.is_router for site in base.linears)
    dense_base = BaseModel.from_config(base_config("llama"))
    assert not dense_base.experts
    assert not dense_base.routers
    assert "is_router" not in repr(dense_base.linears[0]), "fingerprints of stored programs are made of it"
