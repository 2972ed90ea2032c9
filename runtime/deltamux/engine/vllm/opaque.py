"""The ports as custom ops of torch, ``torch.ops.deltamux.*``, which torch.compile takes as they are.

A traced graph is made once and serves every step, whatever adapters it has. So what depends on the step stands behind
an op that the compiler cannot look into: the graph holds the port's number, and the op asks the port what to do now.

A step asks every port, and most have nothing to do. What that costs is not computing but memory: between two ports the
weights of a projection have passed through the caches, and all that an op touches comes from RAM. So an op looks at the
masks before it touches the port; and where torch would only find its way back to this file, it is passed by. Where the
CPU kernels run, their doors stand in for the functions of this file (`kernels/doors.cpp`): they do the same without
Python, and leave to it what has no kernel.

vLLM's CUDA build compiles a model in pieces, a layer each, and a piece that equals one before takes what that became.
A port's number in the graph would make every piece another one. So there each op has a second form, that is told the
port by one of vLLM's layer names: those are inputs of the pieces, and not part of them.
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

from deltamux.deltas.kernels import doors


class Deltas(Protocol):
    """Whatever has a mask of slots, bit i for slot i, and may have a door for them."""

    @property
    def mask(self) -> int: ...
    @property
    def door(self) -> doors.ModuleLanes | None: ...


class Masked(Protocol):
    """Whatever has a mask of slots."""

    @property
    def mask(self) -> int: ...


class Running(Protocol):
    """Whatever knows the step that is running."""

    @property
    def index(self) -> Masked: ...
    @property
    def door(self) -> doors.RunningStep: ...


class Opaque:
    """What a port does in a step, by op; a port overrides those that its graph calls."""

    def change_input(self, x: Tensor) -> None:
        """Changes a module's input in place."""
        raise NotImplementedError

    def change_output(self, x: Tensor, y: Tensor) -> None:
        """Changes a module's output `y` of input `x`, in place."""
        raise NotImplementedError

    def change_sub_layer(self, x: Tensor, read: Tensor, residual: Tensor | None, y: Tensor) -> None:
        """Changes `y`, the output of a sub-layer that has read `read` and is added to `residual`, in place."""
        raise NotImplementedError


@dataclass(slots=True)
class _Door:
    """A port, and what is looked at before it is asked: slots of the step, of its own lanes and of a sub-layer's."""

    step: Running
    own: Deltas
    sub_layer: Deltas
    port: Opaque


_DOORS: list[_Door] = []
# One fragment for the life of the process: torch forgets the ops when it goes.
_LIBRARY = torch.library.Library("deltamux", "DEF")  # type: ignore[no-untyped-call]  # torch leaves it so
_FUNCTIONS: dict[str, Callable[..., None]] = {}
_OVERLOADS: dict[str, Callable[..., None]] = {}


class Ticket(NamedTuple):
    """What the ops find a port by: a number; or, in graphs that are to be alike, a name."""

    number: int
    name: str


def register(port: Opaque, step: Running, deltas: Deltas) -> Ticket:
    """Returns a port's ticket for the ops, which ask it when the step has a slot that `deltas` has."""
    _DOORS.append(_Door(step, deltas, deltas, port))
    number = len(_DOORS) - 1
    _open(number)
    return Ticket(number, str(number))


def open_for(ticket: Ticket, sub_layer: Deltas) -> None:
    """Has a port asked for the slots of a sub-layer as well as for its own."""
    _DOORS[ticket.number].sub_layer = sub_layer
    _open(ticket.number)


def _open(number: int) -> None:
    """Opens the door of the CPU kernels, where there is one."""
    door = _DOORS[number]
    if door.own.door is None or door.sub_layer.door is None or (compiled := _compiled_doors()) is None:
        return
    compiled.open(number, door.step.door.address, door.own.door.address, door.sub_layer.door.address)


@cache
def _compiled_doors() -> ModuleType | None:
    """Returns the doors, which stand in for this file's functions from now on."""
    compiled = doors.load()
    if compiled is not None:
        compiled.stand_in(torch.Tensor.__dlpack_c_exchange_api__, *_FUNCTIONS.values())
        _FUNCTIONS.update({name: getattr(compiled, name) for name in _FUNCTIONS})
    return compiled


def call_directly(directly: bool) -> None:
    """Makes compiled graphs call the functions of this file without torch's dispatch, or with it, as while they load.

    Inductor's code calls an op by its full name, which it looks up in every call: what stands there is called. Torch
    itself reads the name when it loads a compiled model, and must find the op.
    """
    for name, function in _FUNCTIONS.items():
        for form, called in ((name, function), (name + _BY_NAME, _told_by_name(name))):
            getattr(torch.ops.deltamux, form).default = called if directly else _OVERLOADS[form]


@dataclass(slots=True)
class _Tracing:
    """What graphs hold that are traced from now on: ports' names, as inputs, or their numbers."""

    by_name: bool = False


_TRACING = _Tracing()
_BY_NAME = "_by_name"


def trace_by_name(by_name: bool) -> None:
    """Has graphs that are traced from now on tell ops their port by name, so that equal layers have equal graphs."""
    _TRACING.by_name = by_name


def _told_by_name(name: str) -> Callable[..., None]:
    return lambda *args: _FUNCTIONS[name](*args[:-1], int(_resolve_layer_name(args[-1])))


def _type_of_names() -> str:
    """Returns what a schema calls vLLM's layer names."""

    def takes(name: LayerNameType) -> None: ...

    return torch.library.infer_schema(takes, mutates_args=()).removeprefix("(").partition(" ")[0]


def _define(schema: str, function: Callable[..., None]) -> Callable[..., None]:
    """Defines an op in both forms; returns what a port calls: the op while a graph is traced, else the function."""
    name = schema.partition("(")[0]
    _FUNCTIONS[name] = function
    by_name = schema.replace(name, name + _BY_NAME).replace("int number", f"{_type_of_names()} name")
    numbered = _define_form(schema, lambda *args: _FUNCTIONS[name](*args))
    named = _define_form(by_name, _told_by_name(name))

    def call(*args: Any) -> None:
        *tensors, ticket = args
        if not torch.compiler.is_compiling():
            _FUNCTIONS[name](*tensors, ticket.number)
        elif _TRACING.by_name:
            named(*tensors, _encode_layer_name(ticket.name))
        else:
            numbered(*tensors, ticket.number)

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
    door = _DOORS[number]
    if door.step.index.mask & door.own.mask:
        door.port.change_input(x)


def _change_output(x: Tensor, y: Tensor, number: int) -> None:
    door = _DOORS[number]
    if door.step.index.mask & door.own.mask:
        door.port.change_output(x, y)


def _change_sub_layer(x: Tensor, read: Tensor, residual: Tensor | None, y: Tensor, number: int) -> None:
    door = _DOORS[number]
    if door.step.index.mask & (door.own.mask | door.sub_layer.mask):
        door.port.change_sub_layer(x, read, residual, y)


change_input = _define("change_input(Tensor(a!) x, int number)", _change_input)
change_output = _define("change_output(Tensor x, Tensor(a!) y, int number)", _change_output)
change_sub_layer = _define(
    "change_sub_layer(Tensor x, Tensor read, Tensor? residual, Tensor(a!) y, int number)", _change_sub_layer
)
