"""The end of versions: rows first, with a mark for every content that nothing refers to any more; then its files."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from deltamux.errors import DeltamuxError
from deltamux.store.database import VERSION_ROWS, Database
from deltamux.store.leases import Leases
from deltamux.store.objects import ObjectStore
from deltamux.store.records import VersionRecord, VersionState

log = logging.getLogger("deltamux.store")

BATCH = 32
"""Versions that are removed as one change: other tenants' changes and uploads come between two batches."""

PAUSE_SECONDS = 0.002
"""Between two batches: whoever waits for the lock is not given it by its release, but has to wake up and take it."""

Removed = Callable[[VersionRecord, bool], None]
"""Told when a version is gone: its record, and whether no other version has the same content."""


class Removal:
    """Removes versions that drain, once no request holds them.

    Args:
        leases: which versions requests hold.
        moving: orders what moves objects.

    Attributes:
        on_removed: called after a version's last lease is gone and its files are removed.
    """

    def __init__(self, database: Database, objects: ObjectStore, leases: Leases, moving: threading.RLock) -> None:
        self.on_removed: Removed = lambda record, last: None
        self._database = database
        self._objects = objects
        self._leases = leases
        self._moving = moving
        self._thread = ThreadPoolExecutor(1, "deltamux-removal")  # starts its thread with its first task

    def recover(self) -> None:
        """Ends what a crash has interrupted: versions that drained, and contents that are marked as garbage."""
        self.remove_drained("TRUE")
        with self._moving:
            self._collect([row["digest"] for row in self._database.all("SELECT digest FROM garbage")])

    def remove_drained(self, where: str, *values: object) -> None:
        """Removes the versions among those of a condition that drain and that nobody holds."""
        rows = self._database.all(f"{VERSION_ROWS} AND state = ? AND {where}", VersionState.DRAINING, *values)
        free = self._leases.free(self._database.version(row) for row in rows)
        for first in range(0, len(free), BATCH):
            self._remove(free[first : first + BATCH])
            if first + BATCH < len(free):
                time.sleep(PAUSE_SECONDS)

    def remove_released(self, record: VersionRecord) -> None:
        """Removes a version whose last lease has ended; what cannot be removed now is when the store opens again.

        On an event loop, which must not wait for the disk, it is removed a little later, by a thread.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._remove_released(record)
        else:
            self._thread.submit(self._remove_released, record)

    def close(self) -> None:
        """Waits for what is being removed."""
        self._thread.shutdown()

    def _remove_released(self, record: VersionRecord) -> None:
        try:
            self._remove([record])
        except DeltamuxError as error:
            log.error("%s is deleted, but its files are still there: %s", record.key, error.message)

    def _remove(self, records: Sequence[VersionRecord]) -> None:
        with self._moving:
            gone = self._database.freeing(lambda: self._delete_rows(records))
            last = self._collect({record.compiled.digest for record in gone})
        for record in gone:
            self.on_removed(record, record.compiled.digest in last)

    def _delete_rows(self, records: Sequence[VersionRecord]) -> list[VersionRecord]:
        """Deletes versions; returns those that were still there."""
        run = self._database.run
        gone: list[VersionRecord] = []
        with self._database.transaction():
            for record in records:
                found = run("DELETE FROM versions WHERE tenant = ? AND adapter = ? AND number = ?", *record.key)
                gone += [record] * found.rowcount
            for digest in {record.compiled.digest for record in gone}:
                if not self._referenced(digest):
                    run("INSERT OR IGNORE INTO garbage VALUES (?)", digest)
        return gone

    def collect_orphans(self) -> list[str]:
        """Removes the objects that no version refers to."""
        orphans = [digest for digest in self._objects.digests() if not self._referenced(digest)]

        def mark() -> None:
            with self._database.transaction():
                for digest in orphans:
                    self._database.run("INSERT OR IGNORE INTO garbage VALUES (?)", digest)

        self._database.freeing(mark)
        return sorted(self._collect(orphans))

    def discard(self, digest: str) -> None:
        """Removes the objects of a content that is marked; what cannot be removed keeps its mark."""
        try:
            with self._moving:
                self._collect({digest})
        except DeltamuxError as error:
            log.warning("object %s stays until the store opens again: %s", digest[:12], error.message)

    def _collect(self, digests: Sequence[str] | set[str]) -> set[str]:
        """Removes the objects of those contents that are marked, and their marks; returns the contents removed."""
        marked = {row["digest"] for row in self._database.all("SELECT digest FROM garbage")}
        unused = {digest for digest in marked.intersection(digests) if not self._referenced(digest)}
        removed = [digest for digest in unused if self._objects.remove(digest)]
        try:
            with self._database.transaction():
                for digest in removed:
                    self._database.run("DELETE FROM programs WHERE digest = ?", digest)
                    self._database.run("DELETE FROM garbage WHERE digest = ?", digest)
        except DeltamuxError as error:  # the marks stay, and go when the store opens again
            log.warning("marks of removed objects stay for now: %s", error.message)
        return unused

    def _referenced(self, digest: str) -> bool:
        return self._database.one("SELECT 1 FROM versions WHERE digest = ?", digest) is not None
