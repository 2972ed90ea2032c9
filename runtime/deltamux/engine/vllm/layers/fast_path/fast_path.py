"""The input of the fast path (`fast_path.cpp`): the step that is running, and the ops at each module."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from deltamux.deltas.backends.cpu import library
from deltamux.deltas.backends.cpu.library import Mask, SlotParamsStruct, StepRowsStruct
from deltamux.deltas.backends.cpu.slot_params import SlotParams, StepRows

NAME = "deltamux_fast_path"
SOURCE = Path(__file__).parent / "fast_path.cpp"
PYTHON_HEADERS = Path(sysconfig.get_path("include"))
TORCH_HEADERS = Path(torch.__file__).parent / "include"
"""Of DLPack."""

logger = logging.getLogger(__name__)


def install(fallbacks: Sequence[Callable[..., None]]) -> ModuleType | None:
    """Returns the compiled module, which calls `fallbacks` for what the kernels cannot do.

    Args:
        fallbacks: the functions that its own three, of the same names, replace: change_input, change_output,
            change_sub_layer.
    Returns:
        None where the kernels or Python's headers are missing, which is logged once.
    """
    module, kernels = _load(), library.load()
    if module is None or kernels is None:
        return None
    kernel = ctypes.cast(kernels.deltamux_apply, ctypes.c_void_p).value
    module.install(kernel, torch.Tensor.__dlpack_c_exchange_api__, *fallbacks)
    return module


@cache
def _load() -> ModuleType | None:
    if library.load() is None:
        return None
    if not (PYTHON_HEADERS / "Python.h").exists():
        logger.warning(
            "delta ops are called from Python, which costs a step some percent, since Python's headers are missing: "
            "install them (python3-dev, python3-devel), and start again"
        )
        return None
    try:
        path = library.build(
            sources=(SOURCE,), includes=(PYTHON_HEADERS, TORCH_HEADERS), versions=(str(torch.__version__),)
        )
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("delta ops are called from Python, which costs a step some percent: %s", detail)
        return None
    loader = ExtensionFileLoader(NAME, str(path))
    spec = spec_from_loader(NAME, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


class _Step(ctypes.Structure):
    _fields_ = (
        ("slots", ctypes.POINTER(Mask)),
        ("rows", ctypes.POINTER(StepRowsStruct)),
        ("fallback", ctypes.c_int64),
    )


class _Op(ctypes.Structure):
    _fields_ = (
        ("params", ctypes.POINTER(SlotParamsStruct)),
        ("reads_residual", ctypes.c_int64),
        ("changes_input", ctypes.c_int64),
    )


class _Module(ctypes.Structure):
    _fields_ = (
        ("slots", ctypes.POINTER(Mask)),
        ("input_slots", ctypes.POINTER(Mask)),
        ("fallback_slots", ctypes.POINTER(Mask)),
        ("ops", ctypes.POINTER(_Op)),
        ("count", ctypes.c_int64),
    )


class FastPathStep:
    """The step that is running, at an address that stays."""

    def __init__(self) -> None:
        self._slots = Mask()
        self._rows = StepRows(())
        self._struct = _Step(ctypes.pointer(self._slots), ctypes.pointer(self._rows.struct), 0)
        self.address = ctypes.addressof(self._struct)

    def set(self, mask: int, rows: StepRows, *, fallback: bool) -> None:
        """Sets the slots that have rows, and the rows; `fallback` where the kernels alone cannot serve the step."""
        self._slots.set(mask)
        self._struct.rows, self._rows = ctypes.pointer(rows.struct), rows
        self._struct.fallback = fallback


class FastPathOp(NamedTuple):
    """The parameters of one op at a module, and what the op reads and changes."""

    params: SlotParams
    reads_residual: bool
    changes_input: bool


class FastPathModule:
    """The ops at one module, at an address that stays."""

    def __init__(self) -> None:
        self._masks = tuple(Mask() for _ in range(3))
        self._ops: tuple[FastPathOp, ...] = ()
        self._struct = _Module(*map(ctypes.pointer, self._masks))
        self.address = ctypes.addressof(self._struct)

    def set_slots(self, mask: int, input_mask: int, fallback_mask: int) -> None:
        """Sets which slots have ops here, which of them change the input, and which have one without a kernel."""
        for slots, value in zip(self._masks, (mask, input_mask, fallback_mask), strict=True):
            slots.set(value)

    def set_ops(self, ops: Sequence[FastPathOp]) -> None:
        """Sets the ops in the order in which they apply."""
        array = (_Op * len(ops))(*(_Op(ctypes.pointer(op.params.struct), *op[1:]) for op in ops))
        self._struct.ops, self._struct.count = array, len(ops)
        self._ops, self._array = tuple(ops), array
