"""`ProgramLoader`: reads programs into a worker's memory, on threads off the step loop."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from deltamux.deltas import Program
from deltamux.errors import DataLossError

THREADS = 2
"""So that one slow file does not hold up the others."""

FAILED, DAMAGED = "failed: ", "damaged: "
"""Before the reason, in the state of a load that is over: the program is refused, or its file is lost."""


class Loaded(NamedTuple):
    """A program ready in host memory.

    Attributes:
        seconds: what reading, casting and checking it took.
    """

    program: Program
    seconds: float


class ProgramLoader:
    """The programs in a worker's host memory, and the threads that load them. Any thread may call it.

    Args:
        read: reads a file, of a given sha256 unless that is "", as a program that can be used as it is; raises what is
            wrong with it.
    """

    def __init__(self, read: Callable[[Path, str], Program]) -> None:
        self._read = read
        self._cores: frozenset[int] = frozenset()
        self._pool = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="delta-loader")
        self._lock = threading.Lock()
        self._loads: dict[int, Future[Loaded]] = {}
        self._ready: dict[int, Program] = {}

    @property
    def ready(self) -> Mapping[int, Program]:
        """Programs that a step may use; others vanish from it at any time."""
        return self._ready

    def ids(self) -> list[int]:
        return sorted(self._loads)

    def load(self, program_id: int, path: Path, sha256: str = "") -> Future[Loaded]:
        """Begins to load a program, or returns the load that has begun."""
        with self._lock:
            if program_id not in self._loads:
                self._loads[program_id] = self._pool.submit(self._load, program_id, path, sha256)
            return self._loads[program_id]

    def status(self, program_id: int) -> str:
        """Returns ``loading``, ``ready``, ``absent``, or ``failed: `` or ``damaged: `` and the reason."""
        future = self._loads.get(program_id)
        if future is None:
            return "absent"
        return outcome(future) if future.done() else "loading"

    def drop(self, program_id: int) -> None:
        """Forgets a program; the result of a load under way is dropped."""
        with self._lock:
            future = self._loads.pop(program_id, None)
            self._ready.pop(program_id, None)
        if future is not None:
            future.cancel()

    def use_cores(self, cores: Collection[int]) -> None:
        """Lets the threads run on these cores from their next load on."""
        self._cores = frozenset(cores)

    def step_aside(self) -> None:
        """Moves the calling thread to the cores that `use_cores` has named, away from the step loop."""
        if self._cores:
            with contextlib.suppress(OSError):  # a container may forbid it: the thread then shares the step loop's core
                os.sched_setaffinity(threading.get_native_id(), self._cores)

    def _load(self, program_id: int, path: Path, sha256: str) -> Loaded:
        self.step_aside()
        started = time.perf_counter()
        program = self._read(path, sha256)
        with self._lock:
            if program_id in self._loads:
                self._ready[program_id] = program
        return Loaded(program, time.perf_counter() - started)


def outcome(future: Future[Loaded]) -> str:
    """Returns ``ready``, or ``failed: `` and the reason, of a load that is over; ``damaged: `` if its file is lost."""
    if future.cancelled():
        return "failed: dropped"
    error = future.exception()
    if isinstance(error, DataLossError):
        return f"{DAMAGED}{error}"
    return "ready" if error is None else f"{FAILED}{error}"
