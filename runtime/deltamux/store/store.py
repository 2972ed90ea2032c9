"""The adapter store: immutable versions, an alias that moves between them atomically, leases that deletion waits for.

One server process owns a store. Every method may be called from any thread. What a method acknowledged by returning
survives ``kill -9`` and a power cut; what it did not is undone when the store opens again. Opening removes no object
that this store has not marked before.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from deltamux.errors import FailedPreconditionError, NotFoundError
from deltamux.store.admission import Admission
from deltamux.store.database import ADAPTER_ROWS, VERSION_ROWS, Database
from deltamux.store.faults import store_faults
from deltamux.store.leases import Leases
from deltamux.store.lock import Lock, lock_store
from deltamux.store.objects import ObjectStore
from deltamux.store.programs import StoredPrograms
from deltamux.store.records import AdapterKey, AdapterRecord, CompiledAdapter, VersionKey, VersionRecord, VersionState
from deltamux.store.removal import Removal, Removed
from deltamux.store.routes import Route, check_canary
from deltamux.store.row_checks import RowChecks
from deltamux.store.tenants import Tenants


class AdapterStore:
    """See the module's docstring. Make one with `open`.

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
        self.tenants = Tenants(self._database)
        self._leases = Leases()
        # Orders what moves objects, and may wait for the disk; readers need the database's lock only.
        self._moving = threading.RLock()
        self._removal = Removal(self._database, self._objects, self._leases, self._moving)
        self._admission = Admission(root, self._database, self._objects)
        self.programs = StoredPrograms(
            root, self._database, self._objects, self._admission, self._moving, self._leases.forget
        )
        self.rows = RowChecks(self._database, self._leases.forget)
        with store_faults(root, opening=True):
            self._objects.prepare()
            self._database.freeing(self._removal.recover)
            self.rows.tell()

    @classmethod
    def open(cls, root: str | Path, *, adopt: bool = False) -> AdapterStore:
        """Opens a store, making it where there is none, and clears away what a crash of this store left behind.

        Args:
            adopt: take the database that is there, or an empty one where there is none, whatever it belongs to; what it
                does not know of the objects is given up (and not deleted).
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
    def on_removed(self) -> Removed:
        """Called after a version's last lease is gone and its files are removed."""
        return self._removal.on_removed

    @on_removed.setter
    def on_removed(self, told: Removed) -> None:
        self._removal.on_removed = told

    # Upload.

    def staging(self) -> AbstractContextManager[Path]:
        """Yields an empty directory for the files of an upload, which begins here; gone after the block."""
        return self._admission.staging()

    def commit(
        self,
        staged: Path,
        key: AdapterKey,
        compiled: CompiledAdapter,
        *,
        promote: bool | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> VersionRecord:
        """Makes a staged upload, its compiled program included, a version of an adapter.

        The same content in the same adapter is the same version; labels, where any are given, replace its own. A first
        version serves at once; a later one when `promote` is true, or when it is promoted. Where the content is stored
        already, but damaged or compiled for another base, the staged files take its place, for all versions that share
        it.

        Raises:
            AbortedError: the tenant was deleted after the upload began (TENANT_DELETED).
            ResourceExhaustedError: the disk is full (STORE_FULL).
        """
        with self._moving, store_faults(self.root):
            self._admission.check_tenant(staged, key.tenant)
            try:
                placed = self._admission.place(staged, compiled)
                with self._database.transaction():
                    number = self._number(key, compiled, labels) or self._insert(key, compiled, labels or {})
                    if promote or not self._serves(key):
                        self._promote(key, number)
                    self._admission.record(placed)
            except BaseException:
                self._removal.discard(compiled.digest)
                raise
            self._leases.forget()
        return self.version(VersionKey(*key, number))

    def _serves(self, key: AdapterKey) -> bool:
        return self._database.one("SELECT 1 FROM promotions WHERE tenant = ? AND adapter = ?", *key) is not None

    def _number(self, key: AdapterKey, compiled: CompiledAdapter, labels: Mapping[str, str] | None) -> int | None:
        row = self._database.one(
            "SELECT number FROM versions WHERE tenant = ? AND adapter = ? AND digest = ? AND state <> ?",
            *key, compiled.digest, VersionState.DRAINING,
        )  # fmt: skip
        if row and labels:
            sql = "UPDATE versions SET labels = ? WHERE tenant = ? AND adapter = ? AND number = ?"
            self._database.run(sql, json.dumps(dict(labels)), *key, row["number"])
        return row["number"] if row else None

    def _insert(self, key: AdapterKey, compiled: CompiledAdapter, labels: Mapping[str, str]) -> int:
        run, now = self._database.run, time.time()
        run("INSERT OR IGNORE INTO tenants VALUES (?, ?)", key.tenant, now)
        run("INSERT OR IGNORE INTO adapters (tenant, adapter, created, updated) VALUES (?, ?, ?, ?)", *key, now, now)
        run(
            "UPDATE adapters SET updated = ?, deleted = 0,"
            " last_number = 1 + max(CAST(last_number AS INTEGER), (SELECT coalesce(max(CAST(number AS INTEGER)), 0)"
            " FROM versions v WHERE v.tenant = adapters.tenant AND v.adapter = adapters.adapter)),"
            " created = CASE deleted WHEN 1 THEN ? ELSE created END WHERE tenant = ? AND adapter = ?",
            now, now, *key,
        )  # fmt: skip
        number: int = self._database.one("SELECT last_number FROM adapters WHERE tenant = ? AND adapter = ?", *key)[0]
        run(
            "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *key, number, VersionState.READY, compiled.digest, compiled.method, compiled.rank,
            compiled.num_virtual_tokens, compiled.num_bytes, json.dumps(dict(labels)), now,
        )  # fmt: skip
        return number

    def collect_orphans(self) -> list[str]:
        """Marks the objects that no row refers to as garbage, and removes them; returns their digests."""
        with self._moving:
            return self._removal.collect_orphans()

    # Look up.

    def adapter(self, key: AdapterKey) -> AdapterRecord:
        """Returns an adapter; raises NotFoundError."""
        row = self._database.one(f"{ADAPTER_ROWS} AND tenant = ? AND adapter = ?", *key)
        if row is None:
            raise _not_found(key)
        return self._database.adapter(row)

    def adapters(self, tenant: str, *, after: str = "", limit: int = 100) -> list[AdapterRecord]:
        """Returns a tenant's adapters in order of name, beginning behind the name `after`."""
        sql = f"{ADAPTER_ROWS} AND tenant = ? AND adapter > ? ORDER BY adapter LIMIT ?"
        return [self._database.adapter(row) for row in self._database.all(sql, tenant, after, limit)]

    def version(self, key: VersionKey) -> VersionRecord:
        """Returns a version, also one that drains; raises NotFoundError."""
        found = self._there(key.parent, key.number)
        if found is None:
            raise _not_found(key)
        return found

    def versions(self, key: AdapterKey, *, after: int = 0, limit: int = 100) -> list[VersionRecord]:
        """Returns an adapter's versions that do not drain, in order of number, beginning behind the number `after`."""
        self.adapter(key)
        sql = f"{VERSION_ROWS} AND tenant = ? AND adapter = ? AND number > ? AND state <> ? ORDER BY number LIMIT ?"
        rows = self._database.all(sql, *key, after, VersionState.DRAINING, limit)
        return [self._database.version(row) for row in rows]

    @contextmanager
    def lease(self, key: AdapterKey | VersionKey, request_key: str = "") -> Iterator[VersionRecord]:
        """Resolves a name, once, and holds its version for the length of the block, whatever is promoted or deleted.

        Args:
            key: an adapter (its alias decides) or one of its versions.
            request_key: decides between the serving version and a canary; the same key decides alike.
        Raises:
            NotFoundError: no such adapter or version.
        """
        record = self._held(key, request_key)
        try:
            yield record
        finally:
            self._release(record.key)

    def _held(self, key: AdapterKey | VersionKey, request_key: str) -> VersionRecord:
        if isinstance(key, VersionKey):
            return self._hold(key)
        while (record := self._leases.hold_routed(key, request_key)) is None:
            chosen = self._leases.learn(key, lambda: self._route(key)).choose(request_key)
            with suppress(NotFoundError):  # it was deleted since the route was read
                return self._hold(chosen.key)
        return record

    def _hold(self, key: VersionKey) -> VersionRecord:
        self._leases.hold(key)
        try:
            return self._ready(key)
        except BaseException:
            self._release(key)
            raise

    def _route(self, key: AdapterKey) -> Route:
        with self._database.snapshot():
            return Route.of(self.adapter(key), lambda number: self._there(key, number))

    def _there(self, key: AdapterKey, number: int) -> VersionRecord | None:
        row = self._database.one(f"{VERSION_ROWS} AND tenant = ? AND adapter = ? AND number = ?", *key, number)
        return row and self._database.version(row)

    def _release(self, key: VersionKey) -> None:
        if (record := self._leases.release(key)) is not None:
            self._removal.remove_released(record)

    # Change.

    def promote(self, key: AdapterKey, number: int, *, canary_percent: int = 0) -> AdapterRecord:
        """Makes a version the one that the name means; or gives it a share of the traffic, 1 to 99 percent.

        Raises:
            NotFoundError, FailedPreconditionError: no such adapter or version; one that serves, as its own canary.
        """
        with self._changing(key) as adapter:
            self._ready(VersionKey(*key, number))
            if canary_percent:
                check_canary(adapter, number)
                self._set_canary(key, number, canary_percent)
            else:
                self._promote(key, number)
        return self.adapter(key)

    def rollback(self, key: AdapterKey) -> AdapterRecord:
        """Ends a canary; or, where there is none, returns to the version that served before.

        Raises:
            FailedPreconditionError: no version served before.
        """
        with self._changing(key) as adapter:
            if adapter.canary is not None:
                self._set_canary(key, None, None)
            elif adapter.previous is None:
                raise FailedPreconditionError(
                    f"{key} has no earlier version to return to",
                    reason="NO_PREVIOUS_VERSION",
                    metadata={"name": str(key)},
                )
            else:
                self._database.run(
                    "DELETE FROM promotions WHERE tenant = ?1 AND adapter = ?2 AND id >"
                    " (SELECT max(id) FROM promotions WHERE tenant = ?1 AND adapter = ?2 AND number = ?3)",
                    *key, adapter.previous,
                )  # fmt: skip
        return self.adapter(key)

    def pin(self, key: AdapterKey, pinned: bool) -> AdapterRecord:
        """Notes that an adapter is to stay in the engine's memory, or no longer."""
        with self._changing(key):
            self._database.run("UPDATE adapters SET pinned = ? WHERE tenant = ? AND adapter = ?", pinned, *key)
        return self.adapter(key)

    def pinned(self) -> list[AdapterRecord]:
        """Returns all pinned adapters, of all tenants."""
        return [self._database.adapter(row) for row in self._database.all(f"{ADAPTER_ROWS} AND pinned")]

    def delete_adapter(self, key: AdapterKey) -> None:
        """Hides an adapter and its versions at once; each is removed when its last lease ends."""

        def hide() -> None:
            with self._changing(key):
                self._hide("tenant = ? AND adapter = ?", *key)

        self._database.freeing(hide)
        self._removal.remove_drained("tenant = ? AND adapter = ?", *key)

    def delete_tenant(self, tenant: str, *, force: bool = False) -> list[AdapterRecord]:
        """Deletes a tenant and its keys, and with `force` its adapters; returns these, as they were.

        An upload of the tenant's that is under way is not committed any more.

        Raises:
            NotFoundError: no such tenant.
            FailedPreconditionError: it has adapters, and the deletion is not forced.
        """

        def delete() -> list[AdapterRecord]:
            with self._database.transaction():
                rows = self._database.all(f"{ADAPTER_ROWS} AND tenant = ?", tenant)
                self.tenants.delete(tenant, empty=force or not rows)
                self._hide("tenant = ?", tenant)
            self._admission.tenant_deleted(tenant)
            self._leases.forget()
            return [self._database.adapter(row) for row in rows]

        with self._moving:
            deleted = self._database.freeing(delete)
        self._removal.remove_drained("tenant = ?", tenant)
        return deleted

    def _hide(self, where: str, *values: object) -> None:
        self._database.run(f"DELETE FROM promotions WHERE {where}", *values)
        self._database.run(
            "UPDATE adapters SET deleted = 1, pinned = 0, canary_number = NULL, canary_percent = NULL"
            f" WHERE {where}", *values
        )  # fmt: skip
        self._database.run(f"UPDATE versions SET state = ? WHERE {where}", VersionState.DRAINING, *values)

    def delete_version(self, key: VersionKey) -> None:
        """Hides a version at once, and removes it when its last lease ends.

        Raises:
            FailedPreconditionError: the version serves, alone or as a canary.
        """

        def hide() -> None:
            with self._changing(key.parent) as adapter:
                self._check_hideable(key, adapter)
                where = "tenant = ? AND adapter = ? AND number = ?"
                self._database.run(f"DELETE FROM promotions WHERE {where}", *key)
                self._database.run(f"UPDATE versions SET state = ? WHERE {where}", VersionState.DRAINING, *key)

        self._database.freeing(hide)
        self._removal.remove_drained("tenant = ? AND adapter = ? AND number = ?", *key)

    def _check_hideable(self, key: VersionKey, adapter: AdapterRecord) -> None:
        self._ready(key)
        if key.number == adapter.serving or (adapter.canary and key.number == adapter.canary.number):
            raise FailedPreconditionError(
                f"{key} serves traffic: promote another version first, or delete the adapter",
                reason="VERSION_SERVES",
                metadata={"name": str(key)},
            )

    @contextmanager
    def _changing(self, key: AdapterKey) -> Iterator[AdapterRecord]:
        """One transaction on an adapter, which must exist; its route is looked up anew afterwards."""
        try:
            with self._database.transaction():
                yield self.adapter(key)
                self._database.run(
                    "UPDATE adapters SET updated = ? WHERE tenant = ? AND adapter = ?", time.time(), *key
                )  # fmt: skip
        finally:
            self._leases.forget(key)

    def _ready(self, key: VersionKey) -> VersionRecord:
        record = self.version(key)
        if record.state is VersionState.DRAINING:
            raise _not_found(key)
        return record

    def _promote(self, key: AdapterKey, number: int) -> None:
        self._set_canary(key, None, None)
        serving = self._database.one(
            "SELECT number FROM promotions WHERE tenant = ? AND adapter = ? ORDER BY id DESC LIMIT 1", *key
        )
        if serving is None or serving["number"] != number:
            self._database.run("INSERT INTO promotions (tenant, adapter, number) VALUES (?, ?, ?)", *key, number)

    def _set_canary(self, key: AdapterKey, number: int | None, percent: int | None) -> None:
        self._database.run(
            "UPDATE adapters SET canary_number = ?, canary_percent = ? WHERE tenant = ? AND adapter = ?",
            number, percent, *key,
        )  # fmt: skip


def _not_found(key: AdapterKey | VersionKey) -> NotFoundError:
    return NotFoundError(f"{key} does not exist, or belongs to another tenant", metadata={"name": str(key)})
