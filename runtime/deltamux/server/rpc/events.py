"""Events of adapters: one bounded queue per watch."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from deltamux.errors import AbortedError, DeltamuxError, ResourceExhaustedError, UnavailableError
from deltamux.server.access.auth import unknown_key
from deltamux.server.access.caller import Caller, current_caller
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
    caller: Caller
    _queue: asyncio.Queue[pb.AdapterEvent | None] = field(default_factory=lambda: asyncio.Queue(MAX_QUEUED))
    _error: DeltamuxError | None = None

    def matches(self, name: AdapterKey) -> bool:
        return self.tenant == name.tenant and self.adapter in (None, name.adapter)

    def put(self, event: pb.AdapterEvent) -> None:
        if self._error is not None:
            return
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            self.end(
                AbortedError("the client reads the watch's events too slowly: start it again", reason="WATCH_TOO_SLOW")
            )

    def finish(self, error: DeltamuxError) -> None:
        """Ends the watch after the events that are queued; later ones are not for its caller."""
        if self._error is None and not self._queue.full():
            self._error = error
            self._queue.put_nowait(None)
        else:
            self.end(self._error or error)

    def end(self, error: DeltamuxError) -> None:
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
        subscription = Subscription(tenant, adapter, current_caller())
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def publish(self, name: AdapterKey, event: pb.AdapterEvent) -> None:
        for subscription in list(self._subscriptions):
            if subscription.matches(name):
                subscription.put(event)

    def revoke(self, tenant: str, key: str | None = None) -> None:
        """Ends the watches that were begun with a tenant's key, or with any of its keys.

        A key's watch would outlive the key otherwise, and see the adapters of a later tenant of the same name.
        """
        for subscription in list(self._subscriptions):
            if subscription.caller.tenant == tenant and key in (None, subscription.caller.key):
                subscription.finish(unknown_key())

    def close(self) -> None:
        """Ends all watches, before the server stops."""
        self._closed = True
        for subscription in list(self._subscriptions):
            subscription.end(_shutting_down())


def _shutting_down() -> UnavailableError:
    return UnavailableError("the server is shutting down: watch again once it is back", reason="SHUTTING_DOWN")
