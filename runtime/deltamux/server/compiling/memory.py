"""Bounds of the memory of one job in the compiler process."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READING = 512 << 20
"""Bytes for reading an adapter's files, beyond their own size."""

COMPILING = 4 << 30
COPIES = 8
"""Bytes for building, writing and checking a program: COMPILING, and COPIES times the largest allowed program."""


@contextmanager
def limit_memory(growth: int) -> Iterator[None]:
    """Limits the growth of the process during the block; an allocation beyond it is a MemoryError or RuntimeError.

    The limit is RLIMIT_DATA, on Linux only; elsewhere there is none.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _allocated() + growth
    for known in (before, hard):
        limit = limit if known == resource.RLIM_INFINITY else min(limit, known)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error comes from an allocation that failed."""
    seen: set[int] = set()  # a chain of errors may be circular
    while error is not None and id(error) not in seen:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _allocated() -> int:
    """Returns the bytes that RLIMIT_DATA counts: the process's private writable memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith("VmData:"))
    return int(kilobytes) << 10
