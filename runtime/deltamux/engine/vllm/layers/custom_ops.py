"""The layers' changes as custom ops of torch, ``torch.ops.deltamux.*``, which torch.compile leaves as they are.

A traced graph is made once and serves every step, whatever adapters it has. So what depends on the step is inside an op
that the compiler does not trace: the graph holds a layer's number, and the op calls the layer.

Most layers have no work in a step. An op therefore compares masks before it touches the layer, calls skip torch's
dispatch where it would only lead back to this file (`bypass_dispatch`), and the fast path does the same without Python
where the CPU kernels run (docs/decisions/fast-path.md: what that buys).

vLLM's CUDA build compiles a model in pieces, one per layer, and compiles equal pieces once. A number in the graph would
make every piece another one, so each op has a second form there, which takes one of vLLM's layer names: an input of the
pieces, and not part of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name

from deltamux.engine.vllm.layers.fast_path.fast_path import FastPathModule, FastPathStep, install


class MaskedOps(Protocol):
    """Ops with a mask of slots, bit i for slot i."""

    @property
    def mask(self) -> int: ...
    @property
    def fast_path(self) -> FastPathModule | None: ...


class Masked(Protocol):
    """Anything with a mask of slots."""

    @property
    def mask(self) -> int: ...


class RunningStep(Protocol):
    """The step that is running."""

    @property
    def index(self) -> Masked: ...
    @property
    def fast_path(self) -> FastPathStep: ...


class CustomOpTarget:
    """The methods that the custom ops call; a layer overrides those of the ops in its graph."""

    def change_input(self, x: Tensor) -> None:
        """Changes a module's input in place."""
        raise NotImplementedError

    def change_output(self, x: Tensor, y: Tensor) -> None:
        """Changes a module's output `y` of input `x`, in place."""
        raise NotImplementedError

    def change_sub_layer(self, x: Tensor, read: Tensor, residual: Tensor | None, y: Tensor) -> None:
        """Changes `y`, the output of a sub-layer that has read `read` and is added to `residual`, in place."""
        raise NotImplementedError

    def change_experts(self, x: Tensor, weights: Tensor, ids: Tensor, y: Tensor) -> None:
        """Changes `y`, the weighted sum of what experts `ids` make of `x`, in place."""
        raise NotImplementedError

    def run_experts(self, x: Tensor, weights: Tensor, ids: Tensor, y: Tensor) -> None:
        """Fills `y` with the weighted sum of what experts `ids` make of `x`, with all changes."""
        raise NotImplementedError


@dataclass(slots=True)
class _Registered:
    """A layer, and the masks that are compared before it is called: the step's, its ops' and its sub-layer's."""

    step: RunningStep
    own: MaskedOps
    sub_layer: MaskedOps
    layer: CustomOpTarget


_LAYERS: list[_Registered] = []
# One fragment for the life of the process: torch forgets the ops when it goes.
_LIBRARY = torch.library.Library("deltamux", "DEF")  # type: ignore[no-untyped-call]  # torch leaves it so
_FUNCTIONS: dict[str, Callable[..., None]] = {}
_IN_FAST_PATH = ("change_input", "change_output", "change_sub_layer")
_OVERLOADS: dict[str, Callable[..., None]] = {}


class LayerHandle(NamedTuple):
    """The number by which the ops find a layer, and its name, used in graphs that must be equal."""

    number: int
    name: str


def register(layer: CustomOpTarget, step: RunningStep, ops: MaskedOps) -> LayerHandle:
    """Returns a layer's handle for the custom ops, which call it when the step has a slot of `ops`."""
    _LAYERS.append(_Registered(step, ops, ops, layer))
    number = len(_LAYERS) - 1
    _register_fast_path(number)
    return LayerHandle(number, str(number))


def add_sub_layer(handle: LayerHandle, sub_layer: MaskedOps) -> None:
    """Adds the slots with ops at a sub-layer to the slots for which the custom ops call its last layer."""
    _LAYERS[handle.number].sub_layer = sub_layer
    _register_fast_path(handle.number)


def _register_fast_path(number: int) -> None:
    entry = _LAYERS[number]
    own, sub_layer = entry.own.fast_path, entry.sub_layer.fast_path
    if own is not None and sub_layer is not None and (compiled := _compiled()) is not None:
        compiled.register(number, entry.step.fast_path.address, own.address, sub_layer.address)


@cache
def _compiled() -> ModuleType | None:
    """Returns the fast path, whose functions replace this file's from now on; None where it does not run."""
    compiled = install(tuple(_FUNCTIONS[name] for name in _IN_FAST_PATH))
    if compiled is not None:
        _FUNCTIONS.update({name: getattr(compiled, name) for name in _IN_FAST_PATH})
    return compiled


