"""Norms with delta ops."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deltamux.engine.vllm.layers import custom_ops
from deltamux.engine.vllm.layers.base import LayerWithDeltas, as_rows
from deltamux.engine.vllm.layers.current_step import CurrentStep
from deltamux.engine.vllm.layers.linear import BlockInput
from deltamux.engine.vllm.layers.module_ops import ModuleOps


class NormWithDeltas(LayerWithDeltas):
    """A norm.

    Args:
        adds_residual: whether it adds the residual that it is given first, and returns the sum, which it normalised.

    Attributes:
        feeds: the sub-layer after it, if any, whose residual stream it normalised.
    """

    def __init__(self, module: nn.Module, current: CurrentStep, ops: ModuleOps, *, adds_residual: bool) -> None:
        super().__init__(module, current, ops)
        self.feeds: BlockInput | None = None
        self._adds_residual = adds_residual

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self._forward(x, *args, **kwargs)
        y, second = output if isinstance(output, tuple) else (output, None)
        normalised = as_rows(second if second is not None and self._adds_residual else x)
        if self.feeds is not None:
            self.feeds.residual = normalised
        custom_ops.change_output(normalised, as_rows(y), self._handle)
        return output
