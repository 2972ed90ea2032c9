"""The weights of a mixture's experts as vLLM has loaded them, and what they compute of rows that are sorted by expert.

vLLM's kernels compute both projections of an expert at once, so that nothing can be added between them. Rows of
adapters that change experts are therefore computed here, from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from deltamux.deltas.backends.cpu.experts import BLOCK, expert_products
from deltamux.deltas.backends.cpu.slot_params import available
from deltamux.deltas.ops.low_rank_experts import segments


class Layout(NamedTuple):
    """How an expert's weight [out, in] lies in memory.

    Attributes:
        rows: returns it as [out, in].
        product: returns what it makes of rows [n, in], [n, out].
        for_products: whether `expert_products` multiplies by it.
    """

    rows: Callable[[Tensor], Tensor]
    product: Callable[[Tensor, Tensor], Tensor]
    for_products: bool = False


def _blocks(weight: Tensor) -> Tensor:
    return weight.view(-1, weight.shape[1], BLOCK)


def _of_blocks(weight: Tensor, x: Tensor) -> Tensor:
    return torch.matmul(x, _blocks(weight)).transpose(0, 1).reshape(len(x), -1)


def _pairs(weight: Tensor) -> Tensor:
    return weight.view(-1, weight.shape[1] // 2, BLOCK, 2).transpose(1, 2).reshape(weight.shape)


LAYOUTS: MappingProxyType[str, Layout] = MappingProxyType(
    {
        "plain": Layout(lambda weight: weight, lambda weight, x: F.linear(x, weight)),
        "blocks": Layout(lambda weight: _blocks(weight).mT.reshape(weight.shape), _of_blocks, for_products=True),
        "blocks of pairs": Layout(_pairs, lambda weight, x: F.linear(x, _pairs(weight))),
    }
)
"""As vLLM's kernels read them: on a GPU plain; on a CPU ``cpu_prepack_moe_weight`` packs them by blocks of outputs."""


def _oai(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


GATES: MappingProxyType[MoEActivation, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        MoEActivation.SILU: lambda gate, up: F.silu(gate) * up,
        MoEActivation.GELU: lambda gate, up: F.gelu(gate) * up,
        MoEActivation.GELU_TANH: lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        MoEActivation.SWIGLUOAI: _oai,
    }
)
"""What an expert makes of its gates and its ups."""


class ExpertGroups(NamedTuple):
    """Rows that are sorted by expert.

    Attributes:
        experts: [n] int64, each row's.
        starts: [num_experts + 1] int64, where each expert's rows begin.
    """

    experts: Tensor
    starts: Tensor

    @classmethod
    def of(cls, experts: Tensor, num_experts: int) -> ExpertGroups:
        return cls(experts, torch.searchsorted(experts, torch.arange(num_experts + 1, device=experts.device)))


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of all experts of one module.

    Attributes:
        layout: of each expert's weights.
        size: the experts' own intermediate size, which vLLM may have padded.
    """

    module: RoutedExperts
    layout: Layout
    size: int

    def gate_up(self, x: Tensor, groups: ExpertGroups) -> Tensor:
        """Returns the gates and ups [n, 2 * size] of rows [n, hidden]."""
        y = self._product(x, groups, self._into, getattr(self.module, "w13_bias", None))
        return y if y.shape[1] == 2 * self.size else torch.cat(self._halves(y.T)).T.contiguous()

    def activated(self, gate_up: Tensor) -> Tensor:
        """Returns the inputs [n, size] of the down projections."""
        activation = self.module.activation
        if activation is MoEActivation.SWIGLUOAI:  # the one whose gates and ups alternate
            return GATES[activation](gate_up[:, ::2], gate_up[:, 1::2])
        return GATES[activation](*gate_up.chunk(2, dim=1))

    def down(self, x: Tensor, groups: ExpertGroups) -> Tensor:
        """Returns the outputs [n, hidden] of rows [n, size]."""
        padded = F.pad(x, (0, self._back.shape[2] - self.size))
        return self._product(padded, groups, self._back, getattr(self.module, "w2_bias", None))

    def stored(self, expert: int) -> tuple[Tensor, Tensor]:
        """Returns an expert's weights [2 * size, hidden] and [hidden, size], without padding."""
        gate_up, down = self.layout.rows(self._into[expert]), self.layout.rows(self._back[expert])
        return torch.cat(self._halves(gate_up)), down[:, : self.size]

    # Looked up in every step, since vLLM may replace them.

    @property
    def _into(self) -> Tensor:
        weight: Tensor = self.module.get_parameter("w13_weight")
        return weight

    @property
    def _back(self) -> Tensor:
        weight: Tensor = self.module.get_parameter("w2_weight")
        return weight

    def _halves(self, rows: Tensor) -> list[Tensor]:
        """Returns the first rows of both halves, which padding is behind."""
        return [half[: self.size] for half in rows.chunk(2)]

    def _product(self, x: Tensor, groups: ExpertGroups, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.layout.for_products and available(x.dtype, x.device):
            y = expert_products(x, weight, groups.starts)
        else:
            y = x.new_empty(len(x), weight.shape[1])
            for expert, rows in segments(groups.experts):
                y[rows] = self.layout.product(weight[expert], x[rows])
        return y if bias is None else y + bias[groups.experts]
