"""The CPU kernels (`rows.cpp`) as a shared library: compiled for this machine when first needed, and kept.

The compiler gets the machine's own instruction set, which no wheel could know. The library lies in the user's cache
under a name made of its source, the compiler and the processor, so that another machine's is never taken. Where there
is no compiler, `load` says so once and returns None, and the ops run in torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("rows.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w")
SWITCH = "DELTAMUX_KERNELS"
"""Environment variable; ``torch`` keeps the ops in torch."""

COMPILE_SECONDS = 120

logger = logging.getLogger(__name__)


class Rows(ctypes.Structure):
    """See ``Rows`` in rows.cpp."""

    _fields_ = (
        ("segments", ctypes.c_int32),
        ("slot", ctypes.c_void_p),
        ("start", ctypes.c_void_p),
        ("row", ctypes.c_void_p),
    )


@cache
def load() -> ctypes.CDLL | None:
    """Returns the library, compiled if need be (some seconds, once a machine); None where that cannot be."""
    if os.environ.get(SWITCH) == "torch":
        return None
    try:
        return _declared(ctypes.CDLL(str(build())))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("delta ops run in torch, which is slower: the CPU kernels cannot be compiled: %s", detail)
        return None


def build(folder: Path | None = None) -> Path:
    """Returns the compiled library in `folder` (default: the user's cache), compiled now where it is not there yet.

    Raises:
        FileNotFoundError: there is no C++ compiler (``$CXX``, ``g++`` or ``c++``).
        subprocess.CalledProcessError: the compiler refuses; its words are in ``stderr``.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found: install g++, or name one in CXX")
    folder = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltamux" / "kernels"
    path = folder / f"rows-{_fingerprint(compiler)}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / path.name
            command = [*compiler.split(), *FLAGS, str(SOURCE), "-o", str(fresh)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            fresh.replace(path)  # at once, so that two processes never read each other's half
    return path


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([*compiler.split(), "--version"], check=True, capture_output=True, text=True).stdout
    parts = (SOURCE.read_text(), *FLAGS, compiler, version, platform.machine(), _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Returns the processor's model and instruction sets, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    flag, integer, pointer, real = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
    rows, matrix = ctypes.POINTER(Rows), (pointer, integer)
    for name, arguments in {
        "deltamux_shrink_expand": (flag, *matrix, *matrix, integer, rows, pointer, pointer, flag),
        "deltamux_affine": (flag, *matrix, rows, pointer, pointer, flag),
        "deltamux_norm_affine": (flag, *matrix, *matrix, integer, rows, pointer, real, flag),
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library
