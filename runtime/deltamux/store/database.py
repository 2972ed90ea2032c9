"""The store's SQLite database: its checks when it is opened, durable transactions, and queries."""

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
from deltamux.store.database_checks import DATABASE_FILE, check_database, check_present, identity_in
from deltamux.store.faults import FULL, Reserve, gone_error, store_faults
from deltamux.store.identity import Identity, IdentityFiles
from deltamux.store.objects import ObjectStore
from deltamux.store.records import AdapterRecord, VersionRecord

T = TypeVar("T")
BUSY_SECONDS = 5.0
"""Longest wait of a transaction for another program that has locked the database."""


def is_id(column: str) -> str:
    """Returns the SQL condition that a column holds the id of a tenant, an adapter or a key; see `records.ID`."""
    return (
        f"(typeof({column}) = 'text' AND length(CAST({column} AS BLOB)) BETWEEN 1 AND 63"
        f" AND {column} NOT GLOB '*[^a-z0-9._-]*' AND {column} GLOB '[a-z0-9]*' AND {column} GLOB '*[a-z0-9]'"
        f" AND instr(CAST({column} AS BLOB), x'00') = 0)"
    )


_LAST_PROMOTED = "(SELECT number FROM promotions p WHERE p.tenant = a.tenant AND p.adapter = a.adapter"
# The version before and after a deleted one may be the same: two equal rows in sequence.
_ADAPTER_ROWS = f"""
SELECT a.*,
    {_LAST_PROMOTED} ORDER BY id DESC LIMIT 1) AS serving,
    {_LAST_PROMOTED} AND number IS NOT ({_LAST_PROMOTED} ORDER BY id DESC LIMIT 1))
        ORDER BY id DESC LIMIT 1) AS previous
FROM adapters a WHERE NOT deleted AND {is_id("adapter")}
"""
_VERSION_ROWS = """
SELECT v.*, coalesce(p.sha256, '') AS sha256, coalesce(p.base_fingerprint, '') AS base_fingerprint,
    coalesce(p.damage, 'it was never recorded') AS damage
FROM versions v LEFT JOIN programs p USING (digest) WHERE TRUE
"""


