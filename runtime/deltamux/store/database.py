"""The store's SQLite database: opened only if it belongs to its objects, durable transactions, rows as records."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from deltamux.errors import ResourceExhaustedError
from deltamux.store import rows, schema
from deltamux.store.faults import FULL, Reserve, gone, store_faults
from deltamux.store.identity import Identity, IdentityFiles
from deltamux.store.objects import ObjectStore
from deltamux.store.records import AdapterRecord, ApiKeyRecord, TenantRecord, VersionRecord
from deltamux.store.vetting import DATABASE_FILE, check_present, identity_in, vet

T = TypeVar("T")
BUSY_SECONDS = 5.0
"""How long a change waits for another program that has locked the database."""


def is_id(column: str) -> str:
    """Returns the SQL condition that a column holds the id of a tenant, an adapter or a key; see `records.ID`."""
    return (
        f"(typeof({column}) = 'text' AND length(CAST({column} AS BLOB)) BETWEEN 1 AND 63"
        f" AND {column} NOT GLOB '*[^a-z0-9._-]*' AND {column} GLOB '[a-z0-9]*' AND {column} GLOB '*[a-z0-9]'"
        f" AND instr(CAST({column} AS BLOB), x'00') = 0)"
    )


_LAST_PROMOTED = "(SELECT number FROM promotions p WHERE p.tenant = a.tenant AND p.adapter = a.adapter"
# Where a version was deleted, one that served before and after it stands twice in a row.
ADAPTER_ROWS = f"""
SELECT a.*,
    {_LAST_PROMOTED} ORDER BY id DESC LIMIT 1) AS serving,
    {_LAST_PROMOTED} AND number IS NOT ({_LAST_PROMOTED} ORDER BY id DESC LIMIT 1))
        ORDER BY id DESC LIMIT 1) AS previous
FROM adapters a WHERE NOT deleted AND {is_id("adapter")}
"""
VERSION_ROWS = """
SELECT v.*, coalesce(p.sha256, '') AS sha256, coalesce(p.base_fingerprint, '') AS base_fingerprint,
    coalesce(p.damage, 'it was never recorded') AS damage
