"""Projections, and the sub-layers that end at one, with delta ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from deltamux.deltas.ops import StepIndex
from deltamux.engine.vllm.layers import custom_ops
from deltamux.engine.vllm.layers.base import LayerWithDeltas, as_rows
from deltamux.engine.vllm.layers.current_step import CurrentStep, of_step
from deltamux.engine.vllm.layers.module_ops import ModuleOps


class BlockInput:
    """The input of a sub-layer in the step that is running, kept until its output is there.

    Attributes:
        x: what its first projections read.
        residual: the residual stream that its output is added to; None where no norm before it reads that.
    """

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.residual: Tensor | None = None


def output_size(module: Any) -> int:
    """Returns how many outputs a linear of vLLM's, or of torch's, has: those of all projections that it packs."""
    return int(module.output_size if hasattr(module, "output_size") else module.out_features)


class SubLayer(NamedTuple):
    """The sub-layer whose output a projection writes: its ops, and what it has read."""

    ops: ModuleOps
    read: BlockInput


class LinearWithDeltas(LayerWithDeltas):
    """A projection, packed or not: the ops of its slices, and those of the sub-layer whose output it is.

    Attributes:
        reads: sub-layers whose input this module reads.
        writes: the sub-layer whose output it returns, see `end`.
        base: projects rows with the base's own weight; None unless the module has merged weights.
        is_packed: whether the module has outputs of other projections than its first slice's, with deltas or without.
    """

    def __init__(self, module: nn.Module, current: CurrentStep, ops: ModuleOps) -> None:
        super().__init__(module, current, ops)
        self.reads: list[BlockInput] = []
        self.writes: SubLayer | None = None
        self.base: Callable[[Tensor], Tensor] | None = None
        self.is_packed = ops.slices[0].columns.size != output_size(module)

    def end(self, sub_layer: SubLayer) -> None:
        """Makes this the projection that ends a sub-layer: no other module reads its input, which may then change."""
        self.writes = sub_layer
        custom_ops.add_sub_layer(self._handle, sub_layer.ops)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        given, x = x, as_rows(x)
        if self.writes is not None and not self.is_packed:
            custom_ops.change_input(x, self._handle)
        output = self._forward(given, *args, **kwargs)
        y = as_rows(output[0] if isinstance(output, tuple) else output)
        for block in self.reads:
            block.x = x
        if self.writes is None:
            custom_ops.change_output(x, y, self._handle)
        else:
            read = self.writes.read
            custom_ops.change_sub_layer(x, x if read.x is None else read.x, read.residual, y, self._handle)
            read.x = read.residual = None
        return output

    def change_input(self, x: Tensor) -> None:
        step = self._current.index
        if step.mask & self.ops.input_mask:
            self.ops.change_input(of_step(x, step), step)

    def change_output(self, x: Tensor, y: Tensor) -> None:
        step = self._current.index
        if step.mask & self.ops.input_mask and self.writes is None:
            x = self._with_changed_input(x, y, step)
        merged = self._current.merged
        if merged is None or self.base is None:
            super().change_output(x, y)
            return
        # Every module with merged weights gets here: such a step has rows of the merged program, whose slot has ops
        # here.
        if merged.others is not None:
            y[merged.others] = self.base(x[merged.others])
        if step.mask & self.ops.mask:
            self.ops.apply(of_step(x, step), of_step(y, step), step, weights=merged.weights)

    def change_sub_layer(self, x: Tensor, read: Tensor, residual: Tensor | None, y: Tensor) -> None:
        """The projection's own ops come first, then those of the sub-layer that it ends."""
        self.change_output(x, y)
        step, sub_layer = self._current.index, self.writes
        assert sub_layer is not None
        if step.mask & sub_layer.ops.mask:
            stream = None if residual is None else of_step(residual, step)
            sub_layer.ops.apply(of_step(read, step), of_step(y, step), step, stream)

    def _with_changed_input(self, x: Tensor, y: Tensor, step: StepIndex) -> Tensor:
        """Projects a changed copy of the input, which other modules read unchanged; returns the copy."""
        x = x.clone()
        self.ops.change_input(of_step(x, step), step)
        output = self._forward(x)
        y.copy_(output[0] if isinstance(output, tuple) else output)
        return x
