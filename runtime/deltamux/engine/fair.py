"""Orders of scarce work in which groups take turns, so that a long queue of one delays no other."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from deltamux.errors import ResourceExhaustedError


class FairQueue:
    """Admits so many holders at once; the groups that wait are served round robin, each in its own order of arrival.

    Args:
        places: holders at once.
        max_waiting: of one group; one more is refused.
        what: the work's name in the plural, for the message.
        each: places that one group may hold at once; None: all.
    """

    def __init__(self, places: int, max_waiting: int, what: str, *, each: int | None = None) -> None:
        self._free = places
        self._each = places if each is None else each
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
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(group)  # it was called up in the moment it gave up
            else:
                self._remove(group, turn)
            raise

    def _may_hold(self, group: str) -> bool:
        return self._free > 0 and self._held[group] < self._each

    def _hold(self, group: str) -> None:
        self._free -= 1
        self._held[group] += 1

    def _leave(self, group: str) -> None:
        self._free += 1
        self._held[group] -= 1
        self._held += Counter()  # forgets groups that hold nothing
        while (group_called := next(filter(self._may_hold, self._waiting), None)) is not None:
            queue = self._waiting.pop(group_called)
            turn = queue.popleft()
            if queue:
                self._waiting[group_called] = queue  # behind all others
            if not turn.done():
                self._hold(group_called)
                turn.set_result(None)

    def _remove(self, group: str, turn: asyncio.Future[None]) -> None:
        queue = self._waiting.get(group)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._waiting[group]


class FairOrder:
    """Numbers work for a queue that takes the smallest number first, so that the groups in it take turns.

    This is start-time fair queueing with work of equal weight: a group's next number is one above its last, and at
    least that of what was begun last, so that nobody is overtaken for good and no group saves up what it did not use.
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
        if not place.begun:  # it was given up: those behind it have moved up
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
        """Tells that the work is begun; further calls change nothing."""
        if not self.begun:
            self.begun = True
            self._order.begin(self.number)
