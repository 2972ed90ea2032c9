"""Leases of versions by requests, and the cache of adapters' routes."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable

from deltamux.store.records import AdapterKey, VersionKey, VersionRecord
from deltamux.store.routes import Route


class Leases:
    """The number of requests that hold each version, and the cached routes of adapters.

    It is used on the event loop for every request, so nothing here waits for the disk, or for a lock that is held
    meanwhile. A request holds a version before it reads the version's state, and `drain` is called after that state was
    written: so either the request sees that the version is draining, or `drain` sees that it is held.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[VersionKey] = Counter()
        self._draining: dict[VersionKey, VersionRecord] = {}
        self._routes: dict[AdapterKey, Route] = {}
        self._invalidations = 0  # a route that was read before the last one may be outdated

    def hold_routed(self, key: AdapterKey, request_key: str) -> VersionRecord | None:
        """Holds the version that an adapter's cached route chooses; None if no route is cached."""
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
        """Releases a version; returns its record if it is draining and this was its last lease."""
        with self._lock:
            self._counts[key] -= 1
            if self._counts[key]:
                return None
            del self._counts[key]
            return self._draining.pop(key, None)

    def drain(self, draining: Iterable[VersionRecord]) -> list[VersionRecord]:
        """Returns the draining versions that no request holds; the last `release` returns each of the others."""
        records = list(draining)
        with self._lock:
            self._draining |= {record.key: record for record in records if record.key in self._counts}
            return [record for record in records if record.key not in self._counts]

    def cache_route(self, key: AdapterKey, read: Callable[[], Route]) -> Route:
        """Reads and returns an adapter's route; caches it unless routes were invalidated meanwhile."""
        with self._lock:
            seen = self._invalidations
        route = read()
        with self._lock:
            if seen == self._invalidations:
                self._routes[key] = route
        return route

    def invalidate(self, key: AdapterKey | None = None) -> None:
        """Drops the cached route of an adapter, or of all; call it after a change of routes is committed."""
        with self._lock:
            self._invalidations += 1
            if key is None:
                self._routes.clear()
            else:
                self._routes.pop(key, None)
