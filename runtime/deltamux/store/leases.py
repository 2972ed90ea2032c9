"""Which versions requests hold, and what the names mean that they come by."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable

from deltamux.store.records import AdapterKey, VersionKey, VersionRecord
from deltamux.store.routes import Route


class Leases:
    """Counts of the requests that hold each version, and the routes of adapters, read from the database once.

    The event loop takes part in it for every request, so that nothing here waits for the disk, or for a change that
    does. A version is held before it is looked at whether it drains, and `free` is called after that was written:
    either the one or the other sees that the version is not to be used, or not to be removed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[VersionKey] = Counter()
        self._draining: dict[VersionKey, VersionRecord] = {}
        self._routes: dict[AdapterKey, Route] = {}
        self._forgotten = 0  # how often routes were forgotten: what was read before may be outdated

    def hold_routed(self, key: AdapterKey, request_key: str) -> VersionRecord | None:
        """Holds the version that an adapter's route chooses; None where the route is not known."""
        with self._lock:
            route = self._routes.get(key)
            if route is None:
                return None
            record = route.choose(request_key)
            self._counts[record.key] += 1
            return record

    def hold(self, key: VersionKey) -> None:
        with self._lock:
            self._counts[key] += 1

    def release(self, key: VersionKey) -> VersionRecord | None:
        """Lets a version go; returns its record if it drains and this was its last lease."""
        with self._lock:
            self._counts[key] -= 1
            if self._counts[key]:
                return None
            del self._counts[key]
            return self._draining.pop(key, None)

    def free(self, draining: Iterable[VersionRecord]) -> list[VersionRecord]:
        """Returns those of the versions that nobody holds; the others are returned by their last `release`."""
        records = list(draining)
        with self._lock:
            self._draining |= {record.key: record for record in records if record.key in self._counts}
            return [record for record in records if record.key not in self._counts]

    def learn(self, key: AdapterKey, read: Callable[[], Route]) -> Route:
        """Returns an adapter's route, and keeps it unless routes were forgotten while it was read."""
        with self._lock:
            seen = self._forgotten
        route = read()
        with self._lock:
            if seen == self._forgotten:
                self._routes[key] = route
        return route

    def forget(self, key: AdapterKey | None = None) -> None:
        """Forgets the route of an adapter, or of all: call it once a change of what they mean is committed."""
        with self._lock:
            self._forgotten += 1
            if key is None:
                self._routes.clear()
            else:
                self._routes.pop(key, None)
