"""How much of the machine others used while something was measured: what says whether a ratio can be believed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


class OtherLoad:
    """CPU time of processes that are neither this one nor its descendants.

    Attributes:
        cores: that they used on average, over all that was watched.
    """

    def __init__(self) -> None:
        self._used = 0.0
        self._seconds = 0.0

    @property
    def cores(self) -> float:
        return self._used / self._seconds if self._seconds else 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watches for the length of the block; no descendant may start or end in it."""
        started, others = time.perf_counter(), _others()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started
            self._used += max(0.0, _others() - others)


def _others() -> float:
    """Returns the CPU seconds that all processes but ours have used since the machine started."""
    whole = psutil.cpu_times()
    own = psutil.Process()
    return whole.user + whole.nice + whole.system - sum(map(_seconds, (own, *own.children(recursive=True))))


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