class Database:
    """A database with one writer at a time; a committed transaction survives a power cut.

    Reads outside a transaction use a connection of their own and see the last committed state: readers, such as the
    event loop, do not wait until a change is on the disk.

    Args:
        adopt: accept the present database, or create an empty one, whatever store the objects belong to.
    Raises:
        FailedPreconditionError: it belongs to another store, is older than the objects, or cannot be used.
    """

    def __init__(self, root: Path, objects: ObjectStore, *, adopt: bool = False) -> None:
        self._root = root
        self._objects = objects
        self._files = IdentityFiles(root)
        self._reserve = Reserve(root)
        self._open_files: list[tuple[int, int]] | None = (
            None  # device and inode of the open files; None while the store opens
        )
        self._writing = threading.RLock()
        self._reading = threading.RLock()
        self._writer_thread: int | None = None  # the id of the thread whose transaction is open
        self.with_reserve(lambda: self._open(adopt))

    def _open(self, adopt: bool) -> None:
        with store_faults(self._root, opening=True):
            self._connect(adopt)

    def _connect(self, adopt: bool) -> None:
        files = None if adopt else self._files.read()
        claimed = not adopt and (files is not None or next(self._objects.digests(), None) is not None)
        check_present(self._root, files, claimed=claimed)
        version = self._checked_version(files, claimed, adopt)
        with ExitStack() as stack:
            self._connection = stack.enter_context(closing(self._new_connection()))
            self._migrate(version, files)
            self._reader = stack.enter_context(closing(self._read_connection()))
            stack.pop_all()

    def _checked_version(self, files: Identity | None, claimed: bool, adopt: bool) -> int:
        """Returns the version of the database's schema.

        It is read by a read-only connection: another one would merge the write-ahead log into the database, even if
        the log is of another database.
        """
        path = self._root / DATABASE_FILE
        if not path.exists():
            return 0
        mode = (
            "rw" if path.with_name(f"{path.name}-journal").exists() else "ro"
        )  # only a read-write connection rolls a journal back
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True)) as connection:
            rows.prepare(connection)
            return check_database(connection, self._root, files, claimed=claimed, adopt=adopt)

    def _migrate(self, version: int, files: Identity | None) -> None:
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            self._connection.execute(f"PRAGMA {pragma}")
        if version == 0:
            schema.create(self._connection)
        elif version == 1:
            schema.migrate_from_1(self._connection, self._objects.program_sum)
        if files is None:
            self._files.write(identity_in(self._connection))
        with self.transaction():
            pass  # increments the generation: earlier copies of the database are older ones
        self._open_files = self._file_ids()

    def _read_connection(self) -> sqlite3.Connection:
        connection = self._new_connection()
        connection.execute("PRAGMA query_only = ON")
        identity_in(connection)  # opens the files
        return connection

    def _new_connection(self) -> sqlite3.Connection:
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
        return Identity(*self.fetch_one("SELECT store_id, generation, base_fingerprint FROM identity"))

    def set_base(self, fingerprint: str) -> None:
        """Writes a base's fingerprint to the store's identity, in the database and its file."""
        if self.identity().base_fingerprint != fingerprint:
            with self.transaction():
                self.execute("UPDATE identity SET base_fingerprint = ?", fingerprint)
            with store_faults(self._root):
                self._files.write(self.identity())

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Runs the block as one exclusive transaction; an exception rolls it back.

        Raises:
            ResourceExhaustedError, UnavailableError: see `store_faults`; the transaction is rolled back.
            UnavailableError: the open files were moved or replaced, so the change would be lost (STORE_GONE).
        """
        with store_faults(self._root), self._write_transaction():
            try:
                yield
                sql = "UPDATE identity SET generation = generation + 1 RETURNING generation"
                generation: int = self._connection.execute(sql).fetchall()[0][0]
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            self._files.write_generation(generation)
            self._reserve.fill()

    @contextmanager
    def _write_transaction(self) -> Iterator[None]:
        """Holds the write lock and an open transaction for the length of the block.

        While another program has locked the database, the write lock is released between attempts, for `close`.
        """
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            with self._writing:
                if self._open_files not in (None, self._file_ids()):
                    raise gone_error(self._root)
                if self._begin(last=time.monotonic() > deadline):
                    self._writer_thread = threading.get_ident()
                    try:
                        yield
                    finally:
                        self._writer_thread = None
                    return
            time.sleep(0.02)

    def _begin(self, *, last: bool) -> bool:
        """Begins a transaction; returns False if the database is locked, or raises that in the last attempt."""
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

    def _file_ids(self) -> list[tuple[int, int]]:
        """Returns device and inode of the database and its log; an empty list if one is missing."""
        try:
            found = [os.stat(self._root / f"{DATABASE_FILE}{suffix}") for suffix in ("", "-wal")]
        except FileNotFoundError:
            return []
        return [(file.st_dev, file.st_ino) for file in found]

    def with_reserve(self, work: Callable[[], T]) -> T:
        """Runs work that frees space; on a full disk again, with the space of the reserve."""
        try:
            return work()
        except ResourceExhaustedError as error:
            if error.reason != FULL:
                raise
            self._reserve.release()
            return work()

    def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Returns the result of a query on this thread's transaction, if there is one, or on the committed state."""
        if self._writer_thread == threading.get_ident():
            with store_faults(self._root):
                return query(self._connection)
        with self._reading, store_faults(self._root):
            return query(self._reader)

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Makes all reads of the block, outside a transaction, see one committed state."""
        with self._reading, store_faults(self._root):
            self._reader.execute("BEGIN")
            try:
                yield
            finally:
                self._reader.execute("ROLLBACK")

    def execute(self, sql: str, *values: object) -> sqlite3.Cursor:
        with self._writing, store_faults(self._root):
            return self._connection.execute(sql, values)

    def fetch_all(self, sql: str, *values: object) -> list[Any]:
        return self.read(lambda connection: connection.execute(sql, values).fetchall())

    def fetch_one(self, sql: str, *values: object) -> Any:
        def first(connection: sqlite3.Connection) -> Any:
            with closing(
                connection.execute(sql, values)
            ) as found:  # an open cursor would keep the reader at this state
                return found.fetchone()

        return self.read(first)

    def adapters(self, condition: str, *values: object) -> list[AdapterRecord]:
        """Returns the adapters that meet a condition, which may end with an order and a limit."""
        return list(map(rows.adapter, self.fetch_all(f"{_ADAPTER_ROWS} AND {condition}", *values)))

    def versions(self, condition: str, *values: object) -> list[VersionRecord]:
        """Returns the versions that meet a condition, which may end with an order and a limit."""
        return [rows.version(row, self._objects) for row in self.fetch_all(f"{_VERSION_ROWS} AND {condition}", *values)]