FROM versions v LEFT JOIN programs p USING (digest) WHERE TRUE
"""


class Database:
    """One writer at a time; a committed transaction survives a power cut.

    What is read outside a transaction is read by a connection of its own, and so is the last committed state: readers,
    the event loop among them, do not wait until a change is on the disk.

    Args:
        adopt: take the database that is there, or an empty one where there is none, whatever the objects belong to.
    Raises:
        FailedPreconditionError: it belongs to another store, is older than the objects, or cannot be used at all.
    """

    def __init__(self, root: Path, objects: ObjectStore, *, adopt: bool = False) -> None:
        self._root = root
        self._objects = objects
        self._files = IdentityFiles(root)
        self._reserve = Reserve(root)
        self._place: list[tuple[int, int]] | None = None  # the files that are open; None while the store opens
        self._writing = threading.RLock()
        self._reading = threading.RLock()
        self._writer: int | None = None  # the thread that has a transaction under way
        self.freeing(lambda: self._open(adopt))

    def _open(self, adopt: bool) -> None:
        with store_faults(self._root, opening=True):
            self._connect(adopt)

    def _connect(self, adopt: bool) -> None:
        files = None if adopt else self._files.read()
        claimed = not adopt and (files is not None or next(self._objects.digests(), None) is not None)
        check_present(self._root, files, claimed=claimed)
        version = self._vetted(files, claimed, adopt)
        with ExitStack() as stack:
            self._connection = stack.enter_context(closing(self._connected()))
            self._bring_up_to_date(version, files)
            self._reader = stack.enter_context(closing(self._reading_only()))
            stack.pop_all()

    def _vetted(self, files: Identity | None, claimed: bool, adopt: bool) -> int:
        """Returns the version of the database's schema.

        Read by a connection that cannot write: another one would merge the log beside the database into it, also where
        that log is of another database.
        """
        path = self._root / DATABASE_FILE
        if not path.exists():
            return 0
        mode = "rw" if path.with_name(f"{path.name}-journal").exists() else "ro"  # only a writer rolls a journal back
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True)) as connection:
            rows.prepare(connection)
            return vet(connection, self._root, files, claimed=claimed, adopt=adopt)

    def _bring_up_to_date(self, version: int, files: Identity | None) -> None:
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            self._connection.execute(f"PRAGMA {pragma}")
        if version == 0:
            schema.create(self._connection)
        elif version == 1:
            schema.migrate_from_first(self._connection, self._objects.program_sum)
        if files is None:
            self._files.write(identity_in(self._connection))
        with self.transaction():
            pass  # from here on an earlier copy of the database is an older one
        self._place = self._found()

    def _reading_only(self) -> sqlite3.Connection:
        connection = self._connected()
        connection.execute("PRAGMA query_only = ON")
        identity_in(connection)  # opens its files, whatever becomes of their names
        return connection

    def _connected(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._root / DATABASE_FILE, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        rows.prepare(connection)
        return connection

    def close(self) -> None:
        with self._writing, self._reading:
            self._reader.close()
            self._connection.close()
            self._files.close()

    def identity(self) -> Identity:
        return Identity(*self.one("SELECT store_id, generation, base_fingerprint FROM identity"))

    def note_base(self, fingerprint: str) -> None:
        """Makes a base's fingerprint part of the store's identity, in the database and beside it."""
        if self.identity().base_fingerprint != fingerprint:
            with self.transaction():
                self.run("UPDATE identity SET base_fingerprint = ?", fingerprint)
            with store_faults(self._root):
                self._files.write(self.identity())

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Runs the block as one transaction, alone; what it raises undoes it.

        Raises:
            ResourceExhaustedError, UnavailableError: see `store_faults`; nothing of the block has happened.
            UnavailableError: the database is no longer the file that is open: the change would be lost (STORE_GONE).
        """
        with store_faults(self._root), self._begun():
            try:
                yield
                sql = "UPDATE identity SET generation = generation + 1 RETURNING generation"
                generation: int = self._connection.execute(sql).fetchall()[0][0]
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            self._files.note(generation)
            self._reserve.fill()

    @contextmanager
    def _begun(self) -> Iterator[None]:
        """Holds the lock for the length of the block, and a transaction that has begun.

        Where another program has locked the database, the lock is let go while this waits, for whoever closes it.
        """
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            with self._writing:
                if self._place not in (None, self._found()):
                    raise gone(self._root)
                if self._begin(last=time.monotonic() > deadline):
                    self._writer = threading.get_ident()
                    try:
                        yield
                    finally:
                        self._writer = None
                    return
            time.sleep(0.02)

    def _begin(self, *, last: bool) -> bool:
        """Begins a transaction; returns whether it could, or raises what SQLite does where this is the last try."""
        self._connection.execute("PRAGMA busy_timeout = 0")
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if last or error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            return False
        finally:
            self._connection.execute(f"PRAGMA busy_timeout = {int(1000 * BUSY_SECONDS)}")
        return True

    def _found(self) -> list[tuple[int, int]]:
        """Returns which files the database and its log are, by device and inode; none where one is missing."""
        try:
            found = [os.stat(self._root / f"{DATABASE_FILE}{suffix}") for suffix in ("", "-wal")]
        except FileNotFoundError:
            return []
        return [(file.st_dev, file.st_ino) for file in found]

    def freeing(self, work: Callable[[], T]) -> T:
        """Runs what frees space; on a full disk with the space of the reserve."""
        try:
            return work()
        except ResourceExhaustedError as error:
            if error.reason != FULL:
                raise
            self._reserve.release()
            return work()

    def reading(self, read: Callable[[sqlite3.Connection], T]) -> T:
        """Returns what a function reads; inside a transaction with what that has changed, else as it was committed."""
        if self._writer == threading.get_ident():
            with store_faults(self._root):
                return read(self._connection)
        with self._reading, store_faults(self._root):
            return read(self._reader)

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Has what the block reads outside a transaction be of one committed state."""
        with self._reading, store_faults(self._root):
            self._reader.execute("BEGIN")
            try:
                yield
            finally:
                self._reader.execute("ROLLBACK")

    def run(self, sql: str, *values: object) -> sqlite3.Cursor:
        with self._writing, store_faults(self._root):
            return self._connection.execute(sql, values)

    def all(self, sql: str, *values: object) -> list[Any]:
        return self.reading(lambda connection: connection.execute(sql, values).fetchall())

    def one(self, sql: str, *values: object) -> Any:
        def first(connection: sqlite3.Connection) -> Any:
            with closing(connection.execute(sql, values)) as found:  # an open one would keep the reader at this state
                return found.fetchone()

        return self.reading(first)

    # Rows as records.

    def tenant(self, row: Any) -> TenantRecord:
        return rows.tenant(row)

    def api_key(self, row: Any) -> ApiKeyRecord:
        return rows.api_key(row)

    def adapter(self, row: Any) -> AdapterRecord:
        """Returns a row of `ADAPTER_ROWS` as a record."""
        return rows.adapter(row)

    def version(self, row: Any) -> VersionRecord:
        """Returns a row of `VERSION_ROWS` as a record."""
        return rows.version(row, self._objects)
