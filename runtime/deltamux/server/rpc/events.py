"""Events of adapters: one bounded queue per watch."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from deltamux.errors import AbortedError, ResourceExhaustedError, UnavailableError
from deltamux.store import AdapterKey
from deltamux.v1 import adapters_pb2 as pb

MAX_QUEUED = 256
"""Events that one watch may be behind."""

MAX_WATCHES = 256
"""Open watches of one tenant and its adapters: the event loop sends a change to all of them at once."""


@dataclass(eq=False)
class Subscription:
    """One watch: the events of a tenant, or of one of its adapters, since its creation."""

    tenant: str
    adapter: str | None
    _queue: asyncio.Queue[pb.AdapterEvent | None] = field(default_factory=lambda: asyncio.Queue(MAX_QUEUED))
    _error: AbortedError | UnavailableError | None = None

    def matches(self, name: AdapterKey) -> bool:
        return self.tenant == name.tenant and self.adapter in (None, name.adapter)

    def put(self, event: pb.AdapterEvent) -> None:
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            self.end(
                AbortedError("the client reads the watch's events too slowly: start it again", reason="WATCH_TOO_SLOW")
            )

    def end(self, error: AbortedError | UnavailableError) -> None:
        """Ends the watch at once; queued events are dropped, as those after them are."""
        self._error = error
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(None)

    async def events(self) -> AsyncGenerator[pb.AdapterEvent]:
        """Yields events as they happen; raises the error that ended the watch."""
        while (event := await self._queue.get()) is not None:
            yield event
        assert self._error is not None
        raise self._error


class EventHub:
    """The open watches; an event is published to those that match it. All methods run on the event loop.

    Attributes:
        lock: held while an adapter is read and its event is published, so that events are in the order of the
            changes, and the last one has the present state.
    """

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self._subscriptions: set[Subscription] = set()
        self._closed = False

    @contextmanager
    def subscribe(self, tenant: str, adapter: str | None = None) -> Iterator[Subscription]:
        if self._closed:
            raise _shutting_down()
        if sum(subscription.tenant == tenant for subscription in self._subscriptions) >= MAX_WATCHES:
            raise ResourceExhaustedError(
                f"tenants/{tenant} has {MAX_WATCHES} open watches, which is the limit: end one, or share one",
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
        """Ends all watches, before the server stops."""
        self._closed = True
        for subscription in list(self._subscriptions):
            subscription.end(_shutting_down())


def _shutting_down() -> UnavailableError:
    return UnavailableError("the server is shutting down: watch again once it is back", reason="SHUTTING_DOWN")
