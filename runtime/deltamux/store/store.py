"""The adapter store: immutable versions, an alias that moves between them atomically, leases that deletion waits for.

One server process owns a store. Every method may be called from any thread. What a method acknowledged by returning
survives ``kill -9`` and a power cut; what it did not is undone when the store opens again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from deltamux.errors import FailedPreconditionError, NotFoundError
from deltamux.store.database import ADAPTER_ROWS, Database
from deltamux.store.objects import PROGRAM_FILE, ObjectStore
from deltamux.store.records import AdapterKey, AdapterRecord, CompiledAdapter, VersionKey, VersionRecord, VersionState
from deltamux.store.tenants import Tenants

Removed = Callable[[VersionRecord, bool], None]
"""Told when a version is gone: its record, and whether no other version has the same content."""


class _Route(NamedTuple):
    serving: VersionRecord
    canary: VersionRecord | None
    percent: int


class AdapterStore:
    """See the module's docstring. Make one with `open`.

    Attributes:
        tenants: tenants and their API keys.
        on_removed: called after a version's last lease is gone and its files are removed.
    """

    def __init__(self, root: Path, lock_file: object) -> None:
        self._lock_file = lock_file
        self._objects = ObjectStore(root)
        self._database = Database(root / "db.sqlite3", self._objects)
        self.tenants = Tenants(self._database)
        self.on_removed: Removed = lambda record, last: None
        self._routes: dict[AdapterKey, _Route] = {}
        self._leases: Counter[VersionKey] = Counter()
        # Orders what moves objects, and may wait for the disk; readers need the database's lock only.
        self._moving = threading.RLock()
        self._recover()

    @classmethod
    def open(cls, root: str | Path) -> AdapterStore:
        """Opens a store, making it where there is none, and clears away what a crash left behind.

        Raises:
            FailedPreconditionError: another process has the store open, or a newer deltamux wrote it.
        """
        root = Path(root)
        root.mkdir(parents=True, exist_ok=True)
        lock_file = (root / "lock").open("w")
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock_file.close()
            raise FailedPreconditionError(
                f"the store {root} is in use by another process: stop that server, or give this one a store of its own",
                reason="STORE_IN_USE",
            ) from None
        return cls(root, lock_file)

    def close(self) -> None:
        self._database.close()
        self._lock_file.close()  # type: ignore[attr-defined]  # an open file

    def _recover(self) -> None:
        for row in self._database.all("SELECT * FROM versions WHERE state = ?", VersionState.DRAINING):
            self._remove(self._database.version(row))
        self._objects.clean(row["digest"] for row in self._database.all("SELECT DISTINCT digest FROM versions"))

    # Upload.

    def staging(self) -> AbstractContextManager[Path]:
        """Yields an empty directory for the files of an upload; gone after the block unless committed."""
        return self._objects.staging()

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

        The same content in the same adapter is the same version. A first version serves at once; a later one when
        `promote` is true, or when it is promoted.
        """
        if not (staged / PROGRAM_FILE).is_file():
            raise FailedPreconditionError(f"the staged upload has no {PROGRAM_FILE}", reason="NOT_COMPILED")
        with self._moving:
            self._objects.put(staged, compiled.digest)
            with self._database.transaction():
                number = self._number(key, compiled) or self._insert(key, compiled, labels or {})
                first = self._database.one("SELECT 1 FROM promotions WHERE tenant = ? AND adapter = ?", *key) is None
                if promote or first:
                    self._promote(key, number)
            self._routes.pop(key, None)
        return self.version(VersionKey(*key, number))

    def _number(self, key: AdapterKey, compiled: CompiledAdapter) -> int | None:
        row = self._database.one(
            "SELECT number FROM versions WHERE tenant = ? AND adapter = ? AND digest = ? AND state = ?",
            *key, compiled.digest, VersionState.READY,
        )  # fmt: skip
        return row["number"] if row else None

    def _insert(self, key: AdapterKey, compiled: CompiledAdapter, labels: Mapping[str, str]) -> int:
        run, now = self._database.run, time.time()
        run("INSERT OR IGNORE INTO tenants VALUES (?, ?)", key.tenant, now)
        run("INSERT OR IGNORE INTO adapters (tenant, adapter, created, updated) VALUES (?, ?, ?, ?)", *key, now, now)
        run(
            "UPDATE adapters SET last_number = last_number + 1, updated = ?, deleted = 0,"
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
        row = self._database.one("SELECT * FROM versions WHERE tenant = ? AND adapter = ? AND number = ?", *key)
        if row is None:
            raise _not_found(key)
        return self._database.version(row)

    def versions(self, key: AdapterKey, *, after: int = 0, limit: int = 100) -> list[VersionRecord]:
        """Returns an adapter's READY versions in order of number, beginning behind the number `after`."""
        self.adapter(key)
        sql = (
            "SELECT * FROM versions WHERE tenant = ? AND adapter = ? AND number > ? AND state = ?"
            " ORDER BY number LIMIT ?"
        )
        rows = self._database.all(sql, *key, after, VersionState.READY, limit)
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
        with self._database.lock:
            record = self._resolve(key, request_key)
            self._leases[record.key] += 1
        try:
            yield record
        finally:
            self._release(record.key)

    def _resolve(self, key: AdapterKey | VersionKey, request_key: str) -> VersionRecord:
        if isinstance(key, VersionKey):
            record = self.version(key)
            if record.state is not VersionState.READY:
                raise _not_found(key)
            return record
        route = self._routes.get(key)
        if route is None:
            route = self._routes[key] = self._route(self.adapter(key))
        if route.canary is not None and _percentile(request_key) < route.percent:
            return route.canary
        return route.serving

    def _route(self, adapter: AdapterRecord) -> _Route:
        serving = self.version(VersionKey(*adapter.key, adapter.serving))
        if adapter.canary is None:
            return _Route(serving, None, 0)
        return _Route(serving, self.version(VersionKey(*adapter.key, adapter.canary.number)), adapter.canary.percent)

    def _release(self, key: VersionKey) -> None:
        with self._database.lock:
            self._leases[key] -= 1
            if self._leases[key]:
                return
            del self._leases[key]
            record = self.version(key)
        if record.state is VersionState.DRAINING:
            self._remove(record)

    # Change.

    def promote(self, key: AdapterKey, number: int, *, canary_percent: int = 0) -> AdapterRecord:
        """Makes a version the one that the name means; or gives it a share of the traffic, 1 to 99 percent.

        Raises:
            NotFoundError: no such adapter or version.
        """
        with self._changing(key):
            self._ready(VersionKey(*key, number))
            if canary_percent:
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
                    "DELETE FROM promotions WHERE id ="
                    " (SELECT max(id) FROM promotions WHERE tenant = ? AND adapter = ?)", *key
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
        with self._changing(key):
            self._database.run("DELETE FROM promotions WHERE tenant = ? AND adapter = ?", *key)
            self._database.run(
                "UPDATE adapters SET deleted = 1, pinned = 0, canary_number = NULL, canary_percent = NULL"
                " WHERE tenant = ? AND adapter = ?", *key
            )  # fmt: skip
            self._drain("tenant = ? AND adapter = ?", *key)
        self._remove_drained("tenant = ? AND adapter = ?", *key)

    def delete_version(self, key: VersionKey) -> None:
        """Hides a version at once, and removes it when its last lease ends.

        Raises:
            FailedPreconditionError: the version serves, alone or as a canary.
        """
        with self._changing(key.parent) as adapter:
            self._ready(key)
            if key.number == adapter.serving or (adapter.canary and key.number == adapter.canary.number):
                raise FailedPreconditionError(
                    f"{key} serves traffic: promote another version first, or delete the adapter",
                    reason="VERSION_SERVES",
                    metadata={"name": str(key)},
                )
            self._database.run("DELETE FROM promotions WHERE tenant = ? AND adapter = ? AND number = ?", *key)
            self._drain("tenant = ? AND adapter = ? AND number = ?", *key)
        self._remove_drained("tenant = ? AND adapter = ? AND number = ?", *key)

    @contextmanager
    def _changing(self, key: AdapterKey) -> Iterator[AdapterRecord]:
        """One transaction on an adapter, which must exist; its route is looked up anew afterwards."""
        with self._database.transaction():
            yield self.adapter(key)
            self._database.run(
                "UPDATE adapters SET updated = ? WHERE tenant = ? AND adapter = ?", time.time(), *key
            )  # fmt: skip
            self._routes.pop(key, None)

    def _ready(self, key: VersionKey) -> None:
        if self.version(key).state is not VersionState.READY:
            raise _not_found(key)

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

    def _drain(self, where: str, *values: object) -> None:
        self._database.run(f"UPDATE versions SET state = ? WHERE {where}", VersionState.DRAINING, *values)

    def _remove_drained(self, where: str, *values: object) -> None:
        for row in self._database.all(
            f"SELECT * FROM versions WHERE state = ? AND {where}", VersionState.DRAINING, *values
        ):
            record = self._database.version(row)
            if record.key not in self._leases:
                self._remove(record)

    def _remove(self, record: VersionRecord) -> None:
        with self._moving:
            with self._database.transaction():
                gone = self._database.run(
                    "DELETE FROM versions WHERE tenant = ? AND adapter = ? AND number = ?", *record.key
                )
                digest = record.compiled.digest
                last = self._database.one("SELECT 1 FROM versions WHERE digest = ?", digest) is None
            if last:
                self._objects.remove(digest)
        if gone.rowcount:
            self.on_removed(record, last)


def _percentile(request_key: str) -> int:
    return int.from_bytes(hashlib.sha256(request_key.encode()).digest()[:8], "big") % 100


def _not_found(key: AdapterKey | VersionKey) -> NotFoundError:
    return NotFoundError(f"{key} does not exist, or belongs to another tenant", metadata={"name": str(key)})
