"""A queue for scarce work that serves its groups by turns, so that a long queue of one delays no other."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deltamux.errors import ResourceExhaustedError


class FairQueue:
    """Admits so many holders at once; the groups that wait are served round robin, each in its own order of arrival.

    Args:
        places: holders at once.
        max_waiting: of one group; one more is refused.
        what: the work's name in the plural, for the message.
    """

    def __init__(self, places: int, max_waiting: int, what: str) -> None:
        self._free = places
        self._max_waiting = max_waiting
        self._what = what
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def place(self, group: str) -> AsyncIterator[None]:
        """Holds a place for the length of the block. Cancelling while it waits leaves the queue at once.

        Raises:
            ResourceExhaustedError: the group has `max_waiting` waiting already.
        """
        await self._enter(group)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, group: str) -> None:
        if self._free > 0:
            self._free -= 1
            return
        queue = self._waiting.setdefault(group, deque())
        if len(queue) >= self._max_waiting:
            raise ResourceExhaustedError(
                f"{len(queue)} {self._what} of yours wait already, which is the limit; try again soon",
                reason="SERVER_BUSY",
                metadata={"limit": str(self._max_waiting)},
                retry_after=1.0,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()  # it was called up in the moment it gave up
            else:
                self._remove(group, turn)
            raise

    def _leave(self) -> None:
        while self._waiting:
            group, queue = self._waiting.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._waiting[group] = queue  # behind all others
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _remove(self, group: str, turn: asyncio.Future[None]) -> None:
        queue = self._waiting.get(group)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._waiting[group]
