"""Experts with delta ops: own rows are computed with them, all others stay bit for bit as vLLM made them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from deltamux.deltas import ExpertsSite, LowRankExperts
from deltamux.deltas.backends.cpu.experts import BLOCK
from deltamux.deltas.backends.module_batch import ColumnRange, PackedSlice
from deltamux.deltas.weights import WeightFiles
from deltamux.engine.vllm.layers.current_step import CurrentStep
from deltamux.engine.vllm.layers.expert_probes import check_experts
from deltamux.engine.vllm.layers.expert_weights import GATES, LAYOUTS, ExpertWeights
from deltamux.engine.vllm.layers.experts import ExpertsWithDeltas
from deltamux.engine.vllm.layers.module_ops import ModuleOps, group_ops
from deltamux.engine.vllm.layers.probes import ProbeError
from deltamux_testing.steps import rows_of, step_of

EXPERTS, CHOSEN, HIDDEN, SIZE, SLOTS = 6, 2, 32, 16, 4
GATE_UP = ExpertsSite("m.experts.gate_up_proj", EXPERTS, HIDDEN, 2 * SIZE, False, True, 0)
DOWN = ExpertsSite("m.experts.down_proj", EXPERTS, SIZE, HIDDEN, False, True, 0)
SITES = (GATE_UP, DOWN)
PACKED = {
    "plain": lambda w: w,
    "blocks": lambda w: w.view(len(w), -1, BLOCK, w.shape[2]).mT.reshape(w.shape),
    "blocks of pairs": lambda w: w.view(len(w), -1, BLOCK, w.shape[2] // 2, 2).transpose(2, 3).reshape(w.shape),
}


def draw(seed: int, *shape: int) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Unquantised(UnquantizedFusedMoEMethod):
    """vLLM's method of experts without quantisation, as far as it is looked at."""

    is_monolithic = False
    topk_indices_dtype = None

    def __init__(self) -> None:
        nn.Module.__init__(self)


class Monolithic(Unquantised):
    is_monolithic = True


class Experts(nn.Module):
    """What `RoutedExperts` of vLLM has, computed row by row from weights that lie in some layout."""

    def __init__(self, layout: str = "plain", activation: MoEActivation = MoEActivation.SILU, **given: Any) -> None:
        super().__init__()
        self.dense = (draw(1, EXPERTS, 2 * SIZE, HIDDEN), draw(2, EXPERTS, HIDDEN, SIZE))
        padding = given.pop("padding", 0)
        if padding:
            gates, ups = (nn.functional.pad(half, (0, 0, 0, padding)) for half in self.dense[0].chunk(2, dim=1))
            w13, w2 = torch.cat([gates, ups], dim=1), nn.functional.pad(self.dense[1], (0, padding))
        else:
            w13, w2 = self.dense
        self.w13_weight = nn.Parameter(PACKED[layout](w13).contiguous(), requires_grad=False)
        self.w2_weight = nn.Parameter(PACKED[layout](w2).contiguous(), requires_grad=False)
        self.activation, self.hidden_size, self.top_k = activation, HIDDEN, CHOSEN
        self.global_num_experts, self.expert_map, self.swiglu_limit = EXPERTS, None, None
        self.apply_router_weight_on_input = False
        self.quant_method: nn.Module = Unquantised()
        self.moe_config = SimpleNamespace(intermediate_size_per_partition_unpadded=SIZE)
        for name, value in given.items():
            setattr(self, name, value)

    def forward_modular(self, x: Tensor, weights: Tensor, ids: Tensor, changes: Any = None) -> Tensor:
        y = torch.zeros_like(x)
        for row in range(len(x)):
            for weight, expert in zip(weights[row], ids[row].tolist(), strict=True):
                w13, w2 = (w[expert] if changes is None else w[expert] + c[expert] for w, c in self._pairs(changes))
                own = x[row] * weight if self.apply_router_weight_on_input else x[row]
                gate_up = w13 @ own
                interleaved = self.activation is MoEActivation.SWIGLUOAI
                gate, up = (gate_up[::2], gate_up[1::2]) if interleaved else gate_up.chunk(2)
                out = w2 @ GATES[self.activation](gate, up)
                y[row] += out if self.apply_router_weight_on_input else weight * out
        return y

    def _pairs(self, changes: Any) -> Any:
        return zip(self.dense, (None, None) if changes is None else changes, strict=True)


def with_deltas(module: Any) -> tuple[ExpertsWithDeltas, CurrentStep]:
    current, cpu = CurrentStep(), torch.device("cpu")
    _, weights = check_experts(SITES, module, None)
    gate_up, down = (
        ModuleOps((PackedSlice(site, ColumnRange(0, site.out_features)),), SLOTS, torch.float32, cpu) for site in SITES
    )
    return ExpertsWithDeltas(module, current, weights, gate_up, down), current


def op(seed: int, site: ExpertsSite) -> LowRankExperts:
    rank = 1 + seed % 3
    return LowRankExperts(draw(seed, EXPERTS, rank, site.in_features), draw(seed + 1, EXPERTS, site.out_features, rank))


def dense(op: LowRankExperts | None) -> Tensor:
    return torch.zeros(EXPERTS, 1, 1) if op is None else op.scale * torch.bmm(op.b, op.a)


