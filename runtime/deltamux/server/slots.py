"""Bounds how much of one kind of work the server takes on at once, and shares it out between tenants."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deltamux.errors import ResourceExhaustedError

RECENT = 5.0
"""Seconds for which a tenant that was refused counts as one that wants a slot, and a refusal as load."""

MIN_RETRY, MAX_RETRY = 0.5, 30.0
"""Seconds between which the time lies that a refused caller is told to leave, before it is spread by half."""


class Slots:
    """So many at once; what is beyond waits for a while, or is refused with the time after which to try again.

    While another tenant waits, or was refused within `RECENT` seconds, a tenant gets no more than its share: the limit
    divided by the tenants that hold or want a slot. A free slot goes to the waiting tenant that holds fewest.

    Args:
        limit: slots.
        what: the work's name in the plural, for messages.
        per_tenant: most slots of one tenant; None for no such bound.
        max_waiting: most callers that wait, and half of it the most of one tenant; 0 refuses instead.
        patience: seconds that a caller waits at most.
    """

    def __init__(
        self,
        limit: int,
        what: str,
        *,
        per_tenant: int | None = None,
        max_waiting: int = 0,
        patience: float = math.inf,
    ) -> None:
        self._limit = limit
        self._what = what
        self._per_tenant = limit if per_tenant is None else per_tenant
        self._max_waiting = max_waiting
        self._patience = patience
        self._held: Counter[str] = Counter()
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
    async def take(self, tenant: str) -> AsyncIterator[None]:
        """Holds a slot for the length of the block.

        Args:
            tenant: whose work it is; the caller must be known to be allowed to say so.

        Raises:
            ResourceExhaustedError: none is free, and none came free in time; `retry_after` is set.
        """
        await self._enter(tenant)
        began = time.monotonic()
        try:
            yield
        finally:
            self._load.note_held(time.monotonic() - began)
            self._leave(tenant)

    async def _enter(self, tenant: str) -> None:
        if self.used < self._limit and self._held[tenant] < self._share(tenant):
            self._held[tenant] += 1
            return
        queue = self._waiting.setdefault(tenant, deque())
        if self.waiting >= self._max_waiting or 2 * len(queue) >= max(self._max_waiting, 2):
            self._forget_empty()
            raise self._refusal(tenant)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            async with asyncio.timeout(None if math.isinf(self._patience) else self._patience):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._leave(tenant)  # the turn came in the moment of giving up
            elif turn in queue:
                queue.remove(turn)
            self._forget_empty()
            if isinstance(error, TimeoutError):
                raise self._refusal(tenant) from None
            raise

    def _leave(self, tenant: str) -> None:
        self._held[tenant] -= 1
        while self.used < self._limit and (following := self._next()) is not None:
            turn = self._waiting[following].popleft()
            if not turn.done():
                self._held[following] += 1
                turn.set_result(None)
        self._forget_empty()

    def _next(self) -> str | None:
        """Returns the waiting tenant that holds fewest slots, of several the one that was given one longest ago."""
        able = [tenant for tenant, queue in self._waiting.items() if queue and self._held[tenant] < self._per_tenant]
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
            return self._per_tenant
        claimants = wanting | {name for name, held in self._held.items() if held} | {tenant}
        return min(self._per_tenant, math.ceil(self._limit / len(claimants)))

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
