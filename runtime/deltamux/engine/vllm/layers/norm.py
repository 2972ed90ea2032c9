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
    """A norm, also one that adds the residual first: then the sum, its second output, is what it normalised.

    Attributes:
        feeds: the sub-layer after it, if any, whose residual stream it normalises.
    """

    def __init__(self, module: nn.Module, current: CurrentStep, ops: ModuleOps) -> None:
        super().__init__(module, current, ops)
        self.feeds: BlockInput | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self._forward(x, *args, **kwargs)
        y, normalised = output if isinstance(output, tuple) else (output, x)
        normalised = as_rows(normalised)
        if self.feeds is not None:
            self.feeds.residual = normalised
        custom_ops.change_output(normalised, as_rows(y), self._handle)
        return output
