"""Linears of vLLM's CPU build whose weight may change from step to step, in place, under a compiled graph.

Such a linear calls ``cpu_linear``, a closure over a handler of oneDNN, whose ``handler_tensor`` holds the address of
the packed weight. That tensor is an input of the compiled graph and is read in every call; writing another address into
it is all that a change takes. Other linears (small ones for AMX, quantised ones, those of a GPU) have no such handler.
"""

import inspect
from typing import Self

import torch
from torch import Tensor, nn
from vllm import _custom_ops as vllm_ops
from vllm._custom_ops import CPUDNNLGEMMHandler


class _Borrowed(CPUDNNLGEMMHandler):
    """The handler that a linear calls through, once it points to weights that others own."""

    def __del__(self) -> None:
        """Frees nothing: the owners do."""


class SwitchedLinear:
    """A linear, its base's packed weight, which is kept as it is, and at times a second weight.

    Attributes:
        in_features, out_features: of the whole module, all its slices together.
    """

    def __init__(self, module: nn.Module, handler: CPUDNNLGEMMHandler) -> None:
        self.in_features: int = handler.k
        self.out_features: int = handler.n
        self._module = module
        self._address = _address(handler).numpy()  # shares memory with the tensor that the graph reads
        self._base = self._owner_of(handler)
        self._second: CPUDNNLGEMMHandler | None = None

    @classmethod
    def of(cls, module: nn.Module, out_features: int) -> Self | None:
        """Returns the switched linear of an uncompiled module, which owns the module's weights from now on.

        Args:
            out_features: of the sites at the module, all together.
        Returns:
            None where the module has no handler of the known kind, or outputs of other sites as well; it is as before.
        """
        run = getattr(module, "cpu_linear", None)
        handler = inspect.getclosurevars(run).nonlocals.get("handler") if inspect.isfunction(run) else None
        if not isinstance(handler, CPUDNNLGEMMHandler) or isinstance(handler, _Borrowed) or handler.n != out_features:
            return None
        return cls(module, handler) if _address(handler).dtype is torch.int64 else None

    def set_second(self, weight: Tensor) -> None:
        """Packs a second weight [out_features, in_features], of the base's dtype; `select` puts it to use."""
        self._second = vllm_ops.create_onednn_mm(weight.t())

    def drop_second(self) -> None:
        """Goes back to the base's weight and frees the second."""
        self.select_base()
        self._second = None

    def select_second(self) -> None:
        assert self._second is not None
        self._address[...] = _address(self._second).item()

    def select_base(self) -> None:
        self._address[...] = _address(self._base).item()

    def product(self, x: Tensor) -> Tensor:
        """Returns the base's weight times `x` [rows, in_features], whatever is selected; without the bias."""
        product: Tensor = vllm_ops.onednn_mm(self._base, x, None)
        return product

    def base(self, x: Tensor) -> Tensor:
        """Returns what the base's module returns for `x` [rows, in_features], whatever is selected."""
        bias = None if getattr(self._module, "skip_bias_add", False) else getattr(self._module, "bias", None)
        y: Tensor = vllm_ops.onednn_mm(self._base, x, bias)
        return y

    @staticmethod
    def _owner_of(handler: CPUDNNLGEMMHandler) -> CPUDNNLGEMMHandler:
        """Moves what a handler owns to a new one: its own tensor may point elsewhere when it is collected."""
        owner = CPUDNNLGEMMHandler()
        owner.k, owner.n = handler.k, handler.n
        owner.handler_tensor = _address(handler).clone()
        handler.__class__ = _Borrowed
        return owner


def _address(handler: CPUDNNLGEMMHandler) -> Tensor:
    """Returns the int64 tensor, without dimensions, that holds where a handler's packed weight is."""
    assert handler.handler_tensor is not None
    return handler.handler_tensor
