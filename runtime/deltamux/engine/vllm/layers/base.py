"""`LayerWithDeltas`, as vLLM's ``BaseLayerWithLoRA``: a module of the loaded model with delta ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from deltamux.engine.vllm.layers import custom_ops
from deltamux.engine.vllm.layers.current_step import CurrentStep, of_step
from deltamux.engine.vllm.layers.custom_ops import CustomOpTarget
from deltamux.engine.vllm.layers.module_ops import ModuleOps


def as_rows(x: Tensor) -> Tensor:
    """Returns `x` [..., features] as [rows, features]: vLLM's backend for transformers' models keeps a batch of one."""
    return x if x.dim() <= 2 else x.view(-1, x.shape[-1])


class LayerWithDeltas(CustomOpTarget):
    """A module of the loaded model, its own forward, and its ops.

    It replaces the module's ``forward`` on the instance; the module keeps its class, weights and attributes. What it
    adds is one custom op, which torch.compile traces around: where no row of the step is of an adapter with an op here,
    it costs a call and one integer ``&``.
    """

    def __init__(self, module: nn.Module, current: CurrentStep, ops: ModuleOps) -> None:
        self.module = module
        self.ops = ops
        self._forward: Callable[..., Any] = module.forward
        self._current = current
        self._handle = custom_ops.register(self, current, ops)
        module.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def change_output(self, x: Tensor, y: Tensor) -> None:
        step = self._current.index
        if step.mask & self.ops.mask:
            self.ops.apply(of_step(x, step), of_step(y, step), step)
