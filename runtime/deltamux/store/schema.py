"""The database's tables, and their migration from an earlier deltamux."""

import secrets
import sqlite3
from collections.abc import Callable

SCHEMA_VERSION = 2
"""Kept in SQLite's ``user_version``; 0 is an empty database."""

SCHEMA_1 = """
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
# Its statements are split at semicolons: comments must not contain any.
SCHEMA_2 = """
-- One row, equal to the identity in the store's files. The generation grows with every change, and the base is the last
-- served one.
CREATE TABLE identity (
    store_id TEXT NOT NULL, generation INTEGER NOT NULL, base_fingerprint TEXT NOT NULL DEFAULT ''
);
-- One compiled program per content, shared by versions and tenants.
CREATE TABLE programs (
    digest TEXT PRIMARY KEY, sha256 TEXT NOT NULL, base_fingerprint TEXT NOT NULL, damage TEXT NOT NULL DEFAULT ''
);
-- Contents of removed versions and of unfinished uploads: the only objects that are removed when the store is opened.
CREATE TABLE garbage (digest TEXT PRIMARY KEY);
"""

FileSum = Callable[[str], str | None]
"""Given a digest, returns the sha256 of its compiled program; None if the file is missing."""


def create(connection: sqlite3.Connection) -> None:
    """Creates all tables and a new identity, in one transaction."""
    connection.executescript(
        f"BEGIN; {SCHEMA_1} {SCHEMA_2} {_identity()} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
    )


def migrate_from_1(connection: sqlite3.Connection, sum_of: FileSum) -> None:
    """Migrates schema 1 to 2 in one transaction; the checksums are those of the present program files."""
    digests = [row[0] for row in connection.execute("SELECT DISTINCT digest FROM versions")]
    sums = [(digest, sum_of(digest)) for digest in digests]
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statement in (SCHEMA_2 + _identity()).split(";"):
            connection.execute(statement)
        for digest, found in sums:
            damage = "" if found else "its file is missing"
            connection.execute("INSERT INTO programs VALUES (?, ?, '', ?)", (digest, found or "", damage))
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def missing(connection: sqlite3.Connection) -> list[str]:
    """Returns the tables and columns that a database of the present version lacks, as ``table`` or ``table.column``."""
    with sqlite3.connect(":memory:") as model:
        model.executescript(SCHEMA_1 + SCHEMA_2)
        expected = _columns(model)
    model.close()
    found = _columns(connection)
    tables = {table for table, _ in found}
    return sorted({table if table not in tables else f"{table}.{column}" for table, column in expected - found})


def unexpected(connection: sqlite3.Connection) -> list[str]:
    """Returns the triggers and views of a database, which would change the effect of statements."""
    sql = "SELECT type || ' ' || name FROM sqlite_master WHERE type IN ('trigger', 'view') ORDER BY name"
    return [str(row[0])[:80] for row in connection.execute(sql)]


def _columns(connection: sqlite3.Connection) -> set[tuple[str, str]]:
    sql = "SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c WHERE m.type = 'table'"
    return set(map(tuple, connection.execute(sql)))


def _identity() -> str:
    return f"INSERT INTO identity VALUES ('{secrets.token_hex(16)}', 0, '');"
