"""The CPU kernels (`rows.cpp`, `experts.cpp`) as a shared library: compiled here when first needed, and kept.

It is compiled for the machine's own instruction set, which a wheel could not be. It lies in the user's cache under a
name made of its source, the compiler and the processor, so that another machine's is never taken. Where there
is no compiler, `load` logs so once and returns None, and the ops run in torch.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "rows.cpp", FOLDER / "experts.cpp")
HEADERS = (FOLDER / "rows.h", FOLDER / "products.h")

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w")
SWITCH = "DELTAMUX_KERNELS"
"""Environment variable; ``torch`` keeps the ops in torch."""

COMPILE_SECONDS = 120

logger = logging.getLogger(__name__)


class Mask(ctypes.Structure):
    """A set of slots where the library can read it; see ``Mask`` in rows.h."""

    _fields_ = (("words", ctypes.c_void_p), ("count", ctypes.c_int64))
    count: int

    def __init__(self) -> None:
        super().__init__()
        self.value = 0

    def set(self, value: int) -> None:
        """Sets the set as an int: bit i is slot i."""
        if value == self.value:
            return
        self.value = value
        words = (value.bit_length() + 63) // 64
        if words > self.count:
            self._array = (ctypes.c_uint64 * words)()
            self.words, self.count = ctypes.addressof(self._array), words
        for word in range(self.count):
            self._array[word] = value >> 64 * word  # ctypes takes the low 64 bits


class StepRowsStruct(ctypes.Structure):
    """``StepRows`` of rows.h."""

    _fields_ = (
        ("num_segments", ctypes.c_int32),
        ("slot", ctypes.c_void_p),
        ("start", ctypes.c_void_p),
        ("row", ctypes.c_void_p),
    )


class SlotParamsStruct(ctypes.Structure):
    """``SlotParams`` of rows.h."""

    _fields_ = (
        ("kernel", ctypes.c_int64),
        ("bfloat", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("centred", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("held", ctypes.POINTER(Mask)),
        ("words", ctypes.c_void_p),
        ("slices", ctypes.c_void_p),
        ("num_slices", ctypes.c_int64),
    )


@cache
def load() -> ctypes.CDLL | None:
    """Returns the library, compiled if need be (some seconds, once per machine); None where that cannot be."""
    if os.environ.get(SWITCH) == "torch":
        return None
    try:
        return _declared(ctypes.CDLL(str(build())))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("delta ops run in torch, which is slower: the CPU kernels cannot be compiled: %s", detail)
        return None


def build(
    folder: Path | None = None,
    *,
    sources: Sequence[Path] = SOURCES,
    includes: Sequence[Path] = (),
    versions: Sequence[str] = (),
) -> Path:
    """Returns a compiled library in `folder` (default: the user's cache), compiled now where it is not there yet.

    Args:
        sources: C++ files; they may include this folder's headers.
        includes: further folders of headers.
        versions: of these headers; another version is another library.
    Raises:
        FileNotFoundError: there is no C++ compiler (``$CXX``, ``g++`` or ``c++``).
        subprocess.CalledProcessError: the compiler fails; its message is in ``stderr``.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found: install g++, or name one in CXX")
    folder = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltamux" / "kernels"
    path = folder / f"{sources[0].stem}-{_fingerprint(compiler, sources, versions)}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / path.name
            folders = [f"-I{each}" for each in (FOLDER, *includes)]
            command = [*compiler.split(), *FLAGS, *folders, *map(str, sources), "-o", str(fresh)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            fresh.replace(path)  # at once, so that two processes never read each other's half
    return path


def _fingerprint(compiler: str, sources: Sequence[Path], versions: Sequence[str]) -> str:
    version = subprocess.run([*compiler.split(), "--version"], check=True, capture_output=True, text=True).stdout
    texts = (path.read_text() for path in (*sources, *HEADERS))
    python = sysconfig.get_config_var("SOABI") or ""
    parts = (*texts, *FLAGS, compiler, version, python, *versions, platform.machine(), _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Returns the processor's model and instruction sets, as far as the system has them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    matrix = (ctypes.c_void_p, ctypes.c_int64)
    library.deltamux_apply.argtypes = (
        ctypes.POINTER(SlotParamsStruct),
        ctypes.POINTER(StepRowsStruct),
        *matrix,
        *matrix,
    )
    library.deltamux_apply.restype = None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.deltamux_expert_products.argtypes = (pointer, number, pointer, number, pointer, number, pointer, number)
    library.deltamux_expert_products.restype = None
    library.deltamux_expert_low_rank.argtypes = (pointer, number, pointer, number, number, pointer, number)
    library.deltamux_expert_low_rank.restype = None
    return library