def bypass_dispatch(bypass: bool) -> None:
    """Makes compiled graphs call the functions of this file without torch's dispatch, or with it, as while they load.

    Inductor's code looks an op up by its full name in every call, so a function set under that name is called. Torch
    itself reads the name when it loads a compiled model, and must find the op.
    """
    for name, function in _FUNCTIONS.items():
        for form, called in ((name, function), (name + _BY_NAME, _by_name(name))):
            getattr(torch.ops.deltamux, form).default = called if bypass else _OVERLOADS[form]


@dataclass(slots=True)
class _Tracing:
    """The form of ops in graphs that are traced from now on: with names of layers, as inputs, or with numbers."""

    by_name: bool = False


_TRACING = _Tracing()
_BY_NAME = "_by_name"


def trace_by_name(by_name: bool) -> None:
    """Makes graphs that are traced from now on pass layers by name, so that equal layers have equal graphs."""
    _TRACING.by_name = by_name


def _by_name(name: str) -> Callable[..., None]:
    return lambda *args: _FUNCTIONS[name](*args[:-1], int(_resolve_layer_name(args[-1])))


def _type_of_names() -> str:
    """Returns what a schema calls vLLM's layer names."""

    def takes(name: LayerNameType) -> None: ...

    return torch.library.infer_schema(takes, mutates_args=()).removeprefix("(").partition(" ")[0]


def _define(schema: str, function: Callable[..., None]) -> Callable[..., None]:
    """Defines an op in both forms; returns what a layer calls: the op while a graph is traced, else the function."""
    name = schema.partition("(")[0]
    _FUNCTIONS[name] = function
    by_name = schema.replace(name, name + _BY_NAME).replace("int number", f"{_type_of_names()} name")
    numbered = _define_form(schema, lambda *args: _FUNCTIONS[name](*args))
    named = _define_form(by_name, _by_name(name))

    def call(*args: Any) -> None:
        *tensors, handle = args
        if not torch.compiler.is_compiling():
            _FUNCTIONS[name](*tensors, handle.number)
        elif _TRACING.by_name:
            named(*tensors, _encode_layer_name(handle.name))
        else:
            numbered(*tensors, handle.number)

    return call


def _define_form(schema: str, function: Callable[..., None]) -> Callable[..., None]:
    name = schema.partition("(")[0]
    _LIBRARY.define(f"{schema} -> ()")  # type: ignore[no-untyped-call]  # torch leaves it so
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, function, device)  # type: ignore[no-untyped-call]  # torch leaves it so
    torch.library.register_fake(f"deltamux::{name}", lambda *args: None, lib=_LIBRARY)
    op: Callable[..., None] = getattr(torch.ops.deltamux, name).default
    _OVERLOADS[name] = op
    return op


def _change_input(x: Tensor, number: int) -> None:
    entry = _LAYERS[number]
    if entry.step.index.mask & entry.own.mask:
        entry.layer.change_input(x)


def _change_output(x: Tensor, y: Tensor, number: int) -> None:
    entry = _LAYERS[number]
    if entry.step.index.mask & entry.own.mask:
        entry.layer.change_output(x, y)


def _change_sub_layer(x: Tensor, read: Tensor, residual: Tensor | None, y: Tensor, number: int) -> None:
    entry = _LAYERS[number]
    if entry.step.index.mask & (entry.own.mask | entry.sub_layer.mask):
        entry.layer.change_sub_layer(x, read, residual, y)


def _change_experts(x: Tensor, weights: Tensor, ids: Tensor, y: Tensor, number: int) -> None:
    entry = _LAYERS[number]
    if entry.step.index.mask & (entry.own.mask | entry.sub_layer.mask):
        entry.layer.change_experts(x, weights, ids, y)


def _run_experts(x: Tensor, weights: Tensor, ids: Tensor, y: Tensor, number: int) -> None:
    _LAYERS[number].layer.run_experts(x, weights, ids, y)


change_input = _define("change_input(Tensor(a!) x, int number)", _change_input)
change_output = _define("change_output(Tensor x, Tensor(a!) y, int number)", _change_output)
change_sub_layer = _define(
    "change_sub_layer(Tensor x, Tensor read, Tensor? residual, Tensor(a!) y, int number)", _change_sub_layer
)
change_experts = _define(
    "change_experts(Tensor x, Tensor weights, Tensor ids, Tensor(a!) y, int number)", _change_experts
)
run_experts = _define("run_experts(Tensor x, Tensor weights, Tensor ids, Tensor(a!) y, int number)", _run_experts)
