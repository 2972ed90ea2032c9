"""Tells watchers what changes, each within its own bounded queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from deltamux.errors import AbortedError, ResourceExhaustedError, UnavailableError
from deltamux.store import AdapterKey
from deltamux.v1 import adapters_pb2 as pb

MAX_WAITING = 256

MAX_WATCHES = 256
"""Of one tenant and its adapters at once: a change is sent to all of them before the event loop does anything else."""


@dataclass(eq=False)
class Subscription:
    """One watcher's view: events of a tenant, or of one of its adapters, from the moment it was made."""

    tenant: str
    adapter: str | None
    _waiting: asyncio.Queue[pb.AdapterEvent | None] = field(default_factory=lambda: asyncio.Queue(MAX_WAITING))
    _ended_by: AbortedError | UnavailableError | None = None

    def matches(self, name: AdapterKey) -> bool:
        return self.tenant == name.tenant and self.adapter in (None, name.adapter)

    def put(self, event: pb.AdapterEvent) -> None:
        try:
            self._waiting.put_nowait(event)
        except asyncio.QueueFull:
            self.end(AbortedError("the watch fell too far behind: begin it anew", reason="WATCH_TOO_SLOW"))

    def end(self, error: AbortedError | UnavailableError) -> None:
        """Ends the watch at once; what still waits is of no use without what follows it."""
        self._ended_by = error
        while not self._waiting.empty():
            self._waiting.get_nowait()
        self._waiting.put_nowait(None)

    async def events(self) -> AsyncGenerator[pb.AdapterEvent]:
        """Yields events as they happen; raises what ended the watch."""
        while (event := await self._waiting.get()) is not None:
            yield event
        assert self._ended_by is not None
        raise self._ended_by


class EventHub:
    """Hands every event to the subscriptions that match it. All methods run on the event loop.

    Attributes:
        order: held from the look at what changed until its event is published, so that events come in the order of the
            changes, and the last one tells how things are.
    """

    def __init__(self) -> None:
        self.order = asyncio.Lock()
        self._subscriptions: set[Subscription] = set()
        self._closed = False

    @contextmanager
    def subscribe(self, tenant: str, adapter: str | None = None) -> Iterator[Subscription]:
        if self._closed:
            raise _shutting_down()
        if sum(subscription.tenant == tenant for subscription in self._subscriptions) >= MAX_WATCHES:
            raise ResourceExhaustedError(
                f"tenants/{tenant} is watched {MAX_WATCHES} times already, which is the limit: end one, or share one",
                reason="SERVER_BUSY",
                metadata={"limit": str(MAX_WATCHES)},
                retry_after=10.0,
            )
        subscription = Subscription(tenant, adapter)
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def publish(self, name: AdapterKey, event: pb.AdapterEvent) -> None:
        for subscription in list(self._subscriptions):
            if subscription.matches(name):
                subscription.put(event)

    def close(self) -> None:
        """Ends all watches: the server is about to stop."""
        self._closed = True
        for subscription in list(self._subscriptions):
            subscription.end(_shutting_down())


def _shutting_down() -> UnavailableError:
    return UnavailableError("the server is shutting down: watch again once it is back", reason="SHUTTING_DOWN")
