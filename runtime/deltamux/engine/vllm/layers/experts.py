"""The experts of a mixture with delta ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from deltamux.deltas.ops import StepIndex
from deltamux.deltas.ops.low_rank_experts import ExpertRows
from deltamux.deltas.ops.step import RowRange, bits
from deltamux.engine.vllm.layers import custom_ops
from deltamux.engine.vllm.layers.base import as_rows
from deltamux.engine.vllm.layers.current_step import CurrentStep
from deltamux.engine.vllm.layers.custom_ops import CustomOpTarget
from deltamux.engine.vllm.layers.expert_weights import ExpertGroups, ExpertWeights
from deltamux.engine.vllm.layers.module_ops import ModuleOps


class ExpertsWithDeltas(CustomOpTarget):
    """The routed experts of one layer, with the ops at their two projections.

    Rows of adapters with an op here are computed from vLLM's weights with their ops; all other rows are as vLLM makes
    them, and a step without such adapters costs a call and an ``&``. vLLM's own experts run all rows or none, which
    only a CPU chooses in each step: a GPU's graphs run them always, and rows with ops replace theirs.

    Args:
        gate_up, down: the ops at the projections into the experts and back.
    """

    def __init__(
        self, module: RoutedExperts, current: CurrentStep, weights: ExpertWeights, gate_up: ModuleOps, down: ModuleOps
    ) -> None:
        self.gate_up, self.down = gate_up, down
        self._weights = weights
        self._on_input: bool = module.apply_router_weight_on_input
        self._num_experts: int = module.global_num_experts
        self._forward: Callable[..., Any] = module.forward_modular
        # Such a kernel runs the shared experts as well.
        self._runs_shared = bool(getattr(module.quant_method, "mk_can_overlap_shared_experts", False))
        self._current = current
        self._handle = custom_ops.register(self, current, gate_up)
        custom_ops.add_sub_layer(self._handle, down)
        module.forward_modular = self.forward  # type: ignore[method-assign]  # the runner calls it on the instance

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.device.type == "cpu" and not self._runs_shared:
            output = torch.empty_like(x)
            custom_ops.run_experts(as_rows(x), topk_weights, topk_ids, as_rows(output), self._handle)
            return output
        output = self._forward(x, topk_weights, topk_ids, *args, **kwargs)
        custom_ops.change_experts(as_rows(x), topk_weights, topk_ids, as_rows(output), self._handle)
        return output

    def run_experts(self, x: Tensor, weights: Tensor, ids: Tensor, y: Tensor) -> None:
        slots = self._slots()
        if not slots or len(self._own_rows(slots).rows) < len(x):
            y.copy_(self._forward(x, weights, ids))
        if slots:
            self.change_experts(x, weights, ids, y)

    def change_experts(self, x: Tensor, weights: Tensor, ids: Tensor, y: Tensor) -> None:
        step, own = self._current.index, self._own_rows(self._slots())
        chosen = ids.shape[1]
        experts, order = torch.sort(own.keys(chosen) * self._num_experts + ids[own.rows].flatten().long(), stable=True)
        experts, tokens = experts % self._num_experts, order // chosen
        scale = weights[own.rows].flatten()[order].unsqueeze(1)
        at = ExpertRows([RowRange(s, a * chosen, b * chosen) for s, a, b in own.ranges], step.num_slots, experts)
        inputs = x[own.rows[tokens]]
        outputs = self._outputs(inputs * scale.to(x.dtype) if self._on_input else inputs, at).float()
        total = outputs.new_zeros(len(own.rows), outputs.shape[1])
        total.index_add_(0, tokens, outputs if self._on_input else outputs * scale)
        y[own.rows] = total.to(y.dtype)

    def _slots(self) -> int:
        """Returns the mask of the step's slots with an op here."""
        return self._current.index.mask & (self.gate_up.mask | self.down.mask)

    def _own_rows(self, slots: int) -> OwnRows:
        return self._current.index.derived(RowsBySlots).of(slots)

    def _outputs(self, x: Tensor, at: ExpertRows) -> Tensor:
        """Returns what the experts make of rows [n, hidden], with the ops of each row's slot."""
        order = torch.argsort(at.experts, stable=True)
        groups = ExpertGroups.of(at.experts[order], self._num_experts)
        gate_up = torch.empty_like(y := self._weights.gate_up(x[order], groups))
        gate_up[order] = y
        self.gate_up.apply(x, gate_up, at)
        hidden = self._weights.activated(gate_up)
        down = torch.empty_like(y := self._weights.down(hidden[order], groups))
        down[order] = y
        self.down.apply(hidden, down, at)
        return down


class OwnRows(NamedTuple):
    """The rows of some slots in a step, one slot after the other.

    Attributes:
        rows: [n] int64, positions in the step.
        ranges: where each slot's are among the n.
    """

    rows: Tensor
    ranges: tuple[RowRange, ...]

    def keys(self, chosen: int) -> Tensor:
        """Returns [n * chosen] int64, a number for each slot, in order; `chosen` times for each row."""
        counts = torch.tensor([(stop - start) * chosen for _, start, stop in self.ranges])
        return torch.arange(len(self.ranges)).repeat_interleave(counts).to(self.rows.device)


class RowsBySlots:
    """The rows of a step by sets of slots, which the layers share."""

    def __init__(self, step: StepIndex) -> None:
        self._step = step
        self._found: dict[int, OwnRows] = {}

    def of(self, slots: int) -> OwnRows:
        """Returns the rows of the slots of a mask, each of which has rows in the step."""
        if slots not in self._found:
            parts: list[Tensor] = []
            ranges: list[RowRange] = []
            for slot in bits(slots):
                rows = self._step.rows(slot)
                start = ranges[-1].stop if ranges else 0
                ranges.append(RowRange(slot, start, start + self._step.count(slot)))
                parts.append(torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows)
            device = self._step.device
            self._found[slots] = OwnRows(torch.cat([part.to(device) for part in parts]), tuple(ranges))
        return self._found[slots]
