"""Removal of versions: their rows first, with a mark for each content without versions; then its files."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from deltamux.errors import DeltamuxError
from deltamux.store.adapter_rows import OF_VERSION
from deltamux.store.database import Database
from deltamux.store.leases import Leases
from deltamux.store.objects import ObjectStore
from deltamux.store.records import VersionRecord, VersionState

log = logging.getLogger("deltamux.store")

BATCH = 32
"""Versions that are removed in one transaction: other tenants' changes run between two batches."""

PAUSE_SECONDS = 0.002
"""Pause between two batches, in which a waiting thread can acquire the lock: its release does not hand it over."""

RemovalCallback = Callable[[VersionRecord, bool], None]
"""Called with a removed version and whether no other version has the same content."""


class Removal:
    """Removes draining versions that no request holds.

    Args:
        leases: the versions that requests hold.
        objects_lock: held while objects are moved.

    Attributes:
        on_removed: called after a version is removed.
    """

    def __init__(self, database: Database, objects: ObjectStore, leases: Leases, objects_lock: threading.RLock) -> None:
        self.on_removed: RemovalCallback = lambda record, last: None
        self._database = database
        self._objects = objects
        self._leases = leases
        self._objects_lock = objects_lock
        self._thread = ThreadPoolExecutor(1, "deltamux-removal")  # starts its thread with its first task

    def recover(self) -> None:
        """Completes what a crash interrupted: removes draining versions and contents that are marked as garbage."""
        self.remove_drained("TRUE")
        with self._objects_lock:
            self._collect_garbage([row["digest"] for row in self._database.fetch_all("SELECT digest FROM garbage")])

    def remove_drained(self, where: str, *values: object) -> None:
        """Removes the draining versions that meet a condition and that no request holds."""
        draining = self._database.versions(f"state = ? AND {where}", VersionState.DRAINING, *values)
        free = self._leases.drain(draining)
        for first in range(0, len(free), BATCH):
            self._remove(free[first : first + BATCH])
            if first + BATCH < len(free):
                time.sleep(PAUSE_SECONDS)

    def remove_released(self, record: VersionRecord) -> None:
        """Removes a version whose last lease has ended; an error leaves it until the store is opened again.

        On an event loop, which must not wait for the disk, it is removed in a thread.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._remove_released(record)
        else:
            self._thread.submit(self._remove_released, record)

    def close(self) -> None:
        """Waits for removals in progress."""
        self._thread.shutdown()

    def _remove_released(self, record: VersionRecord) -> None:
        try:
            self._remove([record])
        except DeltamuxError as error:
            log.error("%s is deleted, but its files are not removed yet: %s", record.key, error.message)

    def _remove(self, records: Sequence[VersionRecord]) -> None:
        with self._objects_lock:
            gone = self._database.with_reserve(lambda: self._delete_rows(records))
            last = self._collect_garbage({record.compiled.digest for record in gone})
        for record in gone:
            self.on_removed(record, record.compiled.digest in last)

    def _delete_rows(self, records: Sequence[VersionRecord]) -> list[VersionRecord]:
        """Deletes the rows of versions; returns those that existed."""
        execute = self._database.execute
        gone: list[VersionRecord] = []
        with self._database.transaction():
            for record in records:
                found = execute(f"DELETE FROM versions WHERE {OF_VERSION}", *record.key)
                gone += [record] * found.rowcount
            for digest in {record.compiled.digest for record in gone}:
                if not self._referenced(digest):
                    execute("INSERT OR IGNORE INTO garbage VALUES (?)", digest)
        return gone

    def collect_orphans(self) -> list[str]:
        """Removes the objects without versions; returns their digests."""
        orphans = [digest for digest in self._objects.digests() if not self._referenced(digest)]

        def mark() -> None:
            with self._database.transaction():
                for digest in orphans:
                    self._database.execute("INSERT OR IGNORE INTO garbage VALUES (?)", digest)

        self._database.with_reserve(mark)
        return sorted(self._collect_garbage(orphans))

    def discard(self, digest: str) -> None:
        """Removes the object of a marked content; after an error it keeps its mark."""
        try:
            with self._objects_lock:
                self._collect_garbage({digest})
        except DeltamuxError as error:
            log.warning("object %s is kept until the store is opened again: %s", digest[:12], error.message)

    def _collect_garbage(self, digests: Sequence[str] | set[str]) -> set[str]:
        """Removes the objects and marks of those contents that are marked; returns the removed contents."""
        marked = {row["digest"] for row in self._database.fetch_all("SELECT digest FROM garbage")}
        unused = {digest for digest in marked.intersection(digests) if not self._referenced(digest)}
        removed = [digest for digest in unused if self._objects.remove(digest)]
        try:
            with self._database.transaction():
                for digest in removed:
                    self._database.execute("DELETE FROM programs WHERE digest = ?", digest)
                    self._database.execute("DELETE FROM garbage WHERE digest = ?", digest)
        except DeltamuxError as error:  # they are removed when the store is opened again
            log.warning("marks of removed objects are kept for now: %s", error.message)
        return unused

    def _referenced(self, digest: str) -> bool:
        return self._database.fetch_one("SELECT 1 FROM versions WHERE digest = ?", digest) is not None
