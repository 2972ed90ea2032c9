"""What the doors (`doors.cpp`) read: the step that is running, and the deltas at each module.

A compiled model asks the deltas of all its modules in every step; a door answers without running Python, which is worth
it because a step's Python has to come from RAM, again at every module (see docs/decisions.md).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from types import ModuleType
from typing import NamedTuple

from deltamux.deltas.kernels import library
from deltamux.deltas.kernels.library import Mask, Rows
from deltamux.deltas.kernels.tables import Segments, Table

NAME = "deltamux_doors"

logger = logging.getLogger(__name__)


@cache
def load() -> ModuleType | None:
    """Returns the compiled module; None where the kernels or Python's headers are missing, which is said once."""
    loaded = library.load()
    if loaded is None:
        return None
    if not hasattr(loaded, f"PyInit_{NAME}"):
        logger.warning(
            "delta ops are called from Python, which costs a step some percent, since Python's headers are missing: "
            "install them (python3-dev, python3-devel), remove %s, and start again",
            loaded._name,
        )
        return None
    loader = ExtensionFileLoader(NAME, loaded._name)
    spec = spec_from_loader(NAME, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


class _Step(ctypes.Structure):
    _fields_ = (
        ("slots", ctypes.POINTER(Mask)),
        ("rows", ctypes.POINTER(Rows)),
        ("in_python", ctypes.c_int64),
    )


class _Lane(ctypes.Structure):
    _fields_ = (
        ("table", ctypes.POINTER(library.Table)),
        ("reads_residual", ctypes.c_int64),
        ("changes_input", ctypes.c_int64),
    )


class _Lanes(ctypes.Structure):
    _fields_ = (
        ("slots", ctypes.POINTER(Mask)),
        ("input_slots", ctypes.POINTER(Mask)),
        ("python_slots", ctypes.POINTER(Mask)),
        ("lanes", ctypes.POINTER(_Lane)),
        ("count", ctypes.c_int64),
    )


class RunningStep:
    """The step that is running, at an address that stays."""

    def __init__(self) -> None:
        self._slots = Mask()
        self._segments = Segments(())
        self._struct = _Step(ctypes.pointer(self._slots), ctypes.pointer(self._segments.struct), 0)
        self.address = ctypes.addressof(self._struct)

    def set(self, mask: int, segments: Segments, in_python: bool) -> None:
        """Says which slots have rows and which; `in_python` when the kernels alone cannot serve the step."""
        self._slots.set(mask)
        self._struct.rows, self._segments = ctypes.pointer(segments.struct), segments
        self._struct.in_python = in_python


class LaneTable(NamedTuple):
    """The table of one op at a module, and what the op reads and changes."""

    table: Table
    reads_residual: bool
    changes_input: bool


class ModuleLanes:
    """The deltas at one module, at an address that stays."""

    def __init__(self) -> None:
        self._masks = tuple(Mask() for _ in range(3))
        self._tables: tuple[LaneTable, ...] = ()
        self._struct = _Lanes(*map(ctypes.pointer, self._masks))
        self.address = ctypes.addressof(self._struct)

    def set_slots(self, mask: int, input_mask: int, python_mask: int) -> None:
        """Says which slots have deltas here, which change the input, and which have one without a kernel."""
        for slots, value in zip(self._masks, (mask, input_mask, python_mask), strict=True):
            slots.set(value)

    def set_tables(self, tables: Sequence[LaneTable]) -> None:
        """Names the tables in the order in which they apply."""
        lanes = (_Lane * len(tables))(*(_Lane(ctypes.pointer(t.table.struct), *t[1:]) for t in tables))
        self._struct.lanes, self._struct.count = lanes, len(tables)
        self._tables, self._array = tuple(tables), lanes
