"""Bounds how much of one kind of work the server takes on at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deltamux.errors import ResourceExhaustedError


class Slots:
    """So many at once; one more is told to come back rather than to wait.

    Args:
        what: the work's name in the plural, for the message.
        retry_after: seconds after which a caller may try again.
    """

    def __init__(self, limit: int, what: str, retry_after: float = 1.0) -> None:
        self._limit = limit
        self._what = what
        self._retry_after = retry_after
        self.used = 0

    @contextmanager
    def take(self) -> Iterator[None]:
        """Holds a slot for the length of the block; raises ResourceExhaustedError if none is free."""
        if self.used >= self._limit:
            raise ResourceExhaustedError(
                f"the server has {self._limit} {self._what} under way, which is its limit; try again soon",
                reason="SERVER_BUSY",
                metadata={"limit": str(self._limit)},
                retry_after=self._retry_after,
            )
        self.used += 1
        try:
            yield
        finally:
            self.used -= 1
