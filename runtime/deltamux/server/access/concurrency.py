"""`ConcurrencyLimit`: a bound on concurrent work of one kind, shared between tenants."""

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
"""Seconds for which a refused tenant counts as a claimant of a permit, and a refusal as load."""

MIN_RETRY, MAX_RETRY = 0.5, 30.0
"""Bounds of a refusal's `retry_after` in seconds, before it is spread by half."""

CHECK_SECONDS = 0.5
"""How often a waiting caller checks for a permit whose holder is overdue."""


class Preemptible(Protocol):
    """Work at its caller's pace that may be cancelled for a waiting caller."""

    def overdue(self) -> float:
        """Returns the seconds by which its caller is late; 0 or less if it is not."""

    def cancel(self) -> None:
        """Ends the work soon."""


class Permit:
    """The right to run one piece of work.

    Attributes:
        tenant: of the work.
        holder: the work, if it may be cancelled when it is overdue.
        cancelled: whether it was cancelled.
    """

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.holder: Preemptible | None = None
        self.cancelled = False

    def overdue(self) -> float:
        return 0.0 if self.holder is None or self.cancelled else self.holder.overdue()

    def cancel(self) -> None:
        assert self.holder is not None
        self.cancelled = True
        self.holder.cancel()


class ConcurrencyLimit:
    """A number of permits; a caller beyond it is queued, or refused with the time after which to retry.

    While another tenant waits, or was refused within `RECENT` seconds, a tenant gets no more than its share: the limit
    divided by the tenants that hold or claim a permit. A free permit goes to the waiting tenant with the fewest. For a
    waiting caller, the most overdue work of a tenant that holds more permits is cancelled.

    Args:
        limit: permits.
        what: the work's name in the plural, for messages.
        reserved: permits, of the limit, for tenants that hold none.
        queue_size: callers that may wait; half of it for one tenant, and its last quarter for tenants without a waiting
            caller; 0 refuses instead.
        timeout: longest wait in seconds.
    """

    def __init__(
        self, limit: int, what: str, *, reserved: int = 0, queue_size: int = 0, timeout: float = math.inf
    ) -> None:
        self._limit = limit
        self._what = what
        self._reserved = reserved
        self._queue_size = queue_size
        self._timeout = timeout
        self._held: Counter[str] = Counter()
        self._permits: set[Permit] = set()
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
    async def acquire(self, tenant: str) -> AsyncIterator[Permit]:
        """Holds a permit for the length of the block, and yields it.

        Args:
            tenant: the authenticated caller's.

        Raises:
            ResourceExhaustedError: none is free, and none was released in time; `retry_after` is set.
        """
        await self._enter(tenant)
        began, permit = time.monotonic(), Permit(tenant)
        self._permits.add(permit)
        try:
            yield permit
        finally:
            self._permits.remove(permit)
            self._load.note_held(time.monotonic() - began)
            self._leave(tenant)

    async def _enter(self, tenant: str) -> None:
        if self._is_free_for(tenant) and self._held[tenant] < self._share(tenant):
            self._held[tenant] += 1
            return
        queue = self._waiting.setdefault(tenant, deque())
        places = self._queue_size - (self._queue_size // 4 if queue else 0)
        if self.waiting >= places or 2 * len(queue) >= max(self._queue_size, 2):
            self._forget_empty()
            raise self._refusal(tenant)
        admission: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(admission)
        try:
            async with asyncio.timeout(None if math.isinf(self._timeout) else self._timeout):
                await self._wait(admission, tenant)
        except BaseException as error:
            if admission.done() and not admission.cancelled():
                self._leave(tenant)  # admitted while its caller was cancelled
            elif admission in queue:
                queue.remove(admission)
            self._forget_empty()
            if isinstance(error, TimeoutError):
                raise self._refusal(tenant) from None
            raise

    async def _wait(self, admission: asyncio.Future[None], tenant: str) -> None:
        """Waits for admission; cancels overdue work every `CHECK_SECONDS`."""
        while not admission.done():
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_SECONDS):
                    await asyncio.shield(admission)
                    return
            self._preempt(tenant)

    def _preempt(self, tenant: str) -> None:
        if sum(permit.cancelled for permit in self._permits) >= self.waiting:
            return  # one permit per waiting caller is being released
        held = self._held[tenant]
        worst = max((s for s in self._permits if self._held[s.tenant] > held), key=Permit.overdue, default=None)
        if worst is not None and worst.overdue() > 0:
            worst.cancel()

    def _is_free_for(self, tenant: str) -> bool:
        return self.used < self._limit - (self._reserved if self._held[tenant] else 0)

    def _leave(self, tenant: str) -> None:
        self._held[tenant] -= 1
        while (following := self._next()) is not None:
            admission = self._waiting[following].popleft()
            if not admission.done():
                self._held[following] += 1
                admission.set_result(None)
        self._forget_empty()

    def _next(self) -> str | None:
        """Returns the waiting tenant of the next permit: the one with the fewest, least recently served of these."""
        able = [tenant for tenant, queue in self._waiting.items() if queue and self._is_free_for(tenant)]
        if not able:
            return None
        tenant = min(able, key=self._held.__getitem__)
        self._waiting[tenant] = self._waiting.pop(tenant)  # to the end
        return tenant

    def _share(self, tenant: str) -> int:
        since = time.monotonic() - RECENT
        self._refused = {name: at for name, at in self._refused.items() if at > since}
        claiming = {*self._refused, *self._waiting}
        if not claiming - {tenant}:
            return self._limit
        claimants = claiming | {name for name, held in self._held.items() if held} | {tenant}
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
    """The estimate of `retry_after`: the time that recently refused callers would take, spread at random."""

    def __init__(self) -> None:
        self._held = 1.0  # mean seconds for which a permit is held
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
