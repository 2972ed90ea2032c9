"""What a model asks its layers: in a step that has nothing for them, no more than two masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from deltamux.deltas.ops import RowRange, StepIndex
from deltamux.engine.vllm.layers import custom_ops
from deltamux.engine.vllm.layers.current_step import IDLE, CurrentStep

SLOTS, ROWS = 4, 3
OWN, OF_SUB_LAYER, FOREIGN = 0, 1, 2
"""Slots with ops at the layer itself, at the sub-layer that it ends, and elsewhere alone."""


@dataclass
class Held:
    mask: int
    fast_path: None = None


class Counting(custom_ops.CustomOpTarget):
    """A layer that doubles what it may change, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def change_input(self, x: Tensor) -> None:
        self.asked += 1
        x.mul_(2)

    def change_output(self, x: Tensor, y: Tensor) -> None:
        self.asked += 1
        y.mul_(2)

    def change_sub_layer(self, x: Tensor, read: Tensor, residual: Tensor | None, y: Tensor) -> None:
        self.asked += 1
        y.mul_(2)


class Model:
    """Two modules with layers, the second of which ends a sub-layer."""

    def __init__(self) -> None:
        self.step = CurrentStep()
        self.layers = [Counting(), Counting()]
        own = Held(1 << OWN)
        first, last = (custom_ops.register(layer, self.step, own) for layer in self.layers)
        custom_ops.add_sub_layer(last, Held(1 << OF_SUB_LAYER))

        def forward(x: Tensor) -> Tensor:
            y = x + 1
            custom_ops.change_output(x, y, first)
            z = y * 1
            custom_ops.change_input(z, last)
            out = z + 1
            custom_ops.change_sub_layer(z, y, None, out, last)
            return out

        self.eager: Callable[[Tensor], Tensor] = forward
        self.compiled: Callable[[Tensor], Tensor] = torch.compile(forward, fullgraph=True)

    def run(self, forward: Callable[[Tensor], Tensor], slot: int | None) -> tuple[float, list[int]]:
        """Returns what one row of zeros becomes, and how often each layer was asked."""
        for layer in self.layers:
            layer.asked = 0
        self.step.begin(IDLE if slot is None else StepIndex((RowRange(slot, 0, ROWS),), ROWS, SLOTS))
        with torch.inference_mode():
            out = forward(torch.zeros(ROWS, 2))
        assert bool((out == out[0, 0]).all())
        return float(out[0, 0]), [layer.asked for layer in self.layers]


@pytest.fixture(scope="module", params=["by number", "by name"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    custom_ops.trace_by_name(request.param == "by name")
    yield Model()
    custom_ops.bypass_dispatch(False)
    custom_ops.trace_by_name(False)


@pytest.mark.parametrize("way", ["eager", "compiled", "compiled, called directly"])
def test_a_layer_is_called_in_steps_that_have_a_slot_of_its_own(model: Model, way: str) -> None:
    custom_ops.bypass_dispatch(way.endswith("directly"))
    forward = model.eager if way == "eager" else model.compiled
    assert model.run(forward, OWN) == (10.0, [1, 2])
    assert model.run(forward, FOREIGN) == (2.0, [0, 0])
    assert model.run(forward, None) == (2.0, [0, 0])


@pytest.mark.parametrize("directly", [False, True])
def test_a_layer_that_ends_a_sub_layer_is_called_for_the_sub_layers_slots_too(model: Model, directly: bool) -> None:
    custom_ops.bypass_dispatch(directly)
    assert model.run(model.compiled, OF_SUB_LAYER) == (4.0, [0, 1])


def test_a_compiled_model_that_calls_directly_passes_torchs_dispatch_by(model: Model) -> None:
    dispatched = {}
    for directly in (False, True, False):
        custom_ops.bypass_dispatch(directly)
        model.run(model.compiled, OWN)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model.run(model.compiled, OWN)
        dispatched[directly] = sum(e.count for e in profile.key_averages() if e.key.startswith("deltamux::"))
    assert dispatched == {False: 3, True: 0}


def test_one_graph_serves_equal_modules_if_their_layers_are_looked_up_by_name() -> None:
    codes: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        codes.append(graph.code)
        return graph

    custom_ops.trace_by_name(True)
    for _ in range(2):
        model = Model()
        assert model.run(torch.compile(model.eager, fullgraph=True, backend=backend), OWN) == (10.0, [1, 2])
    custom_ops.trace_by_name(False)
    assert len(codes) == 1
