"""The ports as custom ops of torch, ``torch.ops.deltamux.*``, which torch.compile takes as they are.

A traced graph is made once and serves every step, whatever adapters it has. So what depends on the step stands behind
an op that the compiler cannot look into: the graph holds the port's number, and the op asks the port what to do now.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


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


_PORTS: list[Opaque] = []
# One fragment for the life of the process: torch forgets the ops when it goes.
_LIBRARY = torch.library.Library("deltamux", "DEF")  # type: ignore[no-untyped-call]  # torch leaves it so


def register(port: Opaque) -> int:
    """Returns the number under which the ops find a port."""
    _PORTS.append(port)
    return len(_PORTS) - 1


def _define(schema: str, run: Callable[..., None]) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(f"{schema} -> ()")  # type: ignore[no-untyped-call]  # torch leaves it so
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)  # type: ignore[no-untyped-call]  # torch leaves it so
    torch.library.register_fake(f"deltamux::{name}", lambda *args: None, lib=_LIBRARY)


def _change_input(x: Tensor, port: int) -> None:
    _PORTS[port].change_input(x)


def _change_output(x: Tensor, y: Tensor, port: int) -> None:
    _PORTS[port].change_output(x, y)


def _change_sub_layer(x: Tensor, read: Tensor, residual: Tensor | None, y: Tensor, port: int) -> None:
    _PORTS[port].change_sub_layer(x, read, residual, y)


_define("change_input(Tensor(a!) x, int port)", _change_input)
_define("change_output(Tensor x, Tensor(a!) y, int port)", _change_output)
_define("change_sub_layer(Tensor x, Tensor read, Tensor? residual, Tensor(a!) y, int port)", _change_sub_layer)

change_input = torch.ops.deltamux.change_input.default
change_output = torch.ops.deltamux.change_output.default
change_sub_layer = torch.ops.deltamux.change_sub_layer.default
