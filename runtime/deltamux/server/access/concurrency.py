"""Bounds how much of one kind of work the server takes on at once, and shares it out between tenants."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from deltamux.errors import ResourceExhaustedError

RECENT = 5.0
"""Seconds for which a tenant that was refused counts as one that wants a slot, and a refusal as load."""

MIN_RETRY, MAX_RETRY = 0.5, 30.0
"""Seconds between which the time lies that a refused caller is told to leave, before it is spread by half."""


LOOK_SECONDS = 0.5
"""How often a caller that waits looks for a slot whose holder has fallen behind."""


class Holder(Protocol):
    """Work that is paced from outside, and so may be ended for the sake of who waits."""

    def behind(self) -> float:
        """Returns for how many seconds more than it is given it keeps the server waiting; at most 0: for none."""

    def give_up(self) -> None:
        """Ends the work, soon."""


class Slot:
    """One slot that is held.

    Attributes:
        tenant: whose work it is.
        holder: what may be ended if it falls behind; None: nothing ends the work but itself.
        given_up: whether it was ended so.
    """

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.holder: Holder | None = None
        self.given_up = False

    def behind(self) -> float:
        return 0.0 if self.holder is None or self.given_up else self.holder.behind()

    def give_up(self) -> None:
        assert self.holder is not None
        self.given_up = True
        self.holder.give_up()


class Slots:
    """So many at once; what is beyond waits for a while, or is refused with the time after which to try again.

    While another tenant waits, or was refused within `RECENT` seconds, a tenant gets no more than its share: the limit
    divided by the tenants that hold or want a slot. A free slot goes to the waiting tenant that holds fewest. A caller
    that waits has the slot ended that is furthest behind, of a tenant that holds more than its own.

    Args:
        limit: slots.
        what: the work's name in the plural, for messages.
        reserved: the last so many slots go to tenants that hold none.
        max_waiting: most callers that wait, half of it the most of one tenant, and its last quarter for tenants of
            which none waits; 0 refuses instead.
        patience: seconds that a caller waits at most.
    """

    def __init__(
        self,
        limit: int,
        what: str,
        *,
        reserved: int = 0,
        max_waiting: int = 0,
        patience: float = math.inf,
    ) -> None:
        self._limit = limit
        self._what = what
        self._reserved = reserved
        self._max_waiting = max_waiting
        self._patience = patience
        self._held: Counter[str] = Counter()
        self._slots: set[Slot] = set()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._refused: dict[str, float] = {}
        self._load = _Load()

    @property
    def used(self) -> int:
        return self._held.total()

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def take(self, tenant: str) -> AsyncIterator[Slot]:
        """Holds a slot for the length of the block; yields it.

        Args:
            tenant: whose work it is; the caller must be known to be allowed to say so.

        Raises:
            ResourceExhaustedError: none is free, and none came free in time; `retry_after` is set.
        """
        await self._enter(tenant)
        began, slot = time.monotonic(), Slot(tenant)
        self._slots.add(slot)
        try:
            yield slot
        finally:
            self._slots.remove(slot)
            self._load.note_held(time.monotonic() - began)
            self._leave(tenant)

    async def _enter(self, tenant: str) -> None:
        if self._is_free_for(tenant) and self._held[tenant] < self._share(tenant):
            self._held[tenant] += 1
            return
        queue = self._waiting.setdefault(tenant, deque())
        places = self._max_waiting - (self._max_waiting // 4 if queue else 0)
        if self.waiting >= places or 2 * len(queue) >= max(self._max_waiting, 2):
            self._forget_empty()
            raise self._refusal(tenant)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            async with asyncio.timeout(None if math.isinf(self._patience) else self._patience):
                await self._come(turn, tenant)
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._leave(tenant)  # the turn came in the moment of giving up
            elif turn in queue:
                queue.remove(turn)
            self._forget_empty()
            if isinstance(error, TimeoutError):
                raise self._refusal(tenant) from None
            raise

    async def _come(self, turn: asyncio.Future[None], tenant: str) -> None:
        """Waits for a turn, and now and then has a slot ended whose holder is behind."""
        while not turn.done():
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await asyncio.shield(turn)
                    return
            self._take_back(tenant)

    def _take_back(self, tenant: str) -> None:
        if sum(slot.given_up for slot in self._slots) >= self.waiting:
            return  # as many come free as are wanted
        held = self._held[tenant]
        worst = max((s for s in self._slots if self._held[s.tenant] > held), key=Slot.behind, default=None)
        if worst is not None and worst.behind() > 0:
            worst.give_up()

    def _is_free_for(self, tenant: str) -> bool:
        return self.used < self._limit - (self._reserved if self._held[tenant] else 0)

    def _leave(self, tenant: str) -> None:
        self._held[tenant] -= 1
        while (following := self._next()) is not None:
            turn = self._waiting[following].popleft()
            if not turn.done():
                self._held[following] += 1
                turn.set_result(None)
        self._forget_empty()

    def _next(self) -> str | None:
        """Returns the waiting tenant that a slot is free for: which holds fewest, and was given one longest ago."""
        able = [tenant for tenant, queue in self._waiting.items() if queue and self._is_free_for(tenant)]
        if not able:
            return None
        tenant = min(able, key=self._held.__getitem__)
        self._waiting[tenant] = self._waiting.pop(tenant)  # to the end
        return tenant

    def _share(self, tenant: str) -> int:
        since = time.monotonic() - RECENT
        self._refused = {name: at for name, at in self._refused.items() if at > since}
        wanting = {*self._refused, *self._waiting}
        if not wanting - {tenant}:
            return self._limit
        claimants = wanting | {name for name, held in self._held.items() if held} | {tenant}
        return math.ceil(self._limit / len(claimants))

    def _forget_empty(self) -> None:
        self._held = +self._held
        self._waiting = {tenant: queue for tenant, queue in self._waiting.items() if queue}

    def _refusal(self, tenant: str) -> ResourceExhaustedError:
        self._refused[tenant] = time.monotonic()
        retry_after = self._load.retry_after(self._limit, self.waiting)
        return ResourceExhaustedError(
            f"the server has {self.used} of at most {self._limit} {self._what} under way, {self._held[tenant]} of them "
            f"of this tenant; try again in {retry_after:.1f} s",
            reason="SERVER_BUSY",
            metadata={"limit": str(self._limit)},
            retry_after=retry_after,
        )


class _Load:
    """Says when to try again: after as long as those refused of late would take, spread so that they come apart."""

    def __init__(self) -> None:
        self._held = 1.0  # mean seconds that a slot is held
        self._refusals = 0.0  # of about the last `RECENT` seconds
        self._last = time.monotonic()

    def note_held(self, seconds: float) -> None:
        self._held += 0.1 * (seconds - self._held)

    def retry_after(self, limit: int, waiting: int) -> float:
        now = time.monotonic()
        self._refusals = 1 + self._refusals * math.exp((self._last - now) / RECENT)
        self._last = now
        estimate = self._held * (self._refusals + waiting) / limit
        return min(max(estimate, MIN_RETRY), MAX_RETRY) * random.uniform(0.5, 1.5)
