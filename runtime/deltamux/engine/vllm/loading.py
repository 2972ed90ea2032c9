"""Programs on their way from a file into a worker's memory, on threads that keep out of the step loop's way."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deltamux.deltas import Op, Program
from deltamux.deltas.program import Placement
from deltamux.errors import DataLossError

THREADS = 2
"""So that one slow file does not hold up the others."""

SWITCH_SECONDS = 0.00005
"""How long a thread keeps the interpreter from another: at Python's own 5 ms, steps wait for loads and loads for steps.

The threads have the step loop's priority: one of a lower would be put off while it keeps the interpreter from it.
"""

FAILED, DAMAGED = "failed: ", "damaged: "
"""In front of the reason, in the state of a load that is over: whether the program is refused, or its file is lost."""

ALIGNMENT = 64
"""Bytes at whose multiples a packed tensor begins: a cache line."""


class Loaded(NamedTuple):
    """A program ready in host memory.

    Attributes:
        seconds: what reading, casting and checking it took.
    """

    program: Program
    seconds: float


class ProgramLoader:
    """The programs in a worker's host memory, and the threads that bring them there. Any thread may call it.

    Args:
        read: reads a file, of a given sha256 unless that is "", as a program that can be used as it is; raises what is
            wrong with it.
    """

    def __init__(self, read: Callable[[Path, str], Program]) -> None:
        sys.setswitchinterval(SWITCH_SECONDS)
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
        """Forgets a program; a load under way ends for nothing."""
        with self._lock:
            future = self._loads.pop(program_id, None)
            self._ready.pop(program_id, None)
        if future is not None:
            future.cancel()

    def use_cores(self, cores: Collection[int]) -> None:
        """Lets the threads run on these cores from their next load on."""
        self._cores = frozenset(cores)

    def step_aside(self) -> None:
        """Moves the calling thread to the cores that `use_cores` has named, out of the step loop's way."""
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


def packed(program: Program, dtype: torch.dtype, *, pinned: bool = False) -> Program:
    """Returns the program in one block of memory of its own, floats cast to `dtype`.

    Nothing of it is left in a mapped file, whose pages a step might have to wait for. A parameter that the cast makes
    infinite, or a product of parameters, is named by InvalidAdapterError.

    Args:
        pinned: whether the memory is locked, so that an accelerator can copy it by itself.
    """
    step = max(1, ALIGNMENT // dtype.itemsize)
    rows = [(site, op, op.tensors()) for site, op in program]
    floats = [t for _, op, tensors in rows for field, t in tensors.items() if field not in op.packed]
    sizes = [(t.numel(), -t.numel() % step) for t in floats]
    block = torch.zeros(sum(map(sum, sizes)), dtype=dtype, pin_memory=pinned)
    parts = torch.split(block, [size for pair in sizes for size in pair])[::2]
    if parts:
        torch._foreach_copy_(parts, [t.reshape(-1) for t in floats])
    cast = iter([part.view(t.shape) for part, t in zip(parts, floats, strict=True)])

    def move(op: Op, tensors: Mapping[str, Tensor]) -> Op:
        moved = {f: _copied(t, pinned) if f in op.packed else next(cast) for f, t in tensors.items()}
        return op.of(moved, op.attributes())

    moved = Program(tuple(Placement(site, move(op, tensors)) for site, op, tensors in rows), program.num_virtual_tokens)
    _check_finite(moved, block)
    return moved


def on_device(program: Program, device: torch.device) -> Program:
    """Returns a packed program on a device: one copy a block of memory, however many tensors lie in it.

    Copies from pinned memory are queued on the current stream, and nothing waits for them.
    """
    blocks: dict[tuple[int, torch.dtype], Tensor] = {}

    def moved(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), tensor.dtype)
        if key not in blocks:
            whole = tensor.as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
            blocks[key] = whole.to(device, non_blocking=True)
        return blocks[key].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def move(op: Op) -> Op:
        return op.of({field: moved(tensor) for field, tensor in op.tensors().items()}, op.attributes())

    return Program(tuple(Placement(site, move(op)) for site, op in program), program.num_virtual_tokens)


def _copied(tensor: Tensor, pinned: bool) -> Tensor:
    return torch.empty_like(tensor, pin_memory=pinned).copy_(tensor)


def _check_finite(program: Program, block: Tensor) -> None:
    """Looks at all values in one pass; only a program that may fail is searched for the culprit."""
    attributes = {abs(v) for _, op in program for v in op.attributes().values() if isinstance(v, float)}
    largest = max(map(abs, torch.stack(torch.aminmax(block)).tolist())) if block.numel() else 0.0
    # An op multiplies a parameter by an attribute, if anything: no product is larger than this. False also for NaN.
    if not all(factor * largest <= torch.finfo(block.dtype).max for factor in {1.0, *attributes}):
        program.check_finite()
