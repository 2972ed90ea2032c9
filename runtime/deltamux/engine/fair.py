"""Fair queues: a group with many waiting requests delays no other group."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from deltamux.errors import ResourceExhaustedError


class FairQueue:
    """Admits a number of holders at once; waiting groups are served round robin, each in its order of arrival.

    Args:
        places: holders at once.
        max_waiting: of one group; one more is refused.
        what: the work's name in the plural, for the message.
        per_group: places that one group may hold at once; None: all.
    """

    def __init__(self, places: int, max_waiting: int, what: str, *, per_group: int | None = None) -> None:
        self._free = places
        self._per_group = places if per_group is None else per_group
        self._held: Counter[str] = Counter()
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
            self._leave(group)

    async def _enter(self, group: str) -> None:
        if self._may_hold(group):
            self._hold(group)
            return
        queue = self._waiting.setdefault(group, deque())
        if len(queue) >= self._max_waiting:
            raise ResourceExhaustedError(
                f"{len(queue)} {self._what} of yours wait already, which is the limit; try again soon",
                reason="SERVER_BUSY",
                metadata={"limit": str(self._max_waiting)},
                retry_after=1.0,
            )
        admission: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(admission)
        try:
            await admission
        except asyncio.CancelledError:
            if admission.done() and not admission.cancelled():
                self._leave(group)  # admitted while its caller was cancelled
            else:
                self._remove(group, admission)
            raise

    def _may_hold(self, group: str) -> bool:
        return self._free > 0 and self._held[group] < self._per_group

    def _hold(self, group: str) -> None:
        self._free -= 1
        self._held[group] += 1

    def _leave(self, group: str) -> None:
        self._free += 1
        self._held[group] -= 1
        self._held += Counter()  # forgets groups that hold nothing
        while (following := next(filter(self._may_hold, self._waiting), None)) is not None:
            queue = self._waiting.pop(following)
            admission = queue.popleft()
            if queue:
                self._waiting[following] = queue  # after all others
            if not admission.done():
                self._hold(following)
                admission.set_result(None)

    def _remove(self, group: str, admission: asyncio.Future[None]) -> None:
        queue = self._waiting.get(group)
        if queue is not None and admission in queue:
            queue.remove(admission)
            if not queue:
                del self._waiting[group]


class FairOrder:
    """The order of a queue that takes the smallest number first: start-time fair queueing, all of equal weight.

    A group's next number is one above its last, and at least that of the request which was begun last: so no request
    is overtaken for good, and no group saves up a share that it did not use.
    """

    def __init__(self) -> None:
        self._begun = 0
        self._next: dict[str, int] = {}
        self._held: Counter[str] = Counter()

    @contextmanager
    def place(self, group: str) -> Iterator[Place]:
        """Holds a place in the order for the length of the block."""
        number = max(self._begun, self._next.get(group, 0))
        self._next[group] = number + 1
        self._held[group] += 1
        place = Place(self, number)
        try:
            yield place
        finally:
            self._leave(group, place)

    def begin(self, number: int) -> None:
        self._begun = max(self._begun, number)

    def _leave(self, group: str, place: Place) -> None:
        if not place.begun:  # given up: the group's later requests move up
            self._next[group] -= 1
        self._held[group] -= 1
        self._held += Counter()
        if self._next[group] <= self._begun and not self._held[group]:
            del self._next[group]
        if not self._held:
            self._begun, self._next = 0, {}


class Place:
    """A place in a `FairOrder`.

    Attributes:
        number: smaller ones come first.
        begun: whether the work was begun.
    """

    def __init__(self, order: FairOrder, number: int) -> None:
        self._order = order
        self.number = number
        self.begun = False

    def begin(self) -> None:
        """Marks the work as begun; further calls change nothing."""
        if not self.begun:
            self.begun = True
            self._order.begin(self.number)
