"""The adapter store: immutable versions, atomic routing of adapters' names to them, leases that defer their removal.

A store is open in one process. Every method may be called from any thread. The effect of a method that has returned
survives ``kill -9`` and a power cut; that of any other is undone when the store is opened again. Opening removes only
objects that this store has marked before.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Self

from deltamux.errors import FailedPreconditionError, NotFoundError
from deltamux.store.adapter_rows import OF_ADAPTER, OF_TENANT, OF_VERSION, AdapterRows
from deltamux.store.database import Database
from deltamux.store.faults import store_faults
from deltamux.store.leases import Leases
from deltamux.store.lock import Lock, lock_store
from deltamux.store.objects import ObjectStore
from deltamux.store.programs import StoredPrograms
from deltamux.store.records import AdapterKey, AdapterRecord, CompiledAdapter, VersionKey, VersionRecord, VersionState
from deltamux.store.removal import Removal, RemovalCallback
from deltamux.store.routes import Route, check_canary
from deltamux.store.row_checks import RowChecks
from deltamux.store.staging import StagedUploads
from deltamux.store.tenants import Tenants


class AdapterStore:
    """An open store; see the module's docstring and `open`.

    Attributes:
        root: the store's directory.
        tenants: tenants and their API keys.
        programs: the versions' compiled programs.
        rows: the checks of the database's rows.
    """

    def __init__(self, root: Path, lock: Lock, *, adopt: bool = False) -> None:
        self.root = root
        self._lock = lock
        self._objects = ObjectStore(root)
        self._database = Database(root, self._objects, adopt=adopt)
        self._adapter_rows = AdapterRows(self._database)
        self.tenants = Tenants(self._database)
        self._leases = Leases()
        # Held while objects are moved, also during disk access; reads need the database's lock only.
        self._objects_lock = threading.RLock()
        self._removal = Removal(self._database, self._objects, self._leases, self._objects_lock)
        self._staged_uploads = StagedUploads(root, self._database, self._objects)
        self.programs = StoredPrograms(
            root, self._database, self._objects, self._staged_uploads, self._objects_lock, self._leases.invalidate
        )
        self.rows = RowChecks(self._database, self._leases.invalidate)
        with store_faults(root, opening=True):
            self._objects.prepare()
            self._database.with_reserve(self._removal.recover)
            self.rows.log_faults()

    @classmethod
    def open(cls, root: str | Path, *, adopt: bool = False) -> Self:
        """Opens a store, creates it if it does not exist, and removes the remains of a crash.

        Args:
            adopt: accept the present database, or create an empty one, whatever store the objects belong to; objects
                that are not in it are ignored (and not deleted).
        Raises:
            FailedPreconditionError: another process has the store open (STORE_IN_USE); a newer deltamux wrote it
                (STORE_SCHEMA); the database is missing, empty, of another store (STORE_MISMATCH), older than the
                objects (STORE_OUTDATED) or damaged (STORE_CORRUPT); it cannot be written (STORE_READ_ONLY).
            ResourceExhaustedError: the disk is full (STORE_FULL).
        """
        root = Path(root)
        lock = lock_store(root)
        try:
            return cls(root, lock, adopt=adopt)
        except BaseException:
            lock.close()
            raise

    def close(self) -> None:
        self._removal.close()
        self._database.close()
        self._lock.close()

    @property
    def on_removed(self) -> RemovalCallback:
        """Called after a version is removed."""
        return self._removal.on_removed

    @on_removed.setter
    def on_removed(self, callback: RemovalCallback) -> None:
        self._removal.on_removed = callback

    # Upload.

    def staging(self) -> AbstractContextManager[Path]:
        """Yields an empty directory for the files of an upload, which begins here; removed after the block."""
        return self._staged_uploads.staging()

    def commit(
        self,
        staged: Path,
        key: AdapterKey,
        compiled: CompiledAdapter,
        *,
        promote: bool | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> VersionRecord:
        """Commits a staged upload, its compiled program included, as a version of an adapter.

        The same content in the same adapter is the same version; labels, if any, replace its former ones. The first
        version serves at once; a later one if `promote` is true, or when it is promoted. If the content is stored
        already, but damaged or compiled for another base, the staged files replace it, for all its versions.

        Raises:
            AbortedError: the tenant was deleted after the upload began (TENANT_DELETED).
            ResourceExhaustedError: the disk is full (STORE_FULL).
        """
        with self._objects_lock, store_faults(self.root):
            self._staged_uploads.check_tenant(staged, key.tenant)
            try:
                stored = self._staged_uploads.move_to_objects(staged, compiled)
                with self._database.transaction():
                    number = self._adapter_rows.add_version(key, compiled, labels)
                    if promote or not self._adapter_rows.serves(key):
                        self._adapter_rows.promote(key, number)
                    self._staged_uploads.record(stored)
            except BaseException:
                self._removal.discard(compiled.digest)
                raise
            self._leases.invalidate()
        return self.version(VersionKey(*key, number))

    def collect_orphans(self) -> list[str]:
        """Removes the objects that no version refers to; returns their digests."""
        with self._objects_lock:
            return self._removal.collect_orphans()

    # Look up.

    def adapter(self, key: AdapterKey) -> AdapterRecord:
        """Returns an adapter; raises NotFoundError."""
        found = self._database.adapters(OF_ADAPTER, *key)
        if not found:
            raise _not_found(key)
        return found[0]

    def adapters(self, tenant: str, *, after: str = "", limit: int = 100) -> list[AdapterRecord]:
        """Returns a tenant's adapters in order of name, beginning after the name `after`."""
        return self._database.adapters("tenant = ? AND adapter > ? ORDER BY adapter LIMIT ?", tenant, after, limit)

    def version(self, key: VersionKey) -> VersionRecord:
        """Returns a version, also a draining one; raises NotFoundError."""
        found = self._find_version(key.parent, key.number)
        if found is None:
            raise _not_found(key)
        return found

    def versions(self, key: AdapterKey, *, after: int = 0, limit: int = 100) -> list[VersionRecord]:
        """Returns an adapter's versions, without draining ones, in order of number, beginning after `after`."""
        self.adapter(key)
        condition = f"{OF_ADAPTER} AND number > ? AND state <> ? ORDER BY number LIMIT ?"
        return self._database.versions(condition, *key, after, VersionState.DRAINING, limit)

    @contextmanager
    def lease(self, key: AdapterKey | VersionKey, request_key: str = "") -> Iterator[VersionRecord]:
        """Resolves a name once and holds its version for the length of the block, whatever is promoted or deleted.

        Args:
            key: an adapter (its route decides) or one of its versions.
            request_key: decides between the serving version and a canary; the same key always gets the same one.
        Raises:
            NotFoundError: no such adapter or version.
        """
        record = self._acquire(key, request_key)
        try:
            yield record
        finally:
            self._release(record.key)

    def _acquire(self, key: AdapterKey | VersionKey, request_key: str) -> VersionRecord:
        if isinstance(key, VersionKey):
            return self._hold(key)
        while (record := self._leases.hold_routed(key, request_key)) is None:
            chosen = self._leases.cache_route(key, lambda: self._route(key)).choose(request_key)
            with suppress(NotFoundError):  # it was deleted since the route was read
                return self._hold(chosen.key)
        return record

    def _hold(self, key: VersionKey) -> VersionRecord:
        self._leases.hold(key)
        try:
            return self._active_version(key)
        except BaseException:
            self._release(key)
            raise

    def _route(self, key: AdapterKey) -> Route:
        with self._database.snapshot():
            return Route.of(self.adapter(key), lambda number: self._find_version(key, number))

    def _find_version(self, key: AdapterKey, number: int) -> VersionRecord | None:
        found = self._database.versions(OF_VERSION, *key, number)
        return found[0] if found else None

    def _release(self, key: VersionKey) -> None:
        if (record := self._leases.release(key)) is not None:
            self._removal.remove_released(record)

    # Change.

    def promote(self, key: AdapterKey, number: int, *, canary_percent: int = 0) -> AdapterRecord:
        """Makes a version the serving one, or the canary with 1 to 99 percent of the traffic.

        Raises:
            NotFoundError, FailedPreconditionError: no such adapter or version; the serving version as its own canary.
        """
        with self._updating(key) as adapter:
            self._active_version(VersionKey(*key, number))
            if canary_percent:
                check_canary(adapter, number)
                self._adapter_rows.set_canary(key, number, canary_percent)
            else:
                self._adapter_rows.promote(key, number)
        return self.adapter(key)

    def rollback(self, key: AdapterKey) -> AdapterRecord:
        """Ends a canary; without one, returns to the version that served before.

        Raises:
            FailedPreconditionError: no version served before.
        """
        with self._updating(key) as adapter:
            if adapter.canary is not None:
                self._adapter_rows.set_canary(key, None, None)
            elif adapter.previous is None:
                raise FailedPreconditionError(
                    f"{key} has no earlier version to return to",
                    reason="NO_PREVIOUS_VERSION",
                    metadata={"name": str(key)},
                )
            else:
                self._adapter_rows.undo_promotions(key, adapter.previous)
        return self.adapter(key)

    def pin(self, key: AdapterKey, pinned: bool) -> AdapterRecord:
        """Marks an adapter as pinned, or as not pinned."""
        with self._updating(key):
            self._adapter_rows.set_pinned(key, pinned)
        return self.adapter(key)

    def pinned(self) -> list[AdapterRecord]:
        """Returns all pinned adapters, of all tenants."""
        return self._database.adapters("pinned")

    def delete_adapter(self, key: AdapterKey) -> None:
        """Hides an adapter and its versions at once; each is removed when its last lease ends."""

        def hide() -> None:
            with self._updating(key):
                self._adapter_rows.hide_adapters(OF_ADAPTER, *key)

        self._database.with_reserve(hide)
        self._removal.remove_drained(OF_ADAPTER, *key)

    def delete_tenant(self, tenant: str, *, force: bool = False) -> list[AdapterRecord]:
        """Deletes a tenant and its keys, and with `force` its adapters; returns these.

        An upload of the tenant that is under way cannot be committed any more.

        Raises:
            NotFoundError: no such tenant.
            FailedPreconditionError: it has adapters, and the deletion is not forced.
        """

        def delete() -> list[AdapterRecord]:
            with self._database.transaction():
                adapters = self._database.adapters(OF_TENANT, tenant)
                self.tenants.delete(tenant, empty=force or not adapters)
                self._adapter_rows.hide_adapters(OF_TENANT, tenant)
            self._staged_uploads.tenant_deleted(tenant)
            self._leases.invalidate()
            return adapters

        with self._objects_lock:
            deleted = self._database.with_reserve(delete)
        self._removal.remove_drained(OF_TENANT, tenant)
        return deleted

    def delete_version(self, key: VersionKey) -> None:
        """Hides a version at once, and removes it when its last lease ends.

        Raises:
            FailedPreconditionError: the version serves, alone or as a canary.
        """

        def hide() -> None:
            with self._updating(key.parent) as adapter:
                self._check_hideable(key, adapter)
                self._adapter_rows.hide_versions(OF_VERSION, *key)

        self._database.with_reserve(hide)
        self._removal.remove_drained(OF_VERSION, *key)

    def _check_hideable(self, key: VersionKey, adapter: AdapterRecord) -> None:
        self._active_version(key)
        if key.number == adapter.serving or (adapter.canary and key.number == adapter.canary.number):
            raise FailedPreconditionError(
                f"{key} serves traffic: promote another version first, or delete the adapter",
                reason="VERSION_SERVES",
                metadata={"name": str(key)},
            )

    @contextmanager
    def _updating(self, key: AdapterKey) -> Iterator[AdapterRecord]:
        """Runs one transaction on an adapter, which must exist, and invalidates its route."""
        try:
            with self._database.transaction():
                yield self.adapter(key)
                self._adapter_rows.touch(key)
        finally:
            self._leases.invalidate(key)

    def _active_version(self, key: VersionKey) -> VersionRecord:
        record = self.version(key)
        if record.state is VersionState.DRAINING:
            raise _not_found(key)
        return record


def _not_found(key: AdapterKey | VersionKey) -> NotFoundError:
    return NotFoundError(f"{key} does not exist, or belongs to another tenant", metadata={"name": str(key)})