@settings(max_examples=20, deadline=None)
@given(
    step=st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 9)), min_size=1, max_size=6),
    places=st.dictionaries(st.integers(0, SLOTS - 1), st.sampled_from(["both", "gate_up", "down"])),
    layout=st.sampled_from(list(LAYOUTS)),
    on_input=st.booleans(),
)
def test_rows_of_expert_adapters_have_their_changes_and_others_none(
    step: list[tuple[int, int]], places: dict[int, str], layout: str, on_input: bool
) -> None:
    module: Any = Experts(layout, apply_router_weight_on_input=on_input)
    plain = Experts(layout, apply_router_weight_on_input=on_input)
    layer, current = with_deltas(module)
    ops: dict[int, tuple[Any, Any]] = {}
    for slot, place in places.items():
        ops[slot] = (op(slot, GATE_UP) if place != "down" else None, op(slot + 9, DOWN) if place != "gate_up" else None)
        for own, at in zip(ops[slot], (layer.gate_up, layer.down), strict=True):
            if own is not None:
                at.set(slot, group_ops([(0, own)]))
    index = step_of(step, SLOTS)
    x, scores = draw(3, index.num_rows + 2, HIDDEN), torch.rand(index.num_rows + 2, EXPERTS)  # two rows of padding
    weights, ids = scores.topk(CHOSEN)
    current.begin(index)
    after, before = module.forward_modular(x, weights, ids.int()), plain.forward_modular(x, weights, ids)
    for slot, rows in rows_of(step):
        if slot in ops:
            expected = plain.forward_modular(x[rows], weights[rows], ids[rows], [dense(each) for each in ops[slot]])
            torch.testing.assert_close(after[rows], expected, atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(after[rows], before[rows]), "vLLM's own rows"
    assert torch.equal(after[index.num_rows :], before[index.num_rows :])


def test_a_step_without_adapters_at_the_experts_computes_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = Experts()
    layer, current = with_deltas(module)
    layer.down.set(1, group_ops([(0, op(1, DOWN))]))
    monkeypatch.setattr(layer, "change_experts", lambda *args: pytest.fail("called"))
    current.begin(step_of([(0, 3), (-1, 2)], SLOTS))
    module.forward_modular(draw(1, 5, HIDDEN), torch.ones(5, CHOSEN), torch.zeros(5, CHOSEN, dtype=torch.int64))


@pytest.mark.parametrize(("step", "runs"), [([(1, 3)], []), ([(1, 3), (-1, 2)], [5]), ([(1, 3), (0, 1)], [4])])
def test_vllms_experts_run_only_where_a_row_is_theirs(step: list[tuple[int, int]], runs: list[int]) -> None:
    module: Any = Experts()
    own, rows = module.forward_modular, list[int]()

    def counted(x: Tensor, *args: Tensor) -> Any:
        rows.append(len(x))
        return own(x, *args)

    module.forward_modular = counted
    layer, current = with_deltas(module)
    rows.clear()  # of the probes
    layer.down.set(1, group_ops([(0, op(1, DOWN))]))
    current.begin(index := step_of(step, SLOTS))
    x = draw(1, index.num_rows, HIDDEN)
    weights, ids = torch.rand(len(x), EXPERTS).topk(CHOSEN)
    assert not torch.equal(module.forward_modular(x, weights, ids), own(x, weights, ids))
    assert rows == runs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("padding", [0, 16])
def test_the_layout_of_experts_is_found_by_what_they_compute(
    layout: str, activation: MoEActivation, padding: int, tmp_path: Path
) -> None:
    if padding and activation is MoEActivation.SWIGLUOAI:
        pytest.skip("vLLM does not pad gates and ups that alternate")
    module: Any = Experts(layout, activation, padding=padding)
    found, weights = check_experts(SITES, module, checkpoint(tmp_path, module))
    assert found == SITES
    assert weights.layout is LAYOUTS[layout]
    assert isinstance(weights, ExpertWeights)
    for own, stored in zip(weights.stored(3), module.dense, strict=True):
        assert torch.equal(own, stored[3])


def checkpoint(folder: Path, module: Any) -> WeightFiles:
    stored = {site.name: weight.clone() for site, weight in zip(SITES, module.dense, strict=True)}
    save_file(stored, folder / "model.safetensors")
    return WeightFiles.locate(folder)


def swapped(module: Any) -> None:
    module.dense = (module.dense[0].roll(SIZE, dims=1), module.dense[1])


def permuted(module: Any) -> None:
    module.dense = tuple(weight.roll(1, dims=0) for weight in module.dense)


@pytest.mark.parametrize("change", [swapped, permuted])
def test_experts_that_are_not_the_checkpoints_take_no_deltas(change: Any, tmp_path: Path) -> None:
    module: Any = Experts()
    other: Any = Experts()
    change(other)
    with pytest.raises(ProbeError, match="something else than the checkpoint's"):
        check_experts(SITES, module, checkpoint(tmp_path, other))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"quant_method": nn.Identity()}, "are quantised here"),
        ({"quant_method": Monolithic()}, "in one kernel"),
        ({"expert_map": torch.zeros(EXPERTS)}, "distributes or replicates"),
        ({"global_num_experts": EXPERTS + 2}, "distributes or replicates"),
        ({"activation": MoEActivation.RELU2}, "have the activation relu2"),
        ({"swiglu_limit": 7.0}, "have the activation silu"),
        ({"moe_config": SimpleNamespace(intermediate_size_per_partition_unpadded=8)}, "no projection of the shape"),
    ],
)
def test_experts_that_cannot_be_computed_apart_take_no_deltas(given: dict[str, Any], words: str) -> None:
    module: Any = Experts()
    for name, value in given.items():
        setattr(module, name, value)
    with pytest.raises(ProbeError, match=words):
        check_experts(SITES, module, None)


def test_experts_that_compute_in_another_way_take_no_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = Experts()
    monkeypatch.setattr(module, "forward_modular", lambda x, weights, ids: torch.tanh(x))
    with pytest.raises(ProbeError, match="in a way that takes no deltas"):
        check_experts(SITES, module, None)
