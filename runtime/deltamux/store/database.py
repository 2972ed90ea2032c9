"""The store's SQLite database: its schema, durable transactions, and rows as records."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deltamux.errors import FailedPreconditionError
from deltamux.store.objects import ObjectStore
from deltamux.store.records import (
    AdapterKey,
    AdapterRecord,
    ApiKeyRecord,
    Canary,
    CompiledAdapter,
    TenantRecord,
    VersionKey,
    VersionRecord,
    VersionState,
)

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE tenants (tenant TEXT PRIMARY KEY, created REAL NOT NULL);
CREATE TABLE api_keys (
    tenant TEXT NOT NULL REFERENCES tenants ON DELETE CASCADE,
    key TEXT NOT NULL, secret_hash TEXT NOT NULL UNIQUE, created REAL NOT NULL,
    PRIMARY KEY (tenant, key)
);
-- A deleted adapter keeps its row, so that no version number is ever used twice.
CREATE TABLE adapters (
    tenant TEXT NOT NULL, adapter TEXT NOT NULL, deleted INTEGER NOT NULL DEFAULT 0,
    last_number INTEGER NOT NULL DEFAULT 0, pinned INTEGER NOT NULL DEFAULT 0,
    canary_number INTEGER, canary_percent INTEGER,
    created REAL NOT NULL, updated REAL NOT NULL,
    PRIMARY KEY (tenant, adapter)
);
CREATE TABLE versions (
    tenant TEXT NOT NULL, adapter TEXT NOT NULL, number INTEGER NOT NULL, state TEXT NOT NULL,
    digest TEXT NOT NULL, method TEXT NOT NULL, rank INTEGER NOT NULL, num_virtual_tokens INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL, labels TEXT NOT NULL, created REAL NOT NULL,
    PRIMARY KEY (tenant, adapter, number),
    FOREIGN KEY (tenant, adapter) REFERENCES adapters
);
CREATE INDEX versions_by_digest ON versions (digest);
-- The last row of an adapter is the version that serves; a rollback takes it away.
CREATE TABLE promotions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL, adapter TEXT NOT NULL, number INTEGER NOT NULL
);
CREATE INDEX promotions_by_adapter ON promotions (tenant, adapter, id);
"""
ADAPTER_ROWS = """
SELECT a.*,
    (SELECT number FROM promotions p WHERE p.tenant = a.tenant AND p.adapter = a.adapter ORDER BY id DESC LIMIT 1)
        AS serving,
    (SELECT number FROM promotions p WHERE p.tenant = a.tenant AND p.adapter = a.adapter
        ORDER BY id DESC LIMIT 1 OFFSET 1)
        AS previous
FROM adapters a WHERE NOT deleted
"""


class Database:
    """One connection, one writer at a time; a committed transaction survives a power cut."""

    def __init__(self, path: Path, objects: ObjectStore) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.row_factory = sqlite3.Row
        self._objects = objects
        self.lock = threading.RLock()
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._migrate(path)

    def _migrate(self, path: Path) -> None:
        version = self.one("PRAGMA user_version")[0]
        if version == 0:
            self._connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise FailedPreconditionError(
                f"{path} has schema {version}; this deltamux knows {SCHEMA_VERSION}: start the one that wrote it",
                reason="STORE_SCHEMA",
            )

    def close(self) -> None:
        with self.lock:
            self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Runs the block as one transaction, alone; what it raises undoes it."""
        with self.lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def run(self, sql: str, *values: object) -> sqlite3.Cursor:
        with self.lock:
            return self._connection.execute(sql, values)

    def all(self, sql: str, *values: object) -> list[Any]:
        with self.lock:
            return self._connection.execute(sql, values).fetchall()

    def one(self, sql: str, *values: object) -> Any:
        with self.lock:
            return self._connection.execute(sql, values).fetchone()

    # Rows as records.

    def tenant(self, row: Any) -> TenantRecord:
        return TenantRecord(row["tenant"], _time(row["created"]))

    def api_key(self, row: Any) -> ApiKeyRecord:
        return ApiKeyRecord(row["tenant"], row["key"], _time(row["created"]))

    def adapter(self, row: Any) -> AdapterRecord:
        canary = Canary(row["canary_number"], row["canary_percent"]) if row["canary_number"] is not None else None
        return AdapterRecord(
            AdapterKey(row["tenant"], row["adapter"]),
            row["serving"],
            row["previous"],
            canary,
            bool(row["pinned"]),
            _time(row["created"]),
            _time(row["updated"]),
        )

    def version(self, row: Any) -> VersionRecord:
        compiled = CompiledAdapter(
            row["digest"], row["method"], row["rank"], row["num_virtual_tokens"], row["num_bytes"]
        )
        return VersionRecord(
            VersionKey(row["tenant"], row["adapter"], row["number"]),
            compiled,
            VersionState(row["state"]),
            _time(row["created"]),
            self._objects.program(compiled.digest),
            json.loads(row["labels"]),
        )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
