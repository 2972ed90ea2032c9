"""Ports: where a module of the loaded vLLM model lets delta ops in.

A port replaces one module's ``forward`` (on the instance; the module keeps its class, weights and attributes). With no
row of the step belonging to an adapter that has an op here, it costs one integer ``&``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltamux.deltas.ops import Op, OpBatch, StepIndex
from deltamux.deltas.sites import HeadSite, Site

IDLE = StepIndex((), 0, 0)
"""A step in which every row is the base's."""


class CurrentStep:
    """The step that is running; one object shared by all ports of a model."""

    def __init__(self) -> None:
        self.index = IDLE


class LaneKind(NamedTuple):
    """What the ops of one lane share."""

    op: type[Op]
    reads_residual: bool


class Lanes:
    """The op batches of one site, in an order that keeps every program's own."""

    def __init__(self, site: Site, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.site = site
        self.mask = 0
        self._make: Callable[[type[Op]], OpBatch] = lambda kind: kind.batch(site, num_slots, dtype, device)
        self.input_mask = 0
        self._lanes: list[tuple[LaneKind, OpBatch]] = []
        self._last: dict[int, int] = {}

    def place(self, slot: int, op: Op) -> None:
        """Adds a slot's next op; ops of one slot apply in the order in which they come."""
        kind, start = LaneKind(type(op), op.reads_residual), self._last.get(slot, -1) + 1
        index = next((i for i in range(start, len(self._lanes)) if self._lanes[i][0] == kind), len(self._lanes))
        if index == len(self._lanes):
            self._lanes.append((kind, self._make(kind.op)))
        self._lanes[index][1].place(slot, op)
        self._last[slot] = index
        if op.changes_input:
            self.input_mask |= 1 << slot
        self.mask |= 1 << slot

    def clear(self, slot: int) -> None:
        self._last.pop(slot, None)
        for _, lane in self._lanes:
            lane.clear(slot)
        if not self._last:
            self._lanes.clear()
        self.mask &= ~(1 << slot)
        self.input_mask &= ~(1 << slot)

    def apply(self, x: Tensor, y: Tensor, step: StepIndex, residual: Tensor | None = None) -> None:
        """Applies every op of the site to its own rows of `y`, in place; `residual` stands in for `x` where due."""
        for kind, lane in self._lanes:
            if not kind.op.changes_input:
                lane.apply(residual if kind.reads_residual and residual is not None else x, y, step)

    def changed_input(self, x: Tensor, step: StepIndex) -> Tensor:
        """Returns a copy of the module's input with every slot's own rows changed."""
        x = x.clone()
        for kind, lane in self._lanes:
            if kind.op.changes_input:
                lane.apply(x, x[: step.num_rows], step)
        return x


class Port:
    """Base of the ports: holds the module's own forward and the lanes behind it."""

    def __init__(self, module: nn.Module, current: CurrentStep) -> None:
        self._forward: Callable[..., Any] = module.forward
        self._current = current
        module.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class LinearPort(Port):
    """A projection, fused or not: its parts' own ops, and the ops of the sub-layer that reads or writes here.

    Attributes:
        parts: (lanes, first column, end column) of each projection that the module fuses.
        reads: sub-layers whose input this module reads; writes: those whose output it returns.
    """

    def __init__(self, module: nn.Module, current: CurrentStep) -> None:
        super().__init__(module, current)
        self.parts: list[tuple[Lanes, int, int]] = []
        self.reads: list[BlockInput] = []
        self.writes: list[tuple[Lanes, BlockInput]] = []

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        step = self._current.index
        if not step.mask:
            return self._forward(x, *args, **kwargs)
        if self.parts and self.parts[0][0].input_mask & step.mask:
            x = self.parts[0][0].changed_input(x, step)
        output = self._forward(x, *args, **kwargs)
        for block in self.reads:
            block.x = x
        rows = step.num_rows
        y = (output[0] if isinstance(output, tuple) else output)[:rows]
        for lanes, start, stop in self.parts:
            if lanes.mask & step.mask:
                lanes.apply(x[:rows], y[:, start:stop], step)
        for lanes, block in self.writes:
            if lanes.mask & step.mask:
                lanes.apply(block.x[:rows], y, step, None if block.residual is None else block.residual[:rows])
            block.residual = None
        return output


class BlockInput:
    """The input of a sub-layer in the step that is running, kept from where it is read to where it is needed.

    Attributes:
        x: what its first projections read.
        residual: the residual stream that its output is added to; None where no norm in front of it reads that.
    """

    x: Tensor
    residual: Tensor | None = None


class NormPort(Port):
    """A norm, also one that adds the residual first: then the sum, its second output, is what it normalised.

    Attributes:
        feeds: the sub-layer that stands behind it, if any, whose residual stream is what it normalised.
    """

    def __init__(self, module: nn.Module, current: CurrentStep, lanes: Lanes) -> None:
        super().__init__(module, current)
        self._lanes = lanes
        self.feeds: BlockInput | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self._forward(x, *args, **kwargs)
        step = self._current.index
        if not step.mask:
            return output
        y, normalised = output if isinstance(output, tuple) else (output, x)
        if self.feeds is not None:
            self.feeds.residual = normalised
        if step.mask & self._lanes.mask:
            self._lanes.apply(normalised[: step.num_rows], y[: step.num_rows], step)
        return output


class EmbeddingPort(Port):
    """The input embedding: tables change, and virtual tokens get embeddings of their own."""

    def __init__(self, module: nn.Module, current: CurrentStep, lanes: Lanes) -> None:
        super().__init__(module, current)
        self._lanes = lanes

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self._forward(ids, *args, **kwargs)
        step = self._current.index
        if step.mask & self._lanes.mask:
            self._lanes.apply(ids[: step.num_rows], output[: step.num_rows], step)
        return output


class HeadPort:
    """The output head: the model's logits, which vLLM computes for the last row of every request alone."""

    def __init__(self, model: nn.Module, current: CurrentStep, lanes: Lanes) -> None:
        self._compute_logits: Callable[..., Any] = model.compute_logits  # type: ignore[assignment]  # vLLM's method
        self._current = current
        self._lanes = lanes
        model.compute_logits = self.compute_logits  # type: ignore[assignment]  # on the instance

    def compute_logits(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = self._compute_logits(hidden, *args, **kwargs)
        step = self._current.index.last_rows
        if step is not None and step.mask & self._lanes.mask and logits is not None:
            if step.num_rows != hidden.shape[0]:
                raise RuntimeError(f"{hidden.shape[0]} rows of logits in a step of {step.num_rows} requests")
            site = self._lanes.site
            assert isinstance(site, HeadSite)
            self._lanes.apply(hidden, logits[:, : site.vocab_size], step)
        return logits


class AttentionPort(Port):
    """An attention layer: keys and values of virtual tokens change right before they enter the cache."""

    def __init__(self, module: nn.Module, current: CurrentStep, lanes: Lanes) -> None:
        super().__init__(module, current)
        self._lanes = lanes

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        step = self._current.index
        if step.virtual is not None and step.virtual.mask & self._lanes.mask:
            self._lanes.apply(key[: step.num_rows], value[: step.num_rows], step)
        return self._forward(query, key, value, *args, **kwargs)
